"""``cryoiso verify``: hash a run's files again."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cryoiso.cli.common import echo


class InputCheck(StrEnum):
    """What to do about the inputs."""

    check = "check"
    skip = "skip"


def verify(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder; it may have been moved or copied.")],
    inputs: Annotated[
        InputCheck, typer.Option("--inputs", help="check: also hash the inputs that still exist; skip: outputs only.")
    ] = InputCheck.check,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Verify a run folder against its recorded checksums.

    Hashes all inputs and outputs again and compares them with the manifest, the journal and the seal, and result/ with
    its SHA256SUMS. Reports what differs, where and since when. Nothing in the folder is changed. Ranks share the
    reading.

    Exit status: 0 unchanged, 65 a difference or an unfinished run.
    """
    import json

    from cryoiso.cli.common import leave_with
    from cryoiso.core.errors import EXIT_INPUT
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline.reproduce.verify import verify_run

    comm = get_context()
    verdict = verify_run(folder, comm, inputs=inputs == InputCheck.check)
    if comm.rank == 0:
        echo(json.dumps(verdict.as_dict(), indent=1) if as_json else "\n".join(_lines(verdict)))
    if not verdict.good:
        leave_with(comm, EXIT_INPUT)


def _lines(verdict: Any) -> list[str]:
    checked = verdict.checked
    lines = [
        f"{verdict.folder}: {checked['outputs']} files of the run and {checked['inputs']} inputs hashed, "
        f"{checked['bytes'] / 2**30:.3g} GiB"
    ]
    lines += [f"made by {verdict.made_by}"] if verdict.made_by else []
    lines += [f"DIFFERENT  {difference}" for difference in verdict.differences]
    lines += [f"note       {note}" for note in verdict.notes]
    if verdict.state == "unfinished":
        lines.append(f"UNFINISHED {verdict.unfinished}")
    if verdict.differences:
        lines.append(f"{len(verdict.differences)} difference(s)")
    elif verdict.good:
        lines.append(f"all as the run left it; seal {verdict.digest}")
    return lines
