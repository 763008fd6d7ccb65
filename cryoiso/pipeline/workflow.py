"""Which stages a workflow has, and one record per kind of stage: what everybody else needs to know about it.

What a stage does is in ``stages.table``; what it costs, by the same kinds, in ``planning``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cryoiso.core.config import CommandSection, CryosparcSection, Job, RelionSection
from cryoiso.core.errors import UsageError
from cryoiso.pipeline.records.run_folder import REALIGN_STAGES, REFINE_STAGES


@dataclass(frozen=True)
class StageRecord:
    """A kind of stage; the rounds of a co-refinement (``corefine-2``) are of one kind."""

    kind: str
    resumes: bool = False
    """Whether it can go on from what an interrupted attempt left; otherwise it starts afresh."""
    on_gpu: bool = True
    """Whether it computes on the GPU of a run that has one."""
    reads_images: bool = True
    searches: bool = False
    """Whether an engine refines poses in it."""
    auxiliaries: bool = False
    """Whether it holds auxiliary particles beside the raw ones."""
    like: str = ""
    """Kind that does mostly the same with another number of images: its times tell about this one."""


RECORDS = {
    record.kind: record
    for record in (
        StageRecord("ingest", resumes=True, on_gpu=False),
        StageRecord("reference", on_gpu=False, reads_images=False),
        StageRecord("refine", resumes=True, searches=True),
        StageRecord("classify", resumes=True),
        StageRecord("micelle", resumes=True),
        StageRecord("train", resumes=True),
        StageRecord("generate", resumes=True, auxiliaries=True),
        StageRecord("corefine", resumes=True, searches=True, auxiliaries=True, like="refine"),
        StageRecord("local", resumes=True, searches=True, like="refine"),
        StageRecord("reconstruct"),
        StageRecord("correct", resumes=True, reads_images=False),
        StageRecord("diagnose", on_gpu=False, reads_images=False),
        StageRecord("audit", resumes=True, searches=True, like="refine"),
        StageRecord("report", on_gpu=False, reads_images=False),
    )
}
"""Kind -> record, of every stage of every workflow."""
WITHOUT_GPU = ("ingest", "reference")
"""The first stages of every workflow; nothing in them is computed on a GPU."""
CO_REFINEMENTS = ("auxiliary", "both")
"""Workflows with auxiliary particles."""


def folder_stages(job: Job) -> tuple[str, ...]:
    """Names of the stages that have a folder, in order.

    Raises:
        UsageError: no such workflow.
    """
    if job.run.workflow == "refine":
        return _with_classes(job, REFINE_STAGES)
    if job.run.workflow == "realign":
        return _with_classes(job, REALIGN_STAGES)
    if job.run.workflow in CO_REFINEMENTS:
        return _with_classes(job, _co_refinement_stages(job))
    raise UsageError(
        f"unknown workflow '{job.run.workflow}' (known: refine, auxiliary, realign, both)", code="choice-unknown"
    )


def _with_classes(job: Job, stages: tuple[str, ...]) -> tuple[str, ...]:
    """Classes are found with the first poses."""
    if not job.classify.enable:
        return stages
    after = stages.index("refine") + 1
    return (*stages[:after], "classify", *stages[after:])


def working_stages(job: Job) -> tuple[str, ...]:
    """Names of all stages but the report, in order; the controls have a folder without a number."""
    return (*folder_stages(job), *(("audit",) if job.audit.enable else ()))


def _co_refinement_stages(job: Job) -> tuple[str, ...]:
    """Stages with a folder, in order."""
    rounds = [f"{name}-{r}" for r in range(1, job.auxiliary.rounds + 1) for name in ("train", "generate", "corefine")]
    micelle = ["micelle"] if job.micelle.enable else []
    local = ["local"] if job.auxiliary.balance else []
    correct = ["correct"] if job.run.workflow == "both" else []
    return ("ingest", "reference", "refine", *micelle, *rounds, *local, "reconstruct", *correct, "diagnose")


def program_of(job: Job) -> RelionSection | CommandSection | CryosparcSection:
    """The job's section about the program that its engine starts."""
    if job.refine.engine == "cryosparc":
        return job.cryosparc
    return job.command if job.refine.engine in ("command", "files") else job.relion


def starts_a_program(job: Job) -> bool:
    """Whether somebody's program refines, which reads images from files."""
    return job.refine.engine in ("relion", "cryosparc", "command", "files")


def kind_of(stage: str) -> str:
    """Kind of a stage: corefine-2 -> corefine."""
    return re.sub(r"-\d+$", "", stage)


def record_of(stage: str) -> StageRecord:
    """The record of a stage.

    Raises:
        KeyError: no such kind.
    """
    return RECORDS[kind_of(stage)]
