"""``cryoiso init``: a job file for a particle file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import default, job_of, option
from cryoiso.core.config import ParticlesSection as P
from cryoiso.core.config import SampleSection as S

PLACEHOLDER = "reference.mrc"


def init(
    particles: Annotated[Path, typer.Argument(help="Particles: a RELION STAR file or a cryoSPARC .cs file.")],
    reference: Annotated[
        Path | None, typer.Option(help="Reference: atomic model (PDB, mmCIF) or map (MRC). Can be filled in later.")
    ] = None,
    symmetry: Annotated[str, option(S, "symmetry")] = default(S, "symmetry"),
    project: Annotated[str, option(P, "project")] = "",
    passthrough: Annotated[list[str] | None, option(P, "passthrough")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Job file to write.")] = Path("job.toml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing job file.")] = False,
) -> None:
    """Write a job file for a particle file.

    It has every key with its default and what it means. The particle file is read, so that one that cannot be used is
    found out now.
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
    found = read_particle_file(particles, project, passthrough=passthrough or ())
    point_group(symmetry)
    job = job_of(
        particles={
            "file": _from(out, particles),
            "project": _from(out, Path(project)) if project else "",
            "passthrough": [_from(out, Path(name)) for name in passthrough or []],
        },
        reference={"file": PLACEHOLDER if reference is None else _from(out, reference)},
        sample={"symmetry": symmetry},
    )
    head = f"# cryoiso job: mpirun -n 4 cryoiso run {out.name}\n# Relative paths start from this file's folder.\n\n"
    write_text(out, head + job_to_toml(job))
    sizes = sorted({round(group.pixel_size_A, 4) for group in found.groups})
    echo(f"{particles}: {len(found):,} particles, pixel size {', '.join(f'{s:g}' for s in sizes)} Å")
    echo(f"{out} written. " + (f"Next: cryoiso run {out}" if reference else "Next: name your reference in it."))


def _from(job: Path, path: Path) -> str:
    """A path as the job file should name it: relative where it lies below the job file's folder."""
    folder = job.absolute().parent
    full = Path(os.path.abspath(path))
    return str(full.relative_to(folder)) if full.is_relative_to(folder) else str(full)
