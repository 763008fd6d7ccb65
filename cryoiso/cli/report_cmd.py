"""``cryoiso report``: (re)build the report of a run folder, or of a single command's, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_folder: Annotated[
        Path, typer.Argument(help="Folder that 'cryoiso run' wrote, or 'cryoiso refine', 'realign' or 'correct'.")
    ],
    before: Annotated[
        Path | None,
        typer.Option(help="Run folder of the same particles with other settings, to show beside this one as 'before'."),
    ] = None,
) -> None:
    """Write report.html and report.json into a folder, from the files that are there."""
    from cryoiso.report import build

    print(build(run_folder, before))
