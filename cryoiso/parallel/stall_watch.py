"""Notices ranks that have stopped: suspended by a signal or debugger, hung on a file system, on a host that is gone.

The others wait for such a rank in MPI, without end and without a word. So each rank looks now and then at the next one
of its host, in /proc, and the first rank of each host at the log file of the first rank of the next host, whose time of
change that rank renews. Nothing here is collective, and nothing ends a run: it says which rank is silent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryoiso.core.log import BY_ANY_RANK, duration, logger

LOOK_S = 10.0
LOCAL_LOOKS = 6
"""A minute."""
REMOTE_LOOKS = 18
"""Three minutes: a network file system may show a file's time of change a minute late."""
AGAIN_LOOKS = 60
STOPPED, WAITING_FOR_DISK = ("T", "t"), "D"
PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process of this host; the time of its start tells it from a later one with the same number."""

    number: int
    start: int

    @classmethod
    def own(cls) -> Process:
        stat = read_stat(os.getpid())
        return cls(os.getpid(), stat[1] if stat else -1)


def read_stat(number: int, proc: Path = PROC) -> tuple[str, int, int] | None:
    """State letter, start and CPU time (both in clock ticks) of a process; None where there is none to be seen."""
    try:
        words = (proc / str(number) / "stat").read_text().rpartition(")")[2].split()
        return words[0], int(words[19]), int(words[11]) + int(words[12])
    except (OSError, ValueError, IndexError):
        return None


class Silence:
    """Counts looks at one rank in which it gave no sign of life, and says so once there were enough."""

    def __init__(self, who: str, enough: int) -> None:
        self._who, self._enough, self._looks = who, enough, 0

    def note(self, silent: bool, why: str) -> None:
        """One look."""
        if not silent:
            if self._looks >= self._enough:
                logger.warning("%s goes on again", self._who, extra=BY_ANY_RANK)
            self._looks = 0
            return
        self._looks += 1
        if self._looks >= self._enough and (self._looks - self._enough) % AGAIN_LOOKS == 0:
            waited = duration(self._looks * LOOK_S)
            logger.warning(
                "%s has been silent for %s: %s. The other ranks wait for it.", self._who, waited, why, extra=BY_ANY_RANK
            )


class LocalNeighbour:
    """The next rank of this host."""

    def __init__(self, rank: int, host: str, process: Process, proc: Path = PROC) -> None:
        self._process, self._proc = process, proc
        self._silence = Silence(f"rank {rank} on {host} (process {process.number})", LOCAL_LOOKS)
        self._cpu = -1

    def look(self) -> bool:
        """False: the process has ended or cannot be seen."""
        stat = read_stat(self._process.number, self._proc)
        if stat is None or stat[1] != self._process.start:
            return False
        state, _, cpu = stat
        idle, self._cpu = cpu == self._cpu, cpu
        if state in STOPPED:
            remedy = f"'kill -CONT {self._process.number}' there lets it go on"
            self._silence.note(idle, f"it is suspended, by SIGSTOP or a debugger; {remedy}")
        else:
            self._silence.note(idle and state == WAITING_FOR_DISK, "it waits for a disk or a network file system")
        return True


class RemoteNeighbour:
    """The first rank of the next host, by the log file whose time of change it renews."""

    def __init__(self, rank: int, host: str, file: Path) -> None:
        self._file = file
        self._silence = Silence(f"rank {rank} on {host}", REMOTE_LOOKS)
        self._seen: list[int] = []

    def look(self) -> bool:
        with suppress(OSError):
            changed = os.stat(self._file).st_mtime_ns
            alive = changed not in self._seen[-1:]
            if alive:
                self._seen = [*self._seen[-2:], changed]
            if len(self._seen) > 2:  # else its renewals have not been seen here yet: the folder may not be shared
                self._silence.note(not alive, "its process, its host or the network between has stopped")
        return True


class StallWatch:
    """The thread that looks; ends with the process."""

    def __init__(self) -> None:
        self._watched: list[LocalNeighbour | RemoteNeighbour] = []
        self._pulse: Path | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, neighbour: LocalNeighbour | RemoteNeighbour) -> None:
        """Looks at one more."""
        self._watched.append(neighbour)

    def renew(self, file: Path) -> None:
        """From now on renews the time of change of this rank's log file."""
        self._pulse = file

    def start(self) -> None:
        """Begins, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="stall watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_S):
            if self._pulse is not None:
                with suppress(OSError):
                    os.utime(self._pulse)
            self._watched = [neighbour for neighbour in self._watched if neighbour.look()]


def next_host(nodes: dict[str, list[int]], host: str) -> tuple[int, str] | None:
    """First rank and name of the host that comes after this one, None where there is only one.

    >>> next_host({"a": [0, 1], "b": [2]}, "b"), next_host({"a": [0]}, "a")
    ((0, 'a'), None)
    """
    hosts: Sequence[str] = list(nodes)
    if len(hosts) < 2:
        return None
    following = hosts[(hosts.index(host) + 1) % len(hosts)]
    return nodes[following][0], following
