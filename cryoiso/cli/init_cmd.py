"""``cryoiso init``: a job file for a particle file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import SYMMETRY
from cryoiso.cli.options import JobOptions, help_of, keys, with_keys

PLACEHOLDER = "reference.mrc"


@with_keys(SYMMETRY, keys("particles", "Images", "project", "passthrough"))
def init(
    particles: Annotated[Path, typer.Argument(help=help_of("particles", "file"))],
    job_options: JobOptions,
    reference: Annotated[
        Path | None, typer.Option(help=help_of("reference", "file") + " May be entered into the job file later.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Job file to write.")] = Path("job.toml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing job file.")] = False,
) -> None:
    """Write a job file for a particle file.

    It holds every key with its meaning, unit, range, choices and default. The particle file is read and checked.
    """
    from cryoiso.core.config import job_to_toml
    from cryoiso.core.errors import UsageError
    from cryoiso.io import read_particle_file
    from cryoiso.io.atomic import write_text
    from cryoiso.physics.symmetry import point_group

    if out.exists() and not overwrite:
        raise UsageError(
            f"{out} already exists; give --overwrite to replace it, or another name with --out", code="file-exists"
        )
    options = job_options.job(particles={"file": str(particles)}, reference={"file": ""})
    project, passthrough = options.particles.project, options.particles.passthrough
    particle_set = read_particle_file(particles, project, passthrough=passthrough)
    if options.sample.symmetry.lower() != "auto":
        point_group(options.sample.symmetry)
    job = job_options.job(
        particles={
            "file": _from(out, particles),
            "project": _from(out, Path(project)) if project else "",
            "passthrough": [_from(out, Path(name)) for name in passthrough],
        },
        reference={"file": PLACEHOLDER if reference is None else _from(out, reference)},
    )
    head = f"# cryoiso job: mpirun -n 4 cryoiso run {out.name}\n# Relative paths start from this file's folder.\n\n"
    write_text(out, head + job_to_toml(job))
    sizes = sorted({round(group.pixel_size_A, 4) for group in particle_set.groups})
    echo(f"{particles}: {len(particle_set):,} particles, pixel size {', '.join(f'{s:g}' for s in sizes)} Å")
    echo(f"{out} written. " + (f"Next: cryoiso run {out}" if reference else "Next: name your reference in it."))


def _from(job: Path, path: Path) -> str:
    """A path as the job file should name it: relative where it lies below the job file's folder."""
    folder = job.absolute().parent
    full = Path(os.path.abspath(path))
    return str(full.relative_to(folder)) if full.is_relative_to(folder) else str(full)
