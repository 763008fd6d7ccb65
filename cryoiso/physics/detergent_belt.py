"""Synthetic detergent: a belt of head groups and tails around the membrane part of a protein, for tests with known
truth.

The contrast of a micelle or nanodisc with the solvent comes from its head groups; the tails differ little from vitreous
ice. At low resolution this is a flat shell of somewhat less than protein density around a nearly empty core.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.physics.filters import apply_bfactor, lowpass


@dataclass(frozen=True)
class Belt:
    """An oblate body |r / radius|^4 + |z / half_thickness|^4 = 1 about an axis along z, with a shell of head groups."""

    centre_z_A: float = 0.0
    radius_A: float = 62.0
    half_thickness_A: float = 21.0
    shell_A: float = 8.0
    """Thickness of the layer of head groups."""
    shell_density: float = 0.6
    """Relative to the inside of the protein."""
    core_density: float = 0.15
    softness_A: float = 3.0
    """Standard deviation of the Gaussian blur."""


def belt_map(belt: Belt, box_px: int, pixel_size_A: float) -> DensityMap:
    """The belt alone, ignoring the protein; 1 is the protein's density."""
    axis = (np.arange(box_px) - box_px // 2) * pixel_size_A
    radius = np.hypot(axis[:, None], axis[None, :])[None]
    z = (axis - belt.centre_z_A)[:, None, None]

    def body(shrink_A: float) -> np.ndarray:
        level = (radius / (belt.radius_A - shrink_A)) ** 4 + (z / (belt.half_thickness_A - shrink_A)) ** 4
        inside: np.ndarray = (level <= 1).astype(np.float32)
        return inside

    outer, core = body(0.0), body(belt.shell_A)
    density = belt.shell_density * (outer - core) + belt.core_density * core
    blurred = apply_bfactor(density, pixel_size_A, 8 * np.pi**2 * belt.softness_A**2)
    return DensityMap(np.asarray(blurred, np.float32), pixel_size_A)


def in_detergent(protein: DensityMap, belt: Belt) -> tuple[DensityMap, DensityMap]:
    """A protein in its belt: detergent fills the space that the protein leaves free.

    Args:
        protein: any grey scale, membrane normal along z.

    Returns:
        protein with detergent, and the detergent alone, both on the protein's grey scale.
    """
    smooth = np.asarray(lowpass(np.asarray(protein.data, np.float32), protein.pixel_size_A, 10.0))
    inside = np.sort(smooth.ravel())[-max(8, smooth.size // 100) :].mean()
    free = 1 - np.clip(smooth / inside, 0, 1)
    data = inside * free * belt_map(belt, protein.box_px, protein.pixel_size_A).data
    detergent = replace(protein, data=data.astype(np.float32))
    return replace(protein, data=(protein.data + detergent.data).astype(np.float32)), detergent
