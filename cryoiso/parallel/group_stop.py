"""How groups of ranks that work side by side, each at its own pace, stop together.

A collective call at every step would make them wait for each other. So a rank that has to stop sends every other rank
a message, all ranks look for messages between two steps, and all synchronise when each is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cryoiso.core.errors import CryoisoError, Interrupted
from cryoiso.core.protocols import Communicator
from cryoiso.parallel import signals
from cryoiso.parallel.abort import agree

logger = logging.getLogger("cryoiso")
TELL_AFTER_S = 20.0
"""Shorter waits are not reported."""
_TAG = 7
_GROUP_WIDE = "known_to_its_group"


def group_wide(error: CryoisoError) -> CryoisoError:
    """Marks an error that every rank of its group raises at the same step."""
    setattr(error, _GROUP_WIDE, True)
    return error


class StopSignal:
    """Sent by a rank that must stop, received by all; only ``synchronise`` waits."""

    def __init__(self, comm: Any) -> None:
        """Collective.

        Args:
            comm: a ``Context``.
        """
        self._comm = comm
        self._mpi: Any = comm.comm.Dup() if comm.size > 1 else None
        self._sent = False
        self._senders: set[int] = set()
        self._messages: list[Any] = []

    def send(self) -> None:
        """Tells all ranks to stop as soon as they can."""
        if self._mpi is not None and not self._sent:
            others = [rank for rank in range(self._comm.size) if rank != self._comm.rank]
            self._messages = [self._mpi.isend(None, rank, _TAG) for rank in others]
        self._sent = True

    def received(self) -> bool:
        """Whether this rank got a stop signal or any rank sent one. Passes a signal on to all ranks."""
        if signals.stop_signal():
            self.send()
        while self._mpi is not None and self._mpi.iprobe(tag=_TAG):
            self._receive()
        return self._sent or bool(self._senders)

    def synchronise(self, error: CryoisoError | None = None) -> None:
        """Waits, asleep, until every rank is here; then raises on all ranks the worst error that any brought.

        An interruption gives way to anything else: groups are interrupted because another one failed. Collective.
        """
        self._wait()
        sent = self._comm.allgather(self._sent)
        while self._mpi is not None and len(self._senders) < sum(sent) - self._sent:
            self._receive()  # every message finds its receiver before the channel goes
        for message in self._messages:
            message.wait()
        if self._mpi is not None:
            self._mpi.Free()
            self._mpi = None
        only_stopped = error is None or isinstance(error, Interrupted)
        agree(self._comm, None if only_stopped else error)
        agree(self._comm, error)

    def _receive(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        self._mpi.recv(source=MPI.ANY_SOURCE, tag=_TAG, status=status)
        self._senders.add(status.source)

    def _wait(self) -> None:
        if self._mpi is None:
            return
        arrived = self._mpi.Ibarrier()
        pause, since, is_reported = 1e-4, time.monotonic(), False
        while not arrived.Test():
            self.received()
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
            if not is_reported and time.monotonic() - since > TELL_AFTER_S:
                is_reported = True
                logger.info("rank %d is through and waits for ranks that work on something else", self._comm.rank)


@contextmanager
def side_by_side(comm: Communicator) -> Iterator[StopSignal]:
    """Groups of ranks work inside without each other and meet at the end (collective).

    If one is interrupted or fails as a group, the others are told to stop, and every rank raises the same error. An
    error of one rank alone is passed on at once, for ``abort.guard`` to end all.
    """
    stop_signal = StopSignal(comm)
    error: CryoisoError | None = None
    try:
        yield stop_signal
    except CryoisoError as caught:
        if comm.size > 1 and not getattr(caught, _GROUP_WIDE, False):
            raise
        stop_signal.send()
        error = caught
    stop_signal.synchronise(error)


def on_root_heeding(comm: Communicator, function: Callable[..., object], *args: Any) -> None:
    """As ``abort.on_root`` for long work without a result: a signal to any rank reaches rank 0's ``signals.heed``.

    Collective.

    Raises:
        CryoisoError: that of rank 0, on every rank.
    """
    stop_signal = StopSignal(comm)
    error: CryoisoError | None = None
    if comm.rank == 0:
        try:
            with signals.listening_to(stop_signal.received):
                function(*args)
        except CryoisoError as caught:
            error = caught
    stop_signal.synchronise(error)
