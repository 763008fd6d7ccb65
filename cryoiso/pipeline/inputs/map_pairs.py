"""Pairs of half-map files, read and checked in one place."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import read_map
from cryoiso.metrics.half_maps import check_half_maps
from cryoiso.pipeline.inputs.grids import require_grid

logger = logging.getLogger("cryoiso")
SAME_PIXEL = 1e-3
"""Relative difference of pixel sizes; half-maps of one reconstruction have one pixel size."""


def read_half_maps(
    half1: Path, half2: Path, pixel_size_A: float | None = None
) -> tuple[DensityMap, DensityMap, list[str]]:
    """Two half-maps, and what is odd about them (which is logged as well).

    Raises:
        InputError: unreadable, on different grids, or no two half-maps: see `cryoiso.metrics.half_maps`.
    """
    first, second = read_map(half1, pixel_size_A), read_map(half2, pixel_size_A)
    require_grid(second, first.box_px, first.pixel_size_A, half2, "the first half-map")
    if abs(second.pixel_size_A / first.pixel_size_A - 1) > SAME_PIXEL:
        raise InputError(
            "the half-maps have different pixel sizes", file=half2, expected=f"{first.pixel_size_A:g} Å as in {half1}",
            found=f"{second.pixel_size_A:g} Å", hint="Are they of one reconstruction? If so, give --pixel-size.",
            code="grid-mismatch",
        )  # fmt: skip
    warnings = check_half_maps(first.data, second.data, (half1, half2))
    apart_A = float(np.abs(np.subtract(first.origin_A, second.origin_A)).max())
    if apart_A > 0.1 * first.pixel_size_A:
        warnings.append(
            f"the headers of the half-maps name origins {apart_A:g} Å apart; they are compared voxel by voxel"
        )
    for words in warnings:
        logger.warning("%s", words)
    return first, second, warnings
