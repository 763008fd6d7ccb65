"""The surface of a map as triangles with a value at each corner, small enough for a page: naive surface nets.

Gibson 1998 (Constrained elastic surface nets): every cube of eight voxels that the surface passes through has one
vertex, the mean of where the surface cuts its edges; the four cubes around an edge that is cut are joined by two
triangles. The mesh is closed, has no cracks, and half the triangles of marching cubes.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MOST_VOXELS = 72
"""Edge of the grid on which the surface is found."""


@dataclass(frozen=True)
class Mesh:
    """Triangles in space."""

    vertices: Float[np.ndarray, "n 3"]
    """(x, y, z) in voxels of the grid"""
    triangles: Int[np.ndarray, "m 3"]
    """counter-clockwise seen from outside (from the lower density)"""


def surface_mesh(density: Float[np.ndarray, "z y x"], level: float) -> Mesh:
    """The surface at a level; what reaches the border of the grid is closed there.

    Args:
        density: array (z, y, x).
    """
    grid = np.pad(np.asarray(density, np.float64), 1, constant_values=min(float(np.min(density)), level - 1e-9))
    inside = grid > level
    cut = {axis: np.argwhere(np.diff(inside, axis=axis)) for axis in range(3)}
    shape = tuple(n - 1 for n in grid.shape)
    total, count = np.zeros((*shape, 3)), np.zeros(shape)
    for axis, edges in cut.items():
        start = grid[tuple(edges.T)]
        end_index = edges.copy()
        end_index[:, axis] += 1
        part = (level - start) / (grid[tuple(end_index.T)] - start)
        points = edges.astype(np.float64)
        points[:, axis] += part
        for cell in _cells_around(edges, axis):
            ok = ((cell >= 0) & (cell < shape)).all(1)
            np.add.at(total, tuple(cell[ok].T), points[ok])
            np.add.at(count, tuple(cell[ok].T), 1)
    used = count > 0
    number = np.full(shape, -1)
    number[used] = np.arange(used.sum())
    vertices = total[used] / count[used][:, None]
    triangles = [_quads(number, edges, axis, inside) for axis, edges in cut.items()]
    return Mesh(vertices[:, ::-1] - 1, np.concatenate(triangles) if triangles else np.zeros((0, 3), int))


def _cells_around(edges: np.ndarray, axis: int) -> list[np.ndarray]:
    """The four cubes that share each edge, in order around it."""
    first, second = [a for a in range(3) if a != axis]
    cells = []
    for dy, dx in ((-1, -1), (0, -1), (0, 0), (-1, 0)):
        cell = edges.copy()
        cell[:, first] += dy
        cell[:, second] += dx
        cells.append(cell)
    return cells


def _quads(number: np.ndarray, edges: np.ndarray, axis: int, inside: np.ndarray) -> np.ndarray:
    a, b, c, d = (number[tuple(np.clip(cell, 0, np.array(number.shape) - 1).T)] for cell in _cells_around(edges, axis))
    outward = inside[tuple(edges.T)]  # the inside lies at the start of the edge
    # indices run over (z, y, x): around y the other two follow each other the other way round
    turned = outward ^ (axis == 1)
    b, d = np.where(turned, d, b), np.where(turned, b, d)
    return np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])


def packed(mesh: Mesh, values: Float[np.ndarray, " n"] | None) -> dict[str, Any]:
    """A mesh for `assets/report.js`: little-endian arrays in base64.

    Args:
        values: in [0, 1], one a vertex; NaN: not known.

    Returns:
        ``vertices`` (uint16 x, y, z; 65535 is the largest extent), ``scale`` (voxels that are), ``triangles`` (uint32),
        ``values`` (uint8; 255: not known), and their numbers ``n`` and ``m``.
    """
    low = mesh.vertices.min(0) if len(mesh.vertices) else np.zeros(3)
    extent = float((mesh.vertices - low).max(initial=1e-9))
    places = np.round((mesh.vertices - low) / extent * 65535).astype("<u2")
    shown = np.full(len(mesh.vertices), np.nan) if values is None else np.asarray(values, float)
    bytes_ = np.where(np.isfinite(shown), np.round(254 * np.clip(np.nan_to_num(shown), 0, 1)), 255).astype("u1")
    return {
        "n": len(mesh.vertices), "m": len(mesh.triangles), "scale": extent, "vertices": _text(places),
        "triangles": _text(mesh.triangles.astype("<u4")), "values": _text(bytes_),
    }  # fmt: skip


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
