"""A plan of a job before it runs: time, memory, disk and files of every stage, and how many batch jobs it takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from cryoiso.core.errors import UsageError
from cryoiso.core.log import duration
from cryoiso.pipeline.finding import gib
from cryoiso.pipeline.planning import job_size, memory, workload
from cryoiso.pipeline.planning.job_size import Problem
from cryoiso.pipeline.planning.rates import Rates
from cryoiso.pipeline.planning.workload import Assumed
from cryoiso.pipeline.workflow import CO_REFINEMENTS, kind_of, record_of, starts_a_program

MARGIN = 1.25
"""Of the wall-time that is suggested, on top of the uncertainty."""
SEARCH = ("gemm", "local")
"""Units of work whose results an interrupted refinement keeps."""
START_S = 60.0
"""What every start of the program takes on a cluster: imports, reading inputs."""


@dataclass(frozen=True)
class Layout:
    """Where the job is to run."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_node else "cpu"


@dataclass(frozen=True)
class Row:
    """A stage of the plan."""

    stage: str
    seconds: float | None
    memory_bytes: int | None
    """of rank 0, which has the metadata as well"""
    disk_bytes: int
    """that stay"""
    files: int
    temporary_bytes: int = 0
    """that are removed again when the stage ends"""
    temporary_files: int = 0
    other_ranks_bytes: int | None = None
    """memory of every rank but 0"""
    gpu_bytes: int | None = None
    """of a rank, in a plan for GPUs"""


@dataclass(frozen=True)
class Plan:
    """Everything that ``plan`` prints."""

    problem: Problem
    layout: Layout
    rates: Rates
    assumed: Assumed
    rows: tuple[Row, ...]
    repeated_s: float | None
    """the most of a refinement that a resumed job does again"""
    time_s: float | None = None
    """of a batch job, where the user gave it"""

    @property
    def unknown(self) -> list[str]:
        """Stages whose time is not known."""
        return [row.stage for row in self.rows if row.seconds is None]

    @property
    def known_s(self) -> float:
        """Of all other stages and a start."""
        return sum(row.seconds or 0.0 for row in self.rows) + START_S

    @property
    def seconds(self) -> float | None:
        """Of all stages; None if that of one is not known."""
        return None if self.unknown else self.known_s

    @property
    def memory_bytes(self) -> int:
        return max(row.memory_bytes or 0 for row in self.rows)

    @property
    def node_bytes(self) -> int:
        """Memory of the node that rank 0 is on: its metadata is there once."""
        others = self.layout.ranks_per_node - 1
        return max((row.memory_bytes or 0) + others * (row.other_ranks_bytes or 0) for row in self.rows)

    @property
    def gpu_bytes(self) -> tuple[int, str] | None:
        """The most GPU memory of a rank, and the stage that takes it."""
        gpu_rows = [(row.gpu_bytes, row.stage) for row in self.rows if row.gpu_bytes]
        return max(gpu_rows, key=lambda pair: pair[0]) if gpu_rows else None

    def disk_peak(self) -> tuple[int, int]:
        """Most bytes and files at once."""
        rows = self.rows
        return job_size.most([
            job_size.Stored(r.stage, r.disk_bytes, r.files, r.temporary_bytes, r.temporary_files) for r in rows
        ])  # fmt: skip

    def wall_s(self) -> float | None:
        """What to ask the batch system for: the time, the uncertainty, a margin; in quarters of an hour."""
        if self.seconds is None:
            return None
        return 900 * math.ceil(self.seconds * self.rates.spread * MARGIN / 900)

    def jobs(self) -> tuple[int, int] | None:
        """Batch jobs of ``time_s`` that it takes, by the time as it is and at its upper end; None if unknown.

        Each but the last stops before its end, and the next one does a part of an iteration again.
        """
        if self.seconds is None or not self.time_s:
            return None
        lost = 0.5 * (self.repeated_s or 0.0) + START_S + self.problem.job.run.stop_before_end_s
        counts = []
        for factor in (1.0, self.rates.spread):
            total = factor * self.seconds
            useful = self.time_s - factor * lost
            counts.append(1 if total <= self.time_s else -1 if useful <= 0 else math.ceil(total / useful))
        return counts[0], counts[1]

    def never_ends(self) -> bool:
        """Whether what is done again may take longer than a batch job, so that no number of them ends it."""
        return bool(self.time_s and self.repeated_s and self.repeated_s > 0.8 * self.time_s)


