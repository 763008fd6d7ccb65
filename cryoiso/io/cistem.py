"""cisTEM's parameter files: STAR with its own labels, and FREALIGN's .par.

Conventions as cisTEM's own export to RELION has them (its source, read, not run): phi, theta, psi are rot, tilt, psi;
the shifts are in Å and of the other sign than rlnOriginXAngst, YAngst; defocus in Å with RELION's angle; the phase
shift is in radians. A row names its image by its place in the one stack, from 1. Angles have two decimals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles
from cryoiso.io import conventions
from cryoiso.io.atomic import write_text
from cryoiso.io.star.columns import Columns
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks

MARK = "cisTEMAnglePsi"
POSE = ("cisTEMAnglePhi", "cisTEMAngleTheta", "cisTEMAnglePsi", "cisTEMXShift", "cisTEMYShift")
SCORE = "cisTEMScore"
_PAR = ("C", "PSI", "THETA", "PHI", "SHX", "SHY")


@dataclass(frozen=True)
class Parameters:
    """What a parameter file says of n particles."""

    position: np.ndarray
    """(n,) place in the stack, from 0."""
    rotation: np.ndarray
    """(n, 3, 3)"""
    shift_A: np.ndarray
    """(n, 2) as rlnOriginXAngst, YAngst."""
    score: np.ndarray | None = None
    """(n,)"""


def write_cistem(path: object, particles: Particles) -> None:
    """Writes particles, in the order of their stack, as a cisTEM STAR file. Poses that are not known are 0."""
    n, value = len(particles), particles.group_values
    angles = np.zeros((n, 3))
    if particles.rotation is not None:
        angles = conventions.matrix_to_euler(np.asarray(particles.rotation, np.float64))
    shift = np.zeros((n, 2)) if particles.shift_A is None else -np.asarray(particles.shift_A, np.float64)
    tilt = np.array([g.beam_tilt_mrad for g in particles.groups])[particles.optics]
    half = np.zeros(n) if particles.half is None else particles.half
    fixed: Callable[[float], np.ndarray] = lambda number: np.full(n, number)  # noqa: E731
    columns = {
        "cisTEMPositionInStack": ("%d", np.arange(1, n + 1)),
        "cisTEMAnglePsi": ("%.4f", angles[:, 2]),
        "cisTEMAngleTheta": ("%.4f", angles[:, 1]),
        "cisTEMAnglePhi": ("%.4f", angles[:, 0]),
        "cisTEMXShift": ("%.4f", shift[:, 0]),
        "cisTEMYShift": ("%.4f", shift[:, 1]),
        "cisTEMDefocus1": ("%.2f", particles.defocus_u_A),
        "cisTEMDefocus2": ("%.2f", particles.defocus_v_A),
        "cisTEMDefocusAngle": ("%.4f", particles.defocus_angle_deg),
        "cisTEMPhaseShift": ("%.6f", np.radians(particles.phase_shift_deg)),
        "cisTEMOccupancy": ("%.2f", fixed(100)),
        "cisTEMLogP": ("%d", fixed(0)),
        "cisTEMSigma": ("%.4f", fixed(10)),
        "cisTEMScore": ("%.2f", fixed(0)),
        "cisTEMScoreChange": ("%.2f", fixed(0)),
        "cisTEMPixelSize": ("%.6f", value("pixel_size_A")),
        "cisTEMMicroscopeVoltagekV": ("%.2f", value("voltage_kV")),
        "cisTEMMicroscopeCsMM": ("%.4f", value("spherical_aberration_mm")),
        "cisTEMAmplitudeContrast": ("%.4f", value("amplitude_contrast")),
        "cisTEMBeamTiltX": ("%.4f", tilt[:, 0]),
        "cisTEMBeamTiltY": ("%.4f", tilt[:, 1]),
        "cisTEMImageShiftX": ("%.3f", fixed(0)),
        "cisTEMImageShiftY": ("%.3f", fixed(0)),
        "cisTEMAssignedSubset": ("%d", half),
    }
    text = {name: [form % number for number in values.tolist()] for name, (form, values) in columns.items()}
    write_blocks(path, [StarBlock("", True, text)])


def write_par(path: Path, particles: Particles) -> None:
    """Writes particles, in the order of their stack, as a FREALIGN 9 / cisTEM .par file."""
    angles = np.zeros((len(particles), 3))
    if particles.rotation is not None:
        angles = conventions.matrix_to_euler(np.asarray(particles.rotation, np.float64))
    shift = np.zeros((len(particles), 2)) if particles.shift_A is None else -particles.shift_A
    head = "C           PSI   THETA     PHI       SHX       SHY     MAG  INCLUDE   DF1      DF2  ANGAST  PSHIFT     OCC"
    lines = [head + "      LogP      SIGMA   SCORE  CHANGE"]
    rows = zip(
        angles.tolist(), shift.tolist(), particles.defocus_u_A.tolist(), particles.defocus_v_A.tolist(),
        particles.defocus_angle_deg.tolist(), np.radians(particles.phase_shift_deg).tolist(), strict=True,
    )  # fmt: skip
    for number, ((phi, theta, psi), (x, y), du, dv, axis, phase) in enumerate(rows, start=1):
        lines.append(
            f"{number:7d} {psi:8.2f} {theta:7.2f} {phi:7.2f} {x:9.2f} {y:9.2f} {10000:7d} {0:5d} {du:8.1f} {dv:8.1f} "
            f"{axis:7.2f} {phase:7.2f} {100:7.2f} {0:9d} {10:10.4f} {0:7.2f} {0:7.2f}"
        )
    write_text(path, "\n".join(lines) + "\n")


def is_cistem(blocks: list[StarBlock]) -> bool:
    """Whether the tables of a STAR file are cisTEM's."""
    return any(block.loop and MARK in block.columns for block in blocks)


def read_cistem(path: object, blocks: list[StarBlock] | None = None) -> Parameters:
    """Poses of a cisTEM STAR file.

    Raises:
        InputError: no such file or columns, or a value that is no number.
    """
    blocks = read_blocks(path) if blocks is None else blocks
    table = next((block for block in blocks if block.loop and MARK in block.columns), None)
    if table is None:
        raise InputError("no table of cisTEM", file=path, expected=f"_{MARK}", code="star-table-missing")
    columns = Columns(table.frame(), path)
    phi, theta, psi, x, y = (columns.number(name) for name in POSE)
    score = columns.number(SCORE) if columns.has(SCORE) else None
    position = columns.number("cisTEMPositionInStack").astype(np.int64) - 1
    return Parameters(position, conventions.euler_to_matrix(phi, theta, psi), -np.stack([x, y], 1), score)


def read_par(path: Path) -> Parameters:
    """Poses of a .par file: rows that do not begin with C, their first six columns as in its head.

    Raises:
        InputError: no such file, or rows that are not of numbers.
    """
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    rows = [line.split()[: len(_PAR)] for line in lines if line.strip() and not line.lstrip().startswith("C")]
    try:
        values = np.array(rows, np.float64).reshape(len(rows), len(_PAR))
    except ValueError:
        values = np.full((1, len(_PAR)), np.nan)
    if not len(rows) or not np.isfinite(values).all():
        raise InputError(
            "not a .par file", file=path, expected=" ".join(_PAR) + " in every row", code="value-not-a-number"
        )
    number, psi, theta, phi, x, y = values.T
    rotation = conventions.euler_to_matrix(phi, theta, psi)
    return Parameters(number.astype(np.int64) - 1, rotation, -np.stack([x, y], 1))
