"""From poses to half-maps, their mean, the weighted map and a mask, as files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io.mrc import write_map
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import root_of_half
from cryoiso.pipeline.stages import engines

logger = logging.getLogger("cryoiso")


def write_reconstruction(
    source: Any,
    particles: Particles,
    folder: Path,
    comm: Context,
    *,
    symmetry: str,
    padding: int,
    pixel_size_A: float,
    support: Support | None = None,
) -> dict[str, Any]:
    """half1.mrc, half2.mrc and their mean map.mrc from the poses of ``particles``. Collective.

    Args:
        source: images in the same order as ``particles`` (an ``ImageSource``).
        folder: exists already.
        pixel_size_A: of the maps; that of the whole set's first particle, which a subset may not have.
        support: with it also map_weighted.mrc, the Wiener-weighted map of both half-sets (``refine.full_map``).

    Returns:
        what a report says about it.
    """
    how: dict[str, Any] = {
        "symmetry": symmetry, "padding": padding, "device": comm.device(), "pixel_size_A": pixel_size_A
    }  # fmt: skip
    facts: dict[str, Any] = {"symmetry": symmetry, "padding": padding}
    if support is None:
        maps = engines.reconstructor()(source, particles, comm, **how)
        halves = {half: comm.bcast(maps.get(half), root_of_half(half, comm.size)) for half in (1, 2)}
    else:
        full = engines.full_reconstructor()(
            source, particles, comm, support.mask_of, diameter_A=support.diameter_A, seed=support.seed, **how
        )
        halves = full.halves
        on_root(comm, lambda: write_map(folder / products.WEIGHTED_MAP, full.weighted.data, pixel_size_A))
    on_root(comm, write_half_maps, halves, folder)
    half = particles.half if particles.half is not None else np.zeros(len(particles), np.int8)
    facts["half_counts"] = [int((half == number).sum()) for number in (1, 2)]
    return facts


def write_half_maps(halves: dict[int, DensityMap], folder: Path) -> None:
    """The half-maps as they are, and their mean."""
    for half, density in halves.items():
        write_map(folder / products.half_map(half), density.data, density.pixel_size_A)
    mean = 0.5 * (halves[1].data.astype(np.float64) + halves[2].data)
    write_map(folder / products.MAP, mean.astype(np.float32), halves[1].pixel_size_A)


class Support:
    """Where the particle is, for the weighted map: a given mask, or one made from the filtered half-maps.

    Used for several reconstructions, it keeps the mask of the first. Rank 0's is the one that counts.
    """

    def __init__(self, mask: np.ndarray | None = None, diameter_A: float | None = None, seed: int = 0) -> None:
        self.diameter_A, self.seed = diameter_A, seed
        self._mask, self.kind = mask, "given"

    def mask_of(self, full: DensityMap) -> np.ndarray:
        """The mask (D, D, D); made from this map if there is none yet."""
        if self._mask is None:
            self._mask, self.kind = mask_and_kind(full, self.diameter_A)
        return self._mask

    def write_mask(self, folder: Path, pixel_size_A: float) -> str:
        """mask.mrc, after a reconstruction; returns what it was made from: "given", "map" or "sphere"."""
        assert self._mask is not None
        write_map(folder / products.MASK, self._mask, pixel_size_A)
        return self.kind


def make_mask(full: DensityMap, diameter_A: float | None = None) -> np.ndarray:
    """A soft solvent mask of a map: (D, D, D) float32; a sphere where the map does not stand out from its solvent."""
    return mask_and_kind(full, diameter_A)[0]


def mask_and_kind(full: DensityMap, diameter_A: float | None = None) -> tuple[np.ndarray, str]:
    """As ``make_mask``, and what it was made from: "map" or "sphere"."""
    from cryoiso.physics.masks import soft_mask_from_map, sphere_mask

    try:
        return np.asarray(soft_mask_from_map(full.data, full.pixel_size_A), np.float32), "map"
    except InputError as error:
        logger.warning("no mask could be made from the map (%s); a sphere is used", error)
        radius = 0.5 * (diameter_A or full.box_px * full.pixel_size_A) / full.pixel_size_A
        return sphere_mask(full.box_px, min(radius, full.box_px / 2 - 5), 5.0).numpy(), "sphere"
