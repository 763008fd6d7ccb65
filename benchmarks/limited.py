"""A program that is stopped after a number of CPU seconds, with the CPU time of each of its MPI ranks until then.

CPU times are read from the system's table of processes (Linux), once in two seconds, so a stopped program took up to
two seconds per rank more than recorded.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness

PERIOD_S = 2.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK=", "PMI_RANK=")


@dataclass(frozen=True)
class ProcessTimes:
    """CPU time of a living process and of the children that it has waited for."""

    parent: int
    cpu_s: float
    system_s: float


@dataclass
class LimitedRun:
    """What a program has used until it ended or was stopped."""

    cost: harness.Cost
    stopped: bool
    cpu_s_of_ranks: dict[int, float]


def measure(
    argv: Sequence[object], log: Path, limit_cpu_s: float, cwd: Path | None = None, env: dict[str, str] | None = None
) -> LimitedRun:
    """Runs a program with one thread a process and ends it when its processes have used ``limit_cpu_s`` together.

    Raises:
        harness.Failed: if it ends with a status other than 0 before that.
    """
    words = [str(a) for a in argv]
    started = time.monotonic()
    peak_mib = 0.0
    ranks: dict[int, float] = {}
    with open(log, "wb") as out:
        child = subprocess.Popen(
            words, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env={**harness.environment(), **(env or {})}
        )
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        tree = process_tree(child.pid)
        cpu_s, system_s = (sum(getattr(t, name) for t in tree.values()) for name in ("cpu_s", "system_s"))
        for pid, times in tree.items():
            rank = rank_of(pid)
            if rank is not None:
                ranks[rank] = max(ranks.get(rank, 0.0), times.cpu_s)
        peak_mib = max([peak_mib, *map(peak_of, tree)])
        if cpu_s >= limit_cpu_s:
            stop(tree)
            child.wait()
            return LimitedRun(harness.Cost(cpu_s, system_s, time.monotonic() - started, peak_mib), True, ranks)
        time.sleep(PERIOD_S)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise harness.Failed(f"{' '.join(words[:4])} ... ended with {child.returncode}:\n{tail}")
    cpu_s, peak_mib = usage.ru_utime + usage.ru_stime, max(peak_mib, usage.ru_maxrss / 1024)
    cost = harness.Cost(cpu_s, usage.ru_stime, time.monotonic() - started, peak_mib)
    return LimitedRun(cost, False, ranks)


def process_tree(root: int) -> dict[int, ProcessTimes]:
    """A process and its living descendants."""
    table: dict[int, ProcessTimes] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        user, system, child_user, child_system = (int(ticks) / TICKS_PER_S for ticks in fields[11:15])
        table[int(entry.name)] = ProcessTimes(
            int(fields[1]), user + system + child_user + child_system, system + child_system
        )
    tree: dict[int, ProcessTimes] = {}
    level = {root} & table.keys()
    while level:
        tree.update({pid: table[pid] for pid in level})
        level = {pid for pid, times in table.items() if times.parent in level}
    return tree


def rank_of(pid: int) -> int | None:
    """Rank that a launcher has given to a process, from its environment."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return next((int(v.partition("=")[2]) for v in variables if v.startswith(RANK_VARIABLES)), None)


def peak_of(pid: int) -> float:
    """Largest resident size of a process so far, MiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def stop(tree: dict[int, ProcessTimes]) -> None:
    """Ends the processes of a tree that this program has started, the launcher first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in tree:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        time.sleep(3)
