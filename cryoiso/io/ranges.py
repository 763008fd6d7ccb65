"""What a number in a particle file may be: one table for STAR columns and the fields of .cs files.

The limits are wide: they hold everything that microscopes and refinements give, and keep out other units (volts, µm,
nm), other quantities and damaged numbers. Defocus is in Å and positive for underfocus; see ``check_defocus``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cryoiso.core.errors import InputError

logger = logging.getLogger("cryoiso")


@dataclass(frozen=True)
class Range:
    """Smallest and largest admissible value, both included."""

    low: float
    high: float
    unit: str = ""
    integer: bool = False
    hint: str = ""

    def __str__(self) -> str:
        kind = "an integer from " if self.integer else ""
        return f"{kind}{self.low:,.12g} to {self.high:,.12g}{' ' if self.unit else ''}{self.unit}"


PIXEL_SIZE = Range(0.2, 100, "Å", hint="Pixel sizes are in Å.")
_DEFOCUS = Range(-100_000, 200_000, "Å", hint="Defocus is in Å, positive for underfocus.")
_ANGLE = Range(-36_000, 36_000, "°")
_ORIGIN_A, _ORIGIN_PX = Range(-10_000, 10_000, "Å"), Range(-4_096, 4_096, "px")
_DIAGONAL, _OFF_DIAGONAL = Range(0.5, 2), Range(-0.5, 0.5)

RANGES: dict[str, Range] = {
    "rlnVoltage": Range(20, 3_000, "kV", hint="Voltages are in kV."),
    "rlnSphericalAberration": Range(-1, 20, "mm", hint="The spherical aberration is in mm."),
    "rlnAmplitudeContrast": Range(0, 1, hint="The amplitude contrast is a fraction: 0.1, not 10 for 10 %."),
    "rlnImagePixelSize": PIXEL_SIZE,
    "rlnMagnification": Range(10, 10_000_000),
    "rlnDetectorPixelSize": Range(0.1, 1_000, "µm"),
    "rlnImageSize": Range(0, 65_536, "px", integer=True),
    "rlnOpticsGroup": Range(0, 10_000_000, integer=True),
    "rlnBeamTiltX": Range(-100, 100, "mrad"),
    "rlnBeamTiltY": Range(-100, 100, "mrad"),
    "rlnMagMat00": _DIAGONAL,
    "rlnMagMat01": _OFF_DIAGONAL,
    "rlnMagMat10": _OFF_DIAGONAL,
    "rlnMagMat11": _DIAGONAL,
    "rlnOddZernike": Range(-100_000, 100_000),
    "rlnEvenZernike": Range(-100_000, 100_000),
    "rlnDefocusU": _DEFOCUS,
    "rlnDefocusV": _DEFOCUS,
    "rlnDefocusAngle": _ANGLE,
    "rlnPhaseShift": Range(-360, 360, "°"),
    "rlnCtfBfactor": Range(-2_000, 5_000, "Å²"),
    "rlnCtfScalefactor": Range(0, 100),
    "rlnAngleRot": _ANGLE,
    "rlnAngleTilt": _ANGLE,
    "rlnAnglePsi": _ANGLE,
    "rlnTomoSubtomogramRot": _ANGLE,
    "rlnTomoSubtomogramTilt": _ANGLE,
    "rlnTomoSubtomogramPsi": _ANGLE,
    "rlnOriginXAngst": _ORIGIN_A,
    "rlnOriginYAngst": _ORIGIN_A,
    "rlnOriginX": _ORIGIN_PX,
    "rlnOriginY": _ORIGIN_PX,
    "rlnRandomSubset": Range(0, 2, integer=True),
}
"""Admissible values by STAR column. A tilt may be negative or beyond 180°: it is an angle like any other."""

_DEG = 180 / np.pi
CS_FIELDS: dict[str, tuple[str, float]] = {
    "blob/psize_A": ("rlnImagePixelSize", 1.0),
    "alignments3D/psize_A": ("rlnImagePixelSize", 1.0),
    "alignments3D/shift": ("rlnOriginX", 1.0),
    "ctf/accel_kv": ("rlnVoltage", 1.0),
    "ctf/cs_mm": ("rlnSphericalAberration", 1.0),
    "ctf/amp_contrast": ("rlnAmplitudeContrast", 1.0),
    "ctf/df1_A": ("rlnDefocusU", 1.0),
    "ctf/df2_A": ("rlnDefocusV", 1.0),
    "ctf/df_angle_rad": ("rlnDefocusAngle", _DEG),
    "ctf/phase_shift_rad": ("rlnPhaseShift", _DEG),
    "ctf/bfactor": ("rlnCtfBfactor", 1.0),
    "ctf/scale": ("rlnCtfScalefactor", 1.0),
}
"""Field of a .cs file -> the column whose limits it has, and the factor into that column's unit."""

