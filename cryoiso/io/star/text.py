"""STAR files as text: blocks, columns and values exactly as written, in both directions.

Values stay strings, so nothing is lost: leading zeros, long decimals and text that looks like a number come back as
they were. Only layout (padding, comments, ``#1`` column numbers) is not kept. Format: Hall, J. Chem. Inf. Comput. Sci.
31 (1991) 326, in the dialect of RELION: one loop row a line.

The ``starfile`` package reads the tables. What it may change (quoted or missing values, ``nan``, a ``#`` inside a
value) is looked up in the line that it came from. Writing is done here, because ``starfile`` stamps the time into what
it writes and the same results must give the same bytes.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

from cryoiso.core.errors import InputError
from cryoiso.io.atomic import atomic_write
from cryoiso.io.regular_file import open_regular

logger = logging.getLogger("cryoiso")

MAX_LINE, MAX_COLUMNS, MAX_BLOCKS = 2**20, 1_000, 10_000
"""Longest line, columns of a block and blocks of a file that are read; RELION's own files are far below."""
LONG_LINE = 2**15
_CLOSING = {"'": re.compile(r"'(?=[ \t]|$)"), '"': re.compile(r'"(?=[ \t]|$)')}
_BARE = re.compile(r"[^ \t]+")
_SPACE = re.compile(r"[ \t]+")
_STRUCTURE = re.compile(r"(data_\S*|loop_)(\s+#.*)?$|_\S", re.IGNORECASE)


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
        InputError: no such file, not a STAR file, two tables in one block, a column named twice, or a row whose number
            of values is not that of the columns.
    """
    outlines = _outline(path)
    longest = max((len(text) for o in outlines for _, text in o.rows), default=0)
    # the library takes seconds for a line of very many values, only to fail
    tables = _tables(path, {name for o in outlines for name in o.columns}) if longest <= LONG_LINE else {}
    count = Counter(o.name for o in outlines)
    blocks = []
    for outline in outlines:
        table = tables.pop(outline.name, None) if count[outline.name] == 1 else None
        values = _loop_values(outline, table, path) if outline.loop else _list_values(outline, table, path)
        blocks.append(StarBlock(outline.name, outline.loop, dict(zip(outline.columns, values))))
    return blocks


@dataclass
class _Outline:
    """Where a block's values stand: line number and text of every row (of every item if the block is no loop)."""

    name: str
    loop: bool = False
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[int, str]] = field(default_factory=list)


def _outline(path: object) -> list[_Outline]:
    """Blocks, their column names and the lines of their rows. The values are not looked at."""
    found: list[_Outline] = []
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), ""), start=1):
                if "\0" in line or len(line) > MAX_LINE:
                    raise _not_text(number, len(line) > MAX_LINE, path)
                text = line.strip()
                if not text or text[0] == "#":
                    continue
                if text[0] in "_dDlL" and _STRUCTURE.match(text):
                    _add_structure(found, number, text, path)
                elif found and found[-1].loop and found[-1].columns:
                    found[-1].rows.append((number, text))
                else:
                    raise _out_of_place(found, number, text, path)
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path, code="file-unreadable") from None
    if not found:
        raise InputError("not a STAR file: it has no data block", file=path, code="star-malformed")
    return found


def _not_text(number: int, long: bool, path: object) -> InputError:
    what = f"a line of more than {MAX_LINE:,} characters" if long else "a NUL character, which no text file has"
    return InputError(
        "not a STAR file, or damaged",
        file=path,
        found=what,
        hint=f"See line {number} of the file.",
        code="star-malformed",
    )


def _add_structure(found: list[_Outline], number: int, text: str, path: object) -> None:
    word = text.split()[0]
    if any("\ud800" <= letter <= "\udfff" for letter in word):
        problem = "the name of a column or block is not UTF-8"
        raise InputError(problem, file=path, hint=f"See line {number} of the file.", code="star-malformed")
    if word[0] in "dD":
        if len(found) >= MAX_BLOCKS:
            raise InputError(
                "too many data blocks", file=path, expected=f"at most {MAX_BLOCKS:,}", code="star-malformed"
            )
        found.append(_Outline(word[5:]))
        return
    if not found:
        raise _out_of_place(found, number, text, path)
    block = found[-1]
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
    elif block.loop and block.rows:
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
            block.rows.append((number, text))


