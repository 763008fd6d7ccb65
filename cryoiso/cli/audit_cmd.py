"""``cryoiso audit``: controls of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cryoiso.cli.common import echo
from cryoiso.cli.options import JobOptions, keys, with_keys
from cryoiso.cli.run_cmd import Trust

AUDIT = keys(
    "audit", "Controls", ("controls", "--control"), "particles", "regions", "region_share", "other_reference",
    "background", open=True,
)  # fmt: skip


@with_keys(AUDIT)
def audit(
    job_options: JobOptions,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json instead of lines.")] = False,
) -> None:
    """Test a finished run for model bias, overfitting and leaks between the half-sets.

    The first control compares the run's own maps with its reference where the refinement never had it. Each of the
    others repeats the run's workflow on a random subset of its particles with one thing changed (noise instead of
    images, parts of the reference left out or added, another reference, another seed). Each gives a number, an
    interval, a verdict (pass, fail, inconclusive) and a sentence. Results are written to RUN/audit/audit.json and
    RUN/audit/audit.html; nothing else in RUN is changed. After an interruption, the same command continues.

    Exit status: 0 no control fails, 1 at least one fails.
    """
    import json

    from cryoiso.cli.common import leave_with
    from cryoiso.core.errors import EXIT_OTHER
    from cryoiso.parallel.context import get_context

    comm = get_context()
    comm.install_signal_handlers()
    from cryoiso.pipeline.audit.command import audit_run
    from cryoiso.report.audit_page import write_page

    record = audit_run(folder, comm, job_options.sections.get("audit", {}), job_options.names, trust)
    if comm.rank == 0:
        page = write_page(folder)
        echo(json.dumps(record, indent=1, ensure_ascii=False) if as_json else "\n".join(_lines(record)))
        if not as_json:
            echo(f"figures and all numbers: {page}")
    if record["verdict"] == "fail":
        leave_with(comm, EXIT_OTHER)


def _lines(record: dict[str, Any]) -> list[str]:
    head = f"{record['verdict']}: {record['particles']:,} of {record['of']:,} particles, workflow {record['workflow']}"
    return [
        head,
        *(f"{control['verdict']:15s} {control['title']}: {control['sentence']}" for control in record["controls"]),
    ]
