"""Names of files that another file gives: they stay inside the folder that they belong to.

Run folders, shard folders and archives are passed from hand to hand. A name in their records decides what is read,
linked, copied or replaced, so it must not lead out of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from cryoiso.core.errors import InputError

LONGEST_NAME = 255
"""Bytes that file systems allow in one part of a path."""


def contained_path(folder: Path, name: object, source: object, row: int | None = None) -> Path:
    """The path of a file in a folder by the name that a record gives it.

    Args:
        folder: where it must lie.
        name: relative to the folder.
        source: the record that has the name, for the message. row: its line, counted from 1.

    Raises:
        InputError: not a text, empty, absolute, with ``..`` or a character that no file name has.

    >>> contained_path(Path("run"), "04_reconstruct/half1.mrc", "journal.jsonl").as_posix()
    'run/04_reconstruct/half1.mrc'
    """
    problem = why_not_contained(name)
    if problem:
        raise InputError(
            f"a file name in it {problem}", file=source, row=row, expected=f"a name inside of {folder}",
            found=repr(name)[:120], hint="The record is damaged or was changed; nothing was done.",
            code="record-leaves-folder",
        )  # fmt: skip
    return folder / str(name)


def require_contained(folder: Path, names: Iterable[object], source: object, row: int | None = None) -> None:
    """Stops at the first of some names that ``contained_path`` refuses.

    Raises:
        InputError: as ``contained_path``.
    """
    for name in names:
        contained_path(folder, name, source, row)


def why_not_contained(name: object) -> str:
    """What keeps a name from being that of a file inside a folder; empty if nothing does.

    >>> why_not_contained("../x"), why_not_contained("/etc/passwd"), why_not_contained("a/b.mrc")
    ("leads out of the folder ('..')", 'is absolute', '')
    """
    if not isinstance(name, str) or not name:
        return "is not a text" if name != "" else "is empty"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "has a control character"
    path = PurePosixPath(name)
    if path.is_absolute():
        return "is absolute"
    if ".." in path.parts:
        return "leads out of the folder ('..')"
    if not path.parts:
        return "is the folder itself"
    try:
        longest = max(len(os.fsencode(part)) for part in path.parts)
    except UnicodeEncodeError:
        return "has a character that no file name has"
    return f"has a part of more than {LONGEST_NAME} bytes" if longest > LONGEST_NAME else ""


def links_out(folder: Path) -> list[Path]:
    """Symbolic links below a folder that lead out of it, sorted; links to folders are not followed."""
    root = os.path.realpath(folder)
    links = []
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and os.path.commonpath([root, os.path.realpath(path)]) != root:
                links.append(Path(path))
    return sorted(links)
