"""From poses to half-maps, their mean and a mask, as files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io.mrc import read_map, write_map
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import root_of_half
from cryoiso.pipeline import wire

logger = logging.getLogger("cryoiso")


def write_reconstruction(
    source: Any, particles: Particles, folder: Path, comm: Context, *, symmetry: str, padding: int, pixel_size_A: float
) -> dict[str, Any]:
    """half1.mrc, half2.mrc and their mean map.mrc from the poses of ``particles``. Collective.

    Args:
        source: images in the same order as ``particles`` (an ``ImageSource``).
        folder: exists already.
        pixel_size_A: of the maps; that of the whole set's first particle, which a subset may not have.

    Returns:
        what a report says about it.
    """
    maps = wire.reconstructor()(
        source, particles, comm, symmetry=symmetry, padding=padding, device=comm.device(), pixel_size_A=pixel_size_A
    )  # fmt: skip
    halves = {half: comm.bcast(maps.get(half), root_of_half(half, comm.size)) for half in (1, 2)}
    on_root(comm, write_half_maps, halves, folder)
    half = particles.half if particles.half is not None else np.zeros(len(particles), np.int8)
    counts = [int((half == number).sum()) for number in (1, 2)]
    return {"symmetry": symmetry, "padding": padding, "half_counts": counts}


def write_half_maps(halves: dict[int, DensityMap], folder: Path) -> None:
    """The half-maps as they are, and their mean."""
    for half, density in halves.items():
        write_map(folder / f"half{half}.mrc", density.data, density.pixel_size_A)
    mean = 0.5 * (halves[1].data.astype(np.float64) + halves[2].data)
    write_map(folder / "map.mrc", mean.astype(np.float32), halves[1].pixel_size_A)


def write_weighted_map(folder: Path, mask: np.ndarray, seed: int) -> None:
    """map_weighted.mrc, for looking at: the mean map, each shell weighted by what the half-maps agree on.

    C_ref = sqrt(2 FSC / (1 + FSC)) (Rosenthal and Henderson 2003, doi 10.1016/j.jmb.2003.07.013) with the FSC corrected
    for the mask, nothing beyond the shell where that first falls below 0.143. The half-maps stay as they are.
    """
    from cryoiso.metrics.fsc import fsc_corrected
    from cryoiso.physics.filters import apply_radial

    one, two, mean = (read_map(folder / name) for name in ("half1.mrc", "half2.mrc", "map.mrc"))
    curve = np.asarray(fsc_corrected(one.data, two.data, mask, seed)["corrected"])
    below = np.flatnonzero(curve[1:] < 0.143)
    curve = np.where(np.arange(len(curve)) <= (below[0] if len(below) else len(curve)), np.clip(curve, 0, 1), 0.0)
    weighted = apply_radial(mean.data.astype(np.float32), np.sqrt(2 * curve / (1 + curve)))
    write_map(folder / "map_weighted.mrc", np.asarray(weighted, np.float32), mean.pixel_size_A)


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
