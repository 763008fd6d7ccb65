"""cryoSPARC particle files (.cs, a NumPy structured array) into ``Particles``.

Mapped, and checked against other converters: uid; blob/path, idx, psize_A, shape, sign; ctf/accel_kv, cs_mm,
amp_contrast, df1_A, df2_A, df_angle_rad, phase_shift_rad, bfactor, scale, exp_group_id; alignments3D/pose, shift,
psize_A, split, class.

Not mapped, because their units or signs are not documented well enough to be sure: ctf/shift_A, tilt_A, trefoil_A,
tetra_A, anisomag. They are zero unless the job refined them; if one is not, a warning says that it is left out.
alignments2D gives no 3D pose and is ignored.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io import conventions
from cryoiso.io.ranges import CS_FIELDS, RANGES, check_range
from cryoiso.io.regular_file import open_regular
from cryoiso.io.star import check_ctf, check_groups, resolve_paths

logger = logging.getLogger("cryoiso")

NEEDED = {
    "image": ("blob/path", "blob/idx", "blob/psize_A"),
    "ctf": (
        "ctf/accel_kv",
        "ctf/cs_mm",
        "ctf/amp_contrast",
        "ctf/df1_A",
        "ctf/df2_A",
        "ctf/df_angle_rad",
        "blob/psize_A",
    ),
    "pose": ("alignments3D/pose", "alignments3D/shift"),
}
UNMAPPED = ("ctf/shift_A", "ctf/tilt_A", "ctf/trefoil_A", "ctf/tetra_A", "ctf/anisomag")


def read_cs(
    path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf"), passthrough: object = None
) -> Particles:
    """Particles of a .cs file, in the order of its rows.

    Args:
        path: the .cs file of a cryoSPARC job or export.
        project: folder that blob/path starts from, the cryoSPARC project folder; empty: the current folder, then the
            .cs file's folder and those above it.
        require: what must be there: any of "image", "ctf", "pose".
        passthrough: a .cs file of the same particles with the fields that ``path`` lacks, joined by uid. Not given:
            if needed fields are missing, the one ``*passthrough_particles*.cs`` beside the file is used.

    Returns:
        Particles with the source's uids; blob/sign is in ``results["cryoisoSign"]``.

    Raises:
        InputError: not a .cs file, a missing field, a bad or impossible number, a uid that stands twice.
    """
    data = _load(path)
    needed = [name for kind in require for name in NEEDED[kind]]
    if passthrough is None and any(name not in data for name in needed):
        beside = [p for p in Path(str(path)).parent.glob("*passthrough_particles*.cs") if p != Path(str(path))]
        passthrough = beside[0] if len(beside) == 1 else None
    if passthrough is not None:
        data = _joined(data, _load(passthrough), path, passthrough)
    missing = [name for name in needed if name not in data]
    if missing:
        hint = "Export the particles group from cryoSPARC, or give the job's passthrough file too."
        raise InputError("a field is missing", file=path, expected=missing[0], hint=hint)
    for name in needed:
        _require_finite(data[name], name, path)
    _require_possible(data, "ctf" in require, path)
    for name in UNMAPPED:
        if name in data and np.any(data[name]):
            logger.warning("%s: %s is not zero but is not used", path, name)
    particles = _particles(data, path, project)
    check_groups(particles.groups, particles.optics, particles.stack, path, "ctf" in require)
    if "ctf" in require:
        check_ctf(particles, path, "field ctf/scale")
    return particles


def _load(path: object) -> dict[str, np.ndarray]:
    try:
        with open_regular(path) as stream:
            array = np.load(stream, allow_pickle=False)
    except FileNotFoundError:
        raise InputError("no such file", file=path) from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"not a cryoSPARC .cs file: {error}", file=path) from None
    names = getattr(array, "dtype", np.dtype("f4")).names
    if not names or "uid" not in names:
        raise InputError("not a cryoSPARC particle file", file=path, expected="a structured array with the field uid")
    if not len(array):
        raise InputError("there are no particles in it", file=path)
    data = {name: array[name] for name in names}
    values, first = np.unique(data["uid"], return_index=True)
    if len(values) < len(array):
        row = int(np.setdiff1d(np.arange(len(array)), first)[0])
        other = int(np.flatnonzero(data["uid"] == data["uid"][row])[0])
        problem = f"the same particle (uid) stands in two rows: {other + 1} and {row + 1}"
        raise InputError(problem, file=path, row=row + 1, found=int(data["uid"][row]))
    return data


def _joined(
    data: dict[str, np.ndarray], more: dict[str, np.ndarray], path: object, other: object
) -> dict[str, np.ndarray]:
    order = np.argsort(more["uid"])
    place = np.minimum(np.searchsorted(more["uid"][order], data["uid"]), len(order) - 1)
    rows = order[place]
    bad = np.flatnonzero(more["uid"][rows] != data["uid"])
    if len(bad):
        raise InputError(
            f"this particle is not in {other}", file=path, row=int(bad[0]) + 1, found=int(data["uid"][bad[0]])
        )
    return {**{k: v[rows] for k, v in more.items() if k not in data}, **data}


def _require_finite(values: np.ndarray, name: str, path: object) -> None:
    if values.dtype.kind != "f":
        return
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(f"bad value in field {name}", file=path, row=row + 1, expected="a number", found=values[row])


def _require_possible(data: dict[str, np.ndarray], strict: bool, path: object) -> None:
    """All numbers within ``ranges.RANGES``; those of the CTF only where it is needed (``strict``)."""
    rows = np.arange(1, len(data["uid"]) + 1)
    for name, (column, factor) in CS_FIELDS.items():
        if name in data and data[name].dtype.kind in "fiu" and (strict or not name.startswith("ctf/")):
            check_range(data[name], RANGES[column], path, f"field {name}", rows=rows, factor=factor)


def _particles(data: dict[str, np.ndarray], path: object, project: str) -> Particles:
    import pandas as pd

    n = len(data["uid"])
    names = (
        [v.decode("utf-8", "replace").lstrip(">") for v in data["blob/path"].tolist()] if "blob/path" in data else []
    )
    groups, optics = _groups(data)
    index = data["blob/idx"].astype(np.int64) if names else np.full(n, -1, np.int64)
    table: dict[str, Any] = {}
    if names:
        table["rlnImageName"] = [f"{i + 1:06d}@{s}" for i, s in zip(index.tolist(), names)]
    if "alignments3D/class" in data:
        table["rlnClassNumber"] = [str(c + 1) for c in data["alignments3D/class"].tolist()]
    sign = {"cryoisoSign": np.where(data["blob/sign"] < 0, -1, 1)} if "blob/sign" in data else {}
    rotation, shift_A = _poses(data)
    return Particles(
        uid=data["uid"].astype(np.uint64),
        optics=optics,
        groups=groups,
        stack=resolve_paths(names, path, project) if names else np.full(n, "", dtype=str),
        index=index,
        defocus_u_A=_column(data, "ctf/df1_A", np.nan),
        defocus_v_A=_column(data, "ctf/df2_A", np.nan),
        defocus_angle_deg=np.degrees(_column(data, "ctf/df_angle_rad", np.nan)),
        phase_shift_deg=np.degrees(_column(data, "ctf/phase_shift_rad", 0.0)),
        ctf_bfactor_A2=_column(data, "ctf/bfactor", 0.0),
        ctf_scale=_column(data, "ctf/scale", 1.0),
        rotation=rotation,
        shift_A=shift_A,
        half=_halves(data),
        table=pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in table.items()}) if table else None,
        results=sign,
    )


def _column(data: dict[str, np.ndarray], name: str, default: float) -> np.ndarray:
    n = len(data["uid"])
    return data[name].astype(np.float64) if name in data else np.full(n, default)


def _poses(data: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
    if "alignments3D/pose" not in data:
        return None, None
    pixel = data.get("alignments3D/psize_A", data.get("blob/psize_A"))
    shift = data.get("alignments3D/shift", np.zeros((len(data["uid"]), 2)))
    if pixel is None:
        pixel = np.ones(len(shift))
    shift_A = shift.astype(np.float64) * pixel.astype(np.float64)[:, None]
    return conventions.rotvec_to_matrix(data["alignments3D/pose"]), shift_A


def _halves(data: dict[str, np.ndarray]) -> np.ndarray | None:
    """Half-set 1 or 2 of alignments3D/split 0 or 1; None where all particles are in one split, which is no split."""
    split = data.get("alignments3D/split")
    if split is None or len(np.unique(split)) != 2:
        return None
    return np.where(np.isin(split, (0, 1)), split.astype(np.int64) + 1, 0).astype(np.int8)


def _shortest(value: Any) -> float:
    """The shortest decimal number that this float32 can stand for: 2.95, not 2.9500000477."""
    return float(str(np.float32(value)))


def _groups(data: dict[str, np.ndarray]) -> tuple[tuple[OpticsGroup, ...], np.ndarray]:
    """One optics group for each different set of exposure group, microscope values, pixel size and box."""
    n = len(data["uid"])
    box = data["blob/shape"][:, 1] if "blob/shape" in data else np.zeros(n)
    keys = [
        data.get("ctf/exp_group_id", np.zeros(n)).astype(np.float64),
        _column(data, "ctf/accel_kv", np.nan),
        _column(data, "ctf/cs_mm", np.nan),
        _column(data, "ctf/amp_contrast", np.nan),
        _column(data, "blob/psize_A", np.nan),
        box.astype(np.float64),
    ]
    table = np.nan_to_num(np.stack(keys, 1), nan=-1e300)
    _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    groups = []
    for number, row in enumerate(np.sort(first).tolist(), start=1):
        values = [float(k[row]) for k in keys]
        voltage, spherical, amplitude, pixel = (_shortest(v) for v in values[1:5])
        groups.append(
            OpticsGroup(number, f"exp_group_{values[0]:.0f}", pixel, int(values[5]), voltage, spherical, amplitude)
        )
    return tuple(groups), rank[inverse.reshape(-1)].astype(np.int32)
