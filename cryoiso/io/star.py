"""RELION STAR files of particles: 3.0 (everything in each row) and 3.1, 4, 5 (optics groups), into ``Particles``.

Reading keeps every row in its place and every column as text (``Particles.table``, ``optics_table``); only the
columns that are used become numbers. Writing is in ``starwrite``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import stable_hash
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io.mrc import read_header
from cryoiso.io.startable import (
    Columns,
    half_of_table,
    optics_of_rows,
    optics_of_table,
    rotation_of_table,
    shift_of_table,
)
from cryoiso.io.startext import StarBlock, read_blocks
from cryoiso.io.starwrite import write_particles

__all__ = ["Columns", "parse_image_names", "particles_from_table", "read_particles", "resolve_paths", "write_particles"]


def read_particles(path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf")) -> Particles:
    """Particles of a STAR file, in the order of its rows.

    Args:
        path: RELION 3.0, 3.1, 4 or 5 STAR file.
        project: folder that relative image paths start from; empty: the current folder (as RELION does), and where
            an image is not there, the STAR file's own folder and the folders above it; the first hit counts.
        require: what must be in the file: any of "image", "ctf", "pose". What is not required may be missing and is
            then empty text, NaN or None.

    Returns:
        Particles; poses are None if any of the three angles is not in the file.

    Raises:
        InputError: no such file, missing column, bad number (with its row), unknown optics group, the same image twice.
    """
    blocks = read_blocks(path)
    block = _particle_block(blocks, path)
    optics = next((b for b in blocks if b.name == "optics" and b is not block), None)
    others = [b for b in blocks if b is not block and b is not optics]
    table = block.frame()
    table.attrs["star_block"] = block.name
    table.attrs["star_others"] = [(b.name, b.loop, b.columns) for b in others]
    return particles_from_table(table, optics.frame() if optics else None, path, project, require)


def _particle_block(blocks: list[StarBlock], path: object) -> StarBlock:
    loops = [b for b in blocks if b.loop and b.name != "optics"]
    for wanted in (
        [b for b in loops if b.name == "particles"],
        [b for b in loops if "rlnImageName" in b.columns],
        [b for b in loops if "rlnAngleRot" in b.columns],
    ):
        if wanted:
            return wanted[0]
    found = ", ".join(f"data_{b.name}" for b in blocks[:5])
    raise InputError("no table of particles", file=path, expected="a loop with _rlnImageName", found=found)


def particles_from_table(
    table: Any, optics_table: Any, path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf")
) -> Particles:
    """Particles of tables of text as a STAR file has them; arguments and errors as ``read_particles``."""
    columns = Columns(table, path)
    n = len(columns)
    if n == 0:
        raise InputError("the table of particles is empty", file=path)
    for what, names in (
        ("image", ("rlnImageName",)),
        ("ctf", ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")),
        ("pose", ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")),
    ):
        missing = [name for name in names if what in require and not columns.has(name)]
        if missing:
            raise InputError("a column is missing", file=path, expected=f"_{missing[0]}", hint=_HINTS[what])
    stack, index = _images(columns, path, project)
    if optics_table is not None:
        groups, optics = optics_of_table(columns, Columns(optics_table, path), "ctf" in require)
    else:
        groups, optics = optics_of_rows(columns, "ctf" in require)
    groups = _with_boxes(groups, optics, stack)
    nan = float("nan")
    pixel = np.array([g.pixel_size_A for g in groups])[optics]
    return Particles(
        uid=_uids(columns, path, "image" in require),
        optics=optics.astype(np.int32),
        groups=tuple(groups),
        stack=stack,
        index=index,
        defocus_u_A=columns.number("rlnDefocusU", nan),
        defocus_v_A=columns.number("rlnDefocusV", nan),
        defocus_angle_deg=columns.number("rlnDefocusAngle", nan),
        phase_shift_deg=columns.number("rlnPhaseShift", 0.0),
        ctf_bfactor_A2=columns.number("rlnCtfBfactor", 0.0),
        ctf_scale=columns.number("rlnCtfScalefactor", 1.0),
        rotation=rotation_of_table(columns),
        shift_A=shift_of_table(columns, pixel),
        half=half_of_table(columns),
        table=table,
        optics_table=optics_table,
    )


_HINTS = {
    "image": "Give the particle STAR file of an extraction or refinement, not that of micrographs.",
    "ctf": "Estimate the CTF first; every particle needs its defocus.",
    "pose": "Give the output of a refinement.",
}


def parse_image_names(names: list[str], path: object) -> tuple[list[str], np.ndarray]:
    """Stack name and 0-based index of ``000012@stack.mrcs``; a name without @ is its first image.

    Raises:
        InputError: what stands before @ is no number from 1.
    """
    parts = [name.rsplit("@", 1) if "@" in name else ("1", name) for name in names]
    try:
        index = np.array([int(p[0]) for p in parts], np.int64) - 1
    except ValueError:
        index = np.array([int(p[0]) if p[0].isdigit() else 0 for p in parts], np.int64) - 1
    if (index < 0).any():
        row = int(np.flatnonzero(index < 0)[0])
        raise InputError(
            "bad image name", file=path, row=row + 1, expected="NUMBER@STACK, NUMBER from 1", found=names[row]
        )
    return [p[1] for p in parts], index


def resolve_paths(names: list[str], file: object, project: str = "") -> np.ndarray:
    """Where image files lie: (n,) str. Each different name is looked up once.

    Relative names start from ``project`` (else the current folder); if there is no such file, from the folder of
    ``file`` and then the folders above it. A name that is found nowhere stays as it would be in the project folder.
    """
    base = Path(project) if project else Path()
    own = Path(os.path.abspath(str(file))).parent
    found = {name: _resolve(name, base, own) for name in set(names)}
    return np.array([found[name] for name in names], dtype=str)


def _resolve(name: str, base: Path, own: Path) -> str:
    first = base / name
    if os.path.isabs(name) or first.exists():
        return str(first)
    return next((str(folder / name) for folder in (own, *own.parents) if (folder / name).exists()), str(first))


def _images(columns: Columns, path: object, project: str) -> tuple[np.ndarray, np.ndarray]:
    if not columns.has("rlnImageName"):
        return np.full(len(columns), "", dtype=str), np.full(len(columns), -1, np.int64)
    names, index = parse_image_names(columns.text("rlnImageName"), path)
    return resolve_paths(names, path, project), index


def _uids(columns: Columns, path: object, unique: bool) -> np.ndarray:
    """cryoisoUid where there, else the hash of the image's name, else (no images) of the row number."""
    names = [f"row {i}" for i in range(len(columns))]
    if columns.has("rlnImageName"):
        stacks, index = parse_image_names(columns.text("rlnImageName"), path)
        names = [f"{i + 1}@{s}" for s, i in zip(stacks, index.tolist())]
        if unique:
            _no_duplicates(names, "the same image stands in two rows", path, columns.text("rlnImageName"))
        elif len(set(names)) < len(names):
            names = _numbered_repeats(names)
    if columns.has("cryoisoUid"):
        text = columns.text("cryoisoUid")
        for row, value in enumerate(text):
            if not value.isdigit() or int(value) >= 2**64:
                raise InputError(
                    "bad cryoisoUid", file=path, row=row + 1, expected="an integer below 2^64", found=value
                )
        uid = np.array([int(v) for v in text], np.uint64)
    else:
        uid = np.array([stable_hash(name) for name in names], np.uint64)
    _no_duplicates(uid.tolist(), "two particles have the same identity (cryoisoUid)", path, uid.tolist())
    return uid


def _numbered_repeats(names: list[str]) -> list[str]:
    """The second and later copies of a name get a number, so that symmetry-expanded rows keep apart."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} copy {seen[name]}")
    return out


def _no_duplicates(keys: list, problem: str, path: object, shown: list) -> None:
    if len(set(keys)) == len(keys):
        return
    first: dict = {}
    for row, key in enumerate(keys):
        if key in first:
            raise InputError(
                f"{problem}: {first[key] + 1} and {row + 1}",
                file=path,
                row=row + 1,
                found=shown[row],
                hint="Remove the duplicates (and symmetry-expanded copies) first.",
            )
        first[key] = row


def _with_boxes(groups: list[OpticsGroup], optics: np.ndarray, stack: np.ndarray) -> list[OpticsGroup]:
    """Fills in image sizes that the file does not say, from the header of each group's first stack if it is there."""
    out = []
    for number, group in enumerate(groups):
        rows = np.flatnonzero((optics == number) & (group.box_px <= 0))
        if len(rows) and stack[rows[0]] and os.path.isfile(stack[rows[0]]):
            group = replace(group, box_px=read_header(stack[rows[0]]).shape[2])
        out.append(group)
    return out
