"""Sampling of Fourier space by the views of a particle set, from poses alone.

A view along v measures the plane of coefficients perpendicular to v. These numbers describe what the images would give
if their poses were right; they cannot detect wrong poses, and top views misassigned to the side improve them
(docs/diagnose.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.metrics.pose_error import symmetry_operations

if TYPE_CHECKING:
    from jaxtyping import Float, Real

MOST_VIEWS = 10_000
"""Largest number of views used; from a larger set this many are drawn at random. SCF* depends on their number."""


def fibonacci_half_sphere(n: int, offset: float = 0.5) -> Float[np.ndarray, "{n} 3"]:
    """(n, 3) unit vectors (x, y, z) of a Fibonacci spiral with z >= 0, spread evenly: z = (i + offset) / n."""
    i = np.arange(n)
    z = (i + offset) / n
    azimuth = 2 * np.pi * i * (np.sqrt(5.0) - 1) / 2
    across = np.sqrt(1 - z**2)
    return np.stack([across * np.cos(azimuth), across * np.sin(azimuth), z], 1)


@dataclass(frozen=True)
class Sampling:
    """Sampling of a shell of Fourier space by n views and their symmetry mates (Baldwin & Lyumkis 2020)."""

    points: Float[np.ndarray, "points 3"]
    """(p, 3) directions of the half sphere."""
    counts: Real[np.ndarray, " points"]
    """(p,) views (with their mates) whose plane contains each direction."""
    views: int

    @property
    def empty_fraction(self) -> float:
        """Fraction of the directions that no view measures."""
        return float(np.mean(self.counts == 0))

    @property
    def scf(self) -> float:
        """Sampling compensation factor 1 / (<1/S> <S>): <1/S> over what is covered, <S> over all; 1 if even."""
        covered = self.counts[self.counts > 0]
        return float(1 / (np.mean(1 / covered) * self.counts.mean())) if len(covered) else 0.0

    @property
    def scf_star(self) -> float:
        """SCF / (1 + (Q/P) <S> SCF / 2), Q/P = empty over covered: with a gap it falls as the number of views grows."""
        empty = self.empty_fraction
        if empty == 1:
            return 0.0
        return float(self.scf / (1 + empty / (1 - empty) * self.counts.mean() * self.scf / 2))


def fourier_sampling(
    rotation: Float[np.ndarray, "n 3 3"],
    symmetry: str | Float[np.ndarray, "g 3 3"] = "C1",
    *,
    radius_px: int = 50,
    most_points: int = 5000,
    seed: int = 0,
) -> Sampling:
    """Count, on a shell of radius R, the views that measure each direction: |direction . view| < 0.5 / R.

    Args:
        rotation: (n, 3, 3) poses. symmetry: point group name or (g, 3, 3) operations.
        radius_px: R, in Fourier pixels; the number of points is that of half a shell, at most ``most_points``.
        seed: of the draw of `MOST_VIEWS` views from a larger set.

    Raises:
        InputError: no poses.
    """
    from cryoiso.metrics._directional_kernels import count_near_planes, in_threads

    views, mates = symmetric_views(rotation, symmetry, seed)
    points = fibonacci_half_sphere(min(int(2 * np.pi * radius_px**2), most_points), 0.0)
    counts = np.empty(len(points), np.int64)
    in_threads(count_near_planes, len(points), points, mates, 0.5 / radius_px, counts)
    return Sampling(points, counts, len(views))


def even_rotations(n: int, seed: int = 0) -> Float[np.ndarray, "{n} 3 3"]:
    """(n, 3, 3) poses with random, evenly distributed views: the best that ``n`` views can be, counting noise
    included."""
    from cryoiso.physics.so3 import rotation_with_view

    draw = generator(seed, "even views").standard_normal((n, 3))
    return rotation_with_view(draw / np.linalg.norm(draw, axis=1)[:, None])


def view_efficiency(
    rotation: Float[np.ndarray, "n 3 3"], symmetry: str | Float[np.ndarray, "g 3 3"] = "C1", *, seed: int = 0
) -> float:
    """Evenness of the resolution that the views allow: 1 - 2 sd(R) / mean(R), at most 1 (even) and at least -1.

    R is the half width, by direction, of the point spread function of an unweighted back-projection: a view v spreads a
    Gaussian spot into a rod along v, so PSF(r u) is the mean over the views of exp(-r^2 (1 - (u.v)^2) / 2) in units of
    the spot's width, and R(u) is where it falls to one half. The form of the number follows cryoEF (Naydenova & Russo
    2017, doi 10.1038/s41467-017-00782-3); its values may differ.
    """
    _, mates = symmetric_views(rotation, symmetry, seed)
    if len(mates) > MOST_VIEWS:
        mates = mates[generator(seed, "views for the efficiency").permutation(len(mates))[:MOST_VIEWS]]
    axes = fibonacci_half_sphere(400)
    bins = 1000
    spread = np.stack([np.bincount(row, minlength=bins) for row in _sine_bins(axes, mates, bins)]) / len(mates)
    squares = (np.arange(bins) + 0.5) / bins
    low, high = np.zeros(len(axes)), np.full(len(axes), 10 * np.sqrt(2 * np.log(2)))
    for _ in range(30):
        middle = (low + high) / 2
        wide = (spread * np.exp(-0.5 * middle[:, None] ** 2 * squares)).sum(1) > 0.5
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    return float(max(1 - 2 * low.std() / low.mean(), -1.0))


def _sine_bins(axes: np.ndarray, views: np.ndarray, bins: int) -> np.ndarray:
    """(axes, views) bin of the squared sine of the angle between each axis and view."""
    squares = 1 - (axes @ views.T) ** 2
    bin_index: np.ndarray = np.clip((squares * bins).astype(np.intp), 0, bins - 1)
    return bin_index


def symmetric_views(
    rotation: Float[np.ndarray, "n 3 3"], symmetry: str | Float[np.ndarray, "g 3 3"], seed: int
) -> tuple[Float[np.ndarray, "m 3"], Float[np.ndarray, "mates 3"]]:
    """At most `MOST_VIEWS` views (n, 3) of the poses, and with their symmetry mates (n g, 3)."""
    rotation = np.asarray(rotation, np.float64)
    if rotation.ndim != 3 or rotation.shape[1:] != (3, 3) or len(rotation) == 0:
        raise InputError("no poses given", expected="(n, 3, 3) with n > 0", found=rotation.shape, code="poses-missing")
    views = rotation[:, 2]
    if len(views) > MOST_VIEWS:
        views = views[np.sort(generator(seed, "views for the sampling").permutation(len(views))[:MOST_VIEWS])]
    mates = np.concatenate([views @ operation for operation in symmetry_operations(symmetry)])
    return views, mates
