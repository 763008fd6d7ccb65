"""The stage ``refine``: poses and half-maps by an engine, or poses that the particle file has."""

from __future__ import annotations

from cryoiso.core.progress import board
from cryoiso.core.protocols import RefineRequest
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import read_map
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.stages import engines
from cryoiso.pipeline.stages.half_maps import write_reconstruction
from cryoiso.pipeline.work import Work


def refine(work: Work) -> None:
    """Poses and half-maps by the engine, or, where the job says so, from the particle file."""
    comm, job = work.comm, work.job
    if work.folder.has("train-1") and job.auxiliary.poses == "given":
        return _take_given_poses(work)
    engines.engine(job.refine.engine).refine(refine_request(work), comm)


def refine_request(work: Work) -> RefineRequest:
    """What the stage ``refine`` asks an engine for. Collective."""
    comm, job = work.comm, work.job
    source = work.source(once=job.refine.engine == "relion")
    _, pixel_size_A = on_root(comm, work.grid)
    start = on_root(comm, read_map, work.folder.stage("reference") / "reference.mrc", pixel_size_A)
    return RefineRequest(
        source=source,
        reference=start,
        symmetry=job.sample.symmetry,
        folder=work.folder.stage("refine"),
        settings=job.refine,
        seed=job.run.seed,
        diameter_A=on_root(comm, work.diameter_A),
        mask=on_root(comm, work.mask),
        resume=work.resume,
        lowpass_A=job.reference.lowpass_A,
        local_deg=job.refine.local_deg,
        correction=engines.correction(job) if job.run.workflow == "realign" else None,
        program=job.relion,
        on_checkpoint=lambda record: work.note_checkpoint("refine", iteration=record.get("iteration")),
    )


def _take_given_poses(work: Work) -> None:
    """What the refinement would have left, from the poses of the particle file."""
    comm, folder = work.comm, work.folder.stage("refine")
    posed = on_root(comm, lambda: bare(work.particles()))
    board.expect(0, 1, lines=2)
    facts = write_reconstruction(
        work.source(once=True), posed, folder, comm,
        symmetry=work.job.sample.symmetry, padding=work.job.reconstruct.padding,
        pixel_size_A=on_root(comm, work.grid)[1],
    )  # fmt: skip
    on_root(comm, lambda: write_particles(folder / "particles.star", work.particles()))
    on_root(comm, write_json, folder / "refine.json", {**facts, "engine": "given", "particles": len(posed)})