def make_plan(
    p: Problem, layout: Layout, rates: Rates, assumed: Assumed | None = None, time_s: float | None = None
) -> Plan:
    """Puts work, rates, disk and memory together.

    Raises:
        UsageError: no ranks, or rates of the other kind of device.
    """
    if layout.ranks < 1:
        raise UsageError(
            "a plan needs at least one rank: give --nodes and --ranks-per-node or --gpus", code="option-missing"
        )
    if rates.device and rates.device != layout.device:
        words = {"cpu": "CPUs", "cuda": "GPUs"}
        raise UsageError(
            f"these rates are those of {words[rates.device]}, and the plan is for {words[layout.device]} "
            f"(--gpus {layout.gpus_per_node}): give rates of such a machine, or another --gpus",
            code="options-conflict",
        )
    assumed, device = assumed or rates.assumed, layout.device
    p = replace(p, device=device)
    work = workload.stages(p, layout.ranks, assumed, device)
    stored = {s.name: s for s in job_size.disk(p, layout.ranks)}
    own = memory.memory_of_stages(p, layout.ranks)
    metadata = memory.metadata_of_stages(p)
    on_gpu = memory.gpu_memory(p, layout.ranks) if layout.gpus_per_node else {}
    rows = []
    for name, units in work.items():
        kept = stored.pop(name, job_size.Stored(name, 0, 0))
        rows.append(
            Row(name, rates.seconds(kind_of(name), units), own[name] + metadata[name] if name in own else None,
                kept.bytes, kept.files, kept.temporary_bytes, kept.temporary_files, own.get(name), on_gpu.get(name))
        )  # fmt: skip
    rest = list(stored.values())
    rows[-1] = replace(rows[-1], disk_bytes=sum(s.bytes for s in rest), files=sum(s.files for s in rest))
    return Plan(p, layout, rates, assumed, tuple(rows), _repeated(p, layout, rates, assumed), time_s)


