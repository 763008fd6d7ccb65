"""``auxiliary train`` and ``auxiliary generate`` on plain files, without a run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import AuxiliarySection, Job, ParticlesSection
from cryoiso.core.errors import InputError, UsageError
from cryoiso.core.types import HALVES, Particles
from cryoiso.io import ingest as io_ingest
from cryoiso.io import read_job_particles
from cryoiso.io.atomic import make_folder, write_json
from cryoiso.io.contrast_sign import decide_sign
from cryoiso.io.imageprep import IngestSettings
from cryoiso.io.shards import ShardSource
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.methods.auxiliary.particles import apart, auxiliary_particles, both_halves, require_poolable
from cryoiso.methods.auxiliary.transfer import measure as measure_transfer
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.commands.refine import FlatFolder
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.preflight import check_job
from cryoiso.pipeline.stages import ingest
from cryoiso.pipeline.stages.generate import export, generator_files, load_maker, write_images
from cryoiso.pipeline.stages.train import train_into


def train_files(job: Job, out: Path, comm: Context, *, resume: bool = False) -> None:
    """Trains the generators of a particle file with poses into a folder; the shards go beside them. Collective.

    Raises:
        InputError: no poses, or what ``preflight.check_job`` finds.
        Interrupted: stopped by a signal; ``resume`` goes on.
    """
    run = RunContext(job, FlatFolder(out.absolute()), comm)
    inputs = Inputs(job, run.folder, comm)
    comm.device_preference = job.run.device
    comm.install_signal_handlers()

    def check() -> None:
        check_job(inputs)
        inputs.particles().require_poses(job.particles.file)
        for name in ("train", "ingest"):
            run.folder.stage(name).mkdir(parents=True, exist_ok=True)

    on_root(comm, check)
    if on_root(comm, lambda: inputs.shards == run.folder.stage("ingest")):
        ingest.ingest(run, inputs, resume=resume)
    source = inputs.source()
    particles = on_root(comm, lambda: bare(inputs.particles()))
    source.particles = particles
    reference = on_root(comm, lambda: inputs.reference().map)
    facts = {"round": 1, "inverted": bool(source.index["inverted"])}
    train_into(
        out, source, particles, {1: reference, 2: reference}, job.auxiliary, comm, job.run.seed, facts, resume=resume
    )  # fmt: skip


def find_generators(folder: Path) -> dict[int, Path]:
    """Half -> generator file of a folder that ``auxiliary train`` wrote.

    Raises:
        InputError: there is none.
    """
    for shared in (False, True):
        files = generator_files(folder, shared)
        if all(path.is_file() for path in files.values()):
            return files
    raise InputError(
        "no generators in this folder", file=folder, expected="generator1.npz and generator2.npz, or generator.npz",
        hint="'cryoiso auxiliary train' writes them.", code="file-not-found",
    )  # fmt: skip


def generate_files(
    generators: Path,
    section: ParticlesSection,
    out: Path,
    comm: Context,
    *,
    count: int | None,
    settings: AuxiliarySection,
    symmetry: str,
    seed: int,
    device: str = "auto",
) -> int:
    """Auxiliary particles for a particle file, into shards and, on request, stacks with a STAR file. Collective.

    Args:
        generators: folder of ``auxiliary train``.
        section: the particles whose CTFs, half-sets and shifts the auxiliary ones are drawn from.
        count: how many, both halves together; None: ``settings.ratio`` for each raw particle.

    Returns:
        how many were made.

    Raises:
        InputError: the generators were trained on images of another box, pixel size or sign.
    """
    comm.device_preference = device
    comm.install_signal_handlers()
    files = on_root(comm, find_generators, generators)

    def plan() -> tuple[Particles, Particles, bool]:
        raw, inverted = _raw(section, seed)
        planned = _planned(raw, inverted, files, section, count, settings, symmetry, seed)
        make_folder(out)
        return planned, apart(planned, raw) if settings.noise_group == "own" else planned, inverted

    particles, exported, inverted = on_root(comm, plan)
    maker = load_maker(files, particles, settings.temperature, seed, comm)
    write_images(maker, files, out, comm)
    facts = {
        "counts": {str(h): int(np.sum(particles.half == h)) for h in HALVES},
        "temperature": settings.temperature,
        "seed": seed,
        "symmetry": symmetry,
        "generators": {str(h): path.name for h, path in files.items()},
        "transfer": measure_transfer(ShardSource(out), particles, maker.conditions, comm, seed),
    }
    on_root(comm, write_json, out / products.facts("generate"), facts)
    if settings.export:
        on_root(comm, export, ShardSource(out), exported, out, inverted)
    return len(particles)


def _raw(section: ParticlesSection, seed: int) -> tuple[Particles, bool]:
    """The data with half-sets and boxes, and whether protein is dark in its stacks."""
    particles = read_job_particles(section)
    particles = assign_halves(particles, seed, section.file)
    particles = replace(particles, groups=io_ingest.check_stacks(particles, section.file))
    return particles, bool(decide_sign(particles, IngestSettings.of(section), section.file).inverted)


def _planned(
    raw: Particles,
    inverted: bool,
    files: dict[int, Path],
    section: ParticlesSection,
    count: int | None,
    settings: AuxiliarySection,
    symmetry: str,
    seed: int,
) -> Particles:
    if count is not None and count < 2:
        raise UsageError("--count: each half-set needs at least one particle", code="option-out-of-range")
    group = raw.first_group
    if settings.noise_group == "raw":
        require_poolable(raw, group.pixel_size_A, section.file)
    sets = []
    for half in HALVES:
        Generator.load(files[half]).check(group.box_px, group.pixel_size_A, inverted, files[half], section.file)
        of_half = int(np.sum(raw.half == half))
        n = max(1, round(settings.ratio * of_half)) if count is None else (count + 2 - half) // 2
        sets.append(
            auxiliary_particles(
                bare(raw), half, n, round_=1, seed=seed, symmetry=symmetry, box_px=group.box_px,
                pixel_size_A=group.pixel_size_A, known_shift_A=raw.shift_A,
            )
        )  # fmt: skip
    return both_halves(*sets)
