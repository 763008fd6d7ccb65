"""``cryoiso realign``: a refinement whose references are made isotropic between its iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.groups import (
    NETWORK,
    REFINEMENT,
    CommandKeys,
    CryosparcKeys,
    OutputFolder,
    Overwrite,
    ParticlesOrShards,
    Reference,
    RefineKeys,
    RelionKeys,
    Resume,
)  # fmt: skip
from cryoiso.cli.options import JobOptions, keys, keys_of, with_keys
from cryoiso.core import products

CORRECTION = keys(
    "realign", "Correction of the references", "mode", "source", "start_step_deg", "start_resolution_A",
    "keep_lowres_A", "whitening", "whitening_from_A", "fsc_weighting", "correct", "retrain", "epochs",
    ("lowpass", "--lowpass-references/--no-lowpass-references"), "match_scale",
)  # fmt: skip
AUXILIARY = keys("auxiliary", "Auxiliary particles", ("weight", "--auxiliary-weight"))


@with_keys(*REFINEMENT, CORRECTION, NETWORK, AUXILIARY)
def realign(
    particles: ParticlesOrShards,
    ref: Reference,
    out: OutputFolder,
    job_options: JobOptions,
    auxiliary: Annotated[
        Path | None,
        typer.Option(
            help="Shards of auxiliary particles (from 'cryoiso auxiliary generate') to co-refine.",
            rich_help_panel=AUXILIARY.panel,
        ),
    ] = None,
    refine_keys: RefineKeys = None,
    relion: RelionKeys = None,
    command: CommandKeys = None,
    cryosparc: CryosparcKeys = None,
    go_on: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Refine poses with gold-standard half-sets and isotropic references.

    As 'cryoiso refine', but after each iteration a network corrects the anisotropy of the references for the next one.
    Writes particles.star, half1.mrc, half2.mrc (reconstructed from the images alone) and refine.json into --out, the
    networks into correction/. Ranks share particles and training.
    """
    from cryoiso.parallel.abort import on_root
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.commands.output import refuse_result
    from cryoiso.pipeline.commands.realign import realign_files

    comm = get_context()
    on_root(comm, refuse_result, out, (products.facts("refine"),), overwrite or go_on)
    job = on_root(
        comm, job_options.job, particles={"file": str(particles)}, reference={"file": str(ref)},
        refine=keys_of(refine_keys, "--refine"), relion=keys_of(relion, "--relion"),
        command=keys_of(command, "--command"), cryosparc=keys_of(cryosparc, "--cryosparc"),
        run={"workflow": "realign"},
    )  # fmt: skip
    realign_files(job, out, comm, auxiliary=auxiliary, resume=go_on)
    if comm.rank == 0:
        echo("\n".join(str(out / name) for name in (products.PARTICLES, *products.HALF_MAPS)))
