"""Ends an external program when the process that started it is gone, however that ended. Started by ``process``.

Run as a file by a bare interpreter (it imports nothing of the package and starts in a moment):
``python -I -S watchdog.py SESSION``. Its standard input is a pipe whose other end the watched process holds: end of
file means that nobody is left who could stop the program.

A signal to the process group is not enough: Open MPI gives every rank a group of its own. All of them stay in the
session that the program was started in.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress


def members(session: int) -> list[int]:
    """Processes of this host that belong to a session."""
    processes = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if os.getsid(int(name)) == session:
                    processes.append(int(name))
    return processes


def end_session(session: int, grace_s: float) -> None:
    """SIGTERM to the session's leader, so that a launcher can end what runs on other hosts; SIGKILL to what is left
    after ``grace_s``, wherever on this host it is."""
    with suppress(OSError):
        os.killpg(session, signal.SIGTERM)
    until = time.monotonic() + grace_s
    while (left := _alive(session)) and time.monotonic() < until:
        time.sleep(0.05)
    while left:
        for process in left:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
        left = _alive(session)


def _alive(session: int) -> list[int]:
    """Members that are no zombies: those wait for a parent to notice and cannot be ended any further."""
    return [process for process in members(session) if _state(process) not in ("Z", "X", "")]


def _state(process: int) -> str:
    with suppress(OSError, IndexError), open(f"/proc/{process}/stat") as stream:
        return stream.read().rpartition(")")[2].split()[0]
    return ""


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_session(int(sys.argv[1]), 5.0)
