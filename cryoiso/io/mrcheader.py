"""Headers of MRC files: MRC2014 (Cheng et al., J. Struct. Biol. 192 (2015) 146), CCP4 maps, and what IMOD adds.

Where programs differ, the header's own word counts: IMOD's flags say whether bytes are signed; without them the
smallest and largest value do; without those the bytes themselves (a reading with the wrong sign jumps by 256).
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.packed import packing
from cryoiso.io.regular_file import open_regular

logger = logging.getLogger("cryoiso")

MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
HEADER_BYTES = 1024
SAMPLE_BYTES = 1 << 16
"""Data looked at where nothing else says whether bytes are signed."""
MAX_SIDE = 2**24
IMOD_STAMP, IMOD_SIGNED, IMOD_NIBBLES = 1146047817, 1, 16
"""IMOD's mark at byte 152; at byte 156 its flags for "bytes are signed" and "two 4-bit values a byte"."""
VOLUME_STACK = 401
"""Space groups from here on mean a stack of volumes, of mz sections each."""
ANGLE_TOLERANCE_DEG = 0.01
NO_ANGLE, RADIANS_TOLERANCE = 1e-6, 1e-3


@dataclass(frozen=True)
class MrcHeader:
    """What a file's header says, with spatial quantities in the order x, y, z."""

    shape: tuple[int, int, int]
    """(sections, rows, columns) as stored."""
    dtype: np.dtype
    offset: int
    voxel_A: tuple[float, float, float]
    origin_A: tuple[float, float, float]
    """Position of the first voxel: the ORIGIN record, else start index times voxel size."""
    axes: tuple[int, int, int]
    """Spatial axis (0 = x, 1 = y, 2 = z) of sections, rows and columns."""
    angles_deg: tuple[float, float, float] = (90.0, 90.0, 90.0)
    """alpha, beta, gamma: between the cell's axes y and z, z and x, x and y; see ``_angle``."""
    volumes: int = 1
    is_stack: bool = False
    """Space group 0 and one section a cell: images, not a volume."""
    signed: bool | None = True
    """Of mode 0; None: the header does not say, and the data must be looked at."""
    spare_bytes: int = 0
    """Bytes of the file after the last section."""

    @property
    def image_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    @property
    def data_bytes(self) -> int:
        return self.image_bytes * self.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether a program that knows nothing of axis orders and signs of bytes reads the same numbers."""
        return self.axes == (2, 1, 0) and self.dtype.kind + str(self.dtype.itemsize) in ("i2", "f4", "u2", "f2")

    def require_right_angles(self, path: object, *, images: bool = False) -> None:
        """
        Args:
            images: whether only the angle in the plane of the sections matters, between x and y.

        Raises:
            InputError: the voxels (or pixels) are oblique.
        """
        if any(not abs(a - 90) <= ANGLE_TOLERANCE_DEG for a in self.angles_deg[2 if images else 0 :]):
            raise InputError(
                "the axes of the unit cell are not at right angles",
                file=path,
                expected="cell angles of 90°",
                found=", ".join(f"{a:g}°" for a in self.angles_deg),
                hint="Resample it on an orthogonal grid, or correct the header if the axes are orthogonal.",
                code="mrc-unsupported",
            )


def parse_header(raw: bytes, path: object = None) -> MrcHeader:
    """Reads the 1024 bytes of an MRC header of either byte order, with old or missing machine stamps.

    Raises:
        InputError: not an MRC file, a data mode that is no real density, or an order of axes that cannot be.
    """
    from mrcfile.dtypes import HEADER_DTYPE

    order: Any
    for order in "<>":
        h = np.frombuffer(raw[:HEADER_BYTES], HEADER_DTYPE.newbyteorder(order))[0] if len(raw) >= HEADER_BYTES else None
        if h is not None and 0 <= int(h["mode"]) <= 101 and all(0 < int(h[k]) < MAX_SIDE for k in ("nx", "ny", "nz")):
            break
    else:
        raise _not_mrc(raw, path)
    mode = int(h["mode"])
    if mode not in MODES:
        raise InputError(
            "cannot use this kind of MRC data",
            file=path,
            expected=f"mode {sorted(MODES)}",
            found=f"mode {mode}",
            code="mrc-unsupported",
        )
    axes = _axes(h, path)
    cell = [float(h["cella"][k]) for k in "xyz"]
    samples = [int(h[k]) for k in ("mx", "my", "mz")]
    voxel = [c / m if m > 0 else 0.0 for c, m in zip(cell, samples)]
    starts = dict(zip(axes, (int(h[k]) for k in ("nzstart", "nystart", "nxstart"))))
    origin = [float(h["origin"][k]) for k in "xyz"]
    if not any(origin) or not all(map(math.isfinite, origin)):
        origin = [starts[i] * voxel[i] for i in range(3)]
    angles = [_angle(float(h["cellb"][k])) for k in ("alpha", "beta", "gamma")]
    sections, group = int(h["nz"]), int(h["ispg"])
    signed = _signed(raw, h, path) if mode == 0 else True
    return MrcHeader(
        shape=(sections, int(h["ny"]), int(h["nx"])),
        dtype=np.dtype("u1" if signed is False else MODES[mode]).newbyteorder(order),
        offset=HEADER_BYTES + max(int(h["nsymbt"]), 0),
        voxel_A=(voxel[0], voxel[1], voxel[2]),
        origin_A=(origin[0], origin[1], origin[2]),
        axes=(axes[0], axes[1], axes[2]),
        angles_deg=(angles[0], angles[1], angles[2]),
        volumes=sections // samples[2] if group >= VOLUME_STACK and 1 < samples[2] < sections else 1,
        is_stack=group == 0 and samples[2] == 1 < sections,
        signed=signed,
    )


def _angle(value: float) -> float:
    """A cell angle in degrees: 90 also for those that a program left at zero, and for a right angle in radians."""
    return 90.0 if abs(value) < NO_ANGLE or abs(value - math.pi / 2) < RADIANS_TOLERANCE else value


def _not_mrc(raw: bytes, path: object) -> InputError:
    hint = ""
    if kind := packing(raw):
        hint = f"It is packed with {kind}: unpack it."
    elif raw.startswith(b"version https://git-lfs"):
        hint = "It is a placeholder of git-lfs: fetch the file itself."
    expected = "an MRC header of 1024 bytes with sizes and a mode"
    size_text = f"{len(raw)} bytes" if len(raw) < HEADER_BYTES else None
    return InputError("not an MRC file", file=path, expected=expected, found=size_text, hint=hint, code="mrc-malformed")


def _axes(h: Any, path: object) -> list[int]:
    """Spatial axes of sections, rows and columns; zeros (old programs) mean z, y, x."""
    axes = [int(h[k]) - 1 for k in ("maps", "mapr", "mapc")]
    if axes == [-1, -1, -1]:
        return [2, 1, 0]
    if sorted(axes) != [0, 1, 2]:
        raise InputError(
            "an impossible axis order in the header",
            file=path,
            expected="MAPC, MAPR and MAPS being 1, 2 and 3 in some order",
            found=", ".join(str(a + 1) for a in reversed(axes)),
            code="mrc-malformed",
        )
    return axes


def _signed(raw: bytes, h: Any, path: object) -> bool | None:
    """Whether the bytes of mode 0 are signed, as far as the header says."""
    stamp, flags = np.frombuffer(raw, h.dtype["mode"], 2, 152).tolist()
    if stamp == IMOD_STAMP:
        if flags & IMOD_NIBBLES:
            raise InputError(
                "cannot use this kind of MRC data",
                file=path,
                expected="whole bytes",
                found="4-bit values",
                code="mrc-unsupported",
            )
        return bool(flags & IMOD_SIGNED)
    low, high = float(h["dmin"]), float(h["dmax"])
    if low < 0 and high < 128 and low < high:
        return True
    if low >= 0 and 128 <= high <= 255:
        return False
    return None


def with_byte_type(header: MrcHeader, sample: bytes, path: object) -> MrcHeader:
    """Decides by the data whether bytes are signed; the standard's "signed" unless that makes them much rougher."""
    data = np.frombuffer(sample, np.uint8)
    steps = [np.abs(np.diff(d.astype(np.int16))).sum(dtype=np.int64) for d in (data, data.view(np.int8))]
    unsigned = bool(steps[0] < 0.8 * steps[1])
    if unsigned:
        _say_unsigned(path, os.path.dirname(str(path)))
    return replace(header, dtype=np.dtype("u1" if unsigned else "i1"), signed=not unsigned)


_TOLD: set[str] = set()


def _say_unsigned(path: object, folder: str) -> None:
    """Once for each folder: there may be a stack for every micrograph."""
    if folder not in _TOLD:
        _TOLD.add(folder)
        logger.warning("%s: the header does not say whether bytes are signed; its data are unsigned (0 to 255)", path)


def read_header(path: object) -> MrcHeader:
    """The header of an MRC file.

    Raises:
        InputError: missing, not MRC, or shorter than its header says.
    """
    try:
        with open_regular(path) as stream:
            header = parse_header(stream.read(HEADER_BYTES), path)
            size = os.fstat(stream.fileno()).st_size
            if header.signed is None:
                stream.seek(header.offset)
                header = with_byte_type(header, stream.read(min(SAMPLE_BYTES, header.data_bytes)), path)
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path, code="file-unreadable") from None
    expected = header.offset + header.data_bytes
    if size < expected:
        raise InputError(
            "the file is truncated",
            file=path,
            expected=f"{expected} bytes for {header.shape[0]} sections",
            found=f"{size} bytes, {max(size - header.offset, 0) // header.image_bytes} whole sections",
            hint="Copy it again.",
            code="file-truncated",
        )
    return replace(header, spare_bytes=size - expected)
