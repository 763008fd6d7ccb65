"""A file that only grows, of records that are whole or not there: for what is written often and may be cut off."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryoiso.core.errors import InputError
from cryoiso.io.regular_file import open_regular

_HEAD = struct.Struct("<4sIQI")
"""Mark, bytes of the key, bytes of the content, CRC-32 of both."""
_MARK = b"cyFR"


@dataclass(frozen=True)
class Record:
    """Where a record lies."""

    path: Path
    start: int
    key: str
    size: int
    """Bytes of the content."""

    @property
    def end(self) -> int:
        return self.start + _HEAD.size + len(self.key.encode()) + self.size


def append(path: Path, at: int, records: Iterable[tuple[str, bytes]]) -> int:
    """Writes records from a place on, forgets what stood there, and waits until the disk has them.

    Returns:
        The place after them.
    """
    content = b"".join(_head(key, data) + key.encode() + data for key, data in records)
    with open(path, "r+b" if path.exists() else "w+b") as stream:
        stream.truncate(at)
        stream.seek(at)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return at + len(content)


def _head(key: str, data: bytes) -> bytes:
    raw = key.encode()
    return _HEAD.pack(_MARK, len(raw), len(data), zlib.crc32(data, zlib.crc32(raw)))


def read_records(path: Path) -> list[Record]:
    """The records of a file up to the first that is cut off; their contents are not read."""
    known: list[Record] = []
    at, length = 0, path.stat().st_size
    with open_regular(path) as stream:
        while at + _HEAD.size <= length:
            mark, key_size, size, _ = _HEAD.unpack(stream.read(_HEAD.size))
            if mark != _MARK or at + _HEAD.size + key_size + size > length:
                break
            key = stream.read(key_size).decode(errors="replace")
            known.append(Record(path, at, key, size))
            at = stream.seek(size, os.SEEK_CUR)
    return known


def content(record: Record) -> bytes | None:
    """What a record holds; None if it is damaged or gone."""
    try:
        with open_regular(record.path) as stream:
            stream.seek(record.start)
            raw = stream.read(record.end - record.start)
    except (OSError, InputError):
        return None
    mark, key_size, size, crc = _HEAD.unpack(raw[: _HEAD.size]) if len(raw) >= _HEAD.size else (b"", 0, 0, 0)
    body = raw[_HEAD.size :]
    if mark != _MARK or len(body) != key_size + size or zlib.crc32(body) != crc:
        return None
    return body[key_size:]
