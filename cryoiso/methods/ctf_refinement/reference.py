"""References of a CTF refinement: half-maps filtered by their FSC, or one low-passed map for both half-sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import HALVES, DensityMap
from cryoiso.metrics.fsc_curve import fsc_corrected, non_increasing, randomise_phases, resolution_at
from cryoiso.physics.filters import apply_radial, lowpass
from cryoiso.physics.projection import FourierVolume

if TYPE_CHECKING:
    from jaxtyping import Float

COARSEST_A = 40.0
"""Coefficients coarser than this are left out: they carry no defocus, but the solvent's contrast."""
LEAST_SHELLS = 6
"""Smallest number of shells between COARSEST_A and the resolution."""
EDGE_SHELLS = 3


@dataclass(frozen=True)
class CtfReference:
    """The maps that images are compared with."""

    maps: dict[int, DensityMap]
    """Half -> map; of standard deviation 1 / D, whatever it was before: the grey scale is fitted."""
    radius_px: int
    """Last shell that is used."""
    resolution_A: float
    source: str
    """half-maps, or map"""

    def volumes(self) -> dict[int, FourierVolume]:
        """The transforms; a map that both half-sets share is transformed once."""
        import torch

        by_half: dict[int, FourierVolume] = {}
        for half, density in self.maps.items():
            same = [h for h in by_half if self.maps[h] is density]
            data = torch.as_tensor(np.ascontiguousarray(density.data, np.float32))
            by_half[half] = by_half[same[0]] if same else FourierVolume.from_volume(data, 2, self.radius_px)
        return by_half

    def with_random_phases(self, seed: int) -> CtfReference:
        """The same power with random phases: a reference without anything in common with the images."""
        maps = {h: DensityMap(randomise_phases(m.data, 1, seed, h), m.pixel_size_A) for h, m in self.maps.items()}
        return CtfReference(maps, self.radius_px, self.resolution_A, "random phases")


def from_half_maps(
    first: DensityMap, second: DensityMap, mask: Float[np.ndarray, "box box box"], resolution_A: float | None = None
) -> CtfReference:
    """Half-maps inside a mask, each shell multiplied by their FSC, which is the Wiener filter of a half-map, up to
    where the FSC, corrected for the mask, falls below 0.143.

    Args:
        first, second: the half-maps, on one grid.
        mask: (D, D, D) in [0, 1].
        resolution_A: finest resolution; None: as above. A finer one than the half-maps support has no effect.

    Raises:
        InputError: the half-maps do not agree far enough.
    """
    box, pixel = first.box_px, first.pixel_size_A
    curve = np.nan_to_num(fsc_corrected(first.data, second.data, mask)["corrected"], nan=0.0)
    curve[0] = 1.0
    supported_A = resolution_at(curve, 0.143, box, pixel)
    used_A = max(supported_A, resolution_A or 0.0)
    radius = _radius_px(used_A, box, pixel, "the half-maps agree only to")
    weight = np.where(np.arange(len(curve)) <= radius, np.clip(non_increasing(curve), 0.0, 1.0), 0.0)
    maps = {
        half: DensityMap(_unit(apply_radial(np.asarray(m.data * mask, np.float32), weight, 3)), pixel)
        for half, m in zip(HALVES, (first, second), strict=True)
    }
    return CtfReference(maps, radius, used_A, "half-maps")


def from_map(density: DensityMap, resolution_A: float, mask: Float[np.ndarray, "box box box"] | None) -> CtfReference:
    """One map for both half-sets, low-passed at a resolution.

    Args:
        resolution_A: two pixels if it is finer.

    Raises:
        InputError: the resolution is too coarse.
    """
    resolution_A = max(resolution_A, 2 * density.pixel_size_A)
    radius = _radius_px(resolution_A, density.box_px, density.pixel_size_A, "the reference is used only to")
    data = density.data if mask is None else density.data * mask
    passed = lowpass(np.asarray(data, np.float32), density.pixel_size_A, resolution_A, EDGE_SHELLS)
    shared = DensityMap(_unit(passed), density.pixel_size_A)
    return CtfReference(dict.fromkeys(HALVES, shared), radius, resolution_A, "map")


def _unit(data: np.ndarray) -> np.ndarray:
    """The map with standard deviation 1 / D, for which projections have a power of some D in all."""
    spread = float(np.std(data))
    if not np.isfinite(spread) or spread <= 0:
        raise InputError(
            "the reference is constant",
            expected="a map of the particle",
            found=f"sd {spread:g}",
            code="map-without-density",
        )
    return np.asarray(data / (spread * data.shape[0]), np.float32)


def _radius_px(resolution_A: float, box_px: int, pixel_size_A: float, problem: str) -> int:
    length_A = box_px * pixel_size_A
    radius = min(int(length_A / resolution_A + 1e-6), (box_px - 1) // 2) if np.isfinite(resolution_A) else 0
    if radius < length_A / COARSEST_A + LEAST_SHELLS:
        raise InputError(
            f"{problem} {resolution_A:.1f} Å, which says too little of the defocus",
            expected=f"{length_A / (length_A / COARSEST_A + LEAST_SHELLS):.1f} Å or finer",
            found=f"{resolution_A:.1f} Å", hint="Refine the poses first, or give a better reference.",
        code="resolution-too-low")  # fmt: skip
    return radius
