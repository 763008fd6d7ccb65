"""``cryoiso report``: (re)build the report of a run folder, or of a single command's, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_folder: Annotated[
        Path,
        typer.Argument(
            help="Folder written by 'cryoiso run', 'cryoiso refine', 'cryoiso realign' or 'cryoiso correct'."
        ),
    ],
    before: Annotated[
        Path | None,
        typer.Option(help="Run folder of the same particles with other settings, shown beside this one as 'before'."),
    ] = None,
) -> None:
    """Write report.html and report.json from the files of a folder."""
    from cryoiso.report import build

    print(build(run_folder, before))