def _out_of_place(found: list[_Outline], number: int, text: str, path: object) -> InputError:
    shown = repr(text[:40])
    if not found:
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


def _tables(path: object, names: Iterable[str]) -> dict[str, Any]:
    """What starfile reads, as text: block name -> DataFrame of a loop, dict of a list. Empty where it gives up."""
    import linecache

    import starfile

    linecache.clearcache()  # it reads through this cache, which does not notice that a file has changed
    try:
        return dict(starfile.read(str(path), always_dict=True, parse_as_string=sorted(names)))
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        logger.debug("%s: starfile gave up (%s); its tables are read line by line", path, error)
        return {}
    finally:
        linecache.clearcache()


def _loop_values(outline: _Outline, table: Any, path: object) -> list[list[str]]:
    """The columns of a loop: starfile's values, with rows in doubt read again from their lines.

    starfile takes an apostrophe for a quotation mark, ends a row at any #, reads "nan" as missing, fills up short
    rows with empty text, ends a table at a value that starts with data_, and writes the block's name over a column
    called "name".
    """
    rows = outline.rows
    whole = table is not None and not isinstance(table, dict) and "name" not in outline.columns
    if whole and list(table) == outline.columns and len(table) == len(rows):
        values = [table[name].tolist() for name in outline.columns]
        doubt = {i for i, (_, text) in enumerate(rows) if _marked(text)}
        doubt.update(i for column in values for i, v in enumerate(column) if not (isinstance(v, str) and v))
    else:
        values = [[""] * len(rows) for _ in outline.columns]
        doubt = set(range(len(rows)))
    for i in sorted(doubt):
        tokens = _tokens(rows[i][1])
        if len(tokens) != len(values):
            raise InputError(
                f"wrong number of values in the table data_{outline.name}",
                file=path,
                row=i + 1,
                expected=f"{len(values)} values, one a column",
                found=len(tokens),
                hint=f"See line {rows[i][0]} of the file (the first row is on line {rows[0][0]}).",
                code="star-malformed",
            )
        for column, token in zip(values, tokens):
            column[i] = token
    return values


def _list_values(outline: _Outline, table: Any, path: object) -> list[list[str]]:
    """The columns of a block that is no loop, one value each; starfile takes a backslash for an escape."""
    values = []
    for name, (number, text) in zip(outline.columns, outline.rows):
        value = table.get(name) if isinstance(table, dict) else None
        if not isinstance(value, str) or _marked(text) or "\\" in text:
            tokens = _tokens(text)
            if len(tokens) > 2:
                hint = f"See line {number} of the file. A value with spaces must stand in quotes."
                raise InputError(
                    f"_{name} has more than one value",
                    file=path,
                    found=" ".join(tokens[1:]),
                    hint=hint,
                    code="star-malformed",
                )
            value = tokens[1] if len(tokens) == 2 else ""
        values.append([value])
    return values


def _marked(text: str) -> bool:
    return '"' in text or "'" in text or "#" in text


def _tokens(line: str) -> list[str]:
    """The values of a line: quotes taken off, a comment left out (# begins one only at the start of a word)."""
    if not _marked(line):
        return _SPACE.split(line)
    found = []
    at, open_ended = 0, set()
    while word := _BARE.search(line, at):
        start, quote = word.start(), word[0][0]
        if quote == "#":
            break
        end = _CLOSING[quote].search(line, start + 1) if quote in _CLOSING and quote not in open_ended else None
        if end is None:
            open_ended.add(quote)  # nor will a later one be closed: looking again and again would take for ever
            found.append(word[0])
            at = word.end()
        else:
            found.append(line[start + 1 : end.start()])
            at = end.end()
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
    plain = joined.split() == values and not any(map(str.startswith, values, repeat(("'", '"', "#", "_"))))
    return values if plain else [_quoted(v) for v in values]


def write_blocks(path: object, blocks: list[StarBlock]) -> None:
    """Writes a STAR file atomically."""
    text = format_blocks(blocks)
    with atomic_write(path, "wb") as stream:
        stream.write(text.encode("utf-8", errors="surrogateescape"))
