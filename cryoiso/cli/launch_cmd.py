"""``cryoiso launch``: a batch script for a job, printed, written or submitted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo, run_folder_of
from cryoiso.cli.options import JobOptions, keys, keys_of, with_keys
from cryoiso.core.config import Job

logger = logging.getLogger("cryoiso")
RESOURCES = keys(
    "launch", "Resources", "nodes", "gpus", "gpu_type", "ranks_per_node", "cpus_per_rank", "ram_gb", "time", open=True
)  # fmt: skip
BATCH_JOB = keys(
    "launch", "Batch job", "scheduler", "name", "account", ("queue", "--queue", "--partition"), "grace_s", "requeue",
    "expedite", "extra", "template", open=True,
)  # fmt: skip
ENVIRONMENT = keys(
    "launch", "Environment", ("modules", "--module"), "setup", "program", "image", "image_command", "mpi", "mpirun",
    open=True,
)  # fmt: skip
CPU_JOB = keys(
    "launch", "First job of a chain", "cpu_queue", "cpu_ranks", "cpu_time", "cpu_ram_gb", "cpu_extra", open=True
)  # fmt: skip
Run = Annotated[Path | None, typer.Option("--run", help="Run folder (default: beside JOB, as JOB-run).")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the script into this file.")]
Chain = Annotated[
    bool,
    typer.Option("--chain", help="Two jobs: first the stages without a GPU (ingest, reference), then the rest."),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Value of a placeholder of the site's script. May be repeated."),
]


@with_keys(RESOURCES, BATCH_JOB, ENVIRONMENT, CPU_JOB)
def launch(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file; 'cryoiso init' writes one.")],
    job_options: JobOptions,
    run: Run = None,
    out: Out = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit the script (JOB-launch.sh) and print the job ID.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing script.")] = False,
    chain: Chain = False,
    variables: Setting = None,
) -> None:
    """Write a batch script for a job, and submit it.

    Prints the script unless --out or --submit is given. Options override the section [launch] of the job file; the
    defaults below hold for keys that it does not set. The job stops with a checkpoint before its wall time limit and is
    requeued until the run is complete.
    """
    from cryoiso.pipeline.batch.launch import read_launch
    from cryoiso.pipeline.planning.node_memory import fit_to_nodes

    folder = run or run_folder_of(job)
    settings = dict(job_options.sections.get("launch", {}))
    for path in ("image", "template"):
        if settings.get(path) and "://" not in settings[path]:
            settings[path] = str(Path(settings[path]).expanduser().absolute())
    if variables:
        settings["variables"] = keys_of(variables, "--set")
    script = out if out is not None else job.with_name(f"{job.stem}-launch.sh")
    known = fit_to_nodes(read_launch(job, settings, job_options.names), chain=chain)
    _launch(known, job, folder, script, chain, out is not None, submit, overwrite)


def _launch(
    known: Job, job: Path, run: Path, script: Path, chain: bool, write: bool, submit: bool, overwrite: bool
) -> None:
    from cryoiso.pipeline.batch.launch import scripts_of, write_scripts
    from cryoiso.pipeline.batch.submit import in_words, submit_command
    from cryoiso.pipeline.batch.submit import submit as send

    scheduler = known.launch.scheduler
    if submit:
        submit_command(scheduler, script)
    scripts = scripts_of(known, job, run, script, chain)
    for number, text in enumerate(scripts, start=1):
        logger.info("script %d of %d: %s; ranks by %s", number, len(scripts), text.what, text.start)
    if write or submit:
        write_scripts(scripts, overwrite or not write)
    if submit:
        echo("\n".join(send(scheduler, [text.path for text in scripts])))
    elif write:
        for number, text in enumerate(scripts):
            after = "NUMBER-OF-THE-FIRST" if number else ""
            echo(f"{text.path} written: {text.what}. Next: {in_words(scheduler, text.path, after)}")
    else:
        echo("\n\n".join(text.text for text in scripts), nl=False)
