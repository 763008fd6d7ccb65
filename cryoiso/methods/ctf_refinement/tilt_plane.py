"""Planes of defocus over micrographs: the tilt of the specimen, from refined defoci."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

LEAST_PARTICLES = 10
STEPS = 6


@dataclass(frozen=True)
class TiltPlane:
    """Defocus = at the centre of mass + slope . (position - centre of mass)."""

    slope: tuple[float, float]
    """Along x and y, Å per Å."""
    slope_error: tuple[float, float]
    particles: int

    @property
    def tilt_deg(self) -> float:
        return math.degrees(math.atan(math.hypot(*self.slope)))

    @property
    def axis_deg(self) -> float:
        """Direction of the tilt axis, from x to y, 0 to 180 degrees: perpendicular to the slope."""
        return (math.degrees(math.atan2(self.slope[1], self.slope[0])) + 90.0) % 180.0

    def facts(self) -> dict[str, Any]:
        error = math.degrees(math.hypot(*self.slope_error) / math.sqrt(2)) / (1 + math.hypot(*self.slope) ** 2)
        return {"tilt_deg": self.tilt_deg, "tilt_error_deg": error, "axis_deg": self.axis_deg}


def unshrunken(
    change_A: Float[np.ndarray, " n"], fisher: Float[np.ndarray, " n"], width_A: float
) -> Float[np.ndarray, " n"]:
    """Changes of largest likelihood from those of largest posterior probability, which the prior pulls towards 0 by F /
    (F + 1 / s^2); a plane through the latter would be too flat. Where F is 0 the change is 0."""
    if width_A <= 0:
        return np.zeros(len(change_A))
    share = fisher / (fisher + 1.0 / width_A**2)
    free: np.ndarray = np.where(share > 1e-6, change_A / np.maximum(share, 1e-6), 0.0)
    return free


def fit_plane(
    position_A: Float[np.ndarray, "n 2"], defocus_A: Float[np.ndarray, " n"], fisher: Float[np.ndarray, " n"]
) -> TiltPlane | None:
    """Weighted least squares; None with fewer than LEAST_PARTICLES or particles on a line.

    Defoci have errors of variance 1 / fisher, and a scatter about the plane that is estimated with it.

    Args:
        position_A: on the micrograph.
        defocus_A: of largest likelihood.
        fisher: information of each defocus, 1/Å^2; 0: not used.
    """
    used = fisher > 0
    if used.sum() < LEAST_PARTICLES:
        return None
    position, defocus, variance = position_A[used], defocus_A[used], 1.0 / fisher[used]
    design = np.column_stack([np.ones(len(position)), position - position.mean(0)])
    spread = np.linalg.eigvalsh(np.cov(design[:, 1:].T))
    if spread[0] <= 1e-6 * spread[1]:
        return None
    scatter = float(np.var(defocus))
    for _ in range(STEPS):
        weight = 1.0 / (variance + scatter)
        covariance = np.linalg.inv((design * weight[:, None]).T @ design)
        solution = covariance @ (design * weight[:, None]).T @ defocus
        square = (defocus - design @ solution) ** 2 - variance
        scatter = max(0.0, float((weight * square).sum() / weight.sum()))
    error = np.sqrt(np.diag(covariance))
    return TiltPlane((float(solution[1]), float(solution[2])), (float(error[1]), float(error[2])), int(used.sum()))
