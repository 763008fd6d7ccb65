"""Which stages a run has, and where each leaves its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryoiso.core.config import Job
from cryoiso.core.errors import UsageError
from cryoiso.pipeline.records.run_folder import REALIGN_STAGES, REFINE_STAGES, RunFolder
from cryoiso.pipeline.stages import basic, corefine
from cryoiso.pipeline.work import Work

WITHOUT_GPU = ("ingest", "reference")
"""The first stages of every workflow; nothing in them is computed on a GPU."""


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    do: Callable[[Work], None]
    """called by all ranks together"""
    places: tuple[str, ...]
    """files and folders of the run folder that are its result"""
    continues: bool = False
    """whether it can go on from what an interrupted attempt left; otherwise it starts afresh"""


def _stage(folder: RunFolder, name: str, do: Callable[[Work], None], continues: bool = False) -> Stage:
    return Stage(name, do, (folder.folder_name(name),), continues)


def _correct(work: Work) -> None:
    from cryoiso.pipeline.stages.correct import correct

    correct(work)


def folder_stages(job: Job) -> tuple[str, ...]:
    """Names of the stages that have a folder, in order.

    Raises:
        UsageError: no such workflow.
    """
    if job.run.workflow == "refine":
        return REFINE_STAGES
    if job.run.workflow == "realign":
        return REALIGN_STAGES
    if job.run.workflow in corefine.WORKFLOWS:
        return corefine.stage_names(job)
    raise UsageError(f"unknown workflow '{job.run.workflow}' (known: refine, auxiliary, realign, both)")


def stages_of(job: Job, folder: RunFolder) -> tuple[Stage, ...]:
    """The stages of a job, in order."""
    first: tuple[Stage, ...] = (
        _stage(folder, "ingest", basic.ingest, continues=True),
        _stage(folder, "reference", basic.reference),
        _stage(folder, "refine", basic.refine, continues=True),
    )
    if job.run.workflow in corefine.WORKFLOWS:
        middle = tuple(_stage(folder, name, do, goes_on) for name, do, goes_on in corefine.stages_between(job))
        if not folder.has("refine"):
            first = first[:2]
    else:
        middle = ()
    corrected = (_stage(folder, "correct", _correct, continues=True),) if folder.has("correct") else ()
    last = (
        _stage(folder, "reconstruct", basic.reconstruct),
        *corrected,
        _stage(folder, "diagnose", basic.diagnose),
        Stage("report", basic.report, ("result", "report.html", "report.json")),
    )
    return first + middle + last