NO_DEFOCUS_A = 100.0
"""A smaller defocus gives no contrast without a phase plate: it is in µm, or was not measured."""
TINY_A, SMALL_A = 10.0, 2_500.0
PHASE_PLATE_DEG = 20.0
ABSORBING = 0.5
"""From this amplitude contrast on, images have contrast in focus (simulated images without a CTF have 1)."""


def check_range(
    values: np.ndarray,
    limits: Range,
    file: object,
    what: str,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    shown: Sequence[object] | None = None,
    factor: float = 1.0,
) -> None:
    """Makes sure that all values are numbers within limits.

    Args:
        values: (n,) or (n, k), multiplied by ``factor`` for the comparison.
        what: names the quantity, as in "column _rlnVoltage".
        rows: 1-based row numbers of the values; None: no row is named.
        shown: the values as they stand in the file.

    Raises:
        InputError: names the first value that is not, and its row.
    """
    table = np.asarray(values, np.float64).reshape(len(values), -1) * factor
    good = np.isfinite(table) & (table >= limits.low) & (table <= limits.high)
    if limits.integer:
        good &= table == np.round(table)
    bad = np.flatnonzero(~good.all(1))
    if not len(bad):
        return
    first = int(bad[0])
    raw = np.asarray(values, np.float64).reshape(len(values), -1)[first]
    others = f" (and {len(bad) - 1:,} more rows)" if len(bad) > 1 and rows is not None else ""
    raise InputError(
        f"impossible value in {what}",
        file=file,
        row=None if rows is None else int(rows[first]),
        expected=f"{limits}" if factor == 1.0 else f"{limits.low / factor:.6g} to {limits.high / factor:.6g}",
        found=(f"{shown[first]}" if shown is not None else ", ".join(f"{v:.9g}" for v in raw)) + others,
        hint=limits.hint,
        code="value-out-of-range",
    )


def check_defocus(
    u_A: np.ndarray, v_A: np.ndarray, phase_shift_deg: np.ndarray, amplitude_contrast: np.ndarray, file: object
) -> None:
    """Is this set's defocus in Å, positive for underfocus, and measured? Values near zero need a phase plate.

    Args:
        u_A, v_A, phase_shift_deg, amplitude_contrast: (n,), NaN where unknown.

    Raises:
        InputError: no or hardly any defocus without a phase plate (0 or µm), or mostly negative.
    """
    known = np.isfinite(u_A + v_A)
    if not known.any():
        return
    low = np.minimum(np.abs(u_A), np.abs(v_A))
    plate = np.abs(phase_shift_deg) >= PHASE_PLATE_DEG
    dark = known & ~plate & ~(amplitude_contrast >= ABSORBING)
    bad, expected = dark & (low < NO_DEFOCUS_A), f"at least {NO_DEFOCUS_A:g} Å (less only with a phase plate)"
    tiny = known & (low < TINY_A) & (low > 0)
    if not bad.any() and 2 * tiny.sum() > known.sum():
        bad, expected = tiny, f"0, or at least {TINY_A:g} Å"
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(
            "no usable defocus" + (f" in {int(bad.sum()):,} rows, the first of them" if bad.sum() > 1 else ""),
            file=file, row=row + 1, expected=expected, found=f"{u_A[row]:g} and {v_A[row]:g}",
            hint="Defocus is in Å: 1 µm is 10000. Where it is 0, the CTF was not estimated: estimate it, or remove "
            "these rows.", code="defocus-invalid",
        )  # fmt: skip
    over = known & (u_A + v_A < 0)
    if 2 * (over & dark).sum() > known.sum():
        row = int(np.flatnonzero(over)[0])
        raise InputError(
            f"negative defocus in {int(over.sum()):,} of {len(over):,} rows", file=file, row=row + 1,
            expected="positive values: underfocus", found=f"{u_A[row]:g} and {v_A[row]:g}",
            hint="If the program that wrote it counts underfocus as negative, change the sign of both defocus columns.",
            code="defocus-invalid",
        )  # fmt: skip
    if over.any():
        logger.warning("%s: %d rows have a negative defocus (the first is row %d); they are taken as overfocused",
                       file, int(over.sum()), int(np.flatnonzero(over)[0]) + 1)  # fmt: skip
    if dark.any() and float(np.median(low[dark])) < SMALL_A:
        logger.warning("%s: the defocus is small (median %.0f Å); is it in nm?", file, float(np.median(low[dark])))


def check_scale(scale: np.ndarray, file: object, what: str) -> None:
    """
    Raises:
        InputError: the CTF of every particle is multiplied by 0.
    """
    if len(scale) and not np.any(scale):
        raise InputError(
            f"0 in every row of {what}", file=file, expected="a scale, usually 1",
            hint="It would multiply every image by 0. Remove the column, or estimate the CTF again.",
            code="value-out-of-range",
        )  # fmt: skip
