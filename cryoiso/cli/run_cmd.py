"""``cryoiso run`` and ``cryoiso resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo, run_folder_of

Until = Annotated[
    str, typer.Option("--until", metavar="STAGE", help="Stop after this stage; 'cryoiso resume' goes on from there.")
]


Trust = Annotated[
    bool,
    typer.Option("--trust", help="Start the programs that the folder names, although you have not started this run."),
]


def run(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file; 'cryoiso init' writes one.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder, without a run in it (default: beside JOB, as JOB-run).")
    ] = None,
    until: Until = "",
    go_on: Annotated[
        bool,
        typer.Option(
            "--continue", help="If the folder holds a run, go on with it: one command for the first and later starts."
        ),
    ] = False,
) -> None:
    """Run a job from particles to report.

    The stages are ingest, reference, refine, reconstruct, diagnose and report. Under mpirun or srun all ranks work
    together. The run folder holds everything: the result in result/, the report in
    report.html, logs, and what is needed to go on after an interruption with 'cryoiso resume'.

    Exit status: 0 done, 2 usage, 65 bad input, 69 missing program or device, 75 stopped by a signal after a checkpoint
    (SIGTERM, SIGUSR1; resume goes on), 1 anything else.
    """
    from cryoiso.parallel.context import get_context

    comm = get_context()
    comm.install_signal_handlers()  # before the imports, which take seconds: a signal must not kill
    from cryoiso.pipeline.run import run_job
    from cryoiso.report import publish

    folder = out if out is not None else run_folder_of(job)
    done = run_job(job, folder, comm, publish, until, go_on)
    if comm.rank == 0:
        echo(done.path if until else done.report)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of an interrupted run.")],
    until: Until = "",
    trust: Trust = False,
    other_version: Annotated[
        bool,
        typer.Option(
            "--other-version",
            help="Go on although another version of the program made what is finished; stages that are not finished "
            "begin anew.",
        ),
    ] = False,
) -> None:
    """Go on with an interrupted run.

    The result is the same as without the interruption. Stages whose files are all there, unchanged, are not done again.
    Any number of ranks will do. A run that somebody else started, or whose programs were changed since, wants --trust
    before it starts programs: relion.program, launcher and extra, auxiliary.post_command.
    """
    from cryoiso.parallel.context import get_context

    comm = get_context()
    comm.install_signal_handlers()
    from cryoiso.pipeline.run import resume_run
    from cryoiso.report import publish

    done = resume_run(folder, comm, publish, until, trust, other_version)
    if comm.rank == 0:
        echo(done.path if until else done.report)
