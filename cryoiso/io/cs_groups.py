"""Optics groups of cryoSPARC particle files: exposure groups, microscope values, beam tilt and magnification."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup
from cryoiso.io import conventions
from cryoiso.io.ranges import RANGES, check_range

MOST_PIXELS = 2**16
NAME = "exp_group_"
"""How the optics group of an exposure group is called, before its number."""


def column_or(data: dict[str, np.ndarray], name: str, default: float) -> np.ndarray:
    """(n,) float64: a field, or ``default`` where there is none."""
    n = len(data["uid"])
    return data[name].astype(np.float64) if name in data else np.full(n, default)


def has_tilt_without_cs(data: dict[str, np.ndarray]) -> bool:
    """Whether a third-order term is too large for the spherical aberration to be a beam tilt."""
    return "ctf/tilt_A" in data and bool(np.isnan(_tilt_mrad(data)).any())


def _tilt_mrad(data: dict[str, np.ndarray]) -> np.ndarray:
    """(n, 2); NaN where the spherical aberration is so small that the term is not one of beam tilt."""
    spherical = data.get("ctf/cs_mm", np.zeros(len(data["uid"])))
    tilt: np.ndarray = conventions.beam_tilt_mrad(data["ctf/tilt_A"], spherical)
    known: np.ndarray = np.where(np.abs(tilt) <= RANGES["rlnBeamTiltX"].high, tilt, np.nan)
    return known


def _beam_tilt(data: dict[str, np.ndarray]) -> np.ndarray:
    """(n, 2) mrad; 0 where it is not known."""
    if "ctf/tilt_A" not in data:
        return np.zeros((len(data["uid"]), 2))
    tilt: np.ndarray = np.nan_to_num(_tilt_mrad(data), nan=0.0)
    return tilt


def _magnification(data: dict[str, np.ndarray], path: object) -> np.ndarray:
    """(n, 4), row by row."""
    anisomag = data.get("ctf/anisomag", np.zeros((len(data["uid"]), 4)))
    matrix = conventions.magnification_of_anisomag(anisomag)
    rows = np.arange(1, len(matrix) + 1)
    for columns, name in (((0, 3), "rlnMagMat00"), ((1, 2), "rlnMagMat01")):
        what = "field ctf/anisomag, as a magnification"
        check_range(matrix[:, columns], RANGES[name], path, what, rows=rows)
    return matrix


def _shortest(value: Any) -> float:
    """The shortest decimal number that this float32 can stand for: 2.95, not 2.9500000477."""
    return float(str(np.float32(value)))


def groups_of_fields(data: dict[str, np.ndarray], path: object) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """One optics group for each different set of exposure group, microscope values, pixel size and box.

    Args:
        data: field -> (n, ...) values. path: for messages.

    Returns:
        The groups in order of appearance, and (n,) int32 index into them.

    Raises:
        InputError: images that are not square or of an impossible size, or an impossible magnification.
    """
    n = len(data["uid"])
    box = np.zeros(n)
    if "blob/shape" in data:
        box = data["blob/shape"][:, 1]
        bad = np.flatnonzero((data["blob/shape"][:, 0] != box) | (box < 1) | (box > MOST_PIXELS))
        if len(bad):
            side, other = data["blob/shape"][bad[0]].tolist()
            raise InputError("impossible size of an image (blob/shape)", file=path, row=int(bad[0]) + 1,
                             expected=f"square images of at most {MOST_PIXELS:,} px",
                             found=f"{side} x {other}", code="stack-not-of-images")  # fmt: skip
    keys = [
        data.get("ctf/exp_group_id", np.zeros(n)).astype(np.float64),
        column_or(data, "ctf/accel_kv", np.nan),
        column_or(data, "ctf/cs_mm", np.nan),
        column_or(data, "ctf/amp_contrast", np.nan),
        column_or(data, "blob/psize_A", np.nan),
        box.astype(np.float64),
    ]
    tilt, magnification = _beam_tilt(data), _magnification(data, path)
    keys += [*tilt.T, *magnification.T]
    table = np.nan_to_num(np.stack(keys, 1), nan=-1e300)
    _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    groups = []
    for number, row in enumerate(np.sort(first).tolist(), start=1):
        values = [float(k[row]) for k in keys]
        voltage, spherical, amplitude, pixel = (_shortest(v) for v in values[1:5])
        groups.append(
            OpticsGroup(
                number, f"{NAME}{values[0]:.0f}", pixel, int(values[5]), voltage, spherical, amplitude,
                beam_tilt_mrad=(values[6], values[7]), magnification=(values[8], values[9], values[10], values[11]),
            )
        )  # fmt: skip
    return tuple(groups), rank[inverse.reshape(-1)].astype(np.int32)
