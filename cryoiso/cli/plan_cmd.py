"""``cryoiso plan``: what a job will take, before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo


def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Number of nodes.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs per node; 0: a run on CPUs.")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option("--ranks-per-node", min=1, help="MPI ranks per node (default: one per GPU, else one).")
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(
            "--rates", metavar="RUN", help="Use the rates of an earlier run on such a machine, given by its folder."
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Use rates measured on this machine now (some seconds).")
    ] = False,
    cpu: Annotated[
        bool,
        typer.Option("--cpu", help="With --rates: use CPU time instead of wall time, if that run shared its cores."),
    ] = False,
    time: Annotated[
        str,
        typer.Option(
            "--time", metavar="[D-]HH:MM[:SS]", help="Wall time limit of a batch job, to estimate the number of jobs."
        ),
    ] = "",
    iterations: Annotated[int | None, typer.Option("--iterations", min=1, help="Assumed number of iterations.")] = None,
    resolution: Annotated[
        float | None, typer.Option("--resolution", min=0.1, help="Assumed final resolution.  [Å]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate run time, memory, disk space and number of files of a job.

    Reads the job's inputs (headers, a sample of images) and writes no files. Times follow from built-in rates, from
    rates measured on this machine (--measure) or, best, from those of an earlier run of a similar job (--rates).
    """
    from dataclasses import replace

    from cryoiso.core.errors import UsageError
    from cryoiso.parallel.context import Context
    from cryoiso.pipeline.batch.launch import seconds_of
    from cryoiso.pipeline.job_inputs import Inputs
    from cryoiso.pipeline.jobfile import read_job
    from cryoiso.pipeline.planning import rates as rated
    from cryoiso.pipeline.planning.job_size import problem_of
    from cryoiso.pipeline.planning.plan import Layout, as_dict, as_lines, make_plan
    from cryoiso.pipeline.planning.ranks_that_fit import chooses_ranks, division_of
    from cryoiso.pipeline.records.run_folder import RunFolder
    from cryoiso.pipeline.workflow import folder_stages

    if rates is not None and measure:
        raise UsageError("--rates and --measure exclude each other", code="options-conflict")
    _, job_read = read_job(job)
    problem = problem_of(Inputs(job_read, RunFolder(Path.cwd(), folder_stages(job_read)), Context()))
    layout = Layout(nodes, gpus, ranks_per_node or max(gpus, 1))
    device = layout.device
    if rates is not None:
        known = rated.of_run(rates, cpu=cpu)
    elif measure:
        known = rated.measure(problem, Context().device(device))
    else:
        known = rated.built_in(device)
    assumed = known.assumed
    if iterations:
        assumed = replace(assumed, iterations=iterations)
    if resolution:
        assumed = replace(assumed, nyquist_share=min(1.0, 2 * problem.pixel_size_A / resolution))
    time_s = float(seconds_of(time, "--time")) if time else None
    plan_made = make_plan(problem, layout, known, assumed, time_s)
    division = None
    if not gpus and ranks_per_node is None and chooses_ranks(job_read):
        division = division_of(problem, job_read.launch.model_copy(update={"nodes": nodes}))
    if as_json:
        facts = {**as_dict(plan_made), "launch": None if division is None else division.as_dict()}
        echo(json.dumps(facts, indent=2))
    else:
        words = [] if division is None else [f"cryoiso launch starts {division.in_words()}"]
        echo("\n".join([*as_lines(plan_made), *words]))
