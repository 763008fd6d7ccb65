"""The key-value store through which the ranks of a training group find each other, carried by MPI.

torch.distributed exchanges the addresses of its connections through a store. Its own TCPStore listens on every network
address of the host and answers anybody who connects. This one opens no port: each key is sent to the other members by
MPI, which only the ranks of the job can do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its __all__

_TAG = 11
_LONGEST_PAUSE_S = 0.01


class MpiStore(Store):
    """Keys and values of a group of ranks; each member keeps a copy of all of them.

    Live while the group is set up, in the thread that made it; after ``settle`` it answers from its copy alone, and so
    it does at any time for the background threads of torch, which must not call MPI.
    """

    def __init__(self, comm: Any, timeout_s: float) -> None:
        """
        Args:
            comm: an mpi4py communicator of the members and nobody else; freed by ``settle``.
            timeout_s: a key that no member sets in this time is an error.
        """
        super().__init__()
        self._comm, self._timeout_s = comm, timeout_s
        self._thread = threading.get_ident()
        self._values: dict[str, bytes] = {}
        self._sent: list[Any] = []
        self._received = np.zeros(comm.size, np.int64)

    def set(self, key: str, value: Any) -> None:
        """Stores a value here and sends it to the other members."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        if not self._may_call_mpi():
            return
        name = key.encode()
        message = np.frombuffer(len(name).to_bytes(4, "big") + name + data, np.uint8)
        for other in range(self._comm.size):
            if other != self._comm.rank:
                self._sent.append((other, self._comm.Isend(message, other, _TAG), message))

    def get(self, key: str) -> bytes:
        """The value of a key, waited for.

        Raises:
            RuntimeError: nobody set it in time.
        """
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Returns when all keys are there.

        Raises:
            RuntimeError: they are not, in time.
        """
        limit_s = self._timeout_s if timeout is None else timeout.total_seconds()
        until, pause = time.monotonic() + limit_s, 1e-5
        while not self.check(keys):
            if time.monotonic() > until:
                missing = [key for key in keys if key not in self._values]
                raise RuntimeError(f"no rank of the training group has set {missing[0]!r} within {limit_s:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        self._receive()
        return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        """Removes a key of this member's copy."""
        return self._values.pop(key, None) is not None

    def num_keys(self) -> int:
        """Number of keys in this member's copy."""
        return len(self._values)

    def has_extended_api(self) -> bool:
        """No appending and no queues."""
        return False

    def settle(self) -> None:
        """Ends the exchange once the group stands: every message is received, the communicator is freed. Collective."""
        counts = np.zeros(self._comm.size, np.int64)
        for other, _, _ in self._sent:
            counts[other] += 1
        expected = np.empty_like(counts)
        self._comm.Alltoall(counts, expected)
        while (self._received < expected).any():
            self._receive()
        for _, request, _ in self._sent:
            request.Wait()
        self._comm.Free()
        self._comm, self._sent = None, []

    def _may_call_mpi(self) -> bool:
        return self._comm is not None and threading.get_ident() == self._thread

    def _receive(self) -> None:
        if not self._may_call_mpi():
            return
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self._comm.Improbe(MPI.ANY_SOURCE, _TAG, status)) is not None:
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            message.Recv(data)
            raw = data.tobytes()
            length = int.from_bytes(raw[:4], "big")
            self._values[raw[4 : 4 + length].decode()] = raw[4 + length :]
            self._received[status.source] += 1


def group_store(comm: Any, members: Sequence[int], index: int, timeout_s: float) -> MpiStore | None:
    """The store of each group of two ranks or more; None on ranks that are in none. Collective over ``comm``.

    Args:
        comm: an mpi4py communicator of all ranks.
        members: of this rank's group, first member first.
        index: this rank's place among them, -1 if it is not a member.
    """
    from mpi4py import MPI

    joins = index >= 0 and len(members) > 1
    group = comm.Split(members[0] if joins else MPI.UNDEFINED, max(index, 0))
    return MpiStore(group, timeout_s) if joins else None
