"""The object's outline, and what is made of it: a part missing, a featureless blob of the same mass."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.physics.filters import lowpass
from cryoiso.physics.masks import soft_mask_from_map, sphere_mask

HALO_A = 8.0
"""Density this far around the outline belongs to the object: its own blur."""
CUT_SOFT_A = 3.0
"""Distance over which a cut through a density falls from 1 to 1/e^2 and less."""


def inside(volume: DensityMap, extend_A: float = 0.0) -> np.ndarray:
    """(D, D, D) bool: where the object is, or what is at most ``extend_A`` from it."""
    mask = np.asarray(soft_mask_from_map(volume.data, volume.pixel_size_A, extend_A=extend_A, soft_A=0.0))
    return np.asarray(mask > 0.5)


def coordinates_A(where: np.ndarray, pixel_size_A: float) -> np.ndarray:
    """(m, 3) x, y, z in Å from the centre of the voxels that are True."""
    return np.asarray((np.argwhere(where)[:, ::-1] - where.shape[0] // 2) * float(pixel_size_A))


@dataclass(frozen=True)
class Outline:
    """The convex hull of an object."""

    corners_A: np.ndarray
    """(m, 3) x, y, z from the map's centre."""

    @classmethod
    def of(cls, volume: DensityMap) -> Outline:
        from scipy.spatial import ConvexHull, QhullError

        points = coordinates_A(inside(volume), volume.pixel_size_A)
        with contextlib.suppress(QhullError):  # fewer than four voxels, or all in a plane
            points = points[ConvexHull(points).vertices]
        return cls(points)

    @property
    def diameter_A(self) -> float:
        """Of the smallest sphere about the map's centre that holds the object."""
        return 2 * float(np.linalg.norm(self.corners_A, axis=1).max())

    def reach_A(self, rotation: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """(n,): how far the object reaches along directions (n, 3) of the image frame when rotated by (n, 3, 3)."""
        in_map = np.einsum("nij,ni->nj", rotation, direction)
        return np.asarray((in_map @ self.corners_A.T).max(1))

    def contact_A(self, first: np.ndarray, second: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """(n,): distance of two rotated objects' centres along a direction at which one plane separates them."""
        return np.asarray(self.reach_A(first, direction) + self.reach_A(second, -direction))


def without_part(volume: DensityMap, share: float, direction: np.ndarray) -> DensityMap:
    """The object without what lies farthest along a direction (3,): x, y, z.

    Args:
        share: of the mass (density in and around the outline) that is cut off, with an edge of some Å.
    """
    where = inside(volume, HALO_A)
    along = coordinates_A(np.ones_like(where), volume.pixel_size_A) @ (direction / np.linalg.norm(direction))
    along = along.reshape(where.shape)
    mass, place = np.clip(volume.data[where], 0, None).astype(np.float64), along[where]
    low, high = float(place.min()) - 10 * CUT_SOFT_A, float(place.max()) + 10 * CUT_SOFT_A
    while high - low > 1e-3 * volume.pixel_size_A:
        middle = (low + high) / 2
        enough = float(mass @ _before(place, middle)) >= (1 - share) * mass.sum()
        low, high = (low, middle) if enough else (middle, high)
    return replace(volume, data=(volume.data * _before(along, high)).astype(np.float32))


def _before(along_A: np.ndarray, cut_A: float) -> np.ndarray:
    """1 before a cut, 0 behind it, and a logistic edge between."""
    return 1 / (1 + np.exp(np.clip((along_A - cut_A) / (CUT_SOFT_A / 2), -50, 50)))


def blob(volume: DensityMap, resolution_A: float) -> DensityMap:
    """A ball of the object's mass and of the volume inside its outline, blurred to a resolution."""
    where = inside(volume)
    mass = float(volume.data[inside(volume, HALO_A)].sum(dtype=np.float64))
    radius = float((3 * where.sum() / (4 * np.pi)) ** (1 / 3))
    if not mass > 0 or radius + 2 > volume.box_px / 2:
        raise InputError(
            "no ball of the object's mass fits into the box", found=f"radius {radius:.0f} px", code="model-exceeds-box"
        )
    ball = lowpass(np.asarray(sphere_mask(volume.box_px, radius)), volume.pixel_size_A, resolution_A)
    return replace(volume, data=(ball * (mass / ball.sum())).astype(np.float32))
