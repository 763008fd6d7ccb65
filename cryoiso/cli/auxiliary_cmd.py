"""``cryoiso auxiliary train`` and ``cryoiso auxiliary generate``: generators of particle images, and what they make."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import default, job_of, option
from cryoiso.core.config import AuxiliarySection as A
from cryoiso.core.config import ParticlesSection as P
from cryoiso.core.config import ReferenceSection as R
from cryoiso.core.config import RunSection as U
from cryoiso.core.config import SampleSection as S


def train(
    particles: Annotated[Path, typer.Argument(help="Particles with poses: a STAR or .cs file of a refinement.")],
    ref: Annotated[Path, typer.Option("--ref", help="Reference in the frame of the poses: atomic model or map.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    symmetry: Annotated[str, option(S, "symmetry")] = default(S, "symmetry"),
    preset: Annotated[str, option(A, "preset")] = default(A, "preset"),
    generators: Annotated[str, option(A, "generators")] = default(A, "generators"),
    steps: Annotated[int | None, option(A, "steps")] = None,
    batch: Annotated[int | None, option(A, "batch")] = None,
    learning_rate: Annotated[float | None, option(A, "learning_rate")] = None,
    likelihood_sd: Annotated[float | None, option(A, "likelihood_sd")] = None,
    kl_anneal_fraction: Annotated[float, option(A, "kl_anneal_fraction")] = default(A, "kl_anneal_fraction"),
    condition_lowpass: Annotated[float, option(A, "condition_lowpass_A")] = default(A, "condition_lowpass_A"),
    ref_pixel_size: Annotated[float | None, option(R, "pixel_size_A")] = None,
    resample: Annotated[bool, option(R, "resample", "--resample")] = default(R, "resample"),
    project: Annotated[str, option(P, "project")] = "",
    passthrough: Annotated[list[str] | None, option(P, "passthrough")] = None,
    invert: Annotated[str, option(P, "invert")] = default(P, "invert"),
    seed: Annotated[int, option(U, "seed")] = default(U, "seed"),
    device: Annotated[str, option(U, "device")] = default(U, "device"),
    go_on: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training in --out.")] = False,
) -> None:
    """Train the conditional hierarchical VAE on particles with poses.

    Writes generator1.npz and generator2.npz (one for each half-set) or generator.npz (shared), train.json with the
    training curves, and the shards of the images. Two ranks or more train both half-sets side by side.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.auxiliary import train_files

    comm = get_context()
    job = on_root(
        comm, job_of,
        particles={"file": str(particles), "project": project, "passthrough": passthrough, "invert": invert},
        reference={"file": str(ref), "pixel_size_A": ref_pixel_size, "resample": resample},
        sample={"symmetry": symmetry},
        auxiliary={
            "preset": preset, "generators": generators, "steps": steps, "batch": batch, "learning_rate": learning_rate,
            "likelihood_sd": likelihood_sd, "kl_anneal_fraction": kl_anneal_fraction,
            "condition_lowpass_A": condition_lowpass,
        },
        run={"seed": seed, "device": device},
    )  # fmt: skip
    train_files(job, out, comm, resume=go_on)
    if comm.rank == 0:
        echo("\n".join(str(path) for path in sorted(out.glob("generator*.npz"))))


def generate(
    generators: Annotated[Path, typer.Argument(help="Folder that 'auxiliary train' wrote.")],
    particles: Annotated[Path, typer.Argument(help="The data: CTFs, half-sets and shifts are drawn from it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write shards into.")],
    count: Annotated[int | None, typer.Option(min=2, help="How many (default: --ratio).")] = None,
    ratio: Annotated[float, option(A, "ratio")] = default(A, "ratio"),
    temperature: Annotated[float, option(A, "temperature")] = default(A, "temperature"),
    noise_group: Annotated[str, option(A, "noise_group")] = default(A, "noise_group"),
    symmetry: Annotated[str, option(S, "symmetry")] = default(S, "symmetry"),
    export: Annotated[bool, typer.Option("--export", help="Also write MRCS stacks and auxiliary.star.")] = False,
    project: Annotated[str, option(P, "project")] = "",
    passthrough: Annotated[list[str] | None, option(P, "passthrough")] = None,
    invert: Annotated[str, option(P, "invert")] = default(P, "invert"),
    seed: Annotated[int, option(U, "seed")] = default(U, "seed"),
    device: Annotated[str, option(U, "device")] = default(U, "device"),
) -> None:
    """Make auxiliary particles with even views.

    Every image follows from --seed and its uid alone, whatever the number of ranks. Poses are uniform over the
    asymmetric unit; half-set 1 is made by half-set 1's generator.
    """
    from cryoiso.core.config import AuxiliarySection, ParticlesSection
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.auxiliary import generate_files

    comm = get_context()
    job = on_root(
        comm, job_of,
        particles={"file": str(particles), "project": project, "passthrough": passthrough, "invert": invert},
        reference={"file": ""},
        sample={"symmetry": symmetry},
        auxiliary={"ratio": ratio, "temperature": temperature, "noise_group": noise_group, "export": export},
        run={"seed": seed, "device": device},
    )  # fmt: skip
    section: ParticlesSection = job.particles
    settings: AuxiliarySection = job.auxiliary
    made = generate_files(
        generators, section, out, comm, count=count, settings=settings, symmetry=symmetry, seed=seed, device=device
    )
    if comm.rank == 0:
        echo(f"{out}: {made:,} auxiliary particles")
