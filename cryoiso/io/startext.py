"""STAR files as text: blocks, columns and values exactly as written, in both directions.

Values stay strings, so nothing is lost: leading zeros, long decimals and text that looks like a number come back as
they were. Only layout (padding, comments, ``#1`` column numbers) is not kept. Format: Hall, J. Chem. Inf. Comput. Sci.
31 (1991) 326, in the dialect of RELION: one loop row a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from cryoiso.core.errors import InputError
from cryoiso.io.atomic import atomic_write

_TOKEN = re.compile(r"""'(?P<single>.*?)'(?=\s|$)|"(?P<double>.*?)"(?=\s|$)|(?P<bare>\S+)""")
_BLOCK = re.compile(r"data_\S*$", re.IGNORECASE)
_STRUCTURE = re.compile(r"(data_\S*|loop_|_\S+.*)$", re.IGNORECASE)


@dataclass
class StarBlock:
    """One ``data_`` block: name without ``data_``, whether it is a loop, and its values as text.

    ``columns`` maps a name without the leading underscore to its list of strings (one entry each if not a loop).
    """

    name: str
    loop: bool
    columns: dict[str, list[str]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def frame(self) -> Any:
        """The block as a pandas.DataFrame of Python strings."""
        import pandas as pd

        return pd.DataFrame({k: pd.Series(v, dtype=object) for k, v in self.columns.items()})


def block_of_frame(name: str, frame: Any, loop: bool = True) -> StarBlock:
    """A block from a DataFrame; values are written with ``str``."""
    return StarBlock(name, loop, {str(c): [str(v) for v in frame[c].tolist()] for c in frame.columns})


def read_blocks(path: object) -> list[StarBlock]:
    """All blocks of a STAR file in their order.

    Raises:
        InputError: no such file, not a STAR file, or a row whose number of values is not that of the columns.
    """
    try:
        text = Path(str(path)).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise InputError("no such file", file=path) from None
    except (OSError, IsADirectoryError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from None
    return parse_blocks(text, path)


def parse_blocks(text: str, path: object = None) -> list[StarBlock]:
    """All blocks of a STAR text; ``path`` is for error messages only."""
    lines = text.splitlines()
    blocks: list[StarBlock] = []
    at = 0
    while at < len(lines):
        stripped = lines[at].strip()
        if not stripped or stripped.startswith("#"):
            at += 1
        elif _BLOCK.match(stripped):
            blocks.append(StarBlock(stripped[5:], False, {}))
            at += 1
        elif not blocks:
            raise InputError(
                "not a STAR file", file=path, expected="a line 'data_...' first", found=repr(stripped[:40])
            )
        elif stripped.lower() == "loop_":
            at = _read_loop(lines, at + 1, blocks[-1], path)
        elif stripped.startswith("_"):
            tokens = _tokens(stripped)
            _add_column(blocks[-1], tokens[0][1:], tokens[1:2] or [""], path)
            at += 1
        else:
            raise InputError(
                "a value outside any loop", file=path, found=repr(stripped[:40]), hint=f"See line {at + 1} of the file."
            )
    if not blocks:
        raise InputError("not a STAR file: it has no data block", file=path)
    return blocks


def _read_loop(lines: list[str], at: int, block: StarBlock, path: object) -> int:
    if block.columns:
        raise InputError(f"two tables in the block data_{block.name}", file=path)
    block.loop = True
    names: list[str] = []
    while at < len(lines):
        stripped = lines[at].strip()
        if stripped.startswith("_"):
            names.append(stripped.split()[0][1:])
        elif stripped and not stripped.startswith("#"):
            break
        at += 1
    start = at
    rows: list[list[str]] = []
    while at < len(lines):
        line = lines[at]
        stripped = line.lstrip()
        first = stripped[:1]
        if (
            first in ("_", "d", "D", "l", "L")
            and _STRUCTURE.match(stripped.rstrip())
            and (len(names) > 1 or first == "_")
        ):
            break
        if first and first != "#":
            if "'" in line or '"' in line or "#" in line:
                rows.append(_tokens(line))
            else:
                rows.append(line.split())
            if len(rows[-1]) != len(names):
                raise InputError(
                    f"wrong number of values in the table data_{block.name}",
                    file=path,
                    row=len(rows),
                    expected=f"{len(names)} values, one a column",
                    found=len(rows[-1]),
                    hint=f"See line {at + 1} of the file (the first row is on line {start + 1}).",
                )
        at += 1
    values = [list(c) for c in zip(*rows)] if rows else [[] for _ in names]
    for name, column in zip(names, values):
        _add_column(block, name, column, path)
    return at


def _add_column(block: StarBlock, name: str, values: list[str], path: object) -> None:
    if name in block.columns:
        raise InputError(f"the column _{name} stands twice in the block data_{block.name}", file=path)
    block.columns[name] = values


def _tokens(line: str) -> list[str]:
    found = []
    for match in _TOKEN.finditer(line):
        bare = match["bare"]
        if bare is not None and bare.startswith("#"):
            break
        found.append(bare if bare is not None else match["single"] if match["single"] is not None else match["double"])
    return found


def _quoted(value: str) -> str:
    if value and not value.startswith(("'", '"', "#", "_")) and not re.search(r"\s", value):
        return value
    if not re.search(r'"(\s|$)', value):
        return f'"{value}"'
    return f"'{value}'"


def format_blocks(blocks: list[StarBlock]) -> str:
    """A STAR text; reading it back gives equal blocks."""
    parts = []
    for block in blocks:
        parts.append(f"\n# version 30001\n\ndata_{block.name}\n\n")
        if not block.loop:
            parts.extend(f"_{k} {_quoted(v[0])}\n" for k, v in block.columns.items())
            continue
        parts.append("loop_\n")
        parts.extend(f"_{name} #{i}\n" for i, name in enumerate(block.columns, start=1))
        columns = [_quoted_column(c) for c in block.columns.values()]
        if len(columns) == 1:  # a lone value such as data_x would read as structure
            columns[0] = [f'"{v}"' if _STRUCTURE.match(v) else v for v in columns[0]]
        parts.append("".join(map("%s\n".__mod__, map(" ".join, zip(*columns)))))
        parts.append("\n")
    return "".join(parts)


def _quoted_column(values: list[str]) -> list[str]:
    joined = "\n".join(values)
    plain = len(joined.split()) == len(values) and not any(map(str.startswith, values, repeat(("'", '"', "#", "_"))))
    return values if plain else [_quoted(v) for v in values]


def write_blocks(path: object, blocks: list[StarBlock]) -> None:
    """Writes a STAR file atomically."""
    text = format_blocks(blocks)
    with atomic_write(path, "wb") as stream:
        stream.write(text.encode("utf-8", errors="surrogateescape"))
