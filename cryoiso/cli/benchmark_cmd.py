"""``cryoiso benchmark``: how fast this machine is, at the box of one's particles."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo


class Workflow(StrEnum):
    """The workflows of a job."""

    REFINE = "refine"
    AUXILIARY = "auxiliary"
    REALIGN = "realign"
    BOTH = "both"


def benchmark(
    box: Annotated[int, typer.Option(min=16, help="Box of the particles.  [pixels]")] = 128,
    pixel_size: Annotated[float, typer.Option(min=0.1, help="Pixel size.  [Å]")] = 2.0,
    workflow: Annotated[Workflow, typer.Option(help="Workflow whose loops are timed.")] = Workflow.REFINE,
    miniature: Annotated[
        int,
        typer.Option(min=0, help="Particles of a small run, which times whole stages; 0: only the inner loops."),
    ] = 100,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each inner loop.  [s]")] = 1.0,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write the rates to, for 'cryoiso plan --rates'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Measure this machine, or its GPU.

    First compares the results of its kernels with those of the CPU (on a CPU: of plain torch), then times the inner
    loops at this box, beside the memory traffic and the matrix products that the machine is capable of, then runs a
    miniature of the workflow. What it writes serves as --rates of 'cryoiso plan'.
    """
    from cryoiso.io.atomic import write_json
    from cryoiso.parallel.context import Context
    from cryoiso.pipeline.planning import benchmark as bench
    from cryoiso.pipeline.planning.ceilings import ceilings
    from cryoiso.pipeline.planning.same_results import comparisons

    device = Context().device()
    problem = bench.problem(box, pixel_size, workflow.value, device)
    same = comparisons(device)
    bench.require_same(same, device)
    best = ceilings(device, min(seconds, 0.5))
    kernels = bench.kernel_times(problem, device, best, seconds)
    small = bench.miniature(problem, miniature, _simulated, _run) if miniature else None
    record = bench.record(problem, device, best, kernels, same, small)
    if out is not None:
        write_json(out, record)
    echo(json.dumps(record, indent=2) if as_json else "\n".join(bench.as_lines(record)))


def _simulated(folder: Path, count: int, box_px: int, pixel_size_A: float) -> None:
    from cryoiso.physics.phantom import phantom_of_box
    from cryoiso.physics.simulation import simulate
    from cryoiso.pipeline.commands.simulate import Writing, check_folder, write_plain

    check_folder(folder, False)
    density = phantom_of_box(box_px, pixel_size_A, 3.0)
    write_plain(simulate(density, count, shift_sd_A=4.0), folder, {}, Writing())


def _run(job: Path, folder: Path) -> None:
    from cryoiso.parallel.context import Context
    from cryoiso.pipeline.run import run_job
    from cryoiso.report import publish

    run_job(job, folder, Context(), publish)
