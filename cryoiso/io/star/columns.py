"""Numbers out of STAR tables: poses, half-sets and optics groups of RELION 3.0 rows and 3.1, 4, 5 tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup
from cryoiso.io import conventions
from cryoiso.io.ranges import PIXEL_SIZE, RANGES, check_range
from cryoiso.io.star.text_column import MadeColumn, series_column, slabs

logger = logging.getLogger("cryoiso")

DEFAULT_AMPLITUDE_CONTRAST = 0.1
CTF_FLAGS = ("rlnCtfDataAreCtfPremultiplied", "rlnCtfDataArePhaseFlipped")


class Columns:
    """Numbers out of a table of text, with errors that name file, row and column."""

    def __init__(self, frame: Any, file: object, block: str = "", rows: np.ndarray | None = None) -> None:
        """
        Args:
            block: named in errors where it is not the table of particles.
            rows: 1-based row numbers, where they are not 1, 2, ...
        """
        self.frame, self.file = frame, file
        self.where = f" of data_{block}" if block else ""
        self.rows = np.arange(1, len(frame) + 1) if rows is None else rows

    def __len__(self) -> int:
        return len(self.frame)

    def has(self, *names: str) -> bool:
        return all(name in self.frame.columns for name in names)

    def text(self, name: str) -> list[str]:
        """The column as text.

        Raises:
            InputError: there is no such column.
        """
        return list(self.values(name))

    def values(self, name: str) -> MadeColumn:
        """As ``text``, but values become Python strings only when they are asked for."""
        if name not in self.frame.columns:
            raise InputError("a column is missing", file=self.file, expected=f"_{name}", code="star-column-missing")
        return series_column(self.frame[name])

    def text_slabs(self, name: str) -> Iterator[tuple[slice, list[str]]]:
        """The column some thousand rows at a time, with the rows; errors as ``text``."""
        values = self.values(name)
        for rows in slabs(len(values)):
            yield rows, values[rows]

    def number(self, name: str, default: float | None = None, finite: bool = True, ranged: bool = True) -> np.ndarray:
        """The column as (n,) float64; ``default`` where the file has no such column (None: an error).

        Args:
            ranged: values must be within ``ranges.RANGES``, if that knows the column.

        Raises:
            InputError: missing column, or a value that is no (finite) number, or one that cannot be.
        """
        if name not in self.frame.columns and default is not None:
            return np.full(len(self.frame), float(default))
        text = self.values(name)
        values = _cast(self.frame[name])
        if values is None:
            values = np.empty(len(text), np.float64)
            for rows in slabs(len(text)):
                values[rows] = _floats(text[rows])
        if finite and not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(
                f"bad value in column _{name}{self.where}",
                file=self.file,
                row=int(self.rows[row]),
                expected="a number",
                found=text[row][:80] or "nothing",
                code="value-not-a-number",
            )
        if finite and ranged and name in RANGES:
            check_range(values, RANGES[name], self.file, f"column _{name}{self.where}", rows=self.rows, shown=text)
        return values


def _cast(series: Any) -> np.ndarray | None:
    """Numbers of a column in one buffer, in a seventh of the time; None where Arrow takes any value for no number."""
    import pandas as pd
    import pyarrow as pa

    if not isinstance(series.dtype, pd.StringDtype):
        return None
    try:
        return np.array(pa.array(series).cast(pa.float64()), np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _floats(text: list[str]) -> np.ndarray:
    """Numbers of a column of text; NaN for what is no number (Python alone takes 1_000 and other scripts' digits)."""
    joined = "".join(text)
    if joined.isascii() and "_" not in joined:
        try:
            return np.array(list(map(float, text)), np.float64)
        except ValueError:
            pass
    return np.array([_float_or_nan(v) for v in text], np.float64)


def _float_or_nan(text: str) -> float:
    try:
        return float(text) if text.isascii() and "_" not in text else float("nan")
    except ValueError:
        return float("nan")


def rotation_of_table(columns: Columns) -> np.ndarray | None:
    """(n, 3, 3) rotations of rlnAngleRot, Tilt, Psi (and of rlnTomoSubtomogram* where there), or None without them."""
    if not columns.has("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"):
        return None
    angles = [columns.number(f"rlnAngle{a}") for a in ("Rot", "Tilt", "Psi")]
    rotation = conventions.euler_to_matrix(*angles)
    outer = subtomogram_rotation(columns)
    return rotation if outer is None else conventions.join_two_level(outer, rotation)


def subtomogram_rotation(columns: Columns) -> np.ndarray | None:
    """(n, 3, 3) rotations of rlnTomoSubtomogramRot, Tilt, Psi, or None without them."""
    names = [f"rlnTomoSubtomogram{a}" for a in ("Rot", "Tilt", "Psi")]
    if not columns.has(*names):
        return None
    return conventions.euler_to_matrix(*(columns.number(name) for name in names))


def shift_of_table(columns: Columns, pixel_size_A: np.ndarray) -> np.ndarray | None:
    """(n, 2) origins in Å: rlnOriginXAngst, YAngst, else rlnOriginX, Y (pixels); zero with angles alone, else None."""
    if columns.has("rlnOriginXAngst", "rlnOriginYAngst"):
        return np.stack([columns.number("rlnOriginXAngst"), columns.number("rlnOriginYAngst")], 1)
    if columns.has("rlnOriginX", "rlnOriginY"):
        pixels = np.stack([columns.number("rlnOriginX"), columns.number("rlnOriginY")], 1)
        lengths_A: np.ndarray = pixels * pixel_size_A[:, None]
        return lengths_A
    return np.zeros((len(columns), 2)) if columns.has("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi") else None


def half_of_table(columns: Columns) -> np.ndarray | None:
    """(n,) int8 of rlnRandomSubset: 1, 2, or 0 for anything else; None without the column."""
    if not columns.has("rlnRandomSubset"):
        return None
    values = columns.number("rlnRandomSubset")
    return np.where(np.isin(values, (1, 2)), values, 0).astype(np.int8)


def _zernike(text: str, name: str, table: Columns, row: int) -> tuple[float, ...]:
    inner = text.strip().strip("[]").strip()
    values = _floats(inner.split(",") if inner else [])
    what = f"column _{name}{table.where}"
    if not np.isfinite(values).all():
        raise InputError(
            f"bad value in {what}",
            file=table.file,
            row=row,
            expected="[a,b,...]",
            found=text[:80],
            code="value-not-a-number",
        )
    check_range(values[None], RANGES[name], table.file, what, rows=[row], shown=[text[:80]])
    return tuple(values.tolist())


def optics_of_table(columns: Columns, table: Columns, strict: bool) -> tuple[list[OpticsGroup], np.ndarray]:
    """Optics groups of an optics table and each particle's index into them; rows stay where they are."""
    numbers = table.number("rlnOpticsGroup").astype(np.int64)
    if len(numbers) == 0:
        raise InputError("the table of optics groups is empty", file=columns.file, code="optics-groups-invalid")
    if len(set(numbers.tolist())) != len(numbers):
        raise InputError(
            "an optics group is defined twice",
            file=columns.file,
            found=sorted(numbers.tolist()),
            code="optics-groups-invalid",
        )
    names = (
        table.text("rlnOpticsGroupName") if table.has("rlnOpticsGroupName") else [f"opticsGroup{i}" for i in numbers]
    )
    groups = _groups(table, strict, numbers, names)
    if not columns.has("rlnOpticsGroup") and len(numbers) == 1:
        optics = np.zeros(len(columns), np.int64)
    else:
        optics = _groups_of_rows(columns, numbers)
    return _with_flags_of_rows(groups, optics, columns, table), optics


def _groups_of_rows(columns: Columns, numbers: np.ndarray) -> np.ndarray:
    """(n,) index into the optics groups with these numbers."""
    wanted = columns.number("rlnOpticsGroup").astype(np.int64)
    order = np.argsort(numbers)
    place = np.minimum(np.searchsorted(numbers[order], wanted), len(numbers) - 1)
    optics = order[place]
    bad = np.flatnonzero(numbers[optics] != wanted)
    if len(bad):
        raise InputError(
            "unknown optics group",
            file=columns.file,
            row=int(bad[0]) + 1,
            expected=f"one of {sorted(numbers.tolist())}",
            found=int(wanted[bad[0]]),
            code="optics-groups-invalid",
        )
    return optics


def _with_flags_of_rows(
    groups: list[OpticsGroup], optics: np.ndarray, columns: Columns, table: Columns
) -> list[OpticsGroup]:
    """Optics groups with the CTF flags that the particles' own table has.

    Raises:
        InputError: both tables have a flag and disagree, or the images of a group do.
    """
    for name, attribute in zip(CTF_FLAGS, ("ctf_premultiplied", "phase_flipped"), strict=True):
        if not columns.has(name):
            continue
        flags = _flags(columns, name)
        for k, group in enumerate(groups):
            rows_of_group = np.flatnonzero(optics == k)
            if len(rows_of_group) == 0:
                continue
            wanted = getattr(group, attribute) if table.has(name) else bool(flags[rows_of_group[0]])
            bad = rows_of_group[flags[rows_of_group] != wanted]
            if len(bad):
                where = "the table of optics groups" if table.has(name) else f"row {rows_of_group[0] + 1}"
                raise InputError(
                    f"column _{name} differs within optics group {group.number}", file=columns.file,
                    row=int(bad[0]) + 1, expected=f"{int(wanted)}, as {where} has it", found=int(not wanted),
                    hint="Give the images of each kind an optics group of their own.", code="optics-group-mixed",
                )  # fmt: skip
            changed: dict[str, Any] = {attribute: wanted}
            groups[k] = replace(group, **changed)
    return groups


def _flags(table: Columns, name: str) -> np.ndarray:
    """(n,) bool of a column of 0 and 1; False where the file has no such column.

    Raises:
        InputError: anything else.
    """
    values = table.number(name, 0.0)
    bad = np.flatnonzero((values != 0) & (values != 1))
    if len(bad):
        raise InputError(
            f"bad value in column _{name}", file=table.file, row=int(bad[0]) + 1, expected="0 or 1",
            found=table.text(name)[int(bad[0])] or "nothing", code="value-not-a-number",
        )  # fmt: skip
    flags: np.ndarray = values == 1
    return flags


_PER_GROUP = (
    "rlnVoltage",
    "rlnSphericalAberration",
    "rlnAmplitudeContrast",
    "rlnImagePixelSize",
    "rlnMagnification",
    "rlnDetectorPixelSize",
    "rlnBeamTiltX",
    "rlnBeamTiltY",
    "rlnMagMat00",
    "rlnMagMat01",
    "rlnMagMat10",
    "rlnMagMat11",
    "rlnOpticsGroup",
    *CTF_FLAGS,
)


def optics_of_rows(columns: Columns, strict: bool) -> tuple[list[OpticsGroup], np.ndarray]:
    """Optics groups of a RELION 3.0 file: one for each different set of microscope values, in order of appearance."""
    names = [name for name in _PER_GROUP if columns.has(name)]
    if not names:
        optics = np.zeros(len(columns), np.int64)
        firsts = np.zeros(1, np.int64)
    else:
        for name in CTF_FLAGS:
            _flags(columns, name)
        values = np.stack([columns.number(name, ranged=strict) for name in names], 1)
        _, first, inverse = np.unique(values, axis=0, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        optics, firsts = rank[inverse.reshape(-1)], np.sort(first)
    table = Columns(columns.frame.iloc[firsts].reset_index(drop=True), columns.file, rows=firsts + 1)
    numbers = np.arange(1, len(firsts) + 1)
    return _groups(table, strict, numbers, [f"opticsGroup{i}" for i in numbers]), optics


def _groups(table: Columns, strict: bool, numbers: np.ndarray, names: list[str]) -> list[OpticsGroup]:
    default = None if strict else float("nan")
    if not table.has("rlnAmplitudeContrast") and strict:
        logger.warning("%s: no _rlnAmplitudeContrast; %g is used", table.file, DEFAULT_AMPLITUDE_CONTRAST)
    pixel = _pixel_sizes(table, default, strict)
    columns = {
        "voltage_kV": table.number("rlnVoltage", default, ranged=strict),
        "spherical_aberration_mm": table.number("rlnSphericalAberration", default, ranged=strict),
        "amplitude_contrast": table.number("rlnAmplitudeContrast", DEFAULT_AMPLITUDE_CONTRAST, ranged=strict),
        "box_px": table.number("rlnImageSize", 0).astype(int),
    }
    tilt = np.stack([table.number(f"rlnBeamTilt{k}", 0.0, ranged=strict) for k in "XY"], 1)
    unit = {"00": 1.0, "01": 0.0, "10": 0.0, "11": 1.0}
    magnification = np.stack([table.number(f"rlnMagMat{k}", v, ranged=strict) for k, v in unit.items()], 1)
    zernike = {
        name: [_zernike(t, name, table, int(row)) for row, t in zip(table.rows, table.text(name))]
        if table.has(name)
        else None
        for name in ("rlnOddZernike", "rlnEvenZernike")
    }
    premultiplied, flipped = (_flags(table, name) for name in CTF_FLAGS)
    groups = []
    for i, number in enumerate(numbers.tolist()):
        odd, even = (z[i] if z is not None else () for z in zernike.values())
        values: dict[str, Any] = {k: v[i].item() for k, v in columns.items()}
        groups.append(
            OpticsGroup(
                number=int(number),
                name=names[i],
                pixel_size_A=float(pixel[i]),
                beam_tilt_mrad=tuple(tilt[i].tolist()),
                magnification=tuple(magnification[i].tolist()),
                odd_zernike=odd,
                even_zernike=even,
                ctf_premultiplied=bool(premultiplied[i]),
                phase_flipped=bool(flipped[i]),
                **values,
            )
        )
    return groups


def _pixel_sizes(table: Columns, default: float | None, strict: bool) -> np.ndarray:
    if table.has("rlnImagePixelSize"):
        return table.number("rlnImagePixelSize", ranged=strict)
    if table.has("rlnMagnification", "rlnDetectorPixelSize"):
        detector, magnification = table.number("rlnDetectorPixelSize"), table.number("rlnMagnification")
        pixel = conventions.detector_pixel_size_A(detector, magnification)
        if strict:
            what = "the pixel size, from _rlnDetectorPixelSize (µm) and _rlnMagnification"
            check_range(pixel, PIXEL_SIZE, table.file, what, rows=table.rows)
        return pixel
    if default is not None:
        return np.full(len(table), default)
    raise InputError(
        "no pixel size",
        file=table.file,
        expected="_rlnImagePixelSize in the table of optics groups, or _rlnMagnification and _rlnDetectorPixelSize",
        code="pixel-size-missing",
    )
