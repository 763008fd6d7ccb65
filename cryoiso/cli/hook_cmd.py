"""``cryoiso hook relion``: RELION's external-reconstruct program, by hand or for ranks that wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.options import option


def relion(
    star: Annotated[Path, typer.Argument(metavar="STAR", help="RELION's ..._external_reconstruct.star.")],
    job: Annotated[
        Path | None,
        typer.Option(
            envvar="CRYOISO_HOOK_JOB",
            help="Job file with the sections [realign] and [correct] of the correction (default: no correction).",
        ),
    ] = None,
    desk: Annotated[
        Path | None, typer.Option(help="File with the address of the waiting ranks of a run, which do the work.")
    ] = None,
    tau2: Annotated[str | None, option("relion", "tau2", default="the job file's, else relion")] = None,
    wait: Annotated[float, typer.Option(help="Longest wait for the other half-set, in minutes.", min=0.1)] = 720.0,
) -> None:
    """Run the reconstruction requested by 'relion_refine --external_reconstruct'.

    RELION calls it once per half-set and iteration if RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE is 'cryoiso hook relion'.
    With a job file ([realign], [correct]) the references are corrected as in 'cryoiso realign'; the processes of both
    half-sets then exchange files in RELION's folder.
    """
    if desk is not None:
        from cryoiso.engines.relion.callback import hand_over

        hand_over(desk, str(star))
        return
    from cryoiso.pipeline.commands.relion_hook import correct_for_relion

    correct_for_relion(star, job, tau2=tau2, limit_s=60.0 * wait)
