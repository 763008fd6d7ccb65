"""The stage ``refine``: poses and half-maps by an engine, or poses that the particle file has."""

from __future__ import annotations

from typing import Any

from cryoiso.core import products
from cryoiso.core.progress import board
from cryoiso.core.protocols import RefineRequest
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import read_map
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages import engines
from cryoiso.pipeline.stages.confirmation import measured_by_refine
from cryoiso.pipeline.stages.half_maps import write_reconstruction
from cryoiso.pipeline.stages.rounds import control_references, known_grey_scale
from cryoiso.pipeline.workflow import program_of, starts_a_program


def refine(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """Poses and half-maps by the engine, or, where the job says so, from the particle file."""
    if run.folder.has("train-1") and run.job.auxiliary.poses == "given":
        return _take_given_poses(run, inputs)
    engines.engine(run.job.refine.engine).refine(refine_request(run, inputs, resume=resume), run.comm)


def refine_request(run: RunContext, inputs: Inputs, *, resume: bool) -> RefineRequest:
    """What the stage ``refine`` asks an engine for. Collective."""
    job, sample = run.job, inputs.sample()
    source = inputs.source(once=starts_a_program(job))
    start = on_root(run.comm, read_map, run.folder.stage("reference") / products.REFERENCE, sample.pixel_size_A)
    # without auxiliary particles this measures what the raw ones confirm, and changes nothing
    asked: dict[str, Any] = {"auxiliary_weight": "measured", "homologue": start} if measured_by_refine(run) else {}
    return RefineRequest(
        source=source,
        reference=start,
        symmetry=job.sample.symmetry,
        folder=run.folder.stage("refine"),
        settings=job.refine,
        seed=job.run.seed,
        diameter_A=sample.diameter_A,
        mask=sample.mask,
        resume=resume,
        lowpass_A=job.reference.lowpass_A,
        local_deg=job.refine.local_deg,
        correction=engines.correction(job) if job.run.workflow == "realign" else None,
        grey_scale=known_grey_scale(run, 0),
        half_references=on_root(run.comm, control_references, run),
        program=program_of(job),
        on_checkpoint=lambda record: run.note_checkpoint("refine", iteration=record.get("iteration")),
        **asked,
    )


def _take_given_poses(run: RunContext, inputs: Inputs) -> None:
    """What the refinement would have left, from the poses of the particle file."""
    comm, folder = run.comm, run.folder.stage("refine")
    posed = on_root(comm, lambda: bare(inputs.particles()))
    board.expect(0, 1, lines=2)
    facts = write_reconstruction(
        inputs.source(once=True), posed, folder, comm,
        symmetry=run.job.sample.symmetry, padding=run.job.reconstruct.padding,
        pixel_size_A=on_root(comm, inputs.grid)[1],
    )  # fmt: skip
    on_root(comm, lambda: write_particles(folder / products.PARTICLES, inputs.particles()))
    on_root(comm, write_json, folder / products.facts("refine"), {**facts, "engine": "given", "particles": len(posed)})
