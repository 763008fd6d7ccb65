"""The state of a refinement between two iterations, and what is kept of a batch's posterior."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cryoiso.refine.junk import JunkPrior
from cryoiso.refine.schedule import State
from cryoiso.refine.search import Posterior

BEST = ("",) * 11 + ("rlnLogLikeliContribution", "cryoisoPoseEntropy", "rlnMaxValueProbDistribution")
"""Columns of ``best_of``: rotation (9) and shift (2), which have no name, then those of the STAR file."""


@dataclass
class Model:
    """Everything an iteration starts from; a checkpoint is exactly this."""

    state: State
    references: dict[int, np.ndarray]
    """Half -> (D, D, D) float32 reference."""
    sigma2: np.ndarray
    """(G, S) noise variance by optics group and shell."""
    rotation: np.ndarray
    """(N, 3, 3)."""
    shift_A: np.ndarray
    """(N, 2) RELION origins."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Per-particle results by STAR name."""
    half_maps: dict[int, np.ndarray] = field(default_factory=dict)
    """Half -> unregularised map of the last iteration."""
    views: dict[int, np.ndarray] = field(default_factory=dict)
    """Half -> (P,) weight of every cell of views in the last iteration's posteriors; empty before the first."""
    junk: JunkPrior | None = None
    """What was learned of images without a particle; None: nothing yet, or they are not looked for."""
    history: list[dict[str, Any]] = field(default_factory=list)


def best_of(posterior: Posterior) -> np.ndarray:
    """(B, 14) float64, columns as BEST: all that is kept of a batch's posterior, which itself is ten times larger."""
    p = posterior
    parts = (p.best_rotation.flatten(1), p.best_shift_px, p.log_evidence, p.entropy, p.max_weight)
    return np.column_stack([part.cpu().numpy().astype(np.float64) for part in parts])
