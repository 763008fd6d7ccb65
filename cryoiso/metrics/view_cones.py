"""Cones of views: the sphere of directions modulo a point group, cut into cells of about equal size.

A view belongs to the cone with the nearest axis, where an axis and its symmetry mates are one. Unlike cells of a grid
that is cut off at the border of the asymmetric unit, none of these is a sliver.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.metrics.orientation import ViewGrid
from cryoiso.metrics.sampling import fibonacci_half_sphere
from cryoiso.physics.symmetry import in_asymmetric_unit, point_group

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ROUNDS, POINTS = 12, 60
"""Rounds of Lloyd's algorithm, which makes the cones alike, and directions per cone that it looks at."""


@dataclass(frozen=True)
class ViewCones:
    """Axes of the cones and the point group that their views are taken modulo."""

    axes: np.ndarray
    """(m, 3) unit vectors."""
    symmetry: str

    @classmethod
    def with_step(cls, step_deg: float, symmetry: str = "C1") -> ViewCones:
        """Cones about ``step_deg`` wide.

        Raises:
            InputError: unknown point group, or no width between 1 and 90 degrees.
        """
        if not 1 <= step_deg <= 90:
            raise InputError(
                "impossible width of a cone", expected="1 to 90 degrees", found=step_deg, code="option-out-of-range"
            )
        centres = ViewGrid.with_step(step_deg).centres()
        inside = in_asymmetric_unit(centres, symmetry)
        axes = centres[inside] if inside.any() else centres[:1]  # a unit smaller than a cell is one cone
        upper = fibonacci_half_sphere(POINTS * len(centres) // 2)
        points = np.concatenate([upper, -upper])
        for _ in range(ROUNDS):
            axes = cls(axes, symmetry)._centred(points)
        return cls(axes, symmetry)

    def __len__(self) -> int:
        return len(self.axes)

    @cached_property
    def _tree(self) -> Any:
        from scipy.spatial import cKDTree

        return cKDTree(np.einsum("gij,mj->gmi", point_group(self.symmetry), self.axes).reshape(-1, 3))

    def index(self, directions: np.ndarray) -> np.ndarray:
        """(n,) cone of each unit vector (n, 3), the same for all of its symmetry mates."""
        nearest: np.ndarray = self._tree.query(directions)[1]
        return nearest % len(self.axes)

    def places(self) -> list[dict[str, float]]:
        """Direction of each axis as rot and tilt in degrees."""
        tilt = np.degrees(np.arccos(np.clip(self.axes[:, 2], -1, 1)))
        rot = np.degrees(np.arctan2(self.axes[:, 1], self.axes[:, 0]))
        return [{"rot_deg": round(r, 1), "tilt_deg": round(t, 1)} for r, t in zip(rot.tolist(), tilt.tolist())]

    def _centred(self, points: np.ndarray) -> np.ndarray:
        """The axes moved to the middle of those of ``points`` (evenly spread) that are nearest to them."""
        mate, axis = np.divmod(self._tree.query(points)[1], len(self.axes))
        at_axis = np.einsum("nij,ni->nj", point_group(self.symmetry)[mate], points)
        total = np.zeros_like(self.axes)
        np.add.at(total, axis, at_axis)
        length = np.linalg.norm(total, axis=1, keepdims=True)
        return np.where(length > 0, total / np.maximum(length, 1e-30), self.axes)


def cone_facts(
    cones: ViewCones, cone: Int[np.ndarray, " n"], names: list[str], weight: Float[np.ndarray, "n columns"]
) -> list[dict[str, Any]]:
    """Direction, number of particles and sums of weights of every cone that has particles.

    Args:
        cone: (n,) of each particle.
        names: of the columns of ``weight``.
        weight: (n, M) of each particle in each column.
    """
    counts = np.bincount(cone, minlength=len(cones))
    sums = np.stack([np.bincount(cone, column, minlength=len(cones)) for column in weight.T], 1)
    return [
        {**place, "particles": int(count), **{name: round(float(v), 3) for name, v in zip(names, row)}}
        for place, count, row in zip(cones.places(), counts, sums)
        if count
    ]


def ranks(group: np.ndarray, quality: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """(n,) place of each element in its group, from 0, the highest quality first.

    Args:
        group: (n,) integers.
        quality: (n,).
        ties: (n,) keys; of equal quality, the smaller one is first.
    """
    order = np.lexsort((ties, -np.asarray(quality, np.float64), group))
    first = np.ones(len(order), bool)
    first[1:] = group[order][1:] != group[order][:-1]
    start = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - start
    return place
