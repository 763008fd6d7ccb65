"""Memory that a training frees and takes again at every step stays with the process meanwhile."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Numbers of these options in glibc's malloc.h."""
LARGEST_BLOCK = 32 << 20
"""Larger blocks are mapped singly and given back when they are freed."""
KEPT = 2**31 - 1
KEPT_AFTERWARDS = 64 << 20
"""What glibc sets by itself once a block of ``LARGEST_BLOCK`` was freed."""


@contextmanager
def steady_memory() -> Iterator[None]:
    """Keeps freed memory in the process inside; afterwards what is free goes back to the system.

    glibc gives the end of the heap back whenever enough of it is free. A training frees most of it at the end of a
    step, and the system then has to clear every page again: up to a tenth of the step on a loaded machine. Nothing is
    done with another C library, or where the environment sets the allocator.
    """
    library = None if _is_set_by_the_user() else _glibc()
    if library is None:
        yield
        return
    option, trim = library
    option(_MMAP_THRESHOLD, LARGEST_BLOCK)
    option(_TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        option(_TRIM_THRESHOLD, KEPT_AFTERWARDS)
        trim(0)


def _is_set_by_the_user() -> bool:
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)


def _glibc() -> tuple[Callable[[int, int], int], Callable[[int], int]] | None:
    """mallopt and malloc_trim; None without glibc."""
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return None
        return library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
