"""Single stages on plain files, without a run folder."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryoiso.core.config import Job, ParticlesSection
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.types import Particles
from cryoiso.io import ingest as io_ingest
from cryoiso.io import read_job_particles, read_particle_file
from cryoiso.io.dimensionality import kind_of_particles
from cryoiso.io.mrc import read_map
from cryoiso.io.shards import read_index
from cryoiso.io.sources import StackSource
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.commands.begin import begin_or_go_on
from cryoiso.pipeline.commands.subtomograms import refine_subtomograms
from cryoiso.pipeline.inputs.grids import read_mask, require_grid
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.inputs.map_pairs import read_half_maps
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.inputs.standard_frame import warn_of_symmetry
from cryoiso.pipeline.preflight import check_job
from cryoiso.pipeline.records.hashing import hash_shared
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.stages import basic
from cryoiso.pipeline.stages.half_maps import Support, make_mask, write_reconstruction
from cryoiso.pipeline.work import Work, using_scratch

logger = logging.getLogger("cryoiso")


@dataclass(frozen=True)
class FlatFolder(RunFolder):
    """The folder of a single command: the files of its last stage lie in it directly."""

    def stage(self, name: str) -> Path:
        return {"ingest": self.path / "shards", "reference": self.path / "reference"}.get(name, self.path)


def ingest_files(section: ParticlesSection, out: Path, comm: Context) -> None:
    """Particles of a STAR or .cs file into shards, their hashes in index.json. Collective; errors as ``io.ingest``.

    Shards that are there already stay, unless they are no longer what an earlier call wrote.
    """

    def prepare() -> Any:
        particles = read_job_particles(section)
        plan = io_ingest.plan(particles, section, section.file)
        out.mkdir(parents=True, exist_ok=True)
        return basic.bare_plan(plan)

    comm.install_signal_handlers()
    plan = on_root(comm, prepare)
    basic.write_shards(plan, out, comm, known=_kept_shards(plan, out, comm))


def _kept_shards(plan: Any, out: Path, comm: Context) -> dict[str, str]:
    """Hashes of the shards of an earlier call that need not be written again; what has changed since is removed.
    Collective."""

    def noted() -> dict[str, str]:
        with suppress(InputError):
            index = read_index(out)
            if index["plan"] == plan.digest:
                kept = [s for n, s in enumerate(index["shards"]) if io_ingest.shard_is_done(plan, out, n)]
                return {shard["file"]: shard["sha256"] for shard in kept if "sha256" in shard}
        return {}

    def remove(names: list[str]) -> None:
        for name in names:
            logger.warning("%s is not what index.json says; it is written again", out / name)
            (out / name).unlink()

    expected = on_root(comm, noted)
    found = hash_shared(out, list(expected), comm, "checking shards") if expected else {}
    changed = [name for name, facts in found.items() if facts["sha256"] != expected[name]]
    on_root(comm, remove, changed)
    return {name: facts["sha256"] for name, facts in found.items() if name not in changed}


def refine_files(job: Job, out: Path, comm: Context, *, resume: bool = False) -> None:
    """Refines the particles of a job into a folder: shards and reference in sub-folders, the result beside them.

    Subtomograms are not put into shards.

    Args:
        resume: go on with an interrupted refinement in the same folder.
    """
    if on_root(comm, kind_of_particles, job.particles.file, job.particles.project) == "volumes":
        return refine_subtomograms(job, out, comm, resume=resume)
    work = begin_refinement(job, out, comm, resume=resume)
    with using_scratch(work):
        basic.refine(work)


def begin_refinement(job: Job, out: Path, comm: Context, *, resume: bool) -> Work:
    """Checks a job, and makes the shards and the reference that its refinement begins with. Collective."""
    work = Work(job, FlatFolder(out.absolute()), comm, resume=resume)
    comm.device_preference = job.run.device
    comm.install_signal_handlers()
    on_root(comm, check_job, work)
    on_root(comm, _begin_or_go_on, work)
    for name in ("refine", "ingest", "reference"):
        on_root(comm, work.folder.stage(name).mkdir, parents=True, exist_ok=True)
    if on_root(comm, lambda: work.shards == work.folder.stage("ingest")):
        basic.ingest(work)
    basic.reference(work)
    return work


def _begin_or_go_on(work: Work) -> None:
    begin_or_go_on(work.folder.path, work.job, work.particles(), work.reference().map, work.mask(), work.resume)


def reconstruct_files(job: Job, out: Path, comm: Context) -> None:
    """Half-maps, their mean and the weighted map from the poses of a particle file, its images read in place.

    Collective.
    """

    def read() -> Particles:
        from cryoiso.physics.symmetry import point_group

        section = job.particles
        point_group(job.sample.symmetry)
        found = read_job_particles(section, ("image", "ctf", "pose"), job.sample.symmetry)
        found = replace(found, groups=io_ingest.check_stacks(found, section.file))
        out.mkdir(parents=True, exist_ok=True)
        return bare(assign_halves(found, job.run.seed, section.file))

    comm.device_preference = job.run.device
    particles = on_root(comm, read)
    source, error = None, None
    try:
        source = StackSource(particles, job.particles, job.particles.file)
    except CryoisoError as caught:
        error = caught
    agree(comm, error)
    write_reconstruction(
        source, particles, out, comm, symmetry=job.sample.symmetry, padding=job.reconstruct.padding,
        pixel_size_A=particles.first_group.pixel_size_A, support=Support(seed=job.run.seed),
    )  # fmt: skip


def diagnose_files(
    half1: Path, half2: Path, mask: Path | None, particles: Path | None, symmetry: str,
    truth_particles: Path | None, truth_map: Path | None, *, pixel_size_A: float | None = None, seed: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of ``pipeline.stages.diagnose`` from files.

    Raises:
        InputError: unreadable files, or maps on different grids.
    """
    from cryoiso.physics.symmetry import point_group
    from cryoiso.pipeline.stages.diagnose import diagnose

    point_group(symmetry)
    one, two, _ = read_half_maps(half1, half2, pixel_size_A)
    truth = read_map(truth_map, pixel_size_A) if truth_map else None
    if truth is not None:
        require_grid(truth, one.box_px, one.pixel_size_A, truth_map, "the half-maps")
    full = replace(one, data=(one.data + two.data) / 2)
    inside = read_mask(mask, one.box_px, one.pixel_size_A).data if mask else make_mask(full)
    doubt = warn_of_symmetry(full, symmetry, f"the mean of {half1.name} and {half2.name}")
    found = diagnose(
        one.data, two.data, inside, one.pixel_size_A,
        _posed(particles, symmetry),
        symmetry,
        truth_particles=_posed(truth_particles, symmetry),
        truth_map=None if truth is None else truth.data,
        seed=seed,
    )  # fmt: skip
    found["notes"] += [doubt] if doubt else []
    return found


def _posed(file: Path | None, symmetry: str) -> Particles | None:
    return read_particle_file(file, "", ("pose",), symmetry=symmetry) if file else None
