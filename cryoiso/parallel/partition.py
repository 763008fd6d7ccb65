"""Who owns what: pure functions that any process can compute for any rank, without communication."""

from __future__ import annotations


def owned_chunks(n_chunks: int, rank: int, size: int) -> range:
    """The contiguous range of chunks that belongs to ``rank`` of ``size``; counts differ by at most one.

    >>> [list(owned_chunks(7, rank, 3)) for rank in range(3)]
    [[0, 1, 2], [3, 4], [5, 6]]

    Raises:
        ValueError: for a rank outside 0..size-1 or a negative number of chunks.
    """
    if not 0 <= rank < size or n_chunks < 0:
        raise ValueError(f"no share for rank {rank} of {size} in {n_chunks} chunks")
    share, rest = divmod(n_chunks, size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def chunk_bounds(n: int, chunk: int) -> list[tuple[int, int]]:
    """(start, stop) of the chunks of ``chunk`` items that n items fall into; the last one may be shorter.

    >>> chunk_bounds(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    if chunk < 1:
        raise ValueError(f"a chunk has at least one item (found {chunk})")
    return [(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def owned_rows(n: int, chunk: int, rank: int, size: int) -> range:
    """The contiguous rows that belong to ``rank``: its whole chunks of ``chunk`` rows.

    >>> [owned_rows(10, 4, rank, 2) for rank in range(2)]
    [range(0, 8), range(8, 10)]
    """
    chunks = owned_chunks(-(-n // chunk), rank, size)
    return range(min(chunks.start * chunk, n), min(chunks.stop * chunk, n))


def root_of_half(half: int, size: int) -> int:
    """The rank on which the sums of half-set 1 or 2 end: 0 and, where there is one, the first rank of the second half.

    >>> [(root_of_half(1, n), root_of_half(2, n)) for n in (1, 2, 3, 8)]
    [(0, 0), (0, 1), (0, 1), (0, 4)]
    """
    return (half - 1) * (size // 2)
