"""Runs a job and resumes it.

A stage is done when the journal says that it ended with the same key and its files are there with the hashes noted
then. The key of a stage is a hash over the job and the results of all stages before it; so whatever is changed or lost
is made again, with everything that depends on it, and nothing else is.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cryoiso.core.config import Job, job_to_toml, parse_job
from cryoiso.core.errors import CryoisoError, Interrupted, UsageError
from cryoiso.core.log import duration
from cryoiso.core.progress import board
from cryoiso.io.atomic import write_text
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline import manifest as provenance
from cryoiso.pipeline.examine import check_machine
from cryoiso.pipeline.forecast import watching
from cryoiso.pipeline.hashing import digest_of, hash_outputs, verify_outputs
from cryoiso.pipeline.journal import Journal
from cryoiso.pipeline.layout import RunFolder
from cryoiso.pipeline.lock import locked
from cryoiso.pipeline.plan import Stage, folder_stages, stages_of
from cryoiso.pipeline.preflight import check_job, check_space, stacks_of, with_absolute_paths
from cryoiso.pipeline.stages import STOPPED
from cryoiso.pipeline.timing import note_timing, save_timing
from cryoiso.pipeline.work import Work

logger = logging.getLogger("cryoiso")
Report = Callable[[Path], object]


def run_job(job_file: Path, folder: Path, comm: Context, report: Report | None = None) -> RunFolder:
    """Runs a job file into a new run folder. Collective.

    Args:
        job_file: TOML; relative paths in it start from its folder.
        folder: made if it is not there; must not hold a run.
        comm: the ranks.
        report: called on rank 0 with the run folder when all else is done.

    Returns:
        the finished run folder.

    Raises:
        UsageError: bad job file, or the folder holds a run.
        InputError: bad input; found before anything is written, but for images that are bad in themselves.
        Interrupted: a signal asked to stop; ``resume_run`` goes on.
    """
    run = RunFolder(folder.absolute())
    on_root(comm, _refuse_old_run, run)
    text, job = on_root(comm, read_job, job_file)
    run = RunFolder(run.path, folder_stages(job))
    work = Work(job, run, comm, report=report)
    _prepare_device(work)
    on_root(comm, _preflight, work)
    check_machine(work)
    with ExitStack() as stack:
        manifest = on_root(comm, _create, work, text, stack)
        _start(work, manifest, "run")
        _work_through(work)
    return run


def resume_run(folder: Path, comm: Context, report: Report | None = None) -> RunFolder:
    """Goes on with an interrupted run; on a finished one it checks the files and makes again what is lost. Collective.

    Raises:
        UsageError: no run in this folder, or another process works on it.
        InputError: an input has changed since the run started.
        Interrupted: as ``run_job``.
    """
    run = RunFolder(folder.absolute())
    _, job = on_root(comm, _read_resolved, run)
    run = RunFolder(run.path, folder_stages(job))
    work = Work(job, run, comm, report=report)
    _prepare_device(work)
    with ExitStack() as stack:
        manifest = on_root(comm, _reopen, work, stack)
        _start(work, manifest, "resume")
        _work_through(work)
    return run


def read_job(path: Path) -> tuple[str, Job]:
    """The text of a job file and the job in it, with absolute paths.

    Raises:
        UsageError: not there, not TOML, an unknown key, a wrong value.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such job file. 'cryoiso init particles.star' writes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the job file cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from None
    return text, with_absolute_paths(parse_job(data, path), path.absolute().parent)


# --- starting


def _refuse_old_run(run: RunFolder) -> None:
    if run.holds_a_run():
        raise UsageError(
            f"{run.path} holds a run already. Continue it with 'cryoiso resume {run.path}', or give another --out."
        )


def _read_resolved(run: RunFolder) -> tuple[str, Job]:
    if not run.resolved.exists() or not run.manifest.exists():
        raise UsageError(f"{run.path} holds no run that could be resumed. Start one with 'cryoiso run job.toml'.")
    return read_job(run.resolved)


def _prepare_device(work: Work) -> None:
    work.comm.device_preference = work.job.run.device
    error = None
    try:
        work.comm.device()
    except CryoisoError as caught:
        error = caught
    agree(work.comm, error)


def _preflight(work: Work) -> None:
    logger.info("checking the inputs of %s", work.job.run.title or work.folder.path.name)
    check_job(work)
    check_space(work)
    particles, (box, pixel) = work.particles(), work.grid()
    logger.info("%d particles of %d px, %.4g Å a pixel, symmetry %s", len(particles), box, pixel,
                work.job.sample.symmetry)  # fmt: skip


def _create(work: Work, text: str, stack: ExitStack) -> dict[str, Any]:
    run = work.folder
    run.path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(run.lock))
    _refuse_old_run(run)
    manifest = provenance.new_manifest(work.job, stacks_of(work))
    write_text(run.job, text)
    work.journal = Journal(run.journal)
    write_text(run.manifest, json.dumps(manifest))
    write_text(run.resolved, job_to_toml(work.job))
    return manifest


