"""RELION STAR files of particles: 3.0 (everything in each row) and 3.1, 4, 5 (optics groups), into ``Particles``.

Reading keeps every row in its place and every column as text (``Particles.table``, ``optics_table``); only the
columns that are used become numbers. Writing is in ``write``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import stable_hash
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io.imagenames import parse_image_names, resolve_paths
from cryoiso.io.mrc import read_header
from cryoiso.io.ranges import check_defocus, check_scale
from cryoiso.io.star.columns import (
    Columns,
    half_of_table,
    optics_of_rows,
    optics_of_table,
    rotation_of_table,
    shift_of_table,
)
from cryoiso.io.star.text import StarBlock, read_packed_blocks
from cryoiso.io.star.write import write_particles

logger = logging.getLogger("cryoiso")

__all__ = ["Columns", "parse_image_names", "particles_from_table", "read_particles", "resolve_paths", "write_particles"]


def read_particles(path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf")) -> Particles:
    """Particles of a STAR file, in the order of its rows.

    Args:
        path: RELION 3.0, 3.1, 4 or 5 STAR file.
        project: folder that relative image paths start from; empty: found as ``imagenames.resolve_paths`` says.
        require: what must be in the file: any of "image", "ctf", "pose". What is not required may be missing and is
            then empty text, NaN or None.

    Returns:
        Particles; poses are None if any of the three angles is not in the file.

    Raises:
        InputError: no such file, missing column, bad or impossible number (with its row), unknown optics group, the
            same image twice.
    """
    return particles_of_blocks(read_packed_blocks(path), path, project, require)


def particles_of_blocks(
    blocks: list[StarBlock], path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf")
) -> Particles:
    """Particles of the tables of a STAR file; arguments and errors as ``read_particles``."""
    block = particle_block(blocks, path)
    tables = [b for b in blocks if b.name == "optics" and b is not block]
    if len(tables) > 1:
        raise InputError(
            "two tables data_optics in one file",
            file=path,
            expected="one table of optics groups",
            code="star-malformed",
        )
    optics = tables[0] if tables else None
    others = [b for b in blocks if b is not block and b is not optics]
    table = block.frame()
    table.attrs["star_block"] = block.name
    table.attrs["star_others"] = [(b.name, b.loop, b.columns) for b in others]
    groups = StarBlock("optics", True, {k: list(v) for k, v in optics.columns.items()}).frame() if optics else None
    return particles_from_table(table, groups, path, project, require)


def particle_block(blocks: list[StarBlock], path: object) -> StarBlock:
    """The table of particles among the blocks of a STAR file.

    Raises:
        InputError: there is none, or more than one.
    """
    loops = [b for b in blocks if b.loop and b.name != "optics"]
    for wanted in (
        [b for b in loops if b.name == "particles"],
        [b for b in loops if "rlnImageName" in b.columns],
        [b for b in loops if "rlnAngleRot" in b.columns],
    ):
        if len(wanted) > 1 and wanted[1].name == wanted[0].name:
            raise InputError(
                f"two tables data_{wanted[0].name} in one file", file=path, expected="one table of particles",
                found=f"{len(wanted[0])} and {len(wanted[1])} rows", hint="Join them (relion_star_handler --combine).",
                code="star-malformed",
            )  # fmt: skip
        if wanted:
            return wanted[0]
    block_names = ", ".join(f"data_{b.name}" for b in blocks[:5])
    raise InputError(
        "no table of particles",
        file=path,
        expected="a loop with _rlnImageName",
        found=block_names,
        code="star-table-missing",
    )


def particles_from_table(
    table: Any, optics_table: Any, path: object, project: str = "", require: tuple[str, ...] = ("image", "ctf")
) -> Particles:
    """Particles of tables of text as a STAR file has them; arguments and errors as ``read_particles``."""
    strict = "ctf" in require
    columns = Columns(table, path)
    n = len(columns)
    if n == 0:
        raise InputError("the table of particles is empty", file=path, code="particles-too-few")
    _require_columns(columns, path, require)
    images = _Images(columns, path) if columns.has("rlnImageName") else None
    stack = np.full(n, "", dtype=str) if images is None else images.resolved(path, project)
    if optics_table is not None:
        groups, optics = optics_of_table(columns, Columns(optics_table, path, block="optics"), strict)
    else:
        groups, optics = optics_of_rows(columns, strict)
    groups = _with_boxes(groups, optics, stack)
    check_groups(groups, optics, stack, path, strict)
    nan = float("nan")
    pixel = np.array([g.pixel_size_A for g in groups])[optics]
    particles = Particles(
        uid=_uids(columns, images, path, "image" in require),
        optics=optics.astype(np.int32),
        groups=tuple(groups),
        stack=stack,
        index=np.full(n, -1, np.int64) if images is None else images.index,
        defocus_u_A=columns.number("rlnDefocusU", nan, ranged=strict),
        defocus_v_A=columns.number("rlnDefocusV", nan, ranged=strict),
        defocus_angle_deg=columns.number("rlnDefocusAngle", nan, ranged=strict),
        phase_shift_deg=columns.number("rlnPhaseShift", 0.0, ranged=strict),
        ctf_bfactor_A2=columns.number("rlnCtfBfactor", 0.0, ranged=strict),
        ctf_scale=columns.number("rlnCtfScalefactor", 1.0, ranged=strict),
        rotation=rotation_of_table(columns),
        shift_A=shift_of_table(columns, pixel),
        half=half_of_table(columns),
        micrograph=_micrographs(columns),
        signal_scale=_optional(columns, "cryoisoScale", strict),
        noise_level=_optional(columns, "cryoisoNoiseLevel", strict),
        table=table,
        optics_table=optics_table,
    )
    if strict:
        check_ctf(particles, path, "column _rlnCtfScalefactor")
    return particles


def _require_columns(columns: Columns, path: object, require: tuple[str, ...]) -> None:
    for what, names in (
        ("image", ("rlnImageName",)),
        ("ctf", ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")),
        ("pose", ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")),
    ):
        missing = [name for name in names if what in require and not columns.has(name)]
        if missing:
            raise InputError(
                "a column is missing", file=path, expected=f"_{missing[0]}", hint=_HINTS[what],
                code="star-column-missing",
            )  # fmt: skip


def _micrographs(columns: Columns) -> np.ndarray | None:
    """(n,) number of each row's micrograph, if the table names them."""
    if not columns.has("rlnMicrographName"):
        return None
    names: dict[str, int] = {}
    numbers = np.empty(len(columns), np.int64)
    for rows, text in columns.text_slabs("rlnMicrographName"):
        numbers[rows] = [names.setdefault(name, len(names)) for name in text]
    return np.unique(np.array(list(names), dtype=str), return_inverse=True)[1].reshape(-1)[numbers]


