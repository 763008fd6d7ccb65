"""Which stages a workflow has: names alone, from the job."""

from __future__ import annotations

from cryoiso.core.config import Job
from cryoiso.core.errors import UsageError
from cryoiso.pipeline.records.run_folder import REALIGN_STAGES, REFINE_STAGES

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
        return REFINE_STAGES
    if job.run.workflow == "realign":
        return REALIGN_STAGES
    if job.run.workflow in CO_REFINEMENTS:
        return _co_refinement_stages(job)
    raise UsageError(f"unknown workflow '{job.run.workflow}' (known: refine, auxiliary, realign, both)")


def _co_refinement_stages(job: Job) -> tuple[str, ...]:
    """Stages with a folder, in order."""
    rounds = [f"{name}-{r}" for r in range(1, job.auxiliary.rounds + 1) for name in ("train", "generate", "corefine")]
    micelle = ["micelle"] if job.micelle.enable else []
    local = ["local"] if job.auxiliary.balance else []
    correct = ["correct"] if job.run.workflow == "both" else []
    return ("ingest", "reference", "refine", *micelle, *rounds, *local, "reconstruct", *correct, "diagnose")
