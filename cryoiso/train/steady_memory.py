"""Memory that a training frees and takes again at every step stays with the process meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cryoiso.core.allocator import glibc

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
    library = glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, LARGEST_BLOCK)
    library.mallopt(_TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, KEPT_AFTERWARDS)
        library.malloc_trim(0)
