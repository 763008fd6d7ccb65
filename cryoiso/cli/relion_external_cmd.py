"""``cryoiso relion-external``: a step as an External job of RELION's GUI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NOT_TAKEN = ("movies", "micrographs", "coordinates")
UNUSED = "Not used by any step; leave the entry empty."
INPUTS, PARAMETERS = "Input tab", "Parameters"


def relion_external(
    context: typer.Context,
    step: Annotated[str, typer.Argument(help="diagnose, correct, rebalance, refine or run.")],
    out: Annotated[Path, typer.Option("--o", help="Folder of the job, given by RELION.")],
    particles: Annotated[
        Path | None, typer.Option("--in_parts", help="Input particles (STAR).", rich_help_panel=INPUTS)
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            "--in_3dref",
            help="Input 3D reference (MRC); for diagnose and correct, one of the half-maps or the map beside them.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    mask: Annotated[Path | None, typer.Option("--in_mask", help="Input 3D mask.", rich_help_panel=INPUTS)] = None,
    movies: Annotated[Path | None, typer.Option("--in_movies", help=UNUSED, rich_help_panel=INPUTS)] = None,
    micrographs: Annotated[Path | None, typer.Option("--in_mics", help=UNUSED, rich_help_panel=INPUTS)] = None,
    coordinates: Annotated[Path | None, typer.Option("--in_coords", help=UNUSED, rich_help_panel=INPUTS)] = None,
    threads: Annotated[int, typer.Option("--j", min=1, help="Threads per rank, given by RELION.")] = 1,
    half1: Annotated[
        Path | None,
        typer.Option(help="First half-map, if it does not follow from the inputs.", rich_help_panel=PARAMETERS),
    ] = None,
    half2: Annotated[Path | None, typer.Option(help="Second half-map.", rich_help_panel=PARAMETERS)] = None,
    job: Annotated[Path | None, typer.Option(help="Job file, for the step run.", rich_help_panel=PARAMETERS)] = None,
    ranks: Annotated[int, typer.Option(min=1, help="MPI ranks.", rich_help_panel=PARAMETERS)] = 1,
    control: Annotated[
        str, typer.Option("--pipeline_control", help="Given by RELION to some programs; same as --o.")
    ] = "",
) -> None:
    """Run a step as an External job of RELION's GUI.

    Enter 'cryoiso relion-external' and, after a space, the step as the external executable. RELION passes files,
    threads and parameters; parameters that are not listed here are passed to 'cryoiso STEP', e.g. the label
    symmetry with the value C3. The step writes into the job's folder; RELION shows its end, and its files as inputs
    of other jobs. Aborting and continuing the job in the GUI works as for RELION's own jobs.
    """
    from cryoiso.core.errors import UsageError
    from cryoiso.engines.relion import external_job
    from cryoiso.pipeline.commands.relion_external import ExternalJob, run_external_job

    unused = [
        name for name, file in zip(NOT_TAKEN, (movies, micrographs, coordinates), strict=True) if file is not None
    ]
    if unused or (half1 is None) != (half2 is None):
        external_job.begin(out)
        external_job.finish(out, external_job.FAILURE)
        if unused:
            raise UsageError(f"no step takes {' or '.join(unused)}: leave the entry empty", code="options-conflict")
        raise UsageError("give both half1 and half2, or neither", code="option-missing")
    halves = (half1, half2) if half1 is not None and half2 is not None else None
    relion_job = ExternalJob(
        out, particles, reference, mask, half_maps=halves, job_file=job, threads=threads, ranks=ranks,
        options=tuple(context.args),
    )  # fmt: skip
    run_external_job(step, relion_job)
