"""Sub-maps to train on: drawn inside the mask as a function of (seed, place in the sequence), normalised, turned."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.so3 import random_rotations

SOLVENT_MARGIN_PX = 2
"""The solvent's level is taken this far from the particle."""
MANY = 100
"""Voxels that tell it."""
EDGE = 8
"""Losses leave out this part of a cube's edge on each side."""


@dataclass(frozen=True)
class GreyScale:
    """Fixed statistics of whole maps: x -> (x - level) / spread and back."""

    level: float
    """Of the solvent, so that empty space is 0, as it is beyond the box, and density is positive."""
    spread: float
    """Standard deviation inside the mask."""

    @classmethod
    def of(cls, maps: list[np.ndarray], particle_mask: np.ndarray) -> GreyScale:
        """The common scale of some maps.

        Args:
            particle_mask: (D, D, D) bool, the particle.

        Raises:
            InputError: constant maps.
        """
        from scipy.ndimage import binary_dilation

        values = np.concatenate([m[particle_mask] for m in maps]).astype(np.float64)
        # corners of the box are left out: reconstructions hold nothing there, on whatever level the solvent is
        sphere = np.asarray(sphere_mask(len(particle_mask), len(particle_mask) / 2 - 1)) > 0.5
        solvent = sphere & ~binary_dilation(particle_mask, iterations=SOLVENT_MARGIN_PX)
        solvent = solvent if solvent.sum() > MANY else ~particle_mask
        outside = [m[solvent] for m in maps]
        level = float(np.mean(np.concatenate(outside), dtype=np.float64)) if solvent.any() else float(values.mean())
        spread = float(values.std())
        if not spread > 0:
            raise InputError(
                "the map is constant inside the mask: there is nothing to correct", code="map-without-density"
            )
        return cls(level, spread)

    def normalised(self, data: np.ndarray) -> np.ndarray:
        return ((data - self.level) / self.spread).astype(np.float32)

    def restored(self, data: np.ndarray) -> np.ndarray:
        return (data * self.spread + self.level).astype(np.float32)


def particle_region(mask: np.ndarray | None, box_px: int) -> np.ndarray:
    """(D, D, D) bool: where centres of sub-maps may lie; without a mask the sphere in the box.

    Raises:
        InputError: a mask of another box, or an empty one.
    """
    if mask is None:
        return np.asarray(sphere_mask(box_px, box_px / 2 - 1)) > 0.5
    if mask.shape != (box_px,) * 3:
        raise InputError(
            "the mask has another box than the map", expected=(box_px,) * 3, found=mask.shape, code="box-mismatch"
        )
    particle_mask = np.asarray(mask) > 0.5
    if not particle_mask.any():
        raise InputError("the mask is empty: no voxel above 0.5", code="mask-empty")
    return particle_mask


class SubMaps:
    """Where the sub-maps of a training lie, and how each is turned."""

    def __init__(self, particle_mask: np.ndarray, cube_px: int, seed: int, label: str, rotations: str) -> None:
        """
        Args:
            particle_mask: (D, D, D) bool, centres are drawn from it.
            cube_px: C; a box smaller than this is surrounded by solvent.
            label: names the training in the random numbers.
            rotations: "so3" or "axes".
        """
        self.places = np.argwhere(particle_mask)
        self.box, self.cube, self.seed, self.label, self.rotations = (
            particle_mask.shape[0],
            cube_px,
            seed,
            label,
            rotations,
        )

    def draw(self, number: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """The sub-map of this number in the endless sequence.

        Returns:
            first voxel (z, y, x) of the cube, rotation (3, 3) on (x, y, z), and whether the halves change places.
        """
        rng = generator(self.seed, f"sub-map of network {self.label}", number)
        centre = self.places[rng.integers(len(self.places))]
        corner = np.clip(centre - self.cube // 2, 0, self.box - self.cube)
        if self.box < self.cube:
            corner[:] = self.box // 2 - self.cube // 2  # the box as a whole, in the middle
        rotation = random_rotations(rng, 1)[0] if self.rotations == "so3" else axis_rotations()[rng.integers(24)]
        return corner, rotation, bool(rng.integers(2))

    def cut(self, data: np.ndarray, corner: np.ndarray) -> np.ndarray:
        """(C, C, C) of a (D, D, D) map; 0 outside."""
        out = np.zeros((self.cube,) * 3, np.float32)
        low, high = np.maximum(corner, 0), np.minimum(corner + self.cube, self.box)
        there = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True))
        out[there] = data[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        return out


@lru_cache(maxsize=1)
def axis_rotations() -> np.ndarray:
    """(24, 3, 3): the rotations of a cube onto itself."""
    rotations = []
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (1, 0, 2), (2, 1, 0)):
        for signs in np.ndindex(2, 2, 2):
            m = np.zeros((3, 3))
            m[range(3), order] = 1 - 2 * np.array(signs)
            if np.linalg.det(m) > 0:
                rotations.append(m)
    return np.array(rotations)


def turned(cubes: Tensor, rotation: Tensor) -> Tensor:
    """Cubes turned about their centre voxel C//2, trilinear; 0 where the corners of the cube would be needed.

    out(x) = in(R^T x): content at x goes to R x.

    Args:
        cubes: (B, n, C, C, C): n that turn alike.
        rotation: (B, 3, 3) on (x, y, z).

    Returns:
        (B, n, C, C, C).
    """
    size = cubes.shape[-1]
    # in the coordinates of grid_sample voxel i lies at 2 i / (C - 1) - 1; the centre voxel is not 0 there
    centre = 2 * (size // 2) / (size - 1) - 1
    steps = torch.linspace(-1 - centre, 1 - centre, size, dtype=cubes.dtype, device=cubes.device)
    # (B, 3, C) each: what a place along x, y or z adds to the three coordinates
    along_x, along_y, along_z = (rotation.to(cubes.dtype)[:, i, :, None] * steps for i in range(3))
    plane = (along_y + centre)[:, :, :, None] + along_x[:, :, None, :]
    grid = (along_z[:, :, :, None, None] + plane[:, :, None]).permute(0, 2, 3, 4, 1)
    return functional.grid_sample(cubes, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def ball(size: int, margin_px: float = 0.0) -> Tensor:
    """(C, C, C): 1 in the largest ball about voxel C//2 that stays inside the cube however it is turned."""
    return sphere_mask(size, (size - 1) // 2 - margin_px)


def core(size: int) -> Tensor:
    """(C, C, C): 1 in the inner part of a cube, 0 at its faces, where a network lacks surroundings."""
    inner = torch.zeros((size,) * 3)
    inner[(slice(size // EDGE, size - size // EDGE),) * 3] = 1.0
    return inner


def weighted_mean(difference: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of absolute values, equally over the sub-maps."""
    return (difference.abs() * weight).sum() / (weight.sum() * difference.shape[0])


def digest_of(*arrays: np.ndarray) -> str:
    """A hash of some arrays; empty for none."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest() if arrays else ""
