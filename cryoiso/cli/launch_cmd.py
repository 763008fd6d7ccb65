"""``cryoiso launch``: a batch script for a job, printed, written or submitted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import keys_of, option
from cryoiso.core.config import LaunchSection as L

logger = logging.getLogger("cryoiso")
Run = Annotated[Path | None, typer.Option("--run", help="Run folder (default: beside JOB, as JOB-run).")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the script into this file.")]
Chain = Annotated[
    bool,
    typer.Option("--chain", help="Two jobs: the stages that need no GPU (ingest, reference); after it the rest."),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A placeholder of your site's script. May be given several times."),
]


def launch(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file; 'cryoiso init' writes one.")],
    run: Run = None,
    out: Out = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit it and print the job's number (script: JOB-launch.sh).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing script.")] = False,
    chain: Chain = False,
    scheduler: Annotated[str | None, option(L, "scheduler", "--scheduler")] = None,
    name: Annotated[str | None, option(L, "name", "--name")] = None,
    nodes: Annotated[int | None, option(L, "nodes", "--nodes")] = None,
    gpus: Annotated[int | None, option(L, "gpus", "--gpus")] = None,
    gpu_type: Annotated[str | None, option(L, "gpu_type", "--gpu-type")] = None,
    ranks_per_node: Annotated[int | None, option(L, "ranks_per_node", "--ranks-per-node")] = None,
    cpus_per_rank: Annotated[int | None, option(L, "cpus_per_rank", "--cpus-per-rank")] = None,
    ram_gb: Annotated[float | None, option(L, "ram_gb", "--ram-gb")] = None,
    time: Annotated[str | None, option(L, "time", "--time")] = None,
    grace_s: Annotated[int | None, option(L, "grace_s", "--grace-s")] = None,
    requeue: Annotated[bool | None, option(L, "requeue", "--requeue/--no-requeue")] = None,
    account: Annotated[str | None, option(L, "account", "--account")] = None,
    queue: Annotated[str | None, option(L, "queue", "--queue", "--partition")] = None,
    modules: Annotated[list[str] | None, option(L, "modules", "--module")] = None,
    setup: Annotated[list[str] | None, option(L, "setup", "--setup")] = None,
    program: Annotated[str | None, option(L, "program", "--program")] = None,
    image: Annotated[str | None, option(L, "image", "--image")] = None,
    image_command: Annotated[str | None, option(L, "image_command", "--image-command")] = None,
    mpi: Annotated[str | None, option(L, "mpi", "--mpi")] = None,
    mpirun: Annotated[str | None, option(L, "mpirun", "--mpirun")] = None,
    extra: Annotated[list[str] | None, option(L, "extra", "--extra")] = None,
    template: Annotated[str | None, option(L, "template", "--template")] = None,
    variables: Setting = None,
    cpu_queue: Annotated[str | None, option(L, "cpu_queue", "--cpu-queue")] = None,
    cpu_ranks: Annotated[int | None, option(L, "cpu_ranks", "--cpu-ranks")] = None,
    cpu_time: Annotated[str | None, option(L, "cpu_time", "--cpu-time")] = None,
    cpu_ram_gb: Annotated[float | None, option(L, "cpu_ram_gb", "--cpu-ram-gb")] = None,
    cpu_extra: Annotated[list[str] | None, option(L, "cpu_extra", "--cpu-extra")] = None,
) -> None:
    """Write a batch script for a job, and submit it.

    Prints the script unless --out or --submit is given. Its settings are the job file's section [launch]; options go
    before them. The job stops with a checkpoint before its wall-time is over, and is queued again until the run is
    done.
    """
    given = {key: value for key, value in locals().items() if key in L.model_fields and value is not None}
    for path in ("image", "template"):
        if given.get(path) and "://" not in given[path]:
            given[path] = str(Path(given[path]).expanduser().absolute())
    if variables:
        given["variables"] = keys_of(variables, "--set")
    script = out if out is not None else job.with_name(f"{job.stem}-launch.sh")
    _launch(job, run or job.with_name(f"{job.stem}-run"), script, given, chain, out is not None, submit, overwrite)


def _launch(
    job: Path, run: Path, script: Path, given: dict[str, Any], chain: bool, write: bool, submit: bool, overwrite: bool
) -> None:
    from cryoiso.pipeline.batch.launch import read_launch, scripts_of, write_scripts
    from cryoiso.pipeline.batch.submit import in_words, submit_command
    from cryoiso.pipeline.batch.submit import submit as send

    known = read_launch(job, given)
    scheduler = known.launch.scheduler
    if submit:
        submit_command(scheduler, script)
    scripts = scripts_of(known, job, run, script, chain)
    for number, made in enumerate(scripts, start=1):
        logger.info("script %d of %d: %s; ranks by %s", number, len(scripts), made.what, made.start)
    if write or submit:
        write_scripts(scripts, overwrite or not write)
    if submit:
        echo("\n".join(send(scheduler, [made.path for made in scripts])))
    elif write:
        for number, made in enumerate(scripts):
            after = "NUMBER-OF-THE-FIRST" if number else ""
            echo(f"{made.path} written: {made.what}. Next: {in_words(scheduler, made.path, after)}")
    else:
        echo("\n\n".join(made.text for made in scripts), nl=False)
