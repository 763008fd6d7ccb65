"""A plan of a job before it runs: time, memory, disk and files of every stage, and how many batch jobs it takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from cryoiso.core.errors import UsageError
from cryoiso.core.log import duration
from cryoiso.pipeline import estimate, workload
from cryoiso.pipeline.estimate import Problem
from cryoiso.pipeline.finding import gib
from cryoiso.pipeline.rates import Rates
from cryoiso.pipeline.workload import Assumed, kind_of

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
    disk_bytes: int
    files: int


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
    def seconds(self) -> float | None:
        times = [row.seconds for row in self.rows]
        return None if any(t is None for t in times) else sum(t or 0.0 for t in times) + START_S

    @property
    def memory_bytes(self) -> int:
        return max(row.memory_bytes or 0 for row in self.rows)

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
        UsageError: no ranks.
    """
    if layout.ranks < 1:
        raise UsageError("a plan needs one rank at least: give --nodes and --ranks-per-node or --gpus")
    assumed, device = assumed or rates.assumed, layout.device
    p = replace(p, device=device)
    work = workload.stages(p, layout.ranks, assumed, device)
    stored = {s.name: s for s in estimate.disk(p, layout.ranks)}
    memory = estimate.memory_of_stages(p, layout.ranks)
    rows = []
    for name, units in work.items():
        kept = stored.pop(name, None)
        rows.append(Row(name, rates.seconds(kind_of(name), units), memory.get(name), kept.bytes if kept else 0,
                        kept.files if kept else 0))  # fmt: skip
    rest = list(stored.values())
    last = rows[-1]
    rows[-1] = Row(last.stage, last.seconds, None, sum(s.bytes for s in rest), sum(s.files for s in rest))
    return Plan(p, layout, rates, assumed, tuple(rows), _repeated(p, layout, rates, assumed), time_s)


def _repeated(p: Problem, layout: Layout, rates: Rates, assumed: Assumed) -> float | None:
    """Of the native engine's interrupted iteration everything but the search; of RELION's all."""
    kept = () if p.job.refine.engine == "relion" else SEARCH
    n = p.particles + (p.auxiliaries if p.job.run.workflow in ("auxiliary", "both") else 0)
    works = [
        {unit: amount for unit, amount in one.items() if unit not in kept}
        for one in workload.iterations(p, n, layout.ranks, assumed)
    ]
    times = [rates.seconds("refine", one) for one in works]
    return None if any(t is None for t in times) else max(t or 0.0 for t in times)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it."""
    p, wall, jobs = plan.problem, plan.wall_s(), plan.jobs()
    return {
        "problem": {"particles": p.particles, "box_px": p.box_px, "pixel_size_A": p.pixel_size_A,
                    "symmetry": p.job.sample.symmetry, "workflow": p.job.run.workflow},
        "layout": {**asdict(plan.layout), "ranks": plan.layout.ranks},
        "rates": {"source": plan.rates.source, "uncertainty_factor": plan.rates.spread},
        "assumed": asdict(plan.assumed),
        "stages": [asdict(row) for row in plan.rows],
        "seconds": plan.seconds,
        "repeated_s": plan.repeated_s,
        "memory_bytes_per_rank": plan.memory_bytes,
        "memory_bytes_per_node": plan.memory_bytes * plan.layout.ranks_per_node,
        "gpu_bytes_per_rank": estimate.gpu_memory(p, plan.layout.ranks) if plan.layout.gpus_per_node else None,
        "disk_bytes": sum(row.disk_bytes for row in plan.rows),
        "files": sum(row.files for row in plan.rows),
        "wall_time_s": wall,
        "jobs": None if jobs is None else {"expected": jobs[0], "at_the_most": jobs[1]},
        "an_iteration_never_ends": plan.never_ends(),
    }  # fmt: skip


def as_lines(plan: Plan) -> list[str]:
    """The plan as people read it."""
    p, layout, told = plan.problem, plan.layout, as_dict(plan)
    lines = [
        f"{p.particles:,} particles of {p.box_px} px, {p.job.sample.symmetry}, workflow {p.job.run.workflow}, on "
        f"{layout.nodes} node(s) with {layout.ranks_per_node} rank(s)"
        + (f" and {layout.gpus_per_node} GPU(s)" if layout.gpus_per_node else "") + " each",
        "",
        f"{'stage':<14}{'time':>14}{'memory a rank':>16}{'disk':>12}{'files':>8}",
    ]  # fmt: skip
    for row in plan.rows:
        memory = gib(row.memory_bytes) if row.memory_bytes else "-"
        lines.append(f"{row.stage:<14}{_time(row.seconds):>14}{memory:>16}{gib(row.disk_bytes):>12}{row.files:>8}")
    lines.append(f"{'all':<14}{_time(plan.seconds):>14}{gib(plan.memory_bytes):>16}{gib(told['disk_bytes']):>12}"
                 f"{told['files']:>8}")  # fmt: skip
    lines += ["", f"rates: {plan.rates.source}; times may be off by a factor of {plan.rates.spread:g} either way"]
    a = plan.assumed
    lines.append(f"assumed: {a.iterations} iterations a refinement, a resolution of "
                 f"{2 * p.pixel_size_A / a.nyquist_share:.1f} Å, all rounds of auxiliary particles")  # fmt: skip
    if told["gpu_bytes_per_rank"]:
        lines.append(f"GPU memory: about {gib(told['gpu_bytes_per_rank'])} a rank for refinement; training comes above")
    return [*lines, *_wall_lines(plan)]


def _wall_lines(plan: Plan) -> list[str]:
    wall, jobs = plan.wall_s(), plan.jobs()
    if wall is None:
        return [
            "no time: some of this was never timed on such a device. Run a small set there first, then --rates its run "
            "folder, or 'cryoiso plan --measure' on one of its nodes"
        ]
    lines = [f"wall-time to ask for: {duration(wall)} (the uncertainty and {MARGIN:.2f} times that are in it)"]
    if plan.never_ends():
        lines.append(
            f"WARNING: what an interrupted iteration does again takes about {duration(plan.repeated_s or 0)}, and a "
            f"job has {duration(plan.time_s or 0)}: more ranks are needed"
        )
    elif jobs is not None:
        few, many = jobs
        words = f"{few} job(s) of {duration(plan.time_s or 0)}: {few - 1} time(s) requeued"
        if many < 0:
            words += "; at the upper end of the uncertainty a job does not even do what a stop costs"
        elif many != few:
            words += f", at the upper end of the uncertainty {many - 1}"
        lines.append(words)
    return lines


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)
