"""The command ``reconstruct`` on plain files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cryoiso.core.config import Job
from cryoiso.core.types import Particles
from cryoiso.io import ingest as io_ingest
from cryoiso.io import read_job_particles
from cryoiso.io.atomic import make_folder
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.inputs.particle_tables import bare
from cryoiso.pipeline.inputs.stacks import open_stacks
from cryoiso.pipeline.stages.half_maps import Support, write_reconstruction
from cryoiso.refine.junk import with_junk_of_file


def reconstruct_files(job: Job, out: Path, comm: Context) -> None:
    """Half-maps, their mean and the weighted map from the poses of a particle file, its images read in place.

    If the file has them, the images' probabilities of showing a particle are their weights.

    Collective.
    """

    def read() -> Particles:
        from cryoiso.physics.symmetry import point_group

        section = job.particles
        point_group(job.sample.symmetry)
        particles = read_job_particles(section, ("image", "ctf", "pose"), job.sample.symmetry)
        checked = replace(particles, groups=io_ingest.check_stacks(particles, section.file))
        particles = with_junk_of_file(checked, section.file)
        make_folder(out)
        return bare(assign_halves(particles, job.run.seed, section.file))

    comm.device_preference = job.run.device
    particles = on_root(comm, read)
    source = open_stacks(particles, job.particles, comm)
    write_reconstruction(
        source, particles, out, comm, symmetry=job.sample.symmetry, padding=job.reconstruct.padding,
        pixel_size_A=particles.first_group.pixel_size_A, support=Support(seed=job.run.seed),
    )  # fmt: skip
