"""What each stage of a run does: its function, its place in the run folder, and whether it resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryoiso.core.config import Job
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.stages import corefine, diagnose, ingest, reconstruct, reference, refine, report
from cryoiso.pipeline.work import Work
from cryoiso.pipeline.workflow import CO_REFINEMENTS, record_of


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


def _stage(folder: RunFolder, name: str, do: Callable[[Work], None]) -> Stage:
    return Stage(name, do, (folder.folder_name(name),), record_of(name).resumes)


def _correct(work: Work) -> None:
    from cryoiso.pipeline.stages.correct import correct

    correct(work)


def stages_of(job: Job, folder: RunFolder) -> tuple[Stage, ...]:
    """The stages of a job, in order."""
    first: tuple[Stage, ...] = (
        _stage(folder, "ingest", ingest.ingest),
        _stage(folder, "reference", reference.reference),
        _stage(folder, "refine", refine.refine),
    )
    if job.run.workflow in CO_REFINEMENTS:
        middle = tuple(_stage(folder, name, do) for name, do in corefine.stages_between(job))
        if not folder.has("refine"):
            first = first[:2]
    else:
        middle = ()
    corrected = (_stage(folder, "correct", _correct),) if folder.has("correct") else ()
    last = (
        _stage(folder, "reconstruct", reconstruct.reconstruct),
        *corrected,
        _stage(folder, "diagnose", diagnose.diagnose),
        Stage("report", report.report, ("result", "report.html", "report.json")),
    )
    return first + middle + last
