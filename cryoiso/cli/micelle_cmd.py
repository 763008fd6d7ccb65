"""``cryoiso micelle``: the density around a protein, and the reference that holds both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import COMPUTING, GRID, IMAGES, SYMMETRY, OutputFolder, Overwrite, Posed, Resume
from cryoiso.cli.options import JobOptions, keys, with_keys
from cryoiso.core import products

MICELLE = keys("micelle", "Micelle", "threshold", "lowpass_A")
PANEL = MICELLE.panel


@with_keys(SYMMETRY, GRID, MICELLE, IMAGES, COMPUTING)
def micelle(
    particles: Posed,
    ref: Annotated[
        Path, typer.Option("--ref", help="Homologue of the protein, map or model, in the frame of the poses.")
    ],
    out: OutputFolder,
    job_options: JobOptions,
    mask: Annotated[
        Path | None, typer.Option(help="Protein mask (MRC) instead of a threshold.", rich_help_panel=PANEL)
    ] = None,
    diameter: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="Diameter of the sphere around the micelle (default: the box).  [Å]", rich_help_panel=PANEL
        ),
    ] = None,
    prior_sd: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Prior standard deviation of the micelle relative to the protein's rms; 0: no prior.",
            rich_help_panel=PANEL,
        ),
    ] = 1.0,
    max_iterations: Annotated[
        int, typer.Option(min=1, help="Largest number of iterations.", rich_help_panel=PANEL)
    ] = 50,
    tolerance: Annotated[
        float, typer.Option(min=1e-7, max=0.5, help="Relative residual at convergence.", rich_help_panel=PANEL)
    ] = 1e-3,
    go_on: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Reconstruct the micelle around a membrane protein.

    Writes for each half-set the density outside the protein (micelle_half1.mrc, micelle_half2.mrc) and the homologue
    with it, their mean composite.mrc as reference of the next refinement, mask.mrc and micelle.json. Particles without
    half-sets are assigned to them by --seed. Ranks share the particles.
    """
    from cryoiso.methods.micelle.recover import MicelleSettings
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.output import refuse_result
    from cryoiso.pipeline.stages.micelle import MaskChoice, micelle_files

    comm = get_context()
    on_root(comm, refuse_result, out, (products.facts("micelle"),), overwrite or go_on)
    job = on_root(
        comm, job_options.job, particles={"file": str(particles)}, reference={"file": str(ref)},
        sample={"diameter_A": diameter},
    )  # fmt: skip
    settings = MicelleSettings(
        job.sample.symmetry, job.micelle.lowpass_A, diameter, prior_sd, max_iterations, tolerance
    )  # fmt: skip
    facts = micelle_files(job, MaskChoice(job.micelle.threshold, mask), settings, out, comm, resume=go_on)
    if comm.rank == 0:
        same = facts["agreement_of_halves"]
        echo(f"{out / products.COMPOSITE}: threshold {facts['threshold']}, half-sets' micelles correlate by {same}")
