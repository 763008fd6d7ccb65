"""The command ``classify`` on plain files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cryoiso.core.config import Job
from cryoiso.core.errors import UsageError
from cryoiso.core.protocols import ImageSource, RefineRequest
from cryoiso.core.types import DensityMap, Particles
from cryoiso.io import ingest, read_job_particles
from cryoiso.io.atomic import make_folder
from cryoiso.io.shards import ShardSource
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.physics.symmetry import point_group
from cryoiso.pipeline.inputs.grids import read_mask
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.inputs.reference import Reference, model_choice, prepare_reference
from cryoiso.pipeline.inputs.stacks import open_stacks
from cryoiso.pipeline.stages import engines


def classify_files(
    job: Job, references: list[Path], out: Path, comm: Context, *, auxiliary: Path | None = None, resume: bool = False
) -> None:
    """Sorts the particles of a job into classes, the images read from their stacks or shards. Collective.

    Args:
        references: a map or model for each class; empty: maps of random subsets of the particles.
        auxiliary: folder of shards with auxiliary particles, which join the maps of the classes.
        resume: go on with an interrupted classification in the same folder.

    Raises:
        InputError: see ``engines.classify``.
        UsageError: another number of references than of classes.
    """
    settings = job.classify
    if references and len(references) != settings.classes:
        raise UsageError(
            f"--ref: one for each class is expected, or none at all (found {len(references)} for {settings.classes} "
            "classes)",
            code="options-conflict",
        )
    comm.device_preference = job.run.device
    comm.install_signal_handlers()
    particles = on_root(comm, _read, job)
    source = _open(particles, job, comm)
    prepared = on_root(comm, _references, job, references, source.particles)
    maps = tuple(class_reference.map for class_reference in prepared)
    more = None if auxiliary is None else _auxiliary(auxiliary, job, comm)
    request = engines.class_request(_request(job, source, prepared, out, comm, resume), settings, maps, more)
    on_root(comm, engines.check_classes, request)
    on_root(comm, make_folder, out)
    engines.classify(request, comm)


def _read(job: Job) -> Particles:
    """The particles with every column of their file; of a folder of shards, with those that it keeps."""
    section = job.particles
    point_group(job.sample.symmetry)
    if Path(section.file).is_dir():
        particles = ShardSource(Path(section.file)).particles
    else:
        particles = read_job_particles(section, ("image", "ctf"), job.sample.symmetry)
        particles = replace(particles, groups=ingest.check_stacks(particles, section.file))
    return assign_halves(particles, job.run.seed, section.file)


def _auxiliary(folder: Path, job: Job, comm: Context) -> ShardSource:
    """Auxiliary particles with their poses and half-sets. Collective."""

    def read() -> Particles:
        particles = ShardSource(folder).particles
        particles.require_poses(folder)
        return bare(assign_halves(particles, job.run.seed, folder))

    known = on_root(comm, read)
    source = ShardSource(folder)
    source.particles = known
    return source


def _open(particles: Particles, job: Job, comm: Context) -> ImageSource:
    """The images; rank 0 also has the table of their file."""
    bare_particles = on_root(comm, bare, particles)
    source: ImageSource
    if Path(job.particles.file).is_dir():
        source = ShardSource(Path(job.particles.file))
        source.particles = bare_particles
    else:
        source = open_stacks(bare_particles, job.particles, comm)
    if comm.rank == 0:
        source.particles = replace(particles, groups=source.particles.groups)
    return source


def _references(job: Job, files: list[Path], particles: Particles) -> list[Reference]:
    group, section = particles.first_group, job.reference
    return [
        prepare_reference(
            file, group.box_px, group.pixel_size_A, job.classify.lowpass_A, map_pixel_size_A=section.pixel_size_A,
            resample=section.resample, symmetry=job.sample.symmetry, model=model_choice(section),
        )
        for file in files
    ]  # fmt: skip


def _request(
    job: Job, source: ImageSource, prepared: list[Reference], out: Path, comm: Context,
    resume: bool,
) -> RefineRequest:  # fmt: skip
    group, box = source.particles.first_group, source.box_px
    grid = DensityMap(np.zeros((box,) * 3, np.float32), group.pixel_size_A)
    measured = max((class_reference.diameter_A for class_reference in prepared), default=None)
    settings = job.classify

    def mask() -> DensityMap | None:
        name = job.sample.mask
        return read_mask(Path(name), box, group.pixel_size_A, job.sample.symmetry) if name else None

    return RefineRequest(
        source=source,
        reference=prepared[0].map if prepared else grid,
        symmetry=job.sample.symmetry,
        folder=out,
        settings=job.refine,
        seed=job.run.seed,
        diameter_A=job.sample.diameter_A or measured,
        mask=on_root(comm, mask),
        resume=resume,
        lowpass_A=settings.lowpass_A,
        local_deg=settings.local_deg if settings.align == "local" else None,
    )
