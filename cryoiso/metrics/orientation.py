"""Distribution of the views of a particle set over the sphere: counts on cells of equal area, and summary numbers.

A view is the third row of a pose, the direction in the map along which the image was projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.shapes import require_rotations
from cryoiso.metrics.pose_error import symmetry_operations

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real


@dataclass(frozen=True)
class ViewGrid:
    """The sphere divided into rings of constant z and the rings into equal cells, so that every cell has the same
    area."""

    cells: Int[np.ndarray, " rings"]
    """(rings,) int: cells of each ring, from z = 1 down."""

    @classmethod
    def with_step(cls, step_deg: float) -> ViewGrid:
        """Cells about ``step_deg`` wide and high."""
        rings = max(2, round(180 / step_deg))
        middle = (np.arange(rings) + 0.5) * np.pi / rings
        return cls(np.maximum(3, np.rint(2 * rings * np.sin(middle))).astype(int))

    def __len__(self) -> int:
        return int(self.cells.sum())

    @property
    def z_edges(self) -> Float[np.ndarray, " edges"]:
        """(rings + 1,) z of the rings' borders, from 1 to -1."""
        return 1 - 2 * np.concatenate([[0], np.cumsum(self.cells)]) / len(self)

    def index(self, directions: Float[np.ndarray, "n 3"]) -> Int[np.ndarray, " n"]:
        """(n,) cell of each unit vector (n, 3)."""
        first = np.concatenate([[0], np.cumsum(self.cells)])
        ring = np.searchsorted(-self.z_edges, -directions[:, 2], side="right") - 1
        ring = np.clip(ring, 0, len(self.cells) - 1)
        turn = np.mod(np.arctan2(directions[:, 1], directions[:, 0]) / (2 * np.pi), 1.0)
        cell: np.ndarray = first[ring] + np.minimum((turn * self.cells[ring]).astype(int), self.cells[ring] - 1)
        return cell

    def centres(self) -> Float[np.ndarray, "cells 3"]:
        """(cells, 3) unit vectors at the mean azimuth and z of every cell."""
        border = self.borders()
        z, azimuth = border[:, 2:].mean(1), np.radians(border[:, :2].mean(1))
        r = np.sqrt(1 - z**2)
        return np.stack([r * np.cos(azimuth), r * np.sin(azimuth), z], 1)

    def borders(self) -> Float[np.ndarray, "cells 4"]:
        """(cells, 4): azimuth from and to (degrees, 0..360), z from and to of every cell."""
        edges, rows = self.z_edges, []
        for ring, n in enumerate(self.cells):
            azimuth = 360 * np.arange(n + 1) / n
            z = np.full((n, 2), (edges[ring + 1], edges[ring]))
            rows.append(np.column_stack([azimuth[:-1], azimuth[1:], z]))
        return np.concatenate(rows)


@dataclass(frozen=True)
class ViewDistribution:
    """Counts of n views, each spread evenly over its symmetry mates."""

    grid: ViewGrid
    counts: Real[np.ndarray, " cells"]
    """(cells,) float64, sum n."""
    views: int
    group_order: int
    top_fraction: float
    """Fraction of views within the cone about the axis or its opposite."""

    @property
    def entropy(self) -> float:
        """Entropy of the view distribution over that of the uniform one: 1 even, 0 all in one cell (and its mates).

        Miller-Madow correction for small numbers of views: (occupied - 1) / 2n is added. Symmetry-equivalent cells
        count once.
        """
        independent = len(self.grid) / self.group_order
        p = self.counts[self.counts > 0] / self.counts.sum()
        occupied = len(p) / self.group_order
        value = -(p * np.log(p)).sum() - np.log(self.group_order) + max(occupied - 1, 0) / (2 * self.views)
        return float(np.clip(value / np.log(independent), 0, 1))

    def summary(self) -> dict[str, Any]:
        """Numbers for a report. ``peak_over_mean``: fullest cell; ``empty_fraction``: cells without a view."""
        return {
            "n": self.views,
            "entropy": self.entropy,
            "top_fraction": self.top_fraction,
            "peak_over_mean": float(self.counts.max() / self.counts.mean()),
            "empty_fraction": float(np.mean(self.counts == 0)),
        }


def view_distribution(
    rotation: Float[np.ndarray, "n 3 3"],
    symmetry: str | Float[np.ndarray, "g 3 3"] = "C1",
    *,
    step_deg: float | None = None,
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0),
    cone_deg: float = 36.0,
) -> ViewDistribution:
    """Distribution of the views of poses, expanded by the point group.

    Args:
        rotation: (n, 3, 3). symmetry: point group name or (g, 3, 3) operations.
        step_deg: width of a cell; default: an even spread would put ten views into a cell; within 5 to 30 degrees.
        axis, cone_deg: what counts as a top view.

    Raises:
        InputError: no poses, or no rotation matrices.
    """
    rotation = np.asarray(rotation, np.float64)
    if require_rotations(rotation) == 0:
        raise InputError(
            "no poses to take views from",
            expected="(n, 3, 3) with n > 0",
            found=rotation.shape,
            code="particles-too-few",
        )
    ops = symmetry_operations(symmetry)
    if step_deg is None:
        wanted = len(rotation) * len(ops) / 10
        step_deg = float(np.clip(np.degrees(np.sqrt(4 * np.pi / wanted)), 5, 30))
    grid = ViewGrid.with_step(step_deg)
    counts = np.zeros(len(grid))
    for operation in ops:
        counts += np.bincount(grid.index(rotation[:, 2] @ operation), minlength=len(grid))
    unit = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    top = np.abs(rotation[:, 2] @ unit) > np.cos(np.radians(cone_deg))
    return ViewDistribution(grid, counts / len(ops), len(rotation), len(ops), float(top.mean()))
