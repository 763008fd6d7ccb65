"""cryoSPARC particle files (.cs, a NumPy structured array) into ``Particles``.

Mapped, and checked against other converters: uid; blob/path, idx, psize_A, shape, sign; ctf/accel_kv, cs_mm,
amp_contrast, df1_A, df2_A, df_angle_rad, phase_shift_rad, bfactor, scale, exp_group_id; alignments3D/pose, shift,
psize_A, split, class. Mapped by what cryoSPARC's authors say of them (``conventions``): ctf/tilt_A, anisomag.

Not mapped, because their units or signs are not documented well enough to be sure: ctf/shift_A, trefoil_A, tetra_A.
They are zero unless the job refined them; if one is not, a warning says that it is left out.
alignments2D gives no 3D pose and is ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles
from cryoiso.io import conventions
from cryoiso.io.cs_groups import column_or, groups_of_fields, has_tilt_without_cs
from cryoiso.io.csfile import load_cs
from cryoiso.io.imagenames import is_name
from cryoiso.io.ranges import CS_FIELDS, RANGES, Range, check_range
from cryoiso.io.star.read import check_ctf, check_groups, resolve_paths

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
MOST_IMAGES = 2**31
ROTATION = Range(-20, 20, "rad")
"""A component of a rotation vector; its length is an angle, of no more than one turn."""
UNMAPPED = ("ctf/shift_A", "ctf/trefoil_A", "ctf/tetra_A")
"""Terms whose units or signs are not public."""


def read_cs(
    path: object,
    project: str = "",
    require: tuple[str, ...] = ("image", "ctf"),
    passthrough: Sequence[object] = (),
) -> Particles:
    """Particles of a .cs file, in the order of its rows.

    Args:
        path: the .cs file of a cryoSPARC job or export.
        project: folder that blob/path starts from, the cryoSPARC project folder; empty: the current folder, then the
            .cs file's folder and those above it.
        require: what must be there: any of "image", "ctf", "pose".
        passthrough: .cs files of the same particles with fields that ``path`` lacks, joined by uid, an earlier one
            before a later one. Not given: if needed fields are missing, they come from the files
            ``*passthrough_particles*.cs`` beside it that have all of its particles.

    Returns:
        Particles with the source's uids; blob/sign is in ``results["cryoisoSign"]``.

    Raises:
        InputError: what ``csfile.load_cs`` finds wrong; a missing field, a particle that a passthrough file lacks,
            passthrough files that differ; a bad image name, number of an image, image size, half-set or an impossible
            number.
    """
    data = joined_fields(path, require, passthrough)
    for name in unmapped_terms(data):
        logger.warning("%s: %s is not zero but is not used", path, name)
    return particles_of_fields(data, path, project, require)


def joined_fields(
    path: object, require: tuple[str, ...] = ("image", "ctf"), passthrough: Sequence[object] = ()
) -> dict[str, np.ndarray]:
    """Field -> (n, ...) values of a .cs file and of its passthrough files; arguments and errors as ``read_cs``."""
    needed = [name for kind in require for name in NEEDED[kind]]
    data = _completed(load_cs(path), needed, passthrough, path)
    missing = [name for name in needed if name not in data]
    if missing:
        hint = "Export the particles group from cryoSPARC, or give the job's passthrough files too (--passthrough)."
        raise InputError("a field is missing", file=path, expected=missing[0], hint=hint, code="cs-field-missing")
    return data


def unmapped_terms(data: dict[str, np.ndarray]) -> list[str]:
    """Fields that say something which ``particles_of_fields`` leaves out."""
    terms = [name for name in UNMAPPED if name in data and np.any(data[name])]
    return [*terms, *(["ctf/tilt_A"] if has_tilt_without_cs(data) else [])]


def particles_of_fields(
    data: dict[str, np.ndarray], path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf")
) -> Particles:
    """Particles of the fields of a .cs file; arguments and errors as ``read_cs``."""
    _require_possible(data, "ctf" in require, path)
    particles = _particles(data, path, project)
    check_groups(particles.groups, particles.optics, particles.stack, path, "ctf" in require)
    if "ctf" in require:
        check_ctf(particles, path, "field ctf/scale")
    return particles


def read_cs_field(path: object, name: str, passthrough: Sequence[object] = ()) -> np.ndarray:
    """(n,) float64: one field of a .cs file or of its passthrough files, which are found as in ``read_cs``.

    Raises:
        InputError: no such field, not one number per row, or a value that is not finite.
    """
    data = _completed(load_cs(path), (name,), passthrough, path)
    if name not in data:
        raise InputError("no such field", file=path, expected=name, found=", ".join(data), code="cs-field-missing")
    values = data[name]
    if values.dtype.kind not in "fiu" or values.ndim != 1:
        raise InputError(
            f"field {name} is not one number per row", file=path, found=f"type {values.dtype}", code="cs-malformed"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise InputError(f"bad value in field {name}", file=path, row=int(bad[0]) + 1, expected="a number",
                         found=values[bad[0]], code="value-not-a-number")  # fmt: skip
    return values.astype(np.float64)


def _completed(
    data: dict[str, np.ndarray], needed: Sequence[str], passthrough: Sequence[object], path: object
) -> dict[str, np.ndarray]:
    """The fields of a file and of its passthrough files: the given ones, else those beside it if a field is needed."""
    missing = [name for name in needed if name not in data]
    if passthrough:
        for other in passthrough:
            data = _joined(data, load_cs(other), path, other)
        return data
    if not missing:
        return data
    beside = {other: load_cs(other) for other in passthrough_beside(path)}
    useful = {other: more for other, more in beside.items() if any(name in more for name in missing)}
    if len(useful) > 1:  # of other jobs perhaps: those that have all of these particles
        useful = {other: more for other, more in useful.items() if np.isin(data["uid"], more["uid"]).all()}
    for name in missing:
        _require_one_source(name, data["uid"], useful, path)
    for other, more in useful.items():
        logger.info("%s: fields that are missing are taken from %s", path, other)
        data = _joined(data, more, path, other)
    return data


def passthrough_beside(path: object) -> list[Path]:
    """The passthrough files in the folder of a .cs file, by name."""
    own = Path(str(path))
    return sorted(other for other in own.parent.glob("*passthrough_particles*.cs") if other != own)


def _require_one_source(name: str, uid: np.ndarray, sources: dict[Path, dict[str, np.ndarray]], path: object) -> None:
    """Two passthrough files that say different things of a field: the user must choose."""
    matching = [(other, more["uid"], more[name]) for other, more in sources.items() if name in more]
    for other, theirs, values in matching[1:]:
        first, first_uid, first_values = matching[0]
        if not np.array_equal(_by_uid(first_values, first_uid, uid), _by_uid(values, theirs, uid)):
            raise InputError(
                f"two passthrough files beside it differ in {name}: {first.name} and {other.name}", file=path,
                hint="Name the right one: particles.passthrough in a job file, --passthrough of a command.",
                code="passthrough-mismatch",
            )  # fmt: skip


def _by_uid(values: np.ndarray, uid: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    order = np.argsort(uid)
    return values[order[np.searchsorted(uid[order], wanted)]]


def _joined(
    data: dict[str, np.ndarray], more: dict[str, np.ndarray], path: object, other: object
) -> dict[str, np.ndarray]:
    order = np.argsort(more["uid"])
    place = np.minimum(np.searchsorted(more["uid"][order], data["uid"]), len(order) - 1)
    rows = order[place]
    bad = np.flatnonzero(more["uid"][rows] != data["uid"])
    if len(bad):
        raise InputError(
            f"this particle is not in {other}",
            file=path,
            row=int(bad[0]) + 1,
            found=int(data["uid"][bad[0]]),
            code="passthrough-mismatch",
        )
    return {**{k: v[rows] for k, v in more.items() if k not in data}, **data}


def _require_possible(data: dict[str, np.ndarray], strict: bool, path: object) -> None:
    """All numbers within ``ranges.RANGES``; those of the CTF only where it is needed (``strict``)."""
    rows = np.arange(1, len(data["uid"]) + 1)
    for name, (column, factor) in CS_FIELDS.items():
        if name in data and data[name].dtype.kind in "fiu" and (strict or not name.startswith("ctf/")):
            check_range(data[name], RANGES[column], path, f"field {name}", rows=rows, factor=factor)
    if "alignments3D/pose" in data:
        check_range(data["alignments3D/pose"], ROTATION, path, "field alignments3D/pose", rows=rows)


def _particles(data: dict[str, np.ndarray], path: object, project: str) -> Particles:
    import pandas as pd

    n = len(data["uid"])
    names = _names(data["blob/path"], path) if {"blob/path", "blob/idx"} <= data.keys() else []
    groups, optics = groups_of_fields(data, path)
    index = _indices(data["blob/idx"], path) if names else np.full(n, -1, np.int64)
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
        defocus_u_A=column_or(data, "ctf/df1_A", np.nan),
        defocus_v_A=column_or(data, "ctf/df2_A", np.nan),
        defocus_angle_deg=np.degrees(column_or(data, "ctf/df_angle_rad", np.nan)),
        phase_shift_deg=np.degrees(column_or(data, "ctf/phase_shift_rad", 0.0)),
        ctf_bfactor_A2=column_or(data, "ctf/bfactor", 0.0),
        ctf_scale=column_or(data, "ctf/scale", 1.0),
        rotation=rotation,
        shift_A=shift_A,
        half=_halves(data, path),
        table=pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in table.items()}) if table else None,
        results=sign,
    )


def _poses(data: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
    if "alignments3D/pose" not in data:
        return None, None
    pixel = data.get("alignments3D/psize_A", data.get("blob/psize_A"))
    shift = data.get("alignments3D/shift", np.zeros((len(data["uid"]), 2)))
    if pixel is None:
        pixel = np.ones(len(shift))
    shift_A = shift.astype(np.float64) * pixel.astype(np.float64)[:, None]
    return conventions.rotvec_to_matrix(data["alignments3D/pose"]), shift_A


def _names(values: np.ndarray, path: object) -> list[str]:
    """Names of the image stacks, without cryoSPARC's mark for paths of the project."""
    texts = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values.tolist()]
    for row, text in enumerate(texts, start=1):
        if not is_name(text.lstrip(">")):
            raise InputError("no usable image name", file=path, row=row, expected="blob/path in UTF-8",
                             found=repr(text[:80]), code="image-name-invalid")  # fmt: skip
    return [text.lstrip(">") for text in texts]


