"""MRC maps and image stacks (MRC2014, Cheng et al., J. Struct. Biol. 192 (2015) 146).

Maps come in as (z, y, x) whatever the axis order of the file. Reading images out of stacks is in ``stack``.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from cryoiso import __version__
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.types import DensityMap
from cryoiso.io.atomic import atomic_write
from cryoiso.io.mrcheader import (
    HEADER_BYTES,
    MODES,
    SAMPLE_BYTES,
    MrcHeader,
    parse_header,
    read_header,
    with_byte_type,
)
from cryoiso.io.packed import packing_of, read_exactly, unpacking
from cryoiso.io.ranges import PIXEL_SIZE, check_range
from cryoiso.io.regular_file import open_regular

if TYPE_CHECKING:
    from jaxtyping import Real, Shaped

__all__ = ["MrcHeader", "build_header", "copy_labelled", "parse_header", "read_header", "read_map", "read_raw_map",
           "write_map", "write_stack"]  # fmt: skip

PIXEL_SIZE_HINT = (
    "Give it: pixel_size_A under [reference] in the job file, or on the command line --pixel-size (diagnose, correct, "
    "symmetry), --map-pixel-size (reference) or --ref-pixel-size (init, refine, classify, realign, ctf-refine, "
    "micelle, auxiliary)."
)

MAX_MAP_PX = 2048
"""Voxels along a side of the largest map that is read (34 GB)."""
MAX_DENSITY = 1e15
"""Largest voxel: beyond it sums of squares leave the range of single precision."""
UNPACKED_LIMIT = 4 << 30
"""Bytes of the largest map that is unpacked into memory."""

logger = logging.getLogger("cryoiso")


def read_raw_map(path: object) -> tuple[Shaped[np.ndarray, "z y x"], MrcHeader]:
    """A map of any shape, memory-mapped, with axes brought to (z, y, x) and the number type of the file.

    Returns:
        array (nz, ny, nx), read-only, and the header. Files packed with gzip or bzip2 are unpacked into memory.

    Raises:
        InputError: as ``read_header``; packed and damaged, or larger than ``UNPACKED_LIMIT``.
    """
    try:
        kind = packing_of(path)  # whatever its name: browsers unpack .map.gz and keep the name
    except OSError:
        kind = ""  # read_header says why
    if kind:
        return _read_packed(path, kind)
    header = read_header(path)
    if header.spare_bytes:
        logger.warning("%s: %d bytes longer than its header says; they are left out", path, header.spare_bytes)
    try:
        with open_regular(path) as stream:
            data = np.memmap(stream, header.dtype, "r", header.offset, header.shape)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise CryoisoError(
            f"{path}: {header.data_bytes / 1e9:.3g} GB cannot be mapped into memory: {why}", code="memory-short"
        ) from None
    return _to_zyx(data, header), header


def _read_packed(path: object, kind: str) -> tuple[np.ndarray, MrcHeader]:
    with unpacking(path, kind) as stream:
        raw = stream.read(HEADER_BYTES)
        header = parse_header(raw, path)
        size = header.offset + header.data_bytes
        if size > UNPACKED_LIMIT:
            raise InputError(
                "too large to be read packed",
                file=path,
                expected=f"at most {UNPACKED_LIMIT >> 30} GiB unpacked",
                found=f"{size / 2**30:.1f} GiB in its header",
                hint="Unpack it first.",
                code="packed-file-unsupported",
            )
        body = read_exactly(stream, size - HEADER_BYTES)
        if body is None:
            raise InputError(
                "the file is truncated",
                file=path,
                expected=f"{size} bytes",
                hint="Copy it again.",
                code="file-truncated",
            )
        _check_end(stream, size, path)
    body = body[header.offset - HEADER_BYTES :]
    if header.signed is None:
        header = with_byte_type(header, body[:SAMPLE_BYTES].tobytes(), path)
    return _to_zyx(body.view(header.dtype).reshape(header.shape), header), header


def _check_end(stream: IO[bytes], size: int, path: object) -> None:
    """Reads on to the checksum at the end, through as much again as the header said, and no further."""
    spare = 0
    while block := stream.read(1 << 20):
        spare += len(block)
        if spare > size:
            raise InputError(
                "unpacks to more than twice what its header says",
                file=path,
                expected=f"{size} bytes",
                code="packed-file-unsupported",
            )
    if spare:
        logger.warning("%s: %d bytes longer than its header says; they are left out", path, spare)


def _to_zyx(data: np.ndarray, header: MrcHeader) -> np.ndarray:
    return np.transpose(data, [header.axes.index(axis) for axis in (2, 1, 0)])


def read_map(path: object, pixel_size_A: float | None = None) -> DensityMap:
    """A cubic density map.

    Args:
        path: MRC or CCP4 map, possibly packed with gzip or bzip2.
        pixel_size_A: overrides the header's.

    Returns:
        DensityMap: (D, D, D) float32 in (z, y, x).

    Raises:
        InputError: no such file, truncated, not cubic, NaN or Inf inside, no pixel size, different pixel sizes along
            the axes, axes not at right angles, several volumes, more than ``MAX_MAP_PX`` voxels along a side.
    """
    raw, header = read_raw_map(path)
    require_one_straight_volume(header, path)
    if len(set(raw.shape)) != 1:
        nz, ny, nx = raw.shape
        hint = "Pad it to a cube first (for example relion_image_handler --new_box)."
        raise InputError(
            "the map is not a cube",
            file=path,
            found=f"{nx} x {ny} x {nz} voxels (x, y, z)",
            hint=hint,
            code="map-not-cubic",
        )
    if raw.shape[0] > MAX_MAP_PX:
        raise InputError("the map is too large", file=path, expected=f"at most {MAX_MAP_PX} voxels along a side",
                         found=raw.shape[0], code="size-above-limit")  # fmt: skip
    pixel = float(pixel_size_A) if pixel_size_A is not None else _header_pixel_size(header, path)
    if not (math.isfinite(pixel) and pixel > 0):
        raise InputError("the pixel size must be a positive number", file=path, found=pixel, code="pixel-size-invalid")
    if pixel_size_A is None:
        limits = replace(PIXEL_SIZE, hint=f"{PIXEL_SIZE.hint} {PIXEL_SIZE_HINT}")
        check_range(np.array([pixel]), limits, path, "the pixel size of the header")
    try:
        data = np.array(raw, np.float32, order="C")
    except MemoryError:
        raise CryoisoError(
            f"{path}: not enough memory for a map of {raw.shape[0]} voxels along a side", code="memory-short"
        ) from None
    low, high = float(data.min()), float(data.max())  # NaN where there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int(np.size(data) - np.isfinite(data).sum())
        raise InputError(
            "the map has voxels that are NaN or infinite", file=path, found=f"{bad} of them", code="map-not-finite"
        )
    if max(-low, high) > MAX_DENSITY:
        raise InputError(
            "the map has voxels that cannot be densities",
            file=path,
            expected=f"values up to {MAX_DENSITY:g}",
            found=f"{low:g} to {high:g}",
            code="map-not-finite",
        )
    scale = [pixel / v if v > 0 and pixel_size_A is not None else 1.0 for v in header.voxel_A]
    origin = [o * s if math.isfinite(o * s) else 0.0 for o, s in zip(header.origin_A, scale)]
    return DensityMap(data, pixel, (origin[0], origin[1], origin[2]))


def require_one_straight_volume(header: MrcHeader, path: object) -> None:
    """
    Raises:
        InputError: several volumes, or axes that are not at right angles.
    """
    header.require_right_angles(path)
    if header.volumes > 1:
        raise InputError(
            "several volumes in one file",
            file=path,
            expected="one map",
            found=header.volumes,
            hint="Extract the one to use into its own file.",
            code="map-several-volumes",
        )
    if header.is_stack:
        logger.warning("%s: its header says that it is a stack of images; it is read as a map", path)


def _header_pixel_size(header: MrcHeader, path: object) -> float:
    voxel = header.voxel_A
    if not all(math.isfinite(v) and v > 0 for v in voxel):
        raise InputError(
            "the map has no pixel size in its header",
            file=path,
            expected="a voxel size in Å",
            found=" x ".join(f"{v:g}" for v in voxel),
            hint=PIXEL_SIZE_HINT,
            code="pixel-size-missing",
        )
    if max(voxel) - min(voxel) > 1e-3 * max(voxel):
        raise InputError(
            "the voxels are not cubes",
            file=path,
            expected="one pixel size",
            found=" x ".join(f"{v:g}" for v in voxel) + " Å",
            hint="Resample the map, or give its pixel size if the header is wrong.",
            code="map-not-cubic",
        )
    return voxel[0]


def build_header(
    shape: tuple[int, int, int],
    mode: int,
    pixel_size_A: float,
    origin_A: tuple[float, float, float] = (0.0, 0.0, 0.0),
    *,
    stack: bool = False,
    stats: tuple[float, float, float, float] | None = None,
) -> bytes:
    """A valid MRC2014 header, little-endian.

    Args:
        shape: (sections, rows, columns).
        mode: 2 (float32) or 12 (float16).
        pixel_size_A: of all axes.
        origin_A: (x, y, z) of the first voxel.
        stack: images (space group 0, one section a unit cell) rather than a volume.
        stats: (min, max, mean, rms); None is written as "not determined" in the standard's way.
    """
    from mrcfile.dtypes import HEADER_DTYPE

    h = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
    nz, ny, nx = shape
    h["nx"], h["ny"], h["nz"], h["mode"] = nx, ny, nz, mode
    h["mx"], h["my"], h["mz"] = nx, ny, 1 if stack else nz
    h["cella"] = (nx * pixel_size_A, ny * pixel_size_A, (1 if stack else nz) * pixel_size_A)
    h["cellb"] = (90.0, 90.0, 90.0)
    h["mapc"], h["mapr"], h["maps"] = 1, 2, 3
    h["dmin"], h["dmax"], h["dmean"], h["rms"] = stats or (0.0, -1.0, -2.0, -1.0)
    h["ispg"] = 0 if stack else 1
    h["nversion"] = 20141
    h["origin"] = origin_A
    h["map"] = b"MAP "
    h["machst"] = [0x44, 0x44, 0, 0]
    h["nlabl"] = 1
    h["label"][0] = f"cryoiso {__version__}".encode()
    return h.tobytes()


def write_map(
    path: object,
    data: Real[np.ndarray, "... y x"],
    pixel_size_A: float,
    origin_A: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> None:
    """Writes a volume (or one image) as float32, atomically.

    Args:
        data: (nz, ny, nx), or (ny, nx).
        pixel_size_A: Å a voxel.
        origin_A: (x, y, z) of the first voxel.
    """
    volume = np.ascontiguousarray(data, "<f4")
    volume = volume[None] if volume.ndim == 2 else volume
    mean = float(volume.mean(dtype=np.float64))
    rms = math.sqrt(max(float(np.square(volume, dtype=np.float64).mean()) - mean * mean, 0.0))
    stats = (float(volume.min()), float(volume.max()), mean, rms)
    header = build_header((volume.shape[0], volume.shape[1], volume.shape[2]), 2, pixel_size_A, origin_A, stats=stats)
    with atomic_write(path, need_bytes=HEADER_BYTES + volume.nbytes) as stream:
        stream.write(header)
        stream.write(volume.data.cast("B"))


LABELS_AT, LABEL_BYTES, LABELS = 224, 80, 10
"""Where a header keeps its labels, how long one is, how many there are at most."""


def copy_labelled(source: object, target: object, label: str) -> None:
    """Copies an MRC file, bit by bit but for one more label in its header.

    Args:
        label: at most 80 ASCII characters; the last label gives way to it where there are ten.

    Raises:
        InputError: not an MRC file.
    """
    read_header(source)
    text = label.encode("ascii")
    if len(text) > LABEL_BYTES:
        raise ValueError(f"a label has at most {LABEL_BYTES} characters: {label}")
    with open_regular(source) as old, atomic_write(target, need_bytes=os.fstat(old.fileno()).st_size) as new:
        raw = bytearray(old.read(HEADER_BYTES))
        order: Any = "little" if raw[212] in (0x44, 0) else "big"
        count = min(int.from_bytes(raw[LABELS_AT - 4 : LABELS_AT], order), LABELS - 1)
        start = LABELS_AT + count * LABEL_BYTES
        raw[start : start + LABEL_BYTES] = text.ljust(LABEL_BYTES, b"\0")
        raw[LABELS_AT - 4 : LABELS_AT] = (count + 1).to_bytes(4, order)
        new.write(raw)
        shutil.copyfileobj(old, new, 1 << 22)


class StackWriter:
    """Takes images block by block; made by ``write_stack``."""

    def __init__(self, stream: IO[Any], path: object, box_px: int, pixel_size_A: float, mode: int) -> None:
        self._stream, self._path, self._box, self._pixel, self._mode = stream, path, box_px, pixel_size_A, mode
        self.count = 0
        stream.write(bytes(HEADER_BYTES))

    def append(self, images: Real[np.ndarray, "*n box box"]) -> None:
        """Appends (n, D, D) or (D, D) images."""
        block = np.ascontiguousarray(images, "<" + MODES[self._mode])
        block = block[None] if block.ndim == 2 else block
        if block.shape[1:] != (self._box, self._box):
            raise ValueError(f"images of {block.shape[1:]} do not fit a stack of {self._box} px")
        self._stream.write(block.data.cast("B"))
        self.count += len(block)

    def finish(self) -> None:
        """Writes the header now that the number of images is known."""
        self._stream.seek(0)
        self._stream.write(build_header((self.count, self._box, self._box), self._mode, self._pixel, stack=True))


@contextmanager
def write_stack(path: object, box_px: int, pixel_size_A: float, mode: int = 2) -> Iterator[StackWriter]:
    """A streaming writer of an image stack (.mrcs): ``with write_stack(...) as stack: stack.append(images)``.

    Args:
        box_px: image side.
        pixel_size_A: goes into the header.
        mode: 2 (float32) or 12 (float16).
    """
    if mode not in (2, 12):
        raise ValueError(f"cannot write stacks of mode {mode}")
    with atomic_write(path) as stream:
        writer = StackWriter(stream, path, box_px, pixel_size_A, mode)
        yield writer
        writer.finish()
