"""``cryoiso doctor``: what this machine has of what the program can use, and of what a job needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cryoiso.cli.common import echo

if TYPE_CHECKING:
    from cryoiso.pipeline.finding import Finding


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder for runs, to be checked.")] = Path("."),
    job: Annotated[
        Path | None,
        typer.Option("--job", metavar="JOB.toml", help="Also check that the machine meets the needs of this job."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Check the machine and the installation.

    Reports versions, MPI library and launcher, GPUs, threads, memory and RELION; type, free space, speed and clock of
    the folder's file system; and the job's scratch on each node; with a remedy for every problem. Under mpirun or srun
    all ranks are checked, and whether they communicate and share the folder.

    Exit status: 0 unless there is an error; 69 missing program, device or memory; 65 bad input or folder; 2 bad job
    file; 1 not enough disk space.
    """
    from cryoiso.parallel.context import get_context
    from cryoiso.pipeline import finding
    from cryoiso.pipeline.site.doctor import examine

    comm = get_context()
    facts, findings = examine(comm, folder, job)
    if comm.rank == 0:
        if as_json:
            echo(json.dumps({"findings": finding.as_dicts(findings), **facts}, indent=2))
        else:
            echo("\n".join(_lines(findings)))
    comm.barrier()
    if code := finding.exit_code(findings):
        raise SystemExit(code)


def _lines(findings: list[Finding]) -> list[str]:
    """One line a finding; what is not fine is marked, with its remedy below."""
    mark = {"fine": "", "note": "note: ", "warning": "WARNING: ", "error": "ERROR: "}
    lines, last = [], ""
    for finding in findings:
        label = "" if finding.check == last else finding.check
        lines.append(
            f"{label:<13}{mark[finding.severity]}{finding.found}{f' [{finding.code}]' if finding.code else ''}"
        )
        if finding.remedy:
            lines.append(f"{'':<13}{'-> ' + finding.remedy}")
        last = finding.check
    count = {level: sum(f.severity == level for f in findings) for level in ("error", "warning", "note")}
    words = [f"{n} {level}{'s' * (n > 1)}" for level, n in count.items() if n]
    return [*lines, "", ", ".join(words) if words else "all fine"]
