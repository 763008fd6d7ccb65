"""``cryoiso run`` and ``cryoiso resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo, run_folder_of

Until = Annotated[
    str, typer.Option("--until", metavar="STAGE", help="Stop after this stage; 'cryoiso resume' continues from there.")
]


Trust = Annotated[
    bool,
    typer.Option("--trust", help="Allow programs named in the folder to start although another user started this run."),
]


def run(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file; 'cryoiso init' writes one.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder, empty or new (default: beside JOB, as JOB-run).")
    ] = None,
    until: Until = "",
    go_on: Annotated[
        bool,
        typer.Option(
            "--continue", help="Resume the run if the folder holds one: the same command for first and later starts."
        ),
    ] = False,
) -> None:
    """Run a job from particles to report.

    The stages are ingest, reference, refine, reconstruct, diagnose and report. Under mpirun or srun all ranks work
    together. The run folder holds the result in result/, the report in report.html, logs, and all that
    'cryoiso resume' needs to continue after an interruption.

    Exit status: 0 done, 2 usage, 65 bad input, 69 missing program or device, 75 stopped by a signal after a checkpoint
    (SIGTERM, SIGUSR1; resume goes on), 1 anything else.
    """
    from cryoiso.parallel.context import get_context

    comm = get_context()
    comm.install_signal_handlers()  # before the imports, which take seconds: a signal must not kill
    from cryoiso.pipeline.audit.perform import audit
    from cryoiso.pipeline.run import run_job
    from cryoiso.report import publish

    folder = out if out is not None else run_folder_of(job)
    done = run_job(job, folder, comm, publish, until, go_on, audit)
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
            help="Continue although another version of the program ran the finished stages; unfinished stages start "
            "again.",
        ),
    ] = False,
) -> None:
    """Continue an interrupted run.

    The result is the same as without the interruption. Stages whose files are complete and unchanged are skipped. Any
    number of ranks may be used. A run started by another user, or whose programs have changed since, requires --trust
    before it starts programs: relion.program, launcher and extra, command.run and go_on, auxiliary.post_command.
    """
    from cryoiso.parallel.context import get_context

    comm = get_context()
    comm.install_signal_handlers()
    from cryoiso.pipeline.audit.perform import audit
    from cryoiso.pipeline.run import resume_run
    from cryoiso.report import publish

    done = resume_run(folder, comm, publish, until, trust, other_version, audit=audit)
    if comm.rank == 0:
        echo(done.path if until else done.report)
