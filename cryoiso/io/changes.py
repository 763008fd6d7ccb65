"""What differs between two states of the same particles, as far as both a STAR and a .cs file can say it.

Each quantity has a tolerance: a program that reads a file and writes it again rounds to six decimals or to float32,
which is no change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cryoiso.core.types import Particles
from cryoiso.io.cs_write import classes, exposure_group, group_vectors, image_names, signs


@dataclass(frozen=True)
class Quantity:
    """One thing that both kinds of file say of a particle."""

    fields: tuple[str, ...]
    """of the .cs file"""
    tolerance: float
    """largest difference that is rounding; of rotations: of a matrix element"""


SIX_DECIMALS = 1.1e-6
QUANTITIES: dict[str, Quantity] = {
    "image": Quantity(("blob/path", "blob/idx"), 0),
    "box": Quantity(("blob/shape",), 0),
    "pixel": Quantity(("blob/psize_A",), SIX_DECIMALS),
    "sign": Quantity(("blob/sign",), 0),
    "exposure group": Quantity(("ctf/exp_group_id",), 0),
    "voltage": Quantity(("ctf/accel_kv",), SIX_DECIMALS),
    "spherical aberration": Quantity(("ctf/cs_mm",), SIX_DECIMALS),
    "amplitude contrast": Quantity(("ctf/amp_contrast",), SIX_DECIMALS),
    "beam tilt": Quantity(("ctf/tilt_A",), SIX_DECIMALS),
    "magnification": Quantity(("ctf/anisomag",), SIX_DECIMALS),
    "defocus U": Quantity(("ctf/df1_A",), SIX_DECIMALS),
    "defocus V": Quantity(("ctf/df2_A",), SIX_DECIMALS),
    "defocus angle": Quantity(("ctf/df_angle_rad",), SIX_DECIMALS),
    "phase shift": Quantity(("ctf/phase_shift_rad",), SIX_DECIMALS),
    "B-factor": Quantity(("ctf/bfactor",), SIX_DECIMALS),
    "scale": Quantity(("ctf/scale",), SIX_DECIMALS),
    "half-set": Quantity(("alignments3D/split",), 0),
    "rotation": Quantity(("alignments3D/pose",), 5e-8),
    "shift": Quantity(("alignments3D/shift", "alignments3D/psize_A"), SIX_DECIMALS),
    "class": Quantity(("alignments3D/class",), 0),
}
OF_GROUPS = (
    "box", "pixel", "exposure group", "voltage", "spherical aberration", "amplitude contrast", "beam tilt",
    "magnification",
)  # fmt: skip


def quantities_of(particles: Particles, file: object = None) -> dict[str, np.ndarray]:
    """Quantity -> (n, ...) values of what is known of particles."""
    value = particles.group_values
    stacks, index = image_names(particles, file)
    quantities: dict[str, np.ndarray | None] = {
        "image": np.array([f"{i}@{stack}" for i, stack in zip(index.tolist(), stacks, strict=True)], dtype=object),
        "box": value("box_px"),
        "pixel": value("pixel_size_A"),
        "sign": signs(particles),
        "exposure group": np.array([exposure_group(g) for g in particles.groups])[particles.optics],
        "voltage": value("voltage_kV"),
        "spherical aberration": value("spherical_aberration_mm"),
        "amplitude contrast": value("amplitude_contrast"),
        "beam tilt": group_vectors(particles, "beam_tilt_mrad"),
        "magnification": group_vectors(particles, "magnification"),
        "defocus U": particles.defocus_u_A,
        "defocus V": particles.defocus_v_A,
        "defocus angle": particles.defocus_angle_deg,
        "phase shift": particles.phase_shift_deg,
        "B-factor": particles.ctf_bfactor_A2,
        "scale": particles.ctf_scale,
        "half-set": particles.half if particles.half is not None and particles.half.any() else None,
        "rotation": particles.rotation,
        "shift": particles.shift_A if particles.rotation is not None else None,
        "class": classes(particles) if particles.rotation is not None else None,
    }
    known = {name: values for name, values in quantities.items() if values is not None}
    return {name: v for name, v in known.items() if v.dtype == object or not np.isnan(v.astype(np.float64)).any()}


def changes(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Quantity -> (n,) bool, which rows of it are new; quantities without any are not in it.

    What the new state does not say is no change: not every job of a program keeps every column. Nor is a box (0:
    unknown) that comes from the stacks, which may not be found from everywhere.
    """
    out = {}
    for name, values in new.items():
        rows: np.ndarray = np.ones(len(values), bool)
        if name in old:
            rows = _differing(old[name], values, QUANTITIES[name].tolerance)
        if name == "box" and name in old:
            np.logical_and(rows, (old[name] > 0) & (values > 0), out=rows)
        if rows.any():
            out[name] = rows
    return out


def _differing(old: np.ndarray, new: np.ndarray, tolerance: float) -> np.ndarray:
    if new.dtype == object:
        return np.array(old != new, bool)
    distance = np.abs(old.astype(np.float64) - new.astype(np.float64)).reshape(len(new), -1)
    differing: np.ndarray = np.any(distance > tolerance, axis=1)
    return differing
