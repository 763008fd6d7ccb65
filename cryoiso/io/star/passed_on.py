"""A STAR file that is given to others: the same rows, without the folders of the machine that it was made on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from cryoiso.io.atomic import atomic_write
from cryoiso.io.regular_file import open_regular

_VALUE = re.compile(rb"""(?:"[^"\n]*"|'[^'\n]*'|[^\s"']\S*)""")
_ABSOLUTE = re.compile(rb"""^(["']?(?:\d+@)?)(/.*)$""", re.S)


def copy_shared(source: object, target: object) -> list[str]:
    """Copies a STAR file; what all of its absolute paths (below one folder of the root) have in common is taken off.

    000001@/home/me/set/Extract/a.mrcs and .../b.mrcs become 000001@a.mrcs and b.mrcs; with another file beside
    ``Extract``, 000001@Extract/a.mrcs. A file without absolute paths is copied byte by byte.

    Returns:
        the folders that the paths now begin in; empty where there were none.
    """
    folders: dict[str, str] = {}
    with open_regular(source) as lines:
        for line in lines:
            for path in _absolute_values(line):
                parent, root = os.path.dirname(path), path.split("/")[1]
                folders[root] = parent if root not in folders else os.path.commonpath((folders[root], parent))
    prefixes = [os.fsencode(folder.rstrip("/") + "/") for folder in folders.values()]
    with open_regular(source) as lines, atomic_write(target, need_bytes=os.fstat(lines.fileno()).st_size) as out:
        for line in lines:
            out.write(_shortened(line, prefixes) if prefixes else line)
    return sorted(folders.values())


def _values(line: bytes) -> Iterator[Any]:
    """Values of a row, with their places; comments and names of columns hold no paths."""
    if not line.lstrip().startswith((b"#", b"_", b"data_", b"loop_")):
        yield from _VALUE.finditer(line)


def _absolute_values(line: bytes) -> Iterator[str]:
    for value in _values(line) if b"/" in line else ():
        if match := _ABSOLUTE.match(value[0]):
            yield os.fsdecode(match[2]).rstrip("\"'")


def _shortened(line: bytes, prefixes: list[bytes]) -> bytes:
    """The row without the one of the prefixes that each of its paths begins with."""
    if b"/" not in line:
        return line
    shortened, at = bytearray(), 0
    for value in _values(line):
        match = _ABSOLUTE.match(value[0])
        prefix = next((p for p in prefixes if match and match[2].startswith(p)), b"")
        if match and prefix:
            shortened += line[at : value.start()] + match[1] + match[2][len(prefix) :]
            at = value.end()
    return bytes(shortened) + line[at:]
