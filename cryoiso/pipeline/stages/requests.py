"""What an engine is asked for in the rounds of a workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Sample
from cryoiso.pipeline.stages import engines
from cryoiso.pipeline.stages.rounds import known_grey_scale, references_after
from cryoiso.pipeline.workflow import program_of


def round_request(
    run: RunContext, sample: Sample, source: Any, round_: int, stage: str, folder: Path, *, resume: bool
) -> RefineRequest:
    """What the engine is asked for in a round, by a stage, in a folder. Collective."""
    return request_for(
        run, sample, folder, source, references_after(run, round_ - 1),
        lowpass_A=run.job.reference.lowpass_A, correction=engines.correction(run.job), resume=resume,
        grey_scale=known_grey_scale(run, round_ - 1), homologue=references_after(run, 0, with_micelle=False)[1],
        on_checkpoint=lambda record: run.note_checkpoint(stage, iteration=record.get("iteration")),
    )  # fmt: skip


def request_for(
    run: RunContext, sample: Sample, folder: Path, source: Any, references: dict[int, DensityMap], **options: Any
) -> RefineRequest:
    """What the engine is asked for in this workflow."""
    job = run.job
    same = references[1] is references[2]
    return RefineRequest(
        source=source,
        reference=references[1],
        half_references=None if same else references,
        symmetry=job.sample.symmetry,
        folder=folder,
        settings=job.refine,
        seed=job.run.seed,
        diameter_A=sample.diameter_A,
        mask=sample.mask,
        program=program_of(job),
        **options,
    )
