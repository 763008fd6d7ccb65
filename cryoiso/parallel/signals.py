"""SIGTERM, SIGUSR1 and SIGHUP (the terminal was closed) mean: write a checkpoint at the next step boundary and leave
(exit 75), on all ranks together."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cryoiso.core.errors import Interrupted
from cryoiso.core.progress import board

logger = logging.getLogger("cryoiso")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_received: list[str] = []
_others: list[Callable[[], bool]] = []


def install_signal_handlers() -> None:
    """Notes SIGTERM, SIGUSR1 and SIGHUP for ``stop_requested``; a second SIGTERM ends the process at once as usual.

    SIGHUP stays ignored where it is, as under ``nohup``.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if number == signal.SIGTERM else _note)


def ask_to_stop(why: str) -> None:
    """As if a signal had come, e.g. because the job's time is nearly over."""
    _received.append(why)


def heed() -> None:
    """Stops here if this process, or one that it listens to, was told to stop; for work that the other ranks wait for.

    Raises:
        Interrupted: it was.
    """
    if stop_signal() or any(is_stopped() for is_stopped in _others):
        raise Interrupted("stopped by a signal; what is finished is kept")


@contextmanager
def listening_to(is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Inside, ``heed`` also asks this, e.g. a ``StopSignal``, whether to stop."""
    _others.append(is_stopped)
    try:
        yield
    finally:
        _others.remove(is_stopped)


def stop_signal() -> str:
    """Name of the signal (or the reason) that this process was told to stop with; empty if none."""
    board.heard()
    return _received[0] if _received else ""


def clear() -> None:
    """Forgets what was received (for a new run in the same process)."""
    _received.clear()
