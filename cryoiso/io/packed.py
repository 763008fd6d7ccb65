"""Files packed with gzip or bzip2, unpacked piece by piece: what comes out is never larger than what was asked for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.regular_file import open_regular

MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}
"""First bytes of packed files."""


def packing(start: bytes) -> str:
    """What a file is packed with, by its first bytes; empty for anything else.

    >>> packing(b"\\x1f\\x8b\\x08")
    'gzip'
    """
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), "")


def packing_of(path: object) -> str:
    """What a file is packed with, or empty.

    Raises:
        OSError, InputError: as ``open_regular``.
    """
    with open_regular(path) as stream:
        return packing(stream.read(8))


@contextmanager
def unpacking(path: object, kind: str) -> Iterator[IO[bytes]]:
    """A stream of the unpacked bytes.

    Args:
        kind: "gzip" or "bzip2".

    Raises:
        InputError: another kind, or damaged (also while the stream is read).
    """
    import bz2
    import gzip

    if kind not in ("gzip", "bzip2"):
        raise InputError(
            f"packed with {kind}",
            file=path,
            expected="gzip or bzip2, if any",
            hint="Unpack it first.",
            code="packed-file-unsupported",
        )
    opener: Any = gzip.open if kind == "gzip" else bz2.open
    try:
        with open_regular(path) as packed, opener(packed, "rb") as stream:
            yield cast("IO[bytes]", stream)
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot be unpacked: {error}", file=path, hint="Copy it again.", code="file-unreadable"
        ) from None


def read_exactly(stream: Any, count: int) -> np.ndarray | None:
    """The next ``count`` bytes as uint8, or None if there are fewer. Memory is used for what is there, not promised."""
    data = np.empty(count, np.uint8)  # the system gives the pages when they are written to
    view = data.data
    while len(view):
        got = stream.readinto(view[: 1 << 22])
        if not got:
            return None
        view = view[got:]
    return data