def _optional(columns: Columns, name: str, strict: bool) -> np.ndarray | None:
    return columns.number(name, ranged=strict) if columns.has(name) else None


def check_ctf(particles: Particles, path: object, scale: str) -> None:
    """Is the CTF of this set as a whole possible? The values one by one are checked as they are read.

    Raises:
        InputError: see ``ranges.check_defocus`` and ``check_scale``.
    """
    contrast = particles.group_values("amplitude_contrast")
    check_defocus(particles.defocus_u_A, particles.defocus_v_A, particles.phase_shift_deg, contrast, path)
    check_scale(particles.ctf_scale, path, scale)


_HINTS = {
    "image": "Give the particle STAR file of an extraction or refinement, not that of micrographs.",
    "ctf": "Estimate the CTF first; every particle needs its defocus.",
    "pose": "Give the output of a refinement.",
}


class _Images:
    """What the names of images say, without a Python string per row.

    Attributes:
        stacks: different names of stacks, in order of appearance.
        stack: (n,) int32 position of each row's stack among them.
        index: (n,) int64 image within the stack, from 0.
        hashes: (n,) uint64 of the image's name.
    """

    def __init__(self, columns: Columns, path: object) -> None:
        n = len(columns)
        places: dict[str, int] = {}
        self.stack, self.index, self.hashes = np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n, np.uint64)
        for rows, text in columns.text_slabs("rlnImageName"):
            stacks, index = parse_image_names(text, path, rows.start)
            self.stack[rows] = [places.setdefault(stack, len(places)) for stack in stacks]
            self.index[rows] = index
            self.hashes[rows] = [stable_hash(f"{i + 1}@{s}") for s, i in zip(stacks, index.tolist())]
        self.stacks = list(places)

    def resolved(self, path: object, project: str) -> np.ndarray:
        """(n,) str: where each row's stack lies."""
        paths: np.ndarray = resolve_paths(self.stacks, path, project)[self.stack]
        return paths

    def names(self) -> list[str]:
        """Names of all images, written alike."""
        return [f"{i + 1}@{self.stacks[s]}" for s, i in zip(self.stack.tolist(), self.index.tolist())]


