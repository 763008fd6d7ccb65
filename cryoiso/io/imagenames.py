"""Names of images in particle files (``000012@folder/stack.mrcs``), and where the files lie."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.project_folder import find_recorded

if TYPE_CHECKING:
    from cryoiso.core.types import Particles

logger = logging.getLogger("cryoiso")

MAX_NAME = 1_024
"""Characters of the longest name of a stack: a column of names is as wide as the longest of them."""
_NO_NAME = re.compile(r"[\0-\x1f\x7f\ud800-\udfff]")
"""Control characters, and what stands for bytes that are not UTF-8: such names cannot be written to JSON or HDF5."""
_KIND = re.compile(r":mrcs?$")
"""RELION's way to say what a file is whose name does not end so."""
SAMPLE = 16
"""Names that are looked up in both places to see whether there are two sets of images."""


def parse_image_names(names: list[str], path: object, before: int = 0) -> tuple[list[str], np.ndarray]:
    """Stack name and 0-based index of ``000012@stack.mrcs``; a name without @ is its first image.

    The first @ ends the number, so that folder names may hold one. RELION's ``:mrcs`` at the end is taken off.

    Args:
        path: the particle file, for errors.
        before: number of rows of the file that come before these.

    Raises:
        InputError: what stands before @ is no number from 1 to 2^31, or what follows is no file name; names the row.
    """
    parts = [name.partition("@") for name in names]
    numbers = [head if at else "1" for head, at, _ in parts]
    index = np.array([_number(text) for text in numbers], np.int64) - 1
    if (index < 0).any():
        row = int(np.flatnonzero(index < 0)[0])
        raise InputError(
            "bad image name",
            file=path,
            row=before + row + 1,
            expected="NUMBER@STACK, NUMBER from 1",
            found=_short(names[row]),
            code="image-name-invalid",
        )
    stacks = [_KIND.sub("", tail if at else head) for head, at, tail in parts]
    for row, stack in enumerate(stacks):
        if not is_name(stack):
            expected = f"a file name in UTF-8 of 1 to {MAX_NAME} characters, none of them a control character"
            raise InputError(
                "bad image name",
                file=path,
                row=before + row + 1,
                expected=expected,
                found=_short(names[row]),
                code="image-name-invalid",
            )
    return stacks, index


def is_name(stack: str) -> bool:
    """Whether a text can be the name of an image stack."""
    return 0 < len(stack) <= MAX_NAME and not _NO_NAME.search(stack)


def _number(text: str) -> int:
    """A number of plain digits, or 0. Python would also take other scripts' digits, underscores, signs and spaces."""
    if not (text.isascii() and text.isdigit()):
        return 0
    digits = text.lstrip("0")
    return int(digits) if 0 < len(digits) <= 10 and int(digits) <= 2**31 else 0


def _short(name: str) -> str:
    return repr(name)[1:-1] if len(name) <= 80 else f"{repr(name[:60])[1:-1]}... ({len(name):,} characters)"


def resolve_paths(names: list[str], file: object, project: str = "") -> np.ndarray:
    """Where image files lie: (n,) str. Each different name is looked up once, and rows share its path.

    Relative names start from ``project``, else the current folder (as in RELION); if no such file, from the
    folder of ``file`` and then the folders above it, else from the folder that shards beside ``file`` record
    (``io.project_folder``). Where both have a file of that name, ``project`` wins if it was
    given, or if ``file`` lies in the current folder; a particle file from elsewhere belongs to the images beside it.
    Either way a warning names both. A name that is found nowhere stays as it would be in the project folder.
    """
    base = Path(project) if project else Path()
    own = Path(os.path.abspath(str(file))).parent
    here = Path(os.path.abspath(base))
    unique = sorted(set(names))
    beside_first = _two_sets(unique, base, own, file, not project and here not in (own, *own.parents))
    paths = {name: _resolve(name, base, own, beside_first, file) for name in unique}
    return np.array([paths[name] for name in names], dtype=object)


def first_stack(particles: Particles) -> str:
    """Name of the first particle's stack as its source has it, or "" where that names none."""
    if particles.table is None or "rlnImageName" not in particles.table:
        return ""
    return parse_image_names([str(particles.table["rlnImageName"].iloc[0])], None)[0][0]


def distinct(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k,) different names in order, and (n,) int64 position of each row's among them; as ``np.unique``.

    Texts of an object array are looked up, not sorted, and its rows are not widened to the longest of them.
    """
    if names.dtype != object:
        values, inverse = np.unique(names, return_inverse=True)
        return values, inverse.reshape(-1)
    different = sorted(set(names.tolist()))
    place = {name: k for k, name in enumerate(different)}
    return np.array(different, dtype=str), np.fromiter(map(place.__getitem__, names.tolist()), np.int64, len(names))


def _resolve(name: str, base: Path, own: Path, beside_first: bool, file: object) -> str:
    first = str(base / name)
    if os.path.isabs(name) or (not beside_first and os.path.exists(first)):
        return first
    return _beside(name, own) or find_recorded(name, own, file) or first


def _beside(name: str, own: Path) -> str:
    """The file of this name in a folder or the next one above it that has one, or empty."""
    candidates = (os.path.join(folder, name) for folder in (own, *own.parents))
    return next((path for path in candidates if os.path.exists(path)), "")


def _two_sets(names: list[str], base: Path, own: Path, file: object, prefer_own: bool) -> bool:
    """Whether to look beside the particle file first, which only matters where both places have other images."""
    relative = [name for name in names if not os.path.isabs(name)]
    for name in relative[:: max(len(relative) // SAMPLE, 1)]:
        first, other = str(base / name), _beside(name, own)
        if not (other and os.path.exists(first)) or os.path.samefile(first, other):
            continue
        used, left = (other, first) if prefer_own else (first, other)
        logger.warning(
            "%s: there are two sets of images of the same names: %s is used, not %s. If that is wrong, give the "
            "project folder that the names start from (--project, or particles.project in the job file).",
            file, os.path.abspath(used), os.path.abspath(left),
        )  # fmt: skip
        return prefer_own
    return False
