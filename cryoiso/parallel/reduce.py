"""Sums over ranks that are the same every time, in slabs below any MPI count limit.

Integers are summed by MPI itself: exact in any order. Floating-point numbers are exchanged and added in the order of
the ranks, because MPI_SUM may add in an order that depends on the machine, and a + b + c then differs in its last bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SLAB_BYTES = 64 << 20
_EXACT = "iub"


def sum_all(comm: Any, array: np.ndarray, slab_bytes: int = SLAB_BYTES) -> np.ndarray:
    """Element-wise sum over all ranks, on every rank.

    Args:
        comm: an mpi4py communicator.
        array: any shape; integer, float or complex; the same shape and type on every rank. May be overwritten.
        slab_bytes: bytes exchanged at once; the working memory is about twice that.
    """
    return _sum(comm, array, None, slab_bytes)  # type: ignore[return-value]


def sum_to(comm: Any, array: np.ndarray, root: int, slab_bytes: int = SLAB_BYTES) -> np.ndarray | None:
    """As ``sum_all`` with the result on ``root`` and None elsewhere."""
    return _sum(comm, array, root, slab_bytes)


def bcast_array(comm: Any, array: np.ndarray | None, root: int, slab_bytes: int = SLAB_BYTES) -> np.ndarray:
    """An array of any size from ``root`` to every rank."""
    head = comm.bcast(None if array is None else (array.shape, array.dtype), root)
    data = np.ascontiguousarray(array) if comm.rank == root else np.empty(*head)
    flat = data.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, slab_bytes):
        comm.Bcast(flat[start : start + slab_bytes], root)
    return data.reshape(head[0])


def concat_all(comm: Any, rows: np.ndarray) -> np.ndarray:
    """The rows of all ranks, (sum of n, ...), in rank order, on every rank.

    Counted in rows, not in bytes or numbers, so that no MPI count limit is near.

    Args:
        rows: (n, ...) of this rank, n may be 0; the same type and row shape on every rank.
    """
    from mpi4py import MPI

    rows = np.ascontiguousarray(rows)
    counts = np.array(comm.allgather(len(rows)))
    out = np.empty((int(counts.sum()), *rows.shape[1:]), rows.dtype)
    row_bytes = rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    if not out.size:
        return out
    row_type = MPI.BYTE.Create_contiguous(row_bytes).Commit()
    try:
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        comm.Allgatherv([rows, len(rows), row_type], [out, (counts, starts), row_type])
    finally:
        row_type.Free()
    return out


def _sum(comm: Any, array: np.ndarray, root: int | None, slab_bytes: int) -> np.ndarray | None:
    data = np.require(array, requirements=["C", "W"])
    flat = data.reshape(-1)
    if np.iscomplexobj(flat):
        flat = flat.view(flat.real.dtype)
    step = max(1, slab_bytes // flat.itemsize)
    for start in range(0, flat.size, step):
        slab = flat[start : start + step]
        if flat.dtype.kind in _EXACT:
            _sum_exact(comm, slab, root)
        else:
            _sum_in_rank_order(comm, slab, root)
    return data if root is None or comm.rank == root else None


def _sum_exact(comm: Any, slab: np.ndarray, root: int | None) -> None:
    from mpi4py import MPI

    if root is None:
        comm.Allreduce(MPI.IN_PLACE, slab)
    elif comm.rank == root:
        comm.Reduce(MPI.IN_PLACE, slab, root=root)
    else:
        comm.Reduce(slab, None, root=root)


def _sum_in_rank_order(comm: Any, slab: np.ndarray, root: int | None) -> None:
    """Each rank gets everybody's copy of its share of the slab, adds them from rank 0 upwards, and gives it back."""
    size = comm.size
    shares = np.array([len(part) for part in np.array_split(np.empty(slab.size, np.bool_), size)])
    starts = np.concatenate([[0], np.cumsum(shares)[:-1]])
    own_share = int(shares[comm.rank])
    copies = np.empty((size, own_share), slab.dtype)
    comm.Alltoallv([slab, (shares, starts)], [copies, (np.full(size, own_share), np.arange(size) * own_share)])
    total = copies[0]
    for other in copies[1:]:
        total += other
    if root is None:
        comm.Allgatherv(total, [slab, (shares, starts)])
    else:
        comm.Gatherv(total, [slab, (shares, starts)] if comm.rank == root else None, root=root)
