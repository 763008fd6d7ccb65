"""Whether the machine will do for what is left of an interrupted run: looked at before it goes on."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from cryoiso.core.errors import CryoisoError, MissingError
from cryoiso.io.atomic import disk_full
from cryoiso.parallel.abort import agree, on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.finding import Needs
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.planning.job_size import Stored, disk
from cryoiso.pipeline.planning.memory import needs_of_stages, problem_here
from cryoiso.pipeline.records.hashing import next_key
from cryoiso.pipeline.records.manifest import job_key, stage_key
from cryoiso.pipeline.site.doctor import check_machine
from cryoiso.pipeline.stages.table import stages_of
from cryoiso.pipeline.workflow import RECORDS

logger = logging.getLogger("cryoiso")
ON_CPUS = tuple(kind for kind, record in RECORDS.items() if not record.on_gpu)
"""Stages in which nothing is computed on a GPU."""


def check_what_is_left(run: RunContext, inputs: Inputs, until: str) -> None:
    """Devices, memory and room for the stages that are still to be done; warnings go to the log. Collective.

    Raises:
        MissingError: a rank sees no GPU, and the run computed on GPUs.
        DiskFullError: too little room.
        CryoisoError: the first error of ``check_machine``.
    """
    left = on_root(run.comm, stages_left, run, until)
    if not left:
        return
    if set(left) - set(ON_CPUS):
        _require_gpus_as_before(run)
    needs = on_root(run.comm, needs_left, inputs, run.comm.size, left)
    on_root(run.comm, _require_room, run, needs)  # before anything is tried out on a disk that may be full
    check_machine(inputs, lambda *_: needs)


def stages_left(run: RunContext, until: str = "") -> list[str]:
    """Names of the stages, up to ``until``, that the journal does not have as done with this job (rank 0)."""
    key = job_key(run.job)
    left: list[str] = []
    for stage in stages_of(run.job, run.folder):
        end = run.journal.last("end", stage.name) if run.journal is not None else None
        key = stage_key(stage.name, key, run.job)
        if left or end is None or end["key"] != key:
            left.append(stage.name)
        else:
            key = next_key(key, stage.name, end["outputs"])
        if stage.name == until:
            break
    return left


def needs_left(inputs: Inputs, ranks: int, left: list[str]) -> Needs:
    """What some stages ask of the machine, less what they have written already (rank 0)."""
    try:
        problem = problem_here(inputs)
    except (CryoisoError, OSError):  # an input that not every stage needs; one that does will say what is wrong
        logger.debug("no estimate of what is left", exc_info=True)
        return Needs(inputs.job, 0, 0, 0)
    places = {stage: inputs.folder.stage(stage) for stage in left if inputs.folder.has(stage)}
    if "report" in left:
        places |= {"result": inputs.folder.result, "run folder": inputs.folder.logs}
    sizes = {name: _sizes(place) for name, place in places.items()}
    missing = [_less(entry, sizes[entry.name]) for entry in disk(problem, ranks) if entry.name in places]
    return needs_of_stages(problem, ranks, left, missing)


def _less(entry: Stored, there: list[int]) -> Stored:
    """What is still to be written where files of these sizes are: first what stays, then what is removed again."""
    size, files = sum(there), len(there)
    return replace(
        entry, bytes=max(0, entry.bytes - size), files=max(0, entry.files - files),
        temporary_bytes=max(0, entry.temporary_bytes - max(0, size - entry.bytes)),
        temporary_files=max(0, entry.temporary_files - max(0, files - entry.files)),
    )  # fmt: skip


def _require_room(run: RunContext, needs: Needs) -> None:
    if shutil.disk_usage(run.folder.path).free < needs.disk_bytes:
        raise disk_full(run.folder.journal, needs.disk_bytes)


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


def _require_gpus_as_before(run: RunContext) -> None:
    """A run that went on by CPU would be much slower without warning, and not bit-identical."""
    comm = run.comm
    before = on_root(comm, _gpus_before, run)
    if not before or comm.device_preference == "cpu":
        return
    error = None
    if comm.device() == "cpu":
        error = MissingError(
            f"rank {comm.rank} on {comm.hostname} sees no GPU, and this run computed on GPUs before ({before}). Ask "
            f"the batch system for a GPU per rank; 'cryoiso doctor' tells what this machine lacks. {_by_cpu(run)}",
            code="gpu-missing",
        )
    agree(comm, error)


def _by_cpu(run: RunContext) -> str:
    """How to go on without GPUs: networks are smaller there, unless the job says which it wants."""
    if run.job.run.workflow != "refine":
        return "For a run by CPU, whose networks are smaller, begin a new one."
    return f"To go on by CPU set run.device = 'cpu' in {run.folder.resolved}: slower, and with other last bits."


def _gpus_before(run: RunContext) -> str:
    """The GPUs of the last start that computed on them with every rank; empty if there was none."""
    starts, computed = (run.manifest or {}).get("starts", []), _computed(run)
    for start, gpus_used in zip(reversed(starts), reversed(computed), strict=False):
        ranks = start.get("machine") or []
        if gpus_used and ranks and all(str(rank.get("device", "")).startswith("cuda") for rank in ranks):
            return ", ".join(sorted({str(rank.get("gpu", "of an unknown kind")) for rank in ranks}))
    return ""


def _computed(run: RunContext) -> list[bool]:
    """Of each start in the journal whether it began a stage that GPUs compute."""
    computed: list[bool] = []
    for line in run.journal.lines if run.journal is not None else []:
        if line["event"] in ("run", "resume"):
            computed.append(False)
        elif line["event"] == "start" and computed and line["stage"] not in ON_CPUS:
            computed[-1] = True
    return computed
