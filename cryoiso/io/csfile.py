"""The bytes of a cryoSPARC .cs file into named arrays: header, sizes and types checked before anything is believed.

A .cs file is a NumPy ``.npy`` file with a one-dimensional structured array, a row per particle. cryoSPARC can also save
the compressed format CSDAT, which only its own package ``cryosparc-tools`` reads; it is used where it is installed.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.regular_file import open_regular

NUMPY, CSDAT, ZIP, LFS = b"\x93NUMPY", b"CSDAT", b"PK", b"version https://git-lfs"
MOST_HEADER_BYTES = 2**21
"""A 3D classification writes seven fields per class: 300 classes take about 100 kB."""
MOST_FIELDS = 20_000
MOST_ROW_BYTES = 2**22


class Field(NamedTuple):
    """What the values of a field must be."""

    kinds: str
    """NumPy's letters for them"""
    shape: tuple[int, ...] = ()
    words: str = "numbers"


NUMBER = Field("fiu")
FIELDS = {
    "uid": Field("iu", words="64-bit integers"),
    "blob/path": Field("SU", words="text"),
    "blob/idx": Field("iu", words="integers"),
    "blob/shape": Field("iu", (2,), "two integers per row"),
    "ctf/exp_group_id": Field("iu", words="integers"),
    "alignments3D/split": NUMBER,
    "alignments3D/class": Field("iu", words="integers"),
    "alignments3D/pose": Field("f", (3,), "three numbers per row"),
    "alignments3D/shift": Field("fiu", (2,), "two numbers per row"),
    "alignments3D/psize_A": NUMBER,
    "blob/psize_A": NUMBER,
    "blob/sign": NUMBER,
    "ctf/tilt_A": Field("f", (2,), "two numbers per row"),
    "ctf/anisomag": Field("f", (4,), "four numbers per row"),
    **dict.fromkeys(
        (
            *("ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast", "ctf/df1_A", "ctf/df2_A", "ctf/df_angle_rad"),
            *("ctf/phase_shift_rad", "ctf/bfactor", "ctf/scale"),
        ),
        NUMBER,
    ),
}
"""Every field that is read, by name; others are not looked at."""
MAY_BE_ABSENT = "alignments3D/split"
"""Its odd values are told apart by whoever reads it, NaN included."""


def load_cs(path: object) -> dict[str, np.ndarray]:
    """Field -> (n, ...) values of a .cs file, those of ``FIELDS`` of the right kind, shape and finite.

    Raises:
        InputError: not a .cs file, cut short, larger than its header says or smaller, without particles or uid, a
            particle that stands twice, a field of another type, a value that is no number.
    """
    array = read_rows(path)
    names = array.dtype.names or ()
    if "uid" not in names:
        raise InputError(
            "not a cryoSPARC particle file",
            file=path,
            expected="a field uid",
            found=_listed(names),
            code="cs-malformed",
        )
    if not len(array):
        raise InputError("no particles in the file", file=path, code="particles-too-few")
    data = {name: array[name] for name in names}
    for name, field in FIELDS.items():
        if name in data:
            data[name] = _checked(data[name], name, field, path)
    _require_unique(data["uid"], path)
    return data


def read_rows(path: object) -> np.ndarray:
    """(n,) structured array of a .cs file as it stands, its fields not checked.

    Raises:
        InputError: not a .cs file, cut short, larger than its header says or smaller.
    """
    try:
        with open_regular(path) as stream:
            return _read(stream, path)
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=path, code="file-unreadable") from None


def _read(stream: IO[bytes], path: object) -> np.ndarray:
    """The structured array, one-dimensional and complete."""
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(len(LFS))
    if start[:6] == NUMPY:
        stream.seek(6)
        return _read_numpy(stream, size, path)
    if start[1:6] == CSDAT:
        return _read_csdat(path)
    if start == LFS:
        raise InputError(
            "a pointer of git-lfs, not the file itself",
            file=path,
            hint="Fetch it: git lfs pull --include NAME.",
            code="cs-malformed",
        )
    if start[:2] == ZIP:
        raise InputError(
            "a zip archive, not a .cs file",
            file=path,
            hint="Unpack it, and give the .cs file inside.",
            code="cs-malformed",
        )
    raise InputError(
        "not a cryoSPARC .cs file", file=path, expected="a NumPy array", found=repr(start[:6]), code="cs-malformed"
    )


