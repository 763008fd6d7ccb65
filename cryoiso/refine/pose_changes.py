"""How the poses of the particles that steer a refinement changed in an iteration, and how certain they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.physics.so3 import angular_distance_deg

if TYPE_CHECKING:
    from jaxtyping import Float

    from cryoiso.refine.model import Model
    from cryoiso.refine.refinement_setup import RefinementSetup
    from cryoiso.refine.search import SearchPlan


@dataclass(frozen=True)
class PoseChanges:
    """Of the n particles that steer the refinement; the same on every rank."""

    angle_deg: float
    """Median angle between the poses before and after, modulo the symmetry."""
    residual_px: Float[np.ndarray, "n 2"]
    """(n, 2) shifts from the centre of their search."""
    spread_px: float
    """Root mean square of these along one axis."""
    step_deg: float
    """Of the search's last level."""
    uncertainty_deg: float
    """Median angular spread of the posteriors, at least half the step."""

    @classmethod
    def of(
        cls, run: RefinementSetup, model: Model, plan: SearchPlan, rotation: Float[np.ndarray, "n 3 3"],
        shift_px: Float[np.ndarray, "n 2"], columns: dict[str, np.ndarray],
    ) -> PoseChanges:  # fmt: skip
        """
        Args:
            model: before the iteration. plan: of its search.
            rotation: (N, 3, 3) poses after it. shift_px: (N, 2) of the content. columns: results by STAR name.
        """
        moved_deg = angular_distance_deg(model.rotation[run.raw], rotation[run.raw], run.operations)
        residual_px = (shift_px - run.centre_px)[run.raw]
        step_deg = plan.levels[-1].cell_deg / 2
        return cls(
            float(np.median(moved_deg)), residual_px,
            float(np.sqrt(np.mean(np.square(residual_px)) + 1e-12)), step_deg,
            max(float(np.median(columns["cryoisoPoseSpread"][run.raw])), step_deg / 2),
        )  # fmt: skip
