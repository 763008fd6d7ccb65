"""Which stages a run has, and where each leaves its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryoiso.core.errors import UsageError
from cryoiso.pipeline import stages
from cryoiso.pipeline.layout import STAGE_FOLDERS
from cryoiso.pipeline.work import Work


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


def _stage(name: str, do: Callable[[Work], None], continues: bool = False) -> Stage:
    return Stage(name, do, (STAGE_FOLDERS[name],), continues)


WORKFLOWS: dict[str, tuple[Stage, ...]] = {
    "refine": (
        _stage("ingest", stages.ingest, continues=True),
        _stage("reference", stages.reference),
        _stage("refine", stages.refine, continues=True),
        _stage("reconstruct", stages.reconstruct),
        _stage("diagnose", stages.diagnose),
        Stage("report", stages.report, ("result", "report.html", "report.json")),
    ),
}


def stages_of(workflow: str) -> tuple[Stage, ...]:
    """The stages of a workflow, in order.

    Raises:
        UsageError: no such workflow.
    """
    if workflow not in WORKFLOWS:
        raise UsageError(f"unknown workflow '{workflow}' (known: {', '.join(WORKFLOWS)})")
    return WORKFLOWS[workflow]
