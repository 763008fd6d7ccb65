"""What the C library's allocator does with memory that was freed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple


class Glibc(NamedTuple):
    """Two functions of glibc's malloc.h."""

    mallopt: Callable[[int, int], int]
    malloc_trim: Callable[[int], int]


def glibc() -> Glibc | None:
    """The allocator, if it may be told what to do: None with another C library, or where the environment sets it."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    return _library()


def return_free_memory() -> None:
    """Give memory that is free back to the system.

    glibc by itself gives back only the end of the heap. Where a long-lived block is taken after each of many
    short-lived ones, as images are kept while batches come and go, what is free lies between and stays.
    """
    library = glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _library() -> Glibc | None:
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return None
        return Glibc(library.mallopt, library.malloc_trim)
    except (OSError, AttributeError, TypeError):
        return None
