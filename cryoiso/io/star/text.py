"""STAR files as text: blocks, columns and values exactly as written, in both directions.

Values stay strings, so nothing is lost: leading zeros, long decimals and text that looks like a number come back as
they were. Only layout (padding, comments, ``#1`` column numbers) is not kept. Format: Hall, J. Chem. Inf. Comput. Sci.
31 (1991) 326, in the dialect of RELION: one loop row a line.

The ``starfile`` package reads tables (``library``). Those of particles, and all that is written, go some thousand rows
at a time (``text_column``), so that a million particles need little more memory than their text. No stamp of time is
written: the same results give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from cryoiso.core.errors import InputError
from cryoiso.io.atomic import atomic_write
from cryoiso.io.regular_file import open_regular
from cryoiso.io.star import library
from cryoiso.io.star.text_column import TableBuilder, TextColumn, slabs
from cryoiso.io.star.tokens import tokens

MAX_LINE, MAX_COLUMNS, MAX_BLOCKS = 2**20, 1_000, 10_000
"""Longest line, columns of a block and blocks of a file that are read; RELION's own files are far below."""
_STRUCTURE = re.compile(r"(data_\S*|loop_)(\s+#.*)?$|_\S", re.IGNORECASE)


class RowList:
    """Rows of a table as they stand in the file."""

    def __init__(self, width: int, first_line: int, split: object) -> None:
        self.rows: library.Rows = []

    def add(self, number: int, text: str) -> None:
        self.rows.append((number, text))


Builder = type[RowList] | type[TableBuilder]


@dataclass
class StarBlock:
    """One ``data_`` block: name without ``data_``, whether it is a loop, and its values as text.

    ``columns`` maps a name without the leading underscore to its list of strings (one entry each if not a loop), or to
    a column of ``text_column``.
    """

    name: str
    loop: bool
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def frame(self) -> Any:
        """The block as a pandas.DataFrame of Python strings; a ``TextColumn`` keeps its buffer."""
        import pandas as pd

        return pd.DataFrame(
            {
                k: v.series() if isinstance(v, TextColumn) else pd.Series(v, dtype=object)
                for k, v in self.columns.items()
            }
        )


def block_of_frame(name: str, frame: Any, loop: bool = True) -> StarBlock:
    """A block from a DataFrame; values are written with ``str``."""
    return StarBlock(name, loop, {str(c): [str(v) for v in frame[c].tolist()] for c in frame.columns})


def read_blocks(path: object) -> list[StarBlock]:
    """All blocks of a STAR file in their order, read by ``starfile``.

    Raises:
        InputError: no such file, not a STAR file, two tables in one block, a column named twice, or a row whose number
            of values is not that of the columns.
    """
    outlines = _outline(path, RowList)
    rows = [o.items if o.table is None else o.table.rows for o in outlines]
    longest = max((len(text) for block in rows for _, text in block), default=0)
    names = {name for o in outlines for name in o.columns}
    tables = library.tables(path, names) if longest <= library.LONG_LINE else {}
    count = Counter(o.name for o in outlines)
    blocks = []
    for o, own_rows in zip(outlines, rows, strict=True):
        table = tables.pop(o.name, None) if count[o.name] == 1 else None
        if o.loop:
            values = library.loop_values(o.name, o.columns, own_rows, table, path)
        else:
            values = library.list_values(o.columns, own_rows, table, path)
        blocks.append(StarBlock(o.name, o.loop, dict(zip(o.columns, values))))
    return blocks


def read_packed_blocks(path: object) -> list[StarBlock]:
    """As ``read_blocks`` for files of particles, of which there may be millions: some thousand rows at a time, without
    ``starfile``, which holds the file several times. Columns of loops are ``TextColumn``s, which cannot be changed."""
    blocks = []
    for outline in _outline(path, TableBuilder):
        if outline.loop:
            values = _loop_values(outline, path)
        else:
            values = [*library.list_values(outline.columns, outline.items, None, path)]
        blocks.append(StarBlock(outline.name, outline.loop, dict(zip(outline.columns, values))))
    return blocks


@dataclass
class _Outline:
    """A block as far as it was read: names of columns, and the rows of a loop or line number and text of each item."""

    name: str
    builder: Builder
    loop: bool = False
    columns: list[str] = field(default_factory=list)
    items: list[tuple[int, str]] = field(default_factory=list)
    table: Any = None

    def add_row(self, number: int, text: str) -> None:
        if self.table is None:
            self.table = self.builder(len(self.columns), number, tokens)
        self.table.add(number, text)


def _outline(path: object, builder: Builder) -> list[_Outline]:
    """Blocks, their column names and their rows. A row with a wrong number of values is noted, not refused."""
    outlines: list[_Outline] = []
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), ""), start=1):
                if "\0" in line or len(line) > MAX_LINE:
                    raise _not_text(number, len(line) > MAX_LINE, path)
                text = line.strip()
                if not text or text[0] == "#":
                    continue
                if text[0] in "_dDlL" and _STRUCTURE.match(text):
                    _add_structure(outlines, number, text, path, builder)
                elif outlines and outlines[-1].loop and outlines[-1].columns:
                    outlines[-1].add_row(number, text)
                else:
                    raise _out_of_place(outlines, number, text, path)
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path, code="file-unreadable") from None
    if not outlines:
        raise InputError("not a STAR file: it has no data block", file=path, code="star-malformed")
    return outlines


