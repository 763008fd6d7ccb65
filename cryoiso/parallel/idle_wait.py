"""Rank 0 looks after something outside of MPI while the others sleep, all of them ready to stop or to work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from cryoiso.parallel import signals
from cryoiso.parallel.context import Context
from cryoiso.parallel.group_stop import StopSignal

T = TypeVar("T")
_LONGEST_NAP_S = 0.05


def poll_on_root(comm: Context, stop_signal: StopSignal, look: Callable[[bool], T | None]) -> T:
    """Rank 0 calls ``look`` again and again until it finds something; every rank gets that. Collective.

    Nobody spins: rank 0 naps between two looks, the others ask now and then whether it is over.

    Args:
        stop_signal: any rank that gets a stop signal sends it on.
        look: on rank 0; is told whether anybody was told to stop, returns None to go on watching. It must not raise.
    """
    result: Any = None
    if comm.rank == 0:
        pause = 1e-3
        while (result := look(stop_signal.received())) is None:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_NAP_S)
    _arrive(comm, stop_signal)
    value: T = comm.bcast(result)
    return value


def _arrive(comm: Context, stop_signal: StopSignal) -> None:
    """As ``Context.wait_for_all``, and a signal of this rank is passed on meanwhile."""
    if comm.size == 1:
        return
    request = comm.comm.Ibarrier()  # type: ignore[attr-defined]
    pause = 1e-4
    while not request.Test():
        if signals.stop_signal():
            stop_signal.send()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_NAP_S)
