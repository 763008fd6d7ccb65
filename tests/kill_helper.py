"""Ends a job of ranks again and again, stage by stage, at instants that a seed decides, and lets it go on each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi_helper import start_mpi
from relion_helper import relion_processes

GONE_WITHIN_S = 20.0
CHECKPOINT_WITHIN_S = 60.0
RELION_WORKS = ("refine", "corefine-1", "local")
RANK = ("PMI_RANK=", "OMPI_COMM_WORLD_RANK=")


@dataclass(frozen=True)
class Hit:
    """One process that was ended or told to stop."""

    stage: str
    target: str
    signal: str
    seconds: float
    """until nobody was left"""
    status: int
    """exit status of the launcher"""


def launch(ranks: int, job: Path, folder: Path) -> subprocess.Popen[str]:
    """Starts the run, or goes on with it where there is one."""
    words = ["resume", folder] if (folder / "resolved.toml").exists() else ["run", job, "--out", folder]
    return start_mpi(ranks, ["-m", "cryoiso.cli.main", *words])


def ranks_of(folder: Path) -> dict[int, int]:
    """Rank -> process of a job that works in this folder."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            env = Path(f"/proc/{name}/environ").read_bytes().split(b"\0") if str(folder).encode() in words else []
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        for entry in env:
            if entry.decode(errors="replace").startswith(RANK) and state != "Z":
                found[int(entry.split(b"=")[1])] = int(name)
    return found


def relion_of(folder: Path) -> list[int]:
    """RELION's processes that work anywhere in this folder."""
    return [p for stage in folder.glob("[0-9][0-9]_*/**/relion") for p in relion_processes(stage)]


def seconds_of_stages(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return {line["stage"]: line["seconds"] for line in lines if line["event"] == "end"}


def stages_begun(folder: Path) -> list[str]:
    try:
        rows = (folder / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    lines = [json.loads(row) for row in rows]
    return [line["stage"] for line in lines if line["event"] == "start"]


def wait_for_stage(process: subprocess.Popen[str], folder: Path, stage: str, before: int, limit_s: float) -> bool:
    """Whether the stage began anew; False if the job ended without it."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if stage in stages_begun(folder)[before:]:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    raise AssertionError(f"{stage} did not begin within {limit_s} s")


def wait_for_relion(process: subprocess.Popen[str], folder: Path, limit_s: float = 120) -> None:
    end = time.monotonic() + limit_s
    while not relion_of(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def strike(
    process: subprocess.Popen[str], folder: Path, target: str, number: int, rng: np.random.Generator
) -> tuple[str, float, int] | None:
    """Sends a signal to a rank, or kills one of RELION's processes; None if it was too late for that.

    Returns:
        who was hit, seconds until all were gone, exit status.
    """
    victims = relion_of(folder) if target == "relion" else []
    if victims:
        victim, who = victims[int(rng.integers(len(victims)))], "relion"
    else:
        ranks = ranks_of(folder)
        if not ranks:
            process.communicate(timeout=120)
            return None
        rank = int(rng.choice(sorted(ranks))) if not target.isdigit() else int(target)
        if rank not in ranks:
            process.communicate(timeout=120)
            return None
        victim, who = ranks[rank], f"rank {rank}"
    began = time.monotonic()
    try:
        os.kill(victim, number)
    except ProcessLookupError:
        process.communicate(timeout=120)
        return None
    limit = GONE_WITHIN_S if number == signal.SIGKILL else CHECKPOINT_WITHIN_S
    try:
        process.communicate(timeout=limit)
        while (ranks_of(folder) or relion_of(folder)) and time.monotonic() - began < limit:
            time.sleep(0.05)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{who} got {signal.Signals(number).name}; the job still ran after {limit} s") from None
    left = {**ranks_of(folder), **dict.fromkeys(relion_of(folder), 0)}
    assert not left, f"{who} got {signal.Signals(number).name}; these outlived it by {limit} s: {left}"
    return who, time.monotonic() - began, process.returncode


def chain(
    ranks: int, job: Path, folder: Path, seconds: dict[str, float], targets: list[str], numbers: list[int], seed: int
) -> list[Hit]:
    """One run that is struck once in every stage, and goes on after each; ends when it is done.

    Args:
        seconds: of each stage, in a run that nothing happened to.
        targets: ranks, or "relion" for RELION where it works (else any rank); taken in turn.
        numbers: of the signals; taken in turn.
        seed: of the instants.
    """
    rng, hits = np.random.default_rng(seed), []
    for turn, (stage, lasts) in enumerate(seconds.items()):
        number, target = numbers[turn % len(numbers)], targets[(turn + seed) % len(targets)]
        before = len(stages_begun(folder))
        if before and stage in seconds_of_stages(folder):
            continue  # a signal in the stage before was heard after this one
        process = launch(ranks, job, folder)
        if not wait_for_stage(process, folder, stage, before, 300):
            continue
        if target == "relion" and stage in RELION_WORKS:
            wait_for_relion(process, folder)
            lasts /= 4  # of the stage, most is before and after
        time.sleep(float(rng.random()) * lasts)
        found = strike(process, folder, target, number, rng)
        if found is None:
            continue
        who, took, status = found
        allowed = (75, 0) if number != signal.SIGKILL else None  # 0: it was as good as done
        assert allowed is None or status in allowed, (stage, who, status)
        hits.append(Hit(stages_begun(folder)[-1], who, signal.Signals(number).name, took, status))
    process = launch(ranks, job, folder)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return hits


def summary(hits: list[Hit]) -> str:
    """How many, where, whom, and how long the slowest took to be gone."""
    by_stage, by_target = Counter(h.stage for h in hits), Counter(h.target for h in hits)
    statuses = Counter((h.signal, h.status) for h in hits)
    return (
        f"{len(hits)} hits; stages {dict(by_stage)}; targets {dict(by_target)}; signals and exit statuses "
        f"{ {f'{name} {status}': n for (name, status), n in statuses.items()} }; gone within "
        f"{max((h.seconds for h in hits), default=0):.1f} s at most"
    )