def _indices(values: np.ndarray, path: object) -> np.ndarray:
    """Numbers of the images in their stacks, from 0."""
    bad = np.flatnonzero((values < 0) | (values.astype(np.float64) >= MOST_IMAGES))
    if len(bad):
        raise InputError(
            "impossible number of an image (blob/idx)",
            file=path,
            row=int(bad[0]) + 1,
            expected=f"0 to {MOST_IMAGES:,}",
            found=int(values[bad[0]]),
            code="image-name-invalid",
        )
    return values.astype(np.int64)


def _halves(data: dict[str, np.ndarray], path: object) -> np.ndarray | None:
    """Half-set 1 or 2 of alignments3D/split 0 or 1; None where all particles are in one split, which is no split.

    Raises:
        InputError: another value: neither half-set may have such a particle, and a new split would mix the half-sets.
    """
    split = data.get("alignments3D/split")
    if split is None or len(np.unique(split)) == 1:
        return None
    bad = np.flatnonzero(~np.isin(split, (0, 1)))
    if len(bad):
        more = f" (and {len(bad) - 1:,} more rows)" if len(bad) > 1 else ""
        raise InputError(
            "no half-set in field alignments3D/split", file=path, row=int(bad[0]) + 1, expected="0 or 1",
            found=f"{split[bad[0]]}{more}",
            hint="Remove these particles, or run a refinement in cryoSPARC, which splits all of them.",
            code="half-set-missing",
        )  # fmt: skip
    return (split.astype(np.int64) + 1).astype(np.int8)
