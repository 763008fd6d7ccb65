"""The controls of a finished run, on request."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cryoiso.core.config import Job, parse_job
from cryoiso.core.errors import InputError, UsageError
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.audit.perform import audit
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.jobfile import read_resolved, with_absolute_paths
from cryoiso.pipeline.preflight import require_auditable
from cryoiso.pipeline.records import versions
from cryoiso.pipeline.records.hashing import Outputs, verify_outputs
from cryoiso.pipeline.records.journal import read_journal
from cryoiso.pipeline.records.lock import locked
from cryoiso.pipeline.records.manifest import check_manifest, given_shards, manifest_record
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.records.trust import require_recorded_job, require_trust
from cryoiso.pipeline.run import prepare_device
from cryoiso.pipeline.stages.input_hashes import require_unchanged
from cryoiso.pipeline.stages.table import stages_of
from cryoiso.pipeline.workflow import folder_stages

logger = logging.getLogger("cryoiso")


def audit_run(
    folder: Path, comm: Context, settings: Mapping[str, Any], names: Mapping[str, str], trust: bool = False
) -> dict[str, Any]:
    """Runs the controls of a finished run into its folder ``audit``; changes nothing else. Collective.

    Started again, it goes on with what is there.

    Args:
        settings: of [audit], in place of those of the run's job.
        names: audit.KEY -> name of the option that set it, for messages.
        trust: start the programs that the run names, though somebody else did it.

    Returns:
        audit.json.

    Raises:
        UsageError: no finished run, a bad setting, another engine, or a run that wants to be trusted.
        InputError: a file of the run, or an input, has changed.
    """
    place = RunFolder(Path(os.path.abspath(folder)))
    job = on_root(comm, _job, place, settings, names, trust)
    run = RunContext(job, RunFolder(place.path, folder_stages(job)), comm)
    recorded = on_root(comm, _recorded, run)
    prepare_device(run)
    comm.install_signal_handlers()
    with ExitStack() as stack:
        on_root(comm, lambda: _lock(run, stack))
        if wrong := verify_outputs(run.folder.path, recorded, comm):
            raise InputError(
                f"{wrong} since the run; its controls would be those of other files", file=run.folder.path,
                hint="'cryoiso verify' lists all that differs, 'cryoiso resume' makes it again.",
                code="run-inputs-changed",
            )  # fmt: skip
        require_unchanged(comm, on_root(comm, lambda: given_shards(manifest_record(run.folder.manifest))))
        return audit(run, Inputs(job, run.folder, comm))


def _lock(run: RunContext, stack: ExitStack) -> None:
    stack.enter_context(locked(run.folder.lock))


def _job(place: RunFolder, settings: Mapping[str, Any], names: Mapping[str, str], trust: bool) -> Job:
    """The run's job with the settings of the controls."""
    _, job = read_resolved(place)
    manifest = manifest_record(place.manifest)
    check_manifest(manifest, place.manifest)
    if manifest:
        versions.require_schema(manifest, place.manifest)
    require_recorded_job(place, job)
    require_trust(place, job, trust)
    values = {**job.audit.model_dump(), **settings}
    needed = {"particles": {"file": "-"}, "reference": {"file": "-"}}
    job.audit = parse_job({**needed, "audit": values}, options=names).audit
    job = with_absolute_paths(job, Path.cwd())
    require_auditable(job)
    return job


def _recorded(run: RunContext) -> Outputs:
    """What the stages that the controls start from have left, by the journal."""
    ends = {line.get("stage"): line["outputs"] for line in read_journal(run.folder.journal) if line["event"] == "end"}
    outputs: Outputs = {}
    for stage in stages_of(run.job, run.folder):
        if stage.name in ("audit", "report"):
            break
        if stage.name not in ends:
            raise UsageError(
                f"{run.folder.path}: the stage '{stage.name}' is not finished. Continue it with 'cryoiso resume'.",
                code="stage-unfinished",
            )
        outputs.update(ends[stage.name])
    return outputs
