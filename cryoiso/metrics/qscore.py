"""Q-scores: how much the density around each atom of a model looks like a resolved atom.

Pintilie et al. 2020, doi 10.1038/s41592-020-0731-1. Around each atom the map is sampled on spheres of radius 0 to 2 Å,
at points that are nearer to this atom than to any other; Q is the correlation, about the mean, of these densities with
a Gaussian of the radius. It is 1 for a Gaussian peak of the reference width, near 0 in noise, and negative in a hole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Real

SIGMA_A = 0.6
"""Width of the reference Gaussian of the paper; programs that use 0.4 give other values."""
REACH_A, STEP_A = 2.0, 0.1
POINTS = 8
"""On each sphere; the centre counts as often."""
CLEAR = 0.9
"""A point belongs to its atom if no other atom is nearer than this times the radius of the sphere."""
ATTEMPTS = (8, 16, 32, 64, 128)
"""Even points from which those that are clear are taken, until there are ``POINTS`` of them."""
_AT_ONCE = 20_000
"""Atoms whose points are held in memory together."""


def q_scores(
    density: Real[np.ndarray, "z y x"],
    positions_A: Float[np.ndarray, "n 3"],
    voxel_A: tuple[float, float, float],
    origin_A: tuple[float, float, float] = (0.0, 0.0, 0.0),
    sigma_A: float = SIGMA_A,
) -> Float[np.ndarray, " n"]:
    """Q-score of every atom.

    Args:
        density: map of any shape, array (z, y, x).
        positions_A: (n, 3) all atoms (x, y, z), no hydrogens: each is also what the points of others must be clear of.
        voxel_A, origin_A: (x, y, z) of the grid; the first voxel lies at the origin.
        sigma_A: of the reference Gaussian.

    Returns:
        (n,) float64; NaN for an atom that is outside the map or has a constant density around it. A sphere on which not
        even one point in 16 is clear of other atoms is left out, as in the authors' program.
    """
    from scipy.spatial import cKDTree

    positions_A = np.asarray(positions_A, np.float64)
    grid = np.ascontiguousarray(density, np.float32)
    tree = cKDTree(positions_A)
    scale, origin = np.asarray(voxel_A, np.float64), np.asarray(origin_A, np.float64)
    scores = np.full(len(positions_A), np.nan)
    for start in range(0, len(positions_A), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        scores[rows] = _scores(grid, tree, positions_A[rows], scale, origin, sigma_A)
    where = (positions_A - origin) / scale
    outside = (where < 0) | (where > np.array(grid.shape[::-1]) - 1)
    scores[outside.any(1)] = np.nan
    return scores


def _scores(
    grid: np.ndarray, tree: object, centres: np.ndarray, scale: np.ndarray, origin: np.ndarray, sigma_A: float
) -> np.ndarray:
    """Correlation over all samples of each atom; sums are taken sphere by sphere."""
    centre = _sample(grid, (centres - origin) / scale)
    sums = _Sums(len(centres))
    sums.add(centre, np.square(centre), np.ones(len(centres)), POINTS)
    for radius_A in np.arange(STEP_A, REACH_A + STEP_A / 2, STEP_A):
        has_points, mean, mean_square = _sphere(grid, tree, centres, radius_A, scale, origin)
        gaussian = float(np.exp(-0.5 * (radius_A / sigma_A) ** 2))
        sums.add(mean, mean_square, np.full(len(centres), gaussian), np.where(has_points, POINTS, 0))
    return sums.correlation()


class _Sums:
    """Of density u and Gaussian v over the samples of each atom; v is the same at all samples of a sphere."""

    def __init__(self, atoms: int) -> None:
        self.n, self.u, self.v, self.uu, self.vv, self.uv = (np.zeros(atoms) for _ in range(6))

    def add(self, mean: np.ndarray, mean_square: np.ndarray, gaussian: np.ndarray, samples: np.ndarray | int) -> None:
        self.n += samples
        self.u += samples * mean
        self.v += samples * gaussian
        self.uu += samples * mean_square
        self.vv += samples * gaussian**2
        self.uv += samples * mean * gaussian

    def correlation(self) -> np.ndarray:
        across = self.uv - self.u * self.v / self.n
        spread = (self.uu - self.u**2 / self.n) * (self.vv - self.v**2 / self.n)
        flat = self.uu - self.u**2 / self.n <= 1e-12 * self.uu  # rounding errors of a constant density
        return np.where(flat | (spread <= 0), np.nan, across / np.sqrt(np.where(spread > 0, spread, 1)))


def _sphere(
    grid: np.ndarray, tree: object, centres: np.ndarray, radius_A: float, scale: np.ndarray, origin: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether there are enough clear points, and mean and mean square of the density at ``POINTS`` of them."""
    has_points = np.zeros(len(centres), bool)
    mean, mean_square = np.zeros(len(centres)), np.zeros(len(centres))
    for attempt in ATTEMPTS:
        rows = np.flatnonzero(~has_points)
        if not len(rows):
            break
        points = centres[rows, None] + radius_A * _even_directions(attempt)
        nearest, _ = tree.query(points)  # type: ignore[attr-defined]
        clear = nearest >= CLEAR * radius_A  # its own atom is at the radius itself
        enough = clear.sum(1) >= POINTS
        chosen = _spread(clear[enough])
        values = _sample(grid, (np.take_along_axis(points[enough], chosen[..., None], 1) - origin) / scale)
        done = rows[enough]
        has_points[done], mean[done], mean_square[done] = True, values.mean(1), np.square(values).mean(1)
    return has_points, mean, mean_square


def _spread(clear: np.ndarray) -> np.ndarray:
    """(n, POINTS) columns of clear points of each row, as evenly along the row as they come."""
    count = clear.sum(1)
    rank = (np.arange(POINTS) * count[:, None]) // POINTS
    order = np.argsort(~clear, axis=1, kind="stable")
    chosen: np.ndarray = np.take_along_axis(order, rank, 1)
    return chosen


def _even_directions(n: int) -> np.ndarray:
    """(n, 3) unit vectors on a Fibonacci sphere."""
    z = 1 - (2 * np.arange(n) + 1) / n
    turn = np.pi * (3 - np.sqrt(5)) * np.arange(n)
    across = np.sqrt(1 - z**2)
    return np.stack([across * np.cos(turn), across * np.sin(turn), z], -1)


def _sample(grid: np.ndarray, xyz_px: np.ndarray) -> np.ndarray:
    """Trilinear interpolation; beyond the border its nearest voxel."""
    from scipy.ndimage import map_coordinates

    places = np.moveaxis(xyz_px[..., ::-1], -1, 0)
    values: np.ndarray = map_coordinates(grid, places, order=1, mode="nearest", output=np.float64)
    return values
