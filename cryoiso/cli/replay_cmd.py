"""``cryoiso replay``: one stage of a run once more, and whether it makes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.run_cmd import Trust


def replay(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Stage of the run, e.g. reconstruct.")],
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that has finished this stage.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="New folder for the output of the stage (default: RUN-replay-STAGE).")
    ] = None,
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Repeat one stage of a run and compare the results.

    The stage starts from the recorded files of the stages before it (checked, linked and never changed) with the run's
    job and seed, and writes into another folder. Files are compared by hash; files that differ also by relative
    difference and FSC (maps) or number of different poses (STAR files). The verdict is also written to replay.json. Any
    number of ranks may be used.

    Exit status: 0 identical, 1 different.
    """
    import json
    import os

    from cryoiso.cli.common import leave_with
    from cryoiso.core.errors import EXIT_OTHER
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.reproduce.replay import replay_stage
    from cryoiso.report import publish

    comm = get_context()
    run = Path(os.path.abspath(folder))
    result = replay_stage(stage, folder, out or run.parent / f"{run.name}-replay-{stage}", comm, publish, trust)
    if comm.rank == 0:
        made_by = [f"made by {result.made_by}"] if result.made_by else []
        lines = [
            result.verdict,
            *made_by,
            *(f"DIFFERENT  {difference.file}: {difference.words}" for difference in result.different),
        ]
        echo(json.dumps(result.as_dict(), indent=1) if as_json else "\n".join(lines))
    if not result.identical:
        leave_with(comm, EXIT_OTHER)
