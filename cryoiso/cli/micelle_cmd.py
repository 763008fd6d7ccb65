"""``cryoiso micelle``: the density around a protein, and the reference that holds both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import default, job_of, option
from cryoiso.core import products
from cryoiso.core.config import ParticlesSection as P
from cryoiso.core.config import ReferenceSection as R
from cryoiso.core.config import RunSection as U
from cryoiso.core.config import SampleSection as S


def micelle(
    particles: Annotated[Path, typer.Argument(help="Particles with poses: a STAR or .cs file of a refinement.")],
    ref: Annotated[Path, typer.Option("--ref", help="Homologue of the protein, in the poses' frame: map or model.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write into.")],
    symmetry: Annotated[str, option(S, "symmetry")] = default(S, "symmetry"),
    threshold: Annotated[
        float | None,
        typer.Option(help="Protein is where the homologue, low-passed at 10 Å, exceeds this (default: found)."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Protein mask (MRC) instead of a threshold.")] = None,
    lowpass: Annotated[
        float, typer.Option(min=0.0, help="Resolution of the micelle in Å; 0: as fine as the images.")
    ] = 20.0,
    diameter: Annotated[
        float | None, typer.Option(min=1.0, help="Diameter in Å of the sphere that holds it (default: the box).")
    ] = None,
    prior_sd: Annotated[
        float,
        typer.Option(min=0.0, help="Prior standard deviation of the micelle over the protein's rms; 0: no prior."),
    ] = 1.0,
    max_iterations: Annotated[int, typer.Option(min=1, help="Upper bound of iterations.")] = 50,
    tolerance: Annotated[float, typer.Option(min=1e-7, max=0.5, help="Relative residual to stop at.")] = 1e-3,
    ref_pixel_size: Annotated[float | None, option(R, "pixel_size_A")] = None,
    resample: Annotated[bool, typer.Option("--resample", help="Bring the map onto the particles' grid.")] = False,
    project: Annotated[str, option(P, "project")] = "",
    passthrough: Annotated[list[str] | None, option(P, "passthrough")] = None,
    invert: Annotated[str, option(P, "invert")] = default(P, "invert"),
    normalise: Annotated[bool, option(P, "normalise")] = default(P, "normalise"),
    seed: Annotated[int, typer.Option(min=0, help="Makes half-sets where the file has none.")] = 1,
    device: Annotated[str, option(U, "device")] = default(U, "device"),
    go_on: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Recover the micelle around a membrane protein.

    Writes for each half-set the density outside the protein (micelle_half1.mrc, micelle_half2.mrc) and the homologue
    with it, their mean composite.mrc as the next refinement's reference, mask.mrc and micelle.json. Ranks share the
    particles.
    """
    from cryoiso.methods.micelle.recover import MicelleSettings
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.stages.micelle import MaskChoice, micelle_files

    comm = get_context()
    job = on_root(
        comm, job_of,
        particles={
            "file": str(particles), "project": project, "passthrough": passthrough, "invert": invert,
            "normalise": normalise,
        },
        reference={"file": str(ref), "pixel_size_A": ref_pixel_size, "resample": resample},
        sample={"symmetry": symmetry, "diameter_A": diameter},
        run={"seed": seed, "device": device},
    )  # fmt: skip
    settings = MicelleSettings(symmetry, lowpass, diameter, prior_sd, max_iterations, tolerance)
    facts = micelle_files(job, MaskChoice(threshold, mask), settings, out, comm, resume=go_on)
    if comm.rank == 0:
        same = facts["agreement_of_halves"]
        echo(f"{out / products.COMPOSITE}: threshold {facts['threshold']}, half-sets' micelles correlate by {same}")
