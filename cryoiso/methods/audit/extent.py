"""Which controls a job has, how many refinements they are, and on how many particles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryoiso.core.config import Job

LEAST, MOST = 700, 20_000
"""Particles of a control by default: fewer decide nothing, more sharpen nothing."""
COST = 1.8
"""Refinements of all particles that the controls together may cost by default."""
LOCAL_COST = 0.6
"""A local search from known poses against a refinement from scratch."""


@dataclass(frozen=True)
class Extent:
    """The refinements of a control."""

    name: str
    same: Callable[[Job], int]
    """how many repeat the workflow of the run"""
    plain: Callable[[Job], int] = lambda job: 0
    """how many are plain refinements beside it"""
    local: int = 0
    """how many are plain local searches"""
    compared: bool = True
    """whether it is compared with a repetition in which nothing is changed"""
    reason: Callable[[Job], str] = lambda job: ""
    """why the control does not apply; empty if it does"""


def has_plain_counterpart(job: Job) -> bool:
    """Whether the workflow adds something to a plain refinement."""
    return job.run.workflow != "refine"


EXTENTS = {
    extent.name: extent
    for extent in (
        Extent("reference", lambda job: 0, compared=False),
        Extent("null", lambda job: 1, lambda job: int(has_plain_counterpart(job))),
        Extent("omitted", lambda job: job.audit.regions),
        Extent("added", lambda job: 1),
        Extent("decoy", lambda job: 1, compared=False),
        Extent(
            "other-reference", lambda job: 1,
            reason=lambda job: "" if job.audit.other_reference else "audit.other_reference names no second reference",
        ),
        Extent("stability", lambda job: 1, local=1),
        Extent("leak", lambda job: 1, compared=False),
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


def refinements(job: Job, names: list[str] | None = None) -> tuple[int, int, int]:
    """How many refinements the controls are: with the run's workflow (the one with nothing changed included), plain,
    local."""
    names = chosen(job) if names is None else names
    parts = [EXTENTS[name] for name in names]
    return (
        int(need_unchanged(names)) + sum(p.same(job) for p in parts),
        sum(p.plain(job) for p in parts),
        sum(p.local for p in parts),
    )


def particles_of(job: Job, n: int) -> int:
    """Particles of each control, of n that the run has."""
    if job.audit.particles is not None:
        return min(job.audit.particles, n)
    same, plain, local = refinements(job, [name for name, extent in EXTENTS.items() if not extent.reason(job)])
    affordable = int(COST * n / (same + plain + LOCAL_COST * local))
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
