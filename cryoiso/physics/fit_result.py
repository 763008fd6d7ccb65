"""Result of a rigid fit: placements, their scores and errors, and a verdict in words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group

if TYPE_CHECKING:
    from jaxtyping import Float

Hand = Literal["same", "mirrored", "undecided", "not tried"]
FREER = 0.05
"""A free search that scores higher by this than a placement on the axes casts doubt on the axes."""


@dataclass(frozen=True)
class Placement:
    """One placement of the moving map in the target."""

    rotation: Float[np.ndarray, "3 3"]
    """(3, 3) R"""
    shift_A: Float[np.ndarray, " 3"]
    """(3,) d"""
    score: float
    """normalised cross-correlation of both maps with flattened spectra, up to the resolution of the fit"""
    mirrored: bool = False

    def points(self, xyz_A: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Points (n, 3) of the moving map in the target's frame."""
        xyz = np.asarray(xyz_A, np.float64)
        placed_A: np.ndarray = (-xyz if self.mirrored else xyz) @ self.rotation.T + self.shift_A
        return placed_A

    def poses(
        self, rotation: Float[np.ndarray, "n 3 3"], shift_A: Float[np.ndarray, "n 2"]
    ) -> tuple[Float[np.ndarray, "n 3 3"], Float[np.ndarray, "n 2"]]:
        """Poses in the target's frame, of images whose poses are in the moving map's: the same projections.

        A point p' = R p + d of the target is A p in the image, so A' = A R^T, and the origin moves by (A' d) in x and
        y. Not for a mirror image.

        Args:
            rotation: (n, 3, 3) A; shift_A: (n, 2) RELION's origins.
        """
        turned = np.asarray(rotation, np.float64) @ self.rotation.T
        return turned, np.asarray(shift_A, np.float64) + (turned @ self.shift_A)[:, :2]

    def after(self, first: Placement) -> Placement:
        """The placement that applies ``first`` (not mirrored) and then this one."""
        sign = -1 if self.mirrored else 1
        shift = self.shift_A + sign * self.rotation @ first.shift_A
        return replace(self, rotation=self.rotation @ first.rotation, shift_A=shift)


@dataclass(frozen=True)
class Fit:
    """The best placement, its rivals, and the comparison between them."""

    best: Placement
    mirror: Placement | None
    """the best one of the mirror image"""
    runner_up: Placement | None
    """the best one that differs from ``best`` by more than the symmetry"""
    optima: tuple[Placement, ...]
    """the best few of this hand, ``best`` first"""
    free: Placement | None
    """result of a search without regard to the symmetry axes; None if none was made"""
    hand: Hand
    ambiguous: bool
    """``runner_up`` fits as well"""
    on_axes: bool
    """the placement keeps the symmetry axes of the moving map on those of the target"""
    symmetry: str
    resolution_A: float
    error_mirror: float
    """standard error of score - score_mirror; NaN where there is none"""
    error_runner_up: float

    @property
    def rotation(self) -> Float[np.ndarray, "3 3"]:
        return self.best.rotation

    @property
    def shift_A(self) -> Float[np.ndarray, " 3"]:
        return self.best.shift_A

    @property
    def score(self) -> float:
        return self.best.score

    @property
    def score_mirror(self) -> float:
        return self.mirror.score if self.mirror else float("nan")

    @property
    def off_axis(self) -> bool:
        """Whether the free search found a clearly better placement off the symmetry axes."""
        return self.on_axes and self.free is not None and self.free.score > self.score + FREER

    @property
    def verdict(self) -> str:
        """The result in one to four sentences."""
        return " ".join(filter(None, (self._where(), self._hand(), self._rivals(), self._axes())))

    def _where(self) -> str:
        from scipy.spatial.transform import Rotation

        angle = np.degrees(Rotation.from_matrix(self.rotation).magnitude())
        d = float(np.linalg.norm(self.shift_A))
        return f"Turned by {angle:.1f}° and shifted by {d:.1f} Å it correlates to {self.score:.3f} " \
               f"at {self.resolution_A:g} Å."  # fmt: skip

    def _hand(self) -> str:
        if self.mirror is None:
            return ""
        numbers = f"{self.score_mirror:.3f} mirrored, difference {self.score - self.score_mirror:.3f} " \
                  f"± {self.error_mirror:.3f}"  # fmt: skip
        words = {
            "same": "Both have the same hand, clearly",
            "mirrored": "The mirror image fits better, clearly: one of the two has the wrong hand",
            "undecided": f"The hand is undecided at {self.resolution_A:g} Å",
        }
        return f"{words[self.hand]} ({numbers})."

    def _rivals(self) -> str:
        if self.runner_up is None:
            return "No other place comes near."
        other = self.runner_up
        ops = point_group(self.symmetry)
        angle = float(angular_distance_deg(self.rotation.T, other.rotation.T, ops)[0])
        what = f"another place, {angle:.0f}° away, has {other.score:.3f}"
        gap = self.score - other.score
        if self.ambiguous:
            return f"Not unique: {what} (difference {gap:.3f} ± {self.error_runner_up:.3f})."
        return f"The next best: {what}."

    def _axes(self) -> str:
        if self.symmetry == "C1":
            return ""
        if not self.on_axes:
            return f"The fitted map does not have the symmetry {self.symmetry}, so it was placed freely."
        if self.off_axis and self.free is not None:
            angle = float(angular_distance_deg(self.rotation.T, self.free.rotation.T, point_group(self.symmetry))[0])
            return f"A free search finds a better place, {self.free.score:.3f}, {angle:.1f}° away: " \
                   f"the target's axes may lie elsewhere."  # fmt: skip
        return f"Its {self.symmetry} axes were kept on those of the target."

    def facts(self) -> dict[str, Any]:
        """The numbers for a file: plain floats and lists."""
        return {
            "rotation": self.rotation.tolist(), "shift_A": self.shift_A.tolist(), "score": self.score,
            "score_mirror": self.score_mirror if self.mirror else None, "hand": self.hand,
            "error_mirror": self.error_mirror if self.mirror else None,
            "runner_up": self.runner_up.score if self.runner_up else None, "ambiguous": self.ambiguous,
            "on_axes": self.on_axes, "resolution_A": self.resolution_A, "verdict": self.verdict,
        }  # fmt: skip