def _reopen(work: Work, stack: ExitStack) -> dict[str, Any]:
    run = work.folder
    stack.enter_context(locked(run.lock))
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    provenance.check_inputs(manifest, work.job)
    work.journal = Journal(run.journal)
    return manifest


def _start(work: Work, manifest: dict[str, Any], event: str) -> None:
    """Opens the logs, installs the signal handlers, notes who works. Collective."""
    comm, run = work.comm, work.folder
    comm.install_signal_handlers()
    machine = provenance.describe_machine(comm, comm.device())
    on_root(comm, run.logs.mkdir, exist_ok=True)
    _log_to_file(run, comm.rank)
    on_root(comm, provenance.note_start, run, manifest, machine)
    if work.journal is not None:
        work.journal.append(event, ranks=comm.size, hosts={host: len(ranks) for host, ranks in comm.nodes.items()})
    logger.info("run folder %s, %d rank(s), %s", run.path, comm.size, comm.device())


def _log_to_file(run: RunFolder, rank: int) -> None:
    """All ranks log everything, each to its own file; stays open until the process ends."""
    for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(run.logs / f"rank-{rank:04d}.log", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(logging.DEBUG)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)


# --- working


def _work_through(work: Work) -> None:
    began = time.monotonic()
    try:
        with watching(work):
            _all_stages(work)
    except BaseException as error:
        if work.journal is not None:
            event = "stop" if isinstance(error, Interrupted) else "error"
            work.journal.append(event, message=str(error) or type(error).__name__)
        raise
    finally:
        save_timing(work)
    if work.journal is not None:
        work.journal.append("done", seconds=round(time.monotonic() - began, 3))
        logger.info("done in %s: result in %s", duration(time.monotonic() - began), work.folder.result)


def _all_stages(work: Work) -> None:
    comm = work.comm
    stages = stages_of(work.job, work.folder)
    key = _job_key(work.job)
    for number, stage in enumerate(stages, start=1):
        recorded, work.resume = on_root(comm, _what_is_there, work, stage, key)
        outputs = recorded
        if recorded is not None and (wrong := verify_outputs(work.folder.path, recorded, comm)):
            if comm.rank == 0:
                logger.warning("%s: %s; the stage is done again", stage.name, wrong)
            outputs, work.resume = None, False
        if outputs is None:
            if comm.stop_requested():
                raise Interrupted(STOPPED)
            if comm.rank == 0:
                logger.info("stage %d of %d: %s%s", number, len(stages), stage.name, ", continued" * work.resume)
            outputs = _do(work, stage, key)
        elif comm.rank == 0:
            logger.info("stage %d of %d: %s is done already", number, len(stages), stage.name)
        key = digest_of(key, stage.name, json.dumps(outputs, sort_keys=True))


def _job_key(job: Job) -> str:
    """What decides the result: not the title, not the device."""
    facts = job.model_dump()
    facts["run"] = {k: v for k, v in facts["run"].items() if k not in ("title", "device", "stop_before_end_s")}
    return digest_of(json.dumps(facts, sort_keys=True))


def _what_is_there(work: Work, stage: Stage, key: str) -> tuple[dict[str, Any] | None, bool]:
    """The recorded outputs if the stage ended with this key, and whether an interrupted attempt may be continued."""
    journal = work.journal
    if journal is None:
        return None, False
    end, start = journal.last("end", stage.name), journal.last("start", stage.name)
    if end is not None and end["key"] == key:
        return end["outputs"], False
    return None, stage.continues and start is not None and start["key"] == key


def _do(work: Work, stage: Stage, key: str) -> dict[str, Any]:
    """Runs one stage from its start or its continuation to its line in the journal. Collective."""
    began = time.monotonic()
    on_root(work.comm, _open_stage, work, stage, key)
    board.begin(stage.name)
    cpu = time.process_time()
    stage.do(work)
    work.comm.barrier()
    board.end()
    outputs = hash_outputs(work.folder.path, stage.places, work.comm)
    seconds = round(time.monotonic() - began, 3)
    if work.journal is not None:
        work.journal.append("end", stage=stage.name, key=key, seconds=seconds, outputs=outputs)
        logger.info("%s took %s", stage.name, duration(seconds))
        note_timing(work, stage.name, seconds, time.process_time() - cpu)
    return outputs


def _open_stage(work: Work, stage: Stage, key: str) -> None:
    """Makes the stage's folder, empty or, if the stage goes on, rid of unfinished files."""
    if work.folder.has(stage.name):
        folder = work.folder.stage(stage.name)
        if not work.resume and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        for part in folder.rglob("*.part"):
            part.unlink()
    if work.journal is not None:
        work.journal.append("start", stage=stage.name, key=key, resumed=work.resume)