def _repeated(p: Problem, layout: Layout, rates: Rates, assumed: Assumed) -> float | None:
    """Of the native engine's interrupted iteration everything but the search; of RELION's all."""
    kept = () if starts_a_program(p.job) else SEARCH
    n = p.particles + (p.auxiliaries if p.job.run.workflow in CO_REFINEMENTS else 0)
    works = [
        {unit: amount for unit, amount in units.items() if unit not in kept}
        for units in workload.iterations(p, n, layout.ranks, assumed)
    ]
    times = [rates.seconds("refine", units) for units in works]
    return None if any(t is None for t in times) else max(t or 0.0 for t in times)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it."""
    p, wall, jobs, on_gpu, at_once = plan.problem, plan.wall_s(), plan.jobs(), plan.gpu_bytes, plan.disk_peak()
    return {
        "problem": {"particles": p.particles, "box_px": p.box_px, "pixel_size_A": p.pixel_size_A,
                    "symmetry": p.job.sample.symmetry, "workflow": p.job.run.workflow},
        "layout": {**asdict(plan.layout), "ranks": plan.layout.ranks},
        "rates": {"source": plan.rates.source, "uncertainty_factor": plan.rates.spread},
        "assumed": asdict(plan.assumed),
        "stages": [asdict(row) for row in plan.rows],
        "seconds": plan.seconds,
        "seconds_of_known_stages": plan.known_s,
        "unknown_stages": plan.unknown,
        "repeated_s": plan.repeated_s,
        "memory_bytes_per_rank": plan.memory_bytes,
        "memory_bytes_per_node": plan.node_bytes,
        "gpu_bytes_per_rank": on_gpu[0] if on_gpu else None,
        "disk_bytes": sum(row.disk_bytes for row in plan.rows),
        "files": sum(row.files for row in plan.rows),
        "disk_bytes_at_once": at_once[0],
        "files_at_once": at_once[1],
        "wall_time_s": wall,
        "jobs": None if jobs is None else {
            "expected": jobs[0] if jobs[0] > 0 else None, "at_the_most": jobs[1] if jobs[1] > 0 else None,
        },
        "an_iteration_never_ends": plan.never_ends(),
    }  # fmt: skip


def as_lines(plan: Plan) -> list[str]:
    """The plan as people read it."""
    p, layout, record = plan.problem, plan.layout, as_dict(plan)
    lines = [
        f"{p.particles:,} particles of {p.box_px} px, {p.job.sample.symmetry}, workflow {p.job.run.workflow}, on "
        f"{layout.nodes} node(s) with {layout.ranks_per_node} rank(s)"
        + (f" and {layout.gpus_per_node} GPU(s)" if layout.gpus_per_node else "") + " each",
        "",
        f"{'stage':<14}{'time':>14}{'memory a rank':>16}{'disk':>12}{'files':>8}{'temporary':>12}",
    ]  # fmt: skip
    for row in plan.rows:
        held = gib(row.memory_bytes) if row.memory_bytes else "-"
        goes = gib(row.temporary_bytes) if row.temporary_bytes else "-"
        lines.append(
            f"{row.stage:<14}{_time(row.seconds):>14}{held:>16}{gib(row.disk_bytes):>12}{row.files:>8}{goes:>12}"
        )
    time = _time(plan.known_s) if not plan.unknown else f"{_time(plan.known_s)} + ?"
    lines.append(
        f"{'all':<14}{time:>14}{gib(plan.memory_bytes):>16}{gib(record['disk_bytes']):>12}{record['files']:>8}"
    )
    lines.append(f"(the time of all includes {duration(START_S)} for the start of the program)")
    return [*lines, "", *_fact_lines(plan, record), *_wall_lines(plan)]


def _fact_lines(plan: Plan, record: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    p, a, others = plan.problem, plan.assumed, plan.layout.ranks > 1
    lines = [
        f"memory of a node: {gib(plan.node_bytes)}" + (" (that of rank 0, which has all metadata)" if others else ""),
        *_threads_line(plan),
        f"disk at the most at once: {gib(record['disk_bytes_at_once'])}, {record['files_at_once']} files",
    ]
    if starts_a_program(p.job) and any(r.temporary_bytes for r in plan.rows if record_of(r.stage).searches):
        reader = {"relion": "RELION", "cryosparc": "cryoSPARC"}.get(p.job.refine.engine, "the command")
        lines.append(f"{reader} gets a copy of the images, which is removed when it has ended")
    if plan.gpu_bytes:
        lines.append(f"GPU memory: {gib(plan.gpu_bytes[0])} a rank ({plan.gpu_bytes[1]})")
    return [
        *lines,
        f"rates: {plan.rates.source}; times may be off by a factor of {plan.rates.spread:g} either way",
        f"assumed: {a.iterations} iterations a refinement, a resolution of "
        f"{2 * p.pixel_size_A / a.nyquist_share:.1f} Å, all rounds of auxiliary particles",
    ]


def _threads_line(plan: Plan) -> list[str]:
    """What a node would hold if its cores were threads: each rank has grids of its own, threads share them."""
    layout, p = plan.layout, plan.problem
    if layout.gpus_per_node or layout.ranks_per_node == 1:
        return []
    own, metadata = memory.memory_of_stages(p, layout.nodes), memory.metadata_of_stages(p)
    first_rank = max(own[name] + metadata[name] for name in own)
    return [
        f"memory of a node with one rank of {layout.ranks_per_node} times the threads: {gib(first_rank)} (ranks have "
        f"grids of "
        "their own, threads share them)"
    ]


def _wall_lines(plan: Plan) -> list[str]:
    wall, jobs = plan.wall_s(), plan.jobs()
    if wall is None:
        return [
            f"the time is a part of the whole: not known, as never timed on such a device, is that of "
            f"{', '.join(plan.unknown)}. Run a small set with this workflow there first, then --rates its run "
            "folder; or 'cryoiso plan --measure' with the same --gpus on one of its nodes"
        ]
    lines = [f"wall-time to ask for: {duration(wall)} (the uncertainty and {MARGIN:.2f} times that are in it)"]
    if plan.never_ends():
        lines.append(
            f"WARNING: what an interrupted iteration does again takes about {duration(plan.repeated_s or 0)}, and a "
            f"job has {duration(plan.time_s or 0)}: more ranks are needed"
        )
    elif jobs is not None:
        few, many = jobs
        if few < 0:
            return [
                *lines, f"WARNING: a job of {duration(plan.time_s or 0)} does not even do what a stop costs (a start "
                "and the time before the limit at which it stops): no number of them ends the run",
            ]  # fmt: skip
        words = f"{few} job(s) of {duration(plan.time_s or 0)}: {few - 1} time(s) requeued"
        if many < 0:
            words += "; at the upper end of the uncertainty a job does not even do what a stop costs"
        elif many != few:
            words += f", at the upper end of the uncertainty {many - 1}"
        lines.append(words)
    return lines


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)
