"""Ends a job of ranks again and again, stage by stage, at instants that a seed decides, and lets it go on each time.

``python tests/helpers/kill_helper.py RECORD`` makes a table of the rows that the kill matrix has left in a file.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mpi_helper import start_mpi
from relion_helper import relion_processes

from cryoiso.io.scratch_lease import start_of

GONE_WITHIN_S = 20.0
CHECKPOINT_WITHIN_S = 60.0
RANK = ("PMI_RANK=", "OMPI_COMM_WORLD_RANK=")
RELION = "relion"


@dataclass(frozen=True)
class Aim:
    """A strike that is wanted."""

    stage: str
    target: str
    """a rank, or RELION"""
    number: int
    """of the signal"""


@dataclass(frozen=True)
class Hit:
    """One process that was ended or told to stop."""

    stage: str
    """that the run was in; empty: between two of them"""
    target: str
    signal: str
    seconds: float
    """until nobody was left"""
    status: int
    """exit status of the launcher"""


@dataclass
class Tally:
    """What a row of the matrix has to hit, and what it has hit."""

    seconds: dict[str, float]
    """of every stage, in a run that nothing happened to"""
    relion_seconds: dict[str, float]
    """for how long RELION worked in a stage there; empty if it is not to be struck"""
    ranks: int
    numbers: list[int]
    """of the signals, taken in turn"""
    relion_hits: int = 0
    """RELION is to be hit so often at least"""
    hits: list[Hit] = field(default_factory=list)

    def open(self) -> list[tuple[str, str]]:
        """(stage, target) that were not hit yet: every rank in every stage, and RELION wherever it works."""
        wanted = [(stage, str(r)) for stage in self.seconds for r in range(self.ranks)]
        wanted += [(stage, RELION) for stage in self.relion_seconds]
        hit = {(h.stage, h.target) for h in self.hits}
        return [pair for pair in wanted if pair not in hit]

    def missing(self) -> list[str]:
        """What is still to be hit, in words."""
        said = [f"{target} in {stage}" for stage, target in self.open()]
        said += [n for n in map(_name, self.numbers) if n not in {h.signal for h in self.hits}]
        return said + [f"RELION {self.relion_to_go()} times more"] * (self.relion_to_go() > 0)

    def relion_to_go(self) -> int:
        return max(self.relion_hits - sum(h.target == RELION for h in self.hits), 0)

    def aims(self, turn: int, limit: int) -> list[Aim]:
        """For the next run, in the order of the stages: a rank in each that is not through, and RELION; a rank in every
        stage where all are.

        Args:
            turn: number of the run.
            limit: no more than this, then spread over the stages.
        """
        missing, to_go, found = self.open(), self.relion_to_go(), []
        for k, stage in enumerate(self.seconds):
            number = self.numbers[k % len(self.numbers)]
            order = [str((k + turn + r) % self.ranks) for r in range(self.ranks)]
            ranks = [r for r in order if (stage, r) in missing] or (order if not missing and not to_go else [])
            found += [Aim(stage, r, number) for r in ranks[:1]]
            if stage in self.relion_seconds:
                often = max(-(-to_go // len(self.relion_seconds)), int((stage, RELION) in missing))
                found += [Aim(stage, RELION, number)] * min(often, 4)
        chosen = np.linspace(0, len(found) - 1, min(limit, len(found)))
        return [found[k] for k in np.unique(np.rint(chosen).astype(int))]


def launch(ranks: int, job: Path, folder: Path) -> subprocess.Popen[str]:
    """Starts the run, or goes on with it where there is one."""
    words = ["resume", folder] if (folder / "resolved.toml").exists() else ["run", job, "--out", folder]
    return start_mpi(ranks, ["-m", "cryoiso.cli.main", *words])


def leave_alone(ranks: int, job: Path, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """A run that nothing happens to: seconds of its stages, and for how long RELION worked in them."""
    process, worked = launch(ranks, job, folder), defaultdict[str, float](float)

    def watch() -> None:
        while process.poll() is None:
            began = time.monotonic()
            stage, there = stage_now(folder), bool(relion_of(folder))
            time.sleep(0.2)
            worked[stage] += (time.monotonic() - began) * there

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, said = process.communicate(timeout=900)
    watcher.join()
    assert process.returncode == 0, said
    return seconds_of_stages(folder), {stage: s for stage, s in worked.items() if stage and s}


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


def journal_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal that is being written."""
    try:
        rows = (folder / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    return [json.loads(row) for row in rows]


def seconds_of_stages(folder: Path) -> dict[str, float]:
    return {line["stage"]: line["seconds"] for line in journal_of(folder) if line["event"] == "end"}


def stages_begun(folder: Path) -> list[str]:
    return [line["stage"] for line in journal_of(folder) if line["event"] == "start"]


def stage_now(folder: Path) -> str:
    """The stage that has begun and not ended; empty between two of them."""
    found = ""
    for line in journal_of(folder):
        if line["event"] in ("start", "end"):
            found = line["stage"] if line["event"] == "start" else ""
    return found


def wait_for_stage(
    process: subprocess.Popen[str], folder: Path, stage: str, ranks: int, before: int, limit_s: float = 300
) -> dict[int, int]:
    """Rank -> process, at the moment when a stage begins anew; empty if the job ended without it.

    Who they are is found out beforehand: some stages take less time than a look at all processes.
    """
    end, found = time.monotonic() + limit_s, dict[int, int]()
    while time.monotonic() < end:
        if stage in stages_begun(folder)[before:]:
            return found or ranks_of(folder)
        if process.poll() is not None:
            return {}
        if len(found) < ranks:
            found = ranks_of(folder)
        time.sleep(0.002)
    raise AssertionError(f"{stage} did not begin within {limit_s} s")


def wait_in_relion(process: subprocess.Popen[str], folder: Path, stage: str, seconds: float) -> None:
    """Until RELION works, and so long again, but no longer than it works (resumed, it has less to do)."""
    began = 0.0
    while process.poll() is None and stage_now(folder) == stage:
        there = bool(relion_of(folder))
        began = began or (time.monotonic() if there else 0.0)
        if began and (not there or time.monotonic() - began >= seconds):
            return
        time.sleep(0.02)


def strike(
    process: subprocess.Popen[str], folder: Path, aim: Aim, ranks: dict[int, int], rng: np.random.Generator
) -> Hit | None:
    """Sends a signal to a rank, or to one of RELION's processes (to any rank, where none works); None: too late."""
    target, victims = aim.target, relion_of(folder) if aim.target == RELION else []
    if target == RELION and not victims:
        target = str(rng.choice(sorted(ranks)))
    victim = int(rng.choice(victims)) if victims else ranks[int(target)]
    stage, began = stage_now(folder), time.monotonic()
    try:
        if not start_of(victim):
            raise ProcessLookupError
        os.kill(victim, aim.number)
    except ProcessLookupError:
        process.communicate(timeout=300)
        return None
    _wait_until_all_are_gone(process, folder, f"{target} got {_name(aim.number)} in {stage}", aim.number)
    return Hit(stage, target, _name(aim.number), time.monotonic() - began, process.returncode)


def _wait_until_all_are_gone(process: subprocess.Popen[str], folder: Path, what: str, number: int) -> None:
    began, limit = time.monotonic(), GONE_WITHIN_S if number == signal.SIGKILL else CHECKPOINT_WITHIN_S
    try:
        process.communicate(timeout=limit)
        while (ranks_of(folder) or relion_of(folder)) and time.monotonic() - began < limit:
            time.sleep(0.05)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{what}; the job still ran after {limit} s") from None
    left = {**ranks_of(folder), **dict.fromkeys(relion_of(folder), 0)}
    assert not left, f"{what}; these outlived it by {limit} s: {left}"


def chain(job: Path, folder: Path, tally: Tally, aims: list[Aim], turn: int) -> None:
    """One run that is struck as aimed, goes on after each strike, and at last to its end; notes the hits.

    Args:
        turn: number of the run, which decides the instants.
    """
    rng = np.random.default_rng(turn)
    for aim in aims:
        before = len(stages_begun(folder))
        if aim.stage in seconds_of_stages(folder):
            continue  # a signal in the stage before was heard after this one
        process = launch(tally.ranks, job, folder)
        ranks = wait_for_stage(process, folder, aim.stage, tally.ranks, before)
        if len(ranks) < tally.ranks:
            process.communicate(timeout=300)
            continue
        share = float(rng.random()) / 2 ** max(turn - 1, 0)  # a short stage, most likely, that was missed before
        if aim.target == RELION:
            wait_in_relion(process, folder, aim.stage, share * tally.relion_seconds[aim.stage])
        else:
            time.sleep(share * tally.seconds[aim.stage])
        hit = strike(process, folder, aim, ranks, rng)
        if hit is not None:
            _require_its_status(hit, list(tally.seconds)[-1])
            tally.hits.append(hit)
    process = launch(tally.ranks, job, folder)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said


def _require_its_status(hit: Hit, last: str) -> None:
    """A run that was told to stop says that it goes on (75), or was as good as done; who lost a rank does not say 0."""
    if hit.signal != _name(signal.SIGKILL):
        assert hit.status in (75, 0), hit
    elif hit.target != RELION:
        assert hit.status != 0 or hit.stage in ("", last), hit


def _name(number: int) -> str:
    return signal.Signals(number).name


def record(work: str, tally: Tally, same: list[bool], files: int, began: float) -> dict[str, Any]:
    """A row of the matrix as it is kept: how many, where, whom, and how long they took to be gone.

    Args:
        same: of every run, whether it had the bits of the one that was left alone.
        files: that are compared.
    """
    hits, by_stage, slowest = tally.hits, defaultdict[str, Counter[str]](Counter), defaultdict[str, float](float)
    for hit in hits:
        where = hit.stage or "between stages"
        by_stage[where][hit.target] += 1
        slowest[where] = max(slowest[where], round(hit.seconds, 1))
    gone = [hit.seconds for hit in hits]
    return {
        "work": work,
        "signals": [_name(number) for number in tally.numbers],
        "strikes": len(hits),
        "runs": len(same),
        "ranks": tally.ranks,
        "stages": {stage: dict(sorted(by_stage[stage].items())) for stage in [*tally.seconds, *by_stage]},
        "never_hit": tally.missing(),
        "statuses": dict(Counter(f"{hit.signal} {hit.status}" for hit in hits)),
        "gone_median_s": round(statistics.median(gone), 2) if gone else None,
        "gone_slowest_s": round(max(gone), 2) if gone else None,
        "gone_slowest_s_of_stages": slowest,
        "files": files,
        "runs_with_the_same_bits": sum(same),
        "wall_s": round(time.monotonic() - began),
        "wall_s_left_alone": round(sum(tally.seconds.values()), 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| work | signals | strikes | stages hit | whom | gone, median | slowest | same bits | wall |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        whom: Counter[str] = Counter()
        for targets in row["stages"].values():
            whom.update(targets)
        hit = [stage for stage, targets in row["stages"].items() if targets and stage != "between stages"]
        stages = len(set(row["stages"]) - {"between stages"})
        names = [f"{'RELION' if t == RELION else f'rank {t}'} {n} times" for t, n in sorted(whom.items())]
        lines.append(
            f"| {row['work']} | {', '.join(row['signals'])} | {row['strikes']} | {len(hit)} of {stages} | "
            f"{', '.join(names)} | {row['gone_median_s']} s | {row['gone_slowest_s']} s | "
            f"{row['runs_with_the_same_bits']} of {row['runs']} runs, {row['files']} files | "
            f"{row['wall_s'] / 60:.0f} min |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
