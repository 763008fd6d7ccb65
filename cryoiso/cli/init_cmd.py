"""``cryoiso init``: a job file for a particle file."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import MODEL_KEYS, SYMMETRY
from cryoiso.cli.options import JobOptions, help_of, keys, with_keys

PLACEHOLDER = "reference.mrc"


@with_keys(
    SYMMETRY,
    keys("reference", "Reference", ("pixel_size_A", "--ref-pixel-size"), *MODEL_KEYS),
    keys("particles", "Images", "project", "passthrough"),
)
def init(
    particles: Annotated[Path, typer.Argument(help=help_of("particles", "file"))],
    job_options: JobOptions,
    reference: Annotated[
        Path | None, typer.Option(help=help_of("reference", "file") + " May be entered into the job file later.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Job file to write.")] = Path("job.toml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing job file.")] = False,
    images: Annotated[
        int, typer.Option(min=0, help="Number of images looked at to estimate the size of the particle; 0: none.")
    ] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Write a job file for a particle file.

    It holds every key with its meaning, unit, range, choices and default. The particle file is read and checked. From
    some images and the reference, comments propose diameter, box, symmetry and low-pass filter, with their evidence;
    nothing of that is set.
    """
    from cryoiso.core.config import job_to_toml
    from cryoiso.core.errors import InputError, UsageError
    from cryoiso.io import read_particle_file
    from cryoiso.io.atomic import write_text
    from cryoiso.physics.symmetry import point_group
    from cryoiso.pipeline.commands.propose import propose

    if out.exists() and not overwrite:
        raise UsageError(
            f"{out} already exists; give --overwrite to replace it, or another name with --out", code="file-exists"
        )
    options = job_options.job(particles={"file": str(particles)}, reference={"file": ""})
    project, passthrough = options.particles.project, options.particles.passthrough
    particle_set = read_particle_file(particles, project, passthrough=passthrough)
    if options.sample.symmetry.lower() != "auto":
        point_group(options.sample.symmetry)
    named = reference is not None
    if reference is not None and not reference.is_file():
        raise InputError("no such reference", file=reference, hint="Check --reference.", code="file-not-found")
    opened = job_options.job(particles={"file": str(particles)}, reference={"file": str(reference or PLACEHOLDER)})
    proposals = propose(particle_set, opened, images, named, particles)
    job = job_options.job(
        particles={
            "file": _from(out, particles),
            "project": _from(out, Path(project)) if project else "",
            "passthrough": [_from(out, Path(name)) for name in passthrough],
        },
        reference={"file": PLACEHOLDER if reference is None else _from(out, reference)},
    )
    head = f"# cryoiso job: mpirun -n 4 cryoiso run {out.name}\n# Relative paths start from this file's folder.\n\n"
    write_text(out, head + job_to_toml(job, proposals.notes()))
    sizes = sorted({round(group.pixel_size_A, 4) for group in particle_set.groups})
    if as_json:
        import json

        facts = {"job": str(out), "particles": len(particle_set), "pixel_sizes_A": sizes, **proposals.facts()}
        echo(json.dumps(facts, indent=2))
        return
    echo(f"{particles}: {len(particle_set):,} particles, pixel size {', '.join(f'{s:g}' for s in sizes)} Å")
    for proposal in proposals.found:
        echo(f"{proposal.key}: {proposal.line}")
    first = "look at the comments '# ->' in it, then " if any(p.kind != "note" for p in proposals.found) else ""
    start = f"Next: {first}cryoiso run {shlex.quote(str(out))}"
    echo(f"{out} written. " + (start if reference else "Next: name your reference in it."))


def _from(job: Path, path: Path) -> str:
    """A path as the job file should name it: relative where it lies below the job file's folder."""
    folder = job.absolute().parent
    full = Path(os.path.abspath(path))
    return str(full.relative_to(folder)) if full.is_relative_to(folder) else str(full)
