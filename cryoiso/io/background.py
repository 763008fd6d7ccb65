"""Patches of micrographs without particles: an MRC stack of square images with a pixel size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.stack import StackReader

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class PatchGrid:
    """What the header of a stack of patches says."""

    count: int
    side_px: int
    pixel_size_A: float


def read_patch_grid(file: Path) -> PatchGrid:
    """Number, side and pixel size of the patches, from the header.

    Raises:
        InputError: not a stack of square images, or no pixel size in the header.
    """
    with StackReader() as reader:
        return _grid(reader, file)


def read_patches(file: Path) -> tuple[Float[np.ndarray, "n side side"], PatchGrid]:
    """All patches, float32, and their grid.

    Raises:
        InputError: as ``read_patch_grid``, or values that are not finite.
    """
    with StackReader() as reader:
        grid = _grid(reader, file)
        patches = reader.read(str(file), np.arange(grid.count))
    broken = np.flatnonzero(~np.isfinite(patches).all((1, 2)))
    if len(broken):
        raise InputError(
            "values that are not finite", file=file, row=int(broken[0]) + 1, expected="finite numbers",
            found=f"{len(broken)} of {grid.count} patches with others", hint="Leave these patches out.",
            code="image-unusable",
        )  # fmt: skip
    return patches, grid


def _grid(reader: StackReader, file: Path) -> PatchGrid:
    header = reader.header(str(file))
    count, height, width = header.shape
    if height != width:
        raise InputError(
            "the background patches are not square", file=file, expected="(n, H, H)", found=header.shape,
            code="stack-not-of-images",
        )  # fmt: skip
    pixel_A = header.voxel_A[0]
    if not (np.isfinite(pixel_A) and pixel_A > 0):
        raise InputError(
            "the background patches have no pixel size in their header", file=file, expected="a pixel size in Å",
            found=pixel_A, hint="Write it into the header, e.g. with IMOD: alterheader -del A,A,1 FILE.",
            code="pixel-size-missing",
        )  # fmt: skip
    return PatchGrid(count, height, pixel_A)
