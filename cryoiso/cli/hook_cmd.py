"""``cryoiso hook relion``: RELION's external-reconstruct program, by hand or for ranks that wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.options import option
from cryoiso.core.config import RelionSection as R


def relion(
    star: Annotated[Path, typer.Argument(metavar="STAR", help="RELION's ..._external_reconstruct.star.")],
    job: Annotated[
        Path | None,
        typer.Option(
            envvar="CRYOISO_HOOK_JOB",
            help="Job file whose [realign] and [correct] say how to correct the references (default: do not correct).",
        ),
    ] = None,
    desk: Annotated[
        Path | None, typer.Option(help="File that says where the ranks of a run wait; they do the work.")
    ] = None,
    tau2: Annotated[str | None, option(R, "tau2")] = None,
    wait: Annotated[float, typer.Option(help="Longest wait for the other half, in minutes.", min=0.1)] = 720.0,
) -> None:
    """Do the reconstruction that 'relion_refine --external_reconstruct' asks for.

    RELION calls it, once for each half in every iteration, if RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE is set to
    'cryoiso hook relion'. With a job file ([realign], [correct]) the references are corrected as 'cryoiso realign'
    does; both halves' processes meet for that in RELION's folder.
    """
    if desk is not None:
        from cryoiso.engines.relion.callback import hand_over

        hand_over(desk, str(star))
        return
    from cryoiso.pipeline.commands.relion_hook import correct_for_relion

    correct_for_relion(star, job, tau2=tau2, limit_s=60.0 * wait)
