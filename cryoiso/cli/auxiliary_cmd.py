"""``cryoiso auxiliary train`` and ``cryoiso auxiliary generate``: generators of particle images, and their images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import COMPUTING, FILES, GRID, IMAGES, SHARDS, SYMMETRY, OutputFolder, Overwrite, Posed, Resume
from cryoiso.cli.options import JobOptions, keys, with_keys
from cryoiso.core import products

GENERATOR = keys(
    "auxiliary", "Generator", "preset", "generators", "steps", "batch", "learning_rate", "likelihood_sd",
    "kl_anneal_fraction", "condition_lowpass_A",
)  # fmt: skip
MADE = keys("auxiliary", "Auxiliary particles", "ratio", "temperature", "noise_group", "export")


@with_keys(SYMMETRY, GRID, GENERATOR, IMAGES, SHARDS, COMPUTING)
def train(
    particles: Posed,
    ref: Annotated[Path, typer.Option("--ref", help="Reference in the frame of the poses: atomic model or map.")],
    out: OutputFolder,
    job_options: JobOptions,
    go_on: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train the conditional hierarchical VAE on particles with poses.

    Writes generator1.npz and generator2.npz (one per half-set) or generator.npz (shared), train.json with the training
    curves, and the shards of the images. Two or more ranks train both half-sets side by side.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.auxiliary import train_files
    from cryoiso.pipeline.commands.output import refuse_result

    comm = get_context()
    on_root(comm, refuse_result, out, (products.facts("train"),), overwrite or go_on)
    job = on_root(comm, job_options.job, particles={"file": str(particles)}, reference={"file": str(ref)})
    train_files(job, out, comm, resume=go_on)
    if comm.rank == 0:
        echo("\n".join(str(path) for path in sorted(out.glob("generator*.npz"))))


@with_keys(SYMMETRY, MADE, FILES, COMPUTING)
def generate(
    generators: Annotated[Path, typer.Argument(help="Folder written by 'cryoiso auxiliary train'.")],
    particles: Annotated[
        Path, typer.Argument(help="Raw particles (STAR or .cs file) from which CTFs, half-sets and shifts are drawn.")
    ],
    out: OutputFolder,
    job_options: JobOptions,
    count: Annotated[
        int | None,
        typer.Option(min=2, help="Number of auxiliary particles (default: by --ratio).", rich_help_panel=MADE.panel),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Generate auxiliary particles with even views.

    Every image depends on --seed and its uid alone, on any number of ranks. Poses are uniform over the asymmetric
    unit; the particles of each half-set are made by the generator of that half-set.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.auxiliary import generate_files
    from cryoiso.pipeline.commands.output import refuse_result

    comm = get_context()
    on_root(comm, refuse_result, out, (products.facts("generate"),), overwrite)
    job = on_root(comm, job_options.job, particles={"file": str(particles)}, reference={"file": ""})
    facts = generate_files(
        generators, job.particles, out, comm, count=count, settings=job.auxiliary, symmetry=job.sample.symmetry,
        seed=job.run.seed, device=job.run.device,
    )  # fmt: skip
    if comm.rank == 0:
        echo(f"{out}: {facts:,} auxiliary particles")
