"""What each stage of a run does: its function, its place in the run folder, and whether it resumes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.stages import (
    audit,
    classify,
    corefine,
    diagnose,
    generate,
    ingest,
    reconstruct,
    reference,
    refine,
    report,
    train,
)
from cryoiso.pipeline.workflow import CO_REFINEMENTS, record_of


class StageFunction(Protocol):
    """What every stage is."""

    def __call__(self, run: RunContext, inputs: Inputs, *, resume: bool) -> None:
        """Does the stage; all ranks call it together.

        Args:
            run: job, folder, ranks and records of the run.
            inputs: what the job names, read once for all stages.
            resume: an attempt with the same key was interrupted, and left files to go on from in the stage's folder.
                Only true of stages that resume (``workflow.StageRecord.resumes``); the others find their folder empty.
        """


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    do: StageFunction
    places: tuple[str, ...]
    """files and folders of the run folder that are its result"""
    continues: bool = False
    """whether it can go on from what an interrupted attempt left; otherwise it starts afresh"""


def _stage(folder: RunFolder, name: str, do: StageFunction) -> Stage:
    if folder.has("classify") and name not in folder.stages[: folder.stages.index("classify") + 1]:
        do = partial(_of_selected, do)
    return Stage(name, do, (folder.folder_name(name),), record_of(name).resumes)


def _of_selected(do: StageFunction, run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """A stage after the classification: of the selected particles."""
    do(run, inputs.selected(), resume=resume)


def _correct(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    from cryoiso.pipeline.stages.correct import correct

    correct(run, inputs, resume=resume)


def _between(job: Job) -> list[tuple[str, StageFunction]]:
    """Names and functions from the first poses of a co-refinement to its last ones."""
    between: list[tuple[str, StageFunction]] = []
    if job.micelle.enable:
        between.append(("micelle", corefine.micelle))
    for r in range(1, job.auxiliary.rounds + 1):
        between.append((f"train-{r}", partial(train.train_stage, r)))
        between.append((f"generate-{r}", partial(generate.generate_stage, r)))
        between.append((f"corefine-{r}", partial(corefine.corefine, r)))
    if job.auxiliary.balance:
        between.append(("local", corefine.local))
    return between


def stages_of(job: Job, folder: RunFolder) -> tuple[Stage, ...]:
    """The stages of a job, in order."""
    first: tuple[Stage, ...] = (
        _stage(folder, "ingest", ingest.ingest),
        _stage(folder, "reference", reference.reference),
        _stage(folder, "refine", refine.refine),
    )
    if job.run.workflow in CO_REFINEMENTS:
        middle = tuple(_stage(folder, name, do) for name, do in _between(job))
        if not folder.has("refine"):
            first = first[:2]
    else:
        middle = ()
    corrected = (_stage(folder, "correct", _correct),) if folder.has("correct") else ()
    classes = (_stage(folder, "classify", classify.classify),) if folder.has("classify") else ()
    audited = (Stage("audit", audit.audit, (products.AUDIT,), True),) if job.audit.enable else ()
    last = (
        _stage(folder, "reconstruct", reconstruct.reconstruct),
        *corrected,
        _stage(folder, "diagnose", diagnose.diagnose),
        *audited,
        Stage("report", report.report, ("result", products.REPORT_PAGE, products.REPORT_NUMBERS)),
    )
    return first + classes + middle + last