def _read_numpy(stream: IO[bytes], size: int, path: object) -> np.ndarray:
    version = stream.read(2)
    if len(version) < 2 or version[0] not in (1, 2, 3):
        raise InputError("not a cryoSPARC .cs file: unknown version of NumPy's format", file=path, code="cs-malformed")
    width = 2 if version[0] == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    left = size - stream.tell()
    if length > min(left, MOST_HEADER_BYTES):
        length_text = f"{length:,} bytes" + (f", {max(left, 0):,} in the file" if length > left else "")
        raise InputError("the header is truncated or too long", file=path,
                         expected=f"at most {MOST_HEADER_BYTES:,} bytes", found=length_text,
                         code="cs-malformed")  # fmt: skip
    dtype, shape = _header(stream.read(length).decode("utf-8" if version[0] == 3 else "latin-1", "replace"), path)
    if len(shape) != 1:
        raise InputError(
            "not a list of particles", file=path, expected="one dimension", found=f"shape {shape}", code="cs-malformed"
        )
    expected, left = shape[0] * dtype.itemsize, size - stream.tell()
    if left != expected:
        raise InputError(
            "the file is truncated" if left < expected else "the file is longer than its header says", file=path,
            expected=f"{shape[0]:,} rows of {dtype.itemsize:,} bytes", found=f"{left:,} bytes",
            hint="Copy it again, or export it again from cryoSPARC.", code="file-truncated",
        )  # fmt: skip
    data = stream.read(expected)
    if len(data) < expected:
        raise InputError(
            "the file is truncated",
            file=path,
            expected=f"{expected:,} bytes",
            found=f"{len(data):,}",
            code="file-truncated",
        )
    return np.frombuffer(data, dtype)


def _header(text: str, path: object) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type of a row and shape, from the text of a NumPy header."""
    try:
        # Python 2 wrote long integers as 4L
        header = ast.literal_eval(re.sub(r"(?<=\d)L\b", "", text.strip()))
        order, shape = header["fortran_order"], header["shape"]
        dtype = np.lib.format.descr_to_dtype(header["descr"])
    except (ValueError, SyntaxError, TypeError, LookupError, RecursionError, MemoryError, ArithmeticError) as error:
        kind = type(error).__name__
        raise InputError(
            f"not a cryoSPARC .cs file: its header cannot be read ({kind})", file=path, code="cs-malformed"
        ) from None
    good = isinstance(order, bool) and isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not good or dtype.names is None or dtype.hasobject:
        what = "Python objects" if dtype.hasobject else f"{dtype}"[:80]
        raise InputError(
            "not a cryoSPARC .cs file", file=path, expected="a structured array", found=what, code="cs-malformed"
        )
    if len(dtype.names) > MOST_FIELDS or not 0 < dtype.itemsize <= MOST_ROW_BYTES:
        raise InputError(
            "impossible rows", file=path, expected=f"1 to {MOST_FIELDS:,} fields and {MOST_ROW_BYTES:,} bytes",
            found=f"{len(dtype.names):,} fields of {dtype.itemsize:,} bytes", code="cs-malformed",
        )  # fmt: skip
    return dtype, shape


def _read_csdat(path: object) -> np.ndarray:
    try:
        from cryosparc.dataset import Dataset
    except ImportError:
        raise InputError(
            "a .cs file in cryoSPARC's compressed format CSDAT", file=path,
            hint="Install cryosparc-tools beside cryoiso (pip install cryosparc-tools), or save it as a NumPy file "
            "with that package: Dataset.load(FILE).save(NEW, format=1).", code="cs-compressed",
        ) from None  # fmt: skip
    load: Callable[[str], Any] = Dataset.load
    try:
        array = np.asarray(load(str(path)).to_records(fixed=True))
    except Exception as error:  # another package's own errors, of whatever kind
        raise InputError(f"cryosparc-tools cannot read it: {error}", file=path, code="cs-malformed") from None
    if array.dtype.names is None or array.dtype.hasobject or array.ndim != 1:
        raise InputError("not a list of particles", file=path, found=f"{array.dtype}"[:80], code="cs-malformed")
    return array


def _checked(values: np.ndarray, name: str, field: Field, path: object) -> np.ndarray:
    """The same values in this machine's byte order, if they are what the field should hold."""
    if values.dtype.kind not in field.kinds or values.shape[1:] != field.shape or not values.dtype.itemsize:
        type_text = f"type {values.dtype}" + (f", {values.shape[1:]} values per row" if values.shape[1:] else "")
        raise InputError(
            f"field {name} is of the wrong type", file=path, expected=field.words, found=type_text, code="cs-malformed"
        )
    values = values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind == "f" and name != MAY_BE_ABSENT:
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if len(bad):
            row = int(bad[0])
            raise InputError(
                f"bad value in field {name}",
                file=path,
                row=row + 1,
                expected="a number",
                found=values[row],
                code="value-not-a-number",
            )
    return values


def _require_unique(uid: np.ndarray, path: object) -> None:
    _, first = np.unique(uid, return_index=True)
    if len(first) == len(uid):
        return
    row = int(np.setdiff1d(np.arange(len(uid)), first)[0])
    other = int(np.flatnonzero(uid == uid[row])[0])
    problem = f"the same particle (uid) is in two rows: {other + 1} and {row + 1}"
    raise InputError(problem, file=path, row=row + 1, found=int(uid[row]), code="duplicate-particles")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "no fields"
