"""Which controls a job has, how many refinements they are, and on how many particles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cryoiso.core.config import Job

LEAST, MOST = 500, 20_000
"""Particles of a control by default: fewer decide nothing, more sharpen nothing."""
LEAK_PARTICLES = 300
"""Particles of the control of independence: the error of the FSC of noise depends on the coefficients of a shell, not
on how many images were averaged."""
COST = 1.8
"""Refinements of all particles that the controls together may cost by default."""
LOCAL_COST = 0.6
"""A local search from known poses against a refinement from scratch."""


@dataclass(frozen=True)
class Extent:
    """The refinements of a control."""

    name: str
    same: Callable[[Job], int] = lambda job: 0
    """how many repeat the workflow of the run, the changed references of ``arms`` left out"""
    plain: Callable[[Job], int] = lambda job: 0
    """how many are plain refinements beside it"""
    local: Callable[[Job], int] = lambda job: 0
    """how many are plain local searches"""
    arms: Callable[[Job], int] = lambda job: 0
    """how many changed references it needs; controls share these repetitions"""
    compared: bool = True
    """whether it is compared with a repetition in which nothing is changed"""
    reason: Callable[[Job], str] = lambda job: ""
    """why the control does not apply; empty if it does"""


def has_plain_counterpart(job: Job) -> bool:
    """Whether the workflow adds something to a plain refinement."""
    return job.run.workflow != "refine"


def near_poses(job: Job) -> bool:
    """Whether changed references are refined by local searches from the run's poses: in a plain refinement, where final
    poses are all that a reference leaves. Other workflows, which use it again later, are repeated whole."""
    return not has_plain_counterpart(job)


EXTENTS = {
    one.name: one
    for one in (
        Extent("reference", compared=False),
        Extent("null", lambda job: 1, lambda job: int(has_plain_counterpart(job))),
        Extent("omitted", arms=lambda job: job.audit.regions),
        Extent("added", arms=lambda job: 1),
        Extent("decoy", lambda job: 1, compared=False),
        Extent(
            "other-reference", lambda job: 1,
            reason=lambda job: "" if job.audit.other_reference else "audit.other_reference names no second reference",
        ),
        Extent("stability", lambda job: 1, local=lambda job: int(not near_poses(job))),
        Extent("leak", compared=False),
    )
}  # fmt: skip
"""Name -> refinements, in the order in which the controls are run and reported."""


def chosen(job: Job) -> list[str]:
    """Names of the controls that the job asks for and that apply to it, in order."""
    asked: list[str] = [*job.audit.controls] or [*EXTENTS]
    return [name for name, extent in EXTENTS.items() if name in asked and not extent.reason(job)]


def need_unchanged(names: list[str]) -> bool:
    """Whether one of the controls is compared with a repetition in which nothing is changed."""
    return any(EXTENTS[name].compared for name in names)


Kind = Literal["same", "plain", "local"]
"""A repetition with the run's workflow, a plain refinement, a plain local search."""


def repetitions(job: Job, particles: int, names: list[str] | None = None) -> dict[tuple[Kind, int], int]:
    """(kind, particles) -> how many repetitions of that size the controls are.

    Args:
        particles: of each control but the one of independence, which has at most ``LEAK_PARTICLES``.
        names: of the controls; None: those that the job has.
    """
    names = chosen(job) if names is None else names
    parts = [EXTENTS[name] for name in names]
    changed: Kind = "local" if near_poses(job) else "same"
    counts: dict[tuple[Kind, int], int] = {
        ("same", particles): sum(p.same(job) for p in parts),
        ("plain", particles): sum(p.plain(job) for p in parts),
        ("local", particles): sum(p.local(job) for p in parts),
    }
    counts[changed, particles] += max((p.arms(job) for p in parts), default=0) + need_unchanged(names)
    if "leak" in names:
        size = ("same", min(particles, LEAK_PARTICLES))
        counts[size] = counts.get(size, 0) + 1  # type: ignore[index, arg-type]
    return {size: count for size, count in counts.items() if count}


def particles_of(job: Job, n: int) -> int:
    """Particles of each control, of n that the run has."""
    if job.audit.particles is not None:
        return min(job.audit.particles, n)
    names = [name for name, extent in EXTENTS.items() if not extent.reason(job)]
    leak = min(n, LEAK_PARTICLES)
    weights = {"same": 1.0, "plain": 1.0, "local": LOCAL_COST}
    each = sum(count * weights[kind] for (kind, size), count in repetitions(job, n + 1, names).items() if size > n)
    affordable = int((COST * n - leak) / each)
    return min(n, max(LEAST, min(affordable, MOST)))


LOCAL_DEG, LOCAL_A = 20.0, 20.0
"""Reach of the local search of the control of stability."""


def jobs(job: Job) -> tuple[Job, Job]:
    """The run's job as a control repeats it, and the same as a plain refinement: without truth, controls, copies on
    scratch and exported images."""
    same = job.model_copy(deep=True)
    same.audit.enable, same.auxiliary.export = False, False
    same.truth.particles = same.truth.map = ""
    same.run.scratch = ""
    plain = same.model_copy(deep=True)
    plain.run.workflow = "refine"
    return same, plain
