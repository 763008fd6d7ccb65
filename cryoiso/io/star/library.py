"""Tables as the ``starfile`` package reads them.

What it may change (quoted or missing values, ``nan``, a ``#`` inside a value) is looked up in the line that it came
from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from cryoiso.core.errors import InputError
from cryoiso.io.star.tokens import marked, tokens

logger = logging.getLogger("cryoiso")

LONG_LINE = 2**15
"""The library takes seconds for a line of very many values, only to fail; it is not given longer ones."""
Rows = list[tuple[int, str]]
"""Line number and text of every row of a loop, or of every item of a list."""


def tables(path: object, names: Iterable[str]) -> dict[str, Any]:
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


def loop_values(name: str, columns: list[str], rows: Rows, table: Any, path: object) -> list[list[str]]:
    """The columns of a loop: starfile's values, with rows in doubt read again from their lines.

    starfile takes an apostrophe for a quotation mark, ends a row at any #, reads "nan" as missing, fills up short
    rows with empty text, ends a table at a value that starts with data_, and writes the block's name over a column
    called "name".
    """
    is_whole_block = table is not None and not isinstance(table, dict) and "name" not in columns
    if is_whole_block and list(table) == columns and len(table) == len(rows):
        values = [table[column].tolist() for column in columns]
        doubt = {i for i, (_, text) in enumerate(rows) if marked(text)}
        doubt.update(i for column in values for i, v in enumerate(column) if not (isinstance(v, str) and v))
    else:
        values = [[""] * len(rows) for _ in columns]
        doubt = set(range(len(rows)))
    for i in sorted(doubt):
        words = tokens(rows[i][1])
        if len(words) != len(values):
            raise wrong_width(name, i, rows[i][0], rows[0][0], len(values), len(words), path)
        for column, token in zip(values, words):
            column[i] = token
    return values


def wrong_width(
    name: str, row: int, line: int, first_line: int, width: int, row_width: int, path: object
) -> InputError:
    """The error of a row (from 0) of the table ``name`` that has another number of values than there are columns."""
    return InputError(
        f"wrong number of values in the table data_{name}",
        file=path,
        row=row + 1,
        expected=f"{width} values, one a column",
        found=row_width,
        hint=f"See line {line} of the file (the first row is on line {first_line}).",
        code="star-malformed",
    )


def list_values(columns: list[str], items: Rows, table: Any, path: object) -> list[list[str]]:
    """The columns of a block that is no loop, one value each; starfile takes a backslash for an escape.

    Args:
        table: as starfile read it; None: all values are read from their lines.
    """
    values = []
    for name, (number, text) in zip(columns, items):
        value = table.get(name) if isinstance(table, dict) else None
        if not isinstance(value, str) or marked(text) or "\\" in text:
            words = tokens(text)
            if len(words) > 2:
                hint = f"See line {number} of the file. A value with spaces must stand in quotes."
                raise InputError(
                    f"_{name} has more than one value",
                    file=path,
                    found=" ".join(words[1:]),
                    hint=hint,
                    code="star-malformed",
                )
            value = words[1] if len(words) == 2 else ""
        values.append([value])
    return values