def _uids(columns: Columns, images: _Images | None, path: object, unique: bool) -> np.ndarray:
    """cryoisoUid where there, else the hash of the image's name, else (no images) of the row number."""
    uid = _hashes_of_names(columns, images, path, unique)
    if columns.has("cryoisoUid"):
        uid = np.empty(len(columns), np.uint64)
        for rows, text in columns.text_slabs("cryoisoUid"):
            for row, value in enumerate(text, start=rows.start):
                if not (value.isascii() and value.isdigit()) or len(value) > 20 or int(value) >= 2**64:
                    raise InputError(
                        "bad cryoisoUid",
                        file=path,
                        row=row + 1,
                        expected="an integer below 2^64",
                        found=value[:40],
                        code="value-not-a-number",
                    )
            uid[rows] = [int(v) for v in text]
    if not _differ(uid):
        _no_duplicates(uid.tolist(), "two particles have the same identity (cryoisoUid)", path, uid.tolist())
    return uid


def _hashes_of_names(columns: Columns, images: _Images | None, path: object, unique: bool) -> np.ndarray:
    """(n,) uint64. Equal names have equal hashes, so names are looked at only where two hashes are equal."""
    if images is None:
        return np.array([stable_hash(f"row {i}") for i in range(len(columns))], np.uint64)
    if _differ(images.hashes):
        return images.hashes
    names = images.names()
    if unique:
        _no_duplicates(names, "the same image is in two rows", path, columns.values("rlnImageName"))
        return images.hashes
    return np.array([stable_hash(name) for name in _numbered_repeats(names)], np.uint64)


def _differ(numbers: np.ndarray) -> bool:
    """Whether no number is there twice."""
    ordered = np.sort(numbers)
    return bool((ordered[1:] != ordered[:-1]).all())


def _numbered_repeats(names: list[str]) -> list[str]:
    """The second and later copies of a name get a number, so that symmetry-expanded rows keep apart."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} copy {seen[name]}")
    return out


def _no_duplicates(keys: Sequence[Hashable], problem: str, path: object, shown: Sequence[object]) -> None:
    if len(set(keys)) == len(keys):
        return
    first: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        if key in first:
            raise InputError(
                f"{problem}: {first[key] + 1} and {row + 1}",
                file=path,
                row=row + 1,
                found=shown[row],
                hint="Remove the duplicates (and symmetry-expanded copies) first.",
                code="duplicate-particles",
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


LEAST_FIELD_A, SMALL_FIELD_A = 20.0, 50.0
"""Width of the smallest image that can hold a particle, and of the smallest that likely does."""
PIXEL_TOLERANCE = 0.1


def check_groups(
    groups: list[OpticsGroup] | tuple[OpticsGroup, ...],
    optics: np.ndarray,
    stack: np.ndarray,
    path: object,
    strict: bool,
) -> None:
    """Do pixel size and box go together, and with what the stacks say? Looks into one stack a group.

    Raises:
        InputError: images too small to hold a particle (``strict``): their pixel size is in nm.
    """
    for number, group in enumerate(groups):
        rows = np.flatnonzero(optics == number)
        pixel, width = group.pixel_size_A, group.pixel_size_A * group.box_px
        if not len(rows) or not pixel > 0:
            continue
        if strict and 0 < width < LEAST_FIELD_A:
            raise InputError(
                f"the images of optics group {group.number} are too small to hold a particle", file=path,
                expected=f"at least {LEAST_FIELD_A:g} Å across",
                found=f"{group.box_px} px of {pixel:g} Å = {width:.3g} Å", hint="Is the pixel size in nm?",
                code="pixel-size-invalid",
            )  # fmt: skip
        if 0 < width < SMALL_FIELD_A:
            logger.warning("%s: the images of optics group %d are only %.3g Å across; is the pixel size (%g Å) right?",
                           path, group.number, width, pixel)  # fmt: skip
        said = _pixel_of_stack(str(stack[rows[0]]))
        if said and abs(np.log(said / pixel)) > PIXEL_TOLERANCE:
            logger.warning("%s: the pixel size of optics group %d is %g Å, but %g Å in the header of %s; the former is "
                           "used", path, group.number, pixel, said, stack[rows[0]])  # fmt: skip


def _pixel_of_stack(stack: str) -> float:
    """The pixel size in a stack's header, or 0 where there is none or one that means nothing (1)."""
    try:
        pixel = read_header(stack).voxel_A[0] if os.path.isfile(stack) else 0.0
    except InputError:
        return 0.0  # whoever reads the images says what is wrong
    return pixel if 0 < pixel < np.inf and pixel != 1.0 else 0.0
