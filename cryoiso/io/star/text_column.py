"""Columns of text without a Python object per value, which takes 57 bytes beside its characters.

``TextColumn`` keeps what was read in one buffer with an offset of 8 bytes per value; ``MadeColumn`` makes what is
written some rows at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np

SLAB = 2_048
"""Rows that are Python strings at one time while a table is read, converted or written; more only take longer."""
SLAB_CHARACTERS = 2**24


def slabs(n: int) -> Iterator[slice]:
    """Cuts n rows into stretches of at most ``SLAB``."""
    for start in range(0, n, SLAB):
        yield slice(start, min(start + SLAB, n))


class MadeColumn(Sequence[str]):
    """A column whose values are made when they are asked for."""

    def __init__(self, n: int, make: Callable[[slice], list[str]]) -> None:
        """
        Args:
            n: number of values.
            make: the values of a slice of rows.
        """
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, rows: int) -> str: ...
    @overload
    def __getitem__(self, rows: slice) -> list[str]: ...
    def __getitem__(self, rows: int | slice) -> str | list[str]:
        if isinstance(rows, slice):
            return self._make(rows)
        row = range(self._n)[rows]  # an IndexError beyond the end, as for a list
        return self._make(slice(row, row + 1))[0]

    def __iter__(self) -> Iterator[str]:
        for rows in slabs(self._n):
            yield from self._make(rows)


class TextColumn(MadeColumn):
    """A column as it was read. It never changes."""

    def __init__(self, values: Any) -> None:
        """
        Args:
            values: pyarrow.Array of large strings.
        """
        self.values = values
        super().__init__(len(values), lambda rows: values[rows].to_pylist())

    def __deepcopy__(self, memo: object) -> TextColumn:
        return self

    def __reduce__(self) -> tuple[type[TextColumn], tuple[Any]]:
        return TextColumn, (self.values,)

    def series(self) -> Any:
        """The column as a pandas.Series that shares its buffer."""
        import pandas as pd
        import pyarrow as pa

        return pd.Series(pd.StringDtype("pyarrow").__from_arrow__(pa.chunked_array([self.values])))


def series_column(series: Any) -> MadeColumn:
    """The column of a pandas.Series, written with ``str``."""
    return MadeColumn(len(series), lambda rows: [str(v) for v in series.iloc[rows].tolist()])


class TableBuilder:
    """Rows of a table, put together slab by slab.

    Attributes:
        rows: number of rows.
        first_line: of the file, of the first row.
        wrong: row from 0, line of the file and number of values of the first row with another number of values than
            columns, or None. Later rows are left out.
    """

    def __init__(self, width: int, first_line: int, split: Callable[[str], list[str]]) -> None:
        """
        Args:
            width: number of columns.
            split: gives the values of a line that may have quotes, comments or unusual characters.
        """
        self.rows, self.first_line = 0, first_line
        self.wrong: tuple[int, int, int] | None = None
        self._width, self._split = width, split
        self._lines: list[str] = []
        self._numbers: list[int] = []
        self._characters = 0
        self._packed = [_Packed() for _ in range(width)]

    def add(self, number: int, text: str) -> None:
        """A row that is on this line of the file."""
        self._lines.append(text)
        self._numbers.append(number)
        self._characters += len(text)
        if len(self._lines) >= SLAB or self._characters >= SLAB_CHARACTERS:
            self._flush()

    def columns(self) -> list[Sequence[str]]:
        """The columns: ``TextColumn``, or a list where values are not UTF-8. Once, at the end."""
        self._flush()
        return [self._packed.pop(0).column() for _ in range(self._width)]

    def _flush(self) -> None:
        lines, numbers, before = self._lines, self._numbers, self.rows
        self._lines, self._numbers, self._characters = [], [], 0
        self.rows += len(lines)
        if not lines or self.wrong:
            return
        values = self._values(lines)
        if set(map(len, values)) != {self._width}:
            row = next(i for i, row in enumerate(values) if len(row) != self._width)
            self.wrong = (before + row, numbers[row], len(values[row]))
            return
        for packed, column in zip(self._packed, zip(*values), strict=True):
            packed.extend(column)

    def _values(self, lines: list[str]) -> list[list[str]]:
        """The values of each line. ``str.split`` takes more characters for blanks than a STAR file does."""
        text = " ".join(lines)
        if not (text.isascii() and text.replace("\t", " ").isprintable()):
            return list(map(self._split, lines))
        if '"' in text or "'" in text or "#" in text:
            return list(map(self._split, lines))
        return list(map(str.split, lines))


class _Packed:
    """A column that grows: two buffers, which stay whole where many small ones would leave holes in memory."""

    def __init__(self) -> None:
        self._data, self._lengths, self._utf8 = bytearray(), array("i"), True

    def extend(self, values: Sequence[str]) -> None:
        text = "".join(values)
        if text.isascii():
            self._data += text.encode()
            self._lengths.extend(map(len, values))
            return
        self._utf8 &= not any("\ud800" <= letter <= "\udfff" for letter in text)
        encoded = [value.encode("utf-8", "surrogatepass") for value in values]
        self._data += b"".join(encoded)
        self._lengths.extend(map(len, encoded))

    def column(self) -> Sequence[str]:
        import pyarrow as pa

        offsets = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        if not self._utf8:
            return [self._data[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(offsets.tolist())]
        n, data = len(self._lengths), (pa.py_buffer(offsets), pa.py_buffer(self._data))
        return TextColumn(pa.LargeStringArray.from_buffers(n, *data))
