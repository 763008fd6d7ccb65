"""The state of a refinement between two iterations, and the summary of a batch's posterior."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.records import IterationRecord
from cryoiso.refine.intensity import Intensity
from cryoiso.refine.junk import JunkPrior
from cryoiso.refine.schedule import ScheduleState
from cryoiso.refine.search import Posterior

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped

BEST = ("",) * 11 + (
    "rlnLogLikeliContribution", "cryoisoPoseEntropy", "rlnMaxValueProbDistribution", "cryoisoPoseSpread",
)  # fmt: skip
"""Columns of ``best_of``: rotation (9) and shift (2), which are unnamed, then those of the STAR file."""


@dataclass
class Model:
    """Complete state at the start of an iteration, and the content of a checkpoint."""

    state: ScheduleState
    references: dict[int, Float[np.ndarray, "box box box"]]
    """Half -> (D, D, D) float32 reference."""
    sigma2: Float[np.ndarray, "groups shells"]
    """(G, S) noise variance by optics group and shell."""
    intensity: Intensity
    """Scale and noise level of every image."""
    rotation: Float[np.ndarray, "n 3 3"]
    """(N, 3, 3)."""
    shift_A: Float[np.ndarray, "n 2"]
    """(N, 2) RELION origins."""
    columns: dict[str, Shaped[np.ndarray, " n"]] = field(default_factory=dict)
    """Per-particle results by STAR name."""
    half_maps: dict[int, Float[np.ndarray, "box box box"]] = field(default_factory=dict)
    """Half -> unregularised map of the last iteration."""
    views: dict[int, Float[np.ndarray, " cells"]] = field(default_factory=dict)
    """Half -> (P,) weight of every cell of views in the last iteration's posteriors; empty before the first."""
    total_weight: dict[int, Float[np.ndarray, "z y x"]] = field(default_factory=dict)
    """Half -> what the images' own shares in the references follow from (``reference_shares``); empty where intensities
    are not estimated, and before the first iteration."""
    junk: JunkPrior | None = None
    """State of the search for images without a particle; None: not searched for, or before the first iteration."""
    history: list[IterationRecord] = field(default_factory=list)

    def keep_poses(self, before: Model, rows: Bool[np.ndarray, " n"]) -> None:
        """Give these rows (N,) the poses and results that they had before, in place."""
        self.rotation[rows], self.shift_A[rows] = before.rotation[rows], before.shift_A[rows]
        for name, values in self.columns.items():
            if name in before.columns:
                values[rows] = before.columns[name][rows]


def best_of(posterior: Posterior) -> Float[np.ndarray, "n 15"]:
    """(B, 15) float64, columns as BEST: all that is kept of a batch's posterior, which itself is ten times larger."""
    p = posterior
    parts = (p.best_rotation.flatten(1), p.best_shift_px, p.log_evidence, p.entropy, p.max_weight, p.spread_deg)
    return np.column_stack([part.cpu().numpy().astype(np.float64) for part in parts])
