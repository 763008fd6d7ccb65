"""Density maps of any box: not cubic, with voxels that are no cubes, or with axes in another order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.mrc import MAX_DENSITY, MAX_MAP_PX, PIXEL_SIZE_HINT, read_raw_map, require_one_straight_volume
from cryoiso.io.mrcheader import MrcHeader
from cryoiso.io.ranges import PIXEL_SIZE, check_range

if TYPE_CHECKING:
    from jaxtyping import Float

SAME_VOXEL = 1e-3
"""Relative difference of the voxel's edges up to which it is a cube."""


@dataclass(frozen=True)
class MapBox:
    """A map as its file has it, with axes brought to (z, y, x)."""

    data: Float[np.ndarray, "z y x"]
    voxel_A: tuple[float, float, float]
    """edges of a voxel along (x, y, z)"""
    header: MrcHeader

    @property
    def is_plain(self) -> bool:
        """Whether box and voxels are cubes."""
        return len(set(self.data.shape)) == 1 and max(self.voxel_A) - min(self.voxel_A) <= SAME_VOXEL * max(
            self.voxel_A
        )

    @property
    def longest_A(self) -> float:
        """Longest edge of the box."""
        return max(float(n * v) for n, v in zip(self.data.shape[::-1], self.voxel_A, strict=True))

    @property
    def words(self) -> str:
        """Box and pixel size, such as ``90 x 68 x 84 px of 2.87 Å``."""
        nz, ny, nx = self.data.shape
        box = f"{nx}" if nx == ny == nz else f"{nx} x {ny} x {nz}"
        x, y, z = self.voxel_A
        cube = max(x, y, z) - min(x, y, z) <= SAME_VOXEL * max(x, y, z)
        return f"{box} px of {f'{x:g}' if cube else f'{x:g} x {y:g} x {z:g}'} Å"

    def facts(self) -> dict[str, Any]:
        """Plain values for a file, all in the order x, y, z."""
        return {
            "box_px": list(self.data.shape[::-1]), "voxel_A": [round(v, 6) for v in self.voxel_A],
            "mapc_mapr_maps": [axis + 1 for axis in reversed(self.header.axes)],
            "origin_A": [round(v, 4) if math.isfinite(v) else None for v in self.header.origin_A],
            "centre": "voxel n//2 of every axis; the header's origin is not used",
        }  # fmt: skip


def read_map_box(path: object, pixel_size_A: float | None = None) -> MapBox:
    """A map of any box.

    Args:
        path: MRC or CCP4 map, possibly packed with gzip or bzip2.
        pixel_size_A: replaces the voxel's edges in the header.

    Returns:
        MapBox: memory-mapped, in the number type of the file.

    Raises:
        InputError: no such file, truncated, no pixel size, axes not at right angles, several volumes, one section, more
            than ``MAX_MAP_PX`` voxels along a side.
    """
    raw, header = read_raw_map(path)
    require_one_straight_volume(header, path)
    if min(raw.shape) == 1:
        raise InputError("this is a single image, not a map", file=path, expected="a volume of several sections",
                         found=" x ".join(map(str, raw.shape[::-1])) + " px", code="map-not-cubic")  # fmt: skip
    if max(raw.shape) > MAX_MAP_PX:
        raise InputError("the map is too large", file=path, expected=f"at most {MAX_MAP_PX} voxels along a side",
                         found=max(raw.shape), code="size-above-limit")  # fmt: skip
    voxel = header.voxel_A if pixel_size_A is None else (pixel_size_A,) * 3
    if not all(math.isfinite(v) and v > 0 for v in voxel):
        raise InputError(
            "the map has no pixel size in its header", file=path, expected="a voxel size in Å",
            found=" x ".join(f"{v:g}" for v in voxel), hint=PIXEL_SIZE_HINT, code="pixel-size-missing",
        )  # fmt: skip
    check_range(np.array(voxel), PIXEL_SIZE, path, "the pixel size")
    return MapBox(raw, (float(voxel[0]), float(voxel[1]), float(voxel[2])), header)


def densities(map_box: MapBox, path: object) -> Float[np.ndarray, "z y x"]:
    """The voxels as float32, less the median of the box's border: nothing is outside.

    Raises:
        InputError: voxels that are NaN, infinite or too large.
    """
    data = np.array(map_box.data, np.float32, order="C")
    low, high = float(data.min()), float(data.max())  # NaN where there is one
    if not (math.isfinite(low) and math.isfinite(high) and max(-low, high) <= MAX_DENSITY):
        raise InputError(
            "the map has voxels that cannot be densities", file=path, expected=f"values up to {MAX_DENSITY:g}",
            found=f"{low:g} to {high:g}", code="map-not-finite",
        )  # fmt: skip
    border = np.concatenate([np.take(data, [0, -1], axis).ravel() for axis in range(3)])
    return np.asarray(data - np.median(border), np.float32)
