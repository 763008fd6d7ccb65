"""Whether a map or a mask is on the grid that it is needed on."""

from __future__ import annotations

import logging
from pathlib import Path

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import read_map, read_raw_map
from cryoiso.physics.masks import sphere_mask
from cryoiso.pipeline.inputs.reference import PIXEL_TOLERANCE
from cryoiso.pipeline.inputs.standard_frame import require_mask_symmetry

logger = logging.getLogger("cryoiso")
LEAST_MASK_VOXELS = 27
"""A cube of 3 voxels: no particle is smaller, and no correlation inside so few voxels means anything."""


def require_grid(density: DensityMap, box_px: int, pixel_size_A: float, file: object, other: str) -> None:
    """Stops at a map that is not on the grid of something else.

    Raises:
        InputError: another box, or a pixel size that differs by more than 1 %.
    """
    if density.box_px != box_px or abs(density.pixel_size_A / pixel_size_A - 1) > PIXEL_TOLERANCE:
        raise InputError(
            f"the map is on another grid than {other}", file=file, expected=f"{box_px} px of {pixel_size_A:g} Å",
            found=f"{density.box_px} px of {density.pixel_size_A:g} Å", code="grid-mismatch",
        )  # fmt: skip


def read_mask(path: Path, box_px: int, pixel_size_A: float, symmetry: str = "C1") -> DensityMap:
    """A solvent mask on a given grid, which its box decides; another pixel size in its header is said.

    Raises:
        InputError: another box, values outside 0..1, nothing inside, the solvent inside instead of the particle, or a
            mask without the symmetry.
    """
    mask = read_map(path, pixel_size_A)
    if mask.box_px != box_px:
        raise InputError(
            "the mask has another box than the maps",
            file=path,
            expected=f"{box_px} px",
            found=f"{mask.box_px} px",
            code="box-mismatch",
        )
    low, high = float(mask.data.min()), float(mask.data.max())
    if low == high == 0:
        raise InputError("the mask is empty", file=path, expected="1 inside the particle", found="0 everywhere",
                         code="mask-values-invalid")  # fmt: skip
    if low < -1e-3 or not 0 < high <= 1 + 1e-3:
        raise InputError(
            "the mask is not between 0 and 1", file=path, found=f"{low:g} to {high:g}", code="mask-values-invalid"
        )
    if high < 0.5:
        raise InputError(
            f"the maximum of the mask is only {high:g}",
            file=path,
            expected="1 inside the particle",
            code="mask-values-invalid",
        )
    voxels = int((mask.data > 0.5).sum())
    if voxels < LEAST_MASK_VOXELS:
        raise InputError(
            "the mask holds next to nothing", file=path, expected=f"at least {LEAST_MASK_VOXELS} voxels above 0.5",
            found=voxels, code="mask-values-invalid",
        )  # fmt: skip
    sphere = sphere_mask(box_px, box_px / 2 - 1).numpy() > 0.5
    corners, inside = float(mask.data[~sphere].mean()), float(mask.data[sphere].mean())
    if corners > 0.5 and inside < corners - 0.05:
        raise InputError(
            "the mask is inverted", file=path, expected="the particle inside",
            found=f"{corners:.2f} in the corners of the box, {inside:.2f} within its sphere", hint="Give 1 - mask.",
            code="mask-inverted",
        )  # fmt: skip
    header_A = read_raw_map(path)[1].voxel_A[0]
    unset = header_A <= 0 or header_A == 1.0  # what programs write that do not know it
    if not unset and abs(header_A / pixel_size_A - 1) > PIXEL_TOLERANCE:
        logger.warning(
            "%s has a pixel size of %g Å in its header, the maps have %g Å: it is used voxel by voxel",
            path, header_A, pixel_size_A,
        )  # fmt: skip
    require_mask_symmetry(mask.data, symmetry, path)
    return mask