def _not_text(number: int, long: bool, path: object) -> InputError:
    what = f"a line of more than {MAX_LINE:,} characters" if long else "a NUL character, which no text file has"
    return InputError(
        "not a STAR file, or damaged",
        file=path,
        found=what,
        hint=f"See line {number} of the file.",
        code="star-malformed",
    )


def _add_structure(outlines: list[_Outline], number: int, text: str, path: object, builder: Builder) -> None:
    word = text.split()[0]
    if any("\ud800" <= letter <= "\udfff" for letter in word):
        problem = "the name of a column or block is not UTF-8"
        raise InputError(problem, file=path, hint=f"See line {number} of the file.", code="star-malformed")
    if word[0] in "dD":
        if len(outlines) >= MAX_BLOCKS:
            raise InputError(
                "too many data blocks", file=path, expected=f"at most {MAX_BLOCKS:,}", code="star-malformed"
            )
        outlines.append(_Outline(word[5:], builder))
        return
    if not outlines:
        raise _out_of_place(outlines, number, text, path)
    block = outlines[-1]
    name = word[1:]
    if word[0] != "_":
        if block.loop or block.columns:
            raise InputError(
                f"two tables in the block data_{block.name}",
                file=path,
                hint=f"See line {number}.",
                code="star-malformed",
            )
        block.loop = True
    elif block.table is not None:
        hint = f"See line {number}. If it is a row whose first value starts with _, put that value in quotes."
        raise InputError(
            f"a column name below the rows of the table data_{block.name}", file=path, hint=hint, code="star-malformed"
        )
    elif name in block.columns:
        raise InputError(
            f"the column _{name} appears twice in the block data_{block.name}", file=path, code="star-malformed"
        )
    else:
        if len(block.columns) >= MAX_COLUMNS:
            problem = f"too many columns in the block data_{block.name}"
            raise InputError(problem, file=path, expected=f"at most {MAX_COLUMNS:,}", code="star-malformed")
        block.columns.append(name)
        if not block.loop:
            block.items.append((number, text))


def _out_of_place(outlines: list[_Outline], number: int, text: str, path: object) -> InputError:
    shown = repr(text[:40])
    if not outlines:
        return InputError(
            "not a STAR file", file=path, expected="a line 'data_...' first", found=shown, code="star-malformed"
        )
    return InputError(
        "a value outside any loop",
        file=path,
        found=shown,
        hint=f"See line {number} of the file.",
        code="star-malformed",
    )


def _loop_values(outline: _Outline, path: object) -> list[Sequence[str]]:
    """The columns of a loop."""
    table = outline.table
    if table is None:
        return [[] for _ in outline.columns]
    columns: list[Sequence[str]] = table.columns()
    if table.wrong:
        row, line, values = table.wrong
        raise library.wrong_width(outline.name, row, line, table.first_line, len(outline.columns), values, path)
    return columns


def _quoted(value: str) -> str:
    if value and not value.startswith(("'", '"', "#", "_")) and not re.search(r"\s", value):
        return value
    if not re.search(r'"(\s|$)', value):
        return f'"{value}"'
    return f"'{value}'"


def format_blocks(blocks: list[StarBlock]) -> str:
    """A STAR text; reading it back gives equal blocks."""
    return "".join(_pieces(blocks))


def _pieces(blocks: list[StarBlock]) -> Iterator[str]:
    """The text of blocks, some rows at a time."""
    for block in blocks:
        yield f"\n# version 30001\n\ndata_{block.name}\n\n"
        if not block.loop:
            yield from (f"_{k} {_quoted(v[0])}\n" for k, v in block.columns.items())
            continue
        yield "loop_\n"
        yield from (f"_{name} #{i}\n" for i, name in enumerate(block.columns, start=1))
        for rows in slabs(min(map(len, block.columns.values()), default=0)):
            columns = [_quoted_column(c[rows]) for c in block.columns.values()]
            if len(columns) == 1:  # a lone value such as data_x would read as structure
                columns[0] = [f'"{v}"' if _STRUCTURE.match(v) else v for v in columns[0]]
            yield "".join(map("%s\n".__mod__, map(" ".join, zip(*columns))))
        yield "\n"


def _quoted_column(values: Sequence[str]) -> Sequence[str]:
    joined = "\n".join(values)
    plain = joined.split() == values and not any(map(str.startswith, values, repeat(("'", '"', "#", "_"))))
    return values if plain else [_quoted(v) for v in values]


def write_blocks(path: object, blocks: list[StarBlock]) -> None:
    """Writes a STAR file atomically."""
    with atomic_write(path, "wb") as stream:
        for text in _pieces(blocks):
            stream.write(text.encode("utf-8", errors="surrogateescape"))
