"""Runs a job and resumes it.

A stage is done when the journal says that it ended with the same key and its files are there with the hashes noted
then. The key of a stage is a hash over the job and the results of all stages before it; so whatever is changed or lost
is made again, with everything that depends on it, and nothing else is.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryoiso import __version__
from cryoiso.core.config import job_to_toml
from cryoiso.core.errors import STOPPED, CryoisoError, Interrupted, UsageError, code_of
from cryoiso.core.log import LineFormatter, PatientFileHandler, duration, quantity
from cryoiso.core.progress import board
from cryoiso.io.atomic import make_folder, write_text
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs, using_scratch
from cryoiso.pipeline.jobfile import read_job, read_resolved, require_run
from cryoiso.pipeline.planning.forecast import watching
from cryoiso.pipeline.planning.timing import note_timing, save_timing
from cryoiso.pipeline.preflight import check_job, check_space, images_of
from cryoiso.pipeline.records import environment, versions
from cryoiso.pipeline.records import manifest as provenance
from cryoiso.pipeline.records.hashing import hash_outputs, next_key, verify_outputs
from cryoiso.pipeline.records.journal import Journal
from cryoiso.pipeline.records.lock import locked
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.records.seal import write_seal
from cryoiso.pipeline.records.trust import programs_of, require_trust, signature
from cryoiso.pipeline.site.doctor import check_machine
from cryoiso.pipeline.site.resume_check import check_what_is_left
from cryoiso.pipeline.stages.input_hashes import check_given_shards, image_hashed_meanwhile
from cryoiso.pipeline.stages.table import Stage, stages_of
from cryoiso.pipeline.workflow import WITHOUT_GPU, folder_stages

logger = logging.getLogger("cryoiso")
Report = Callable[[Path], object]
Audit = Callable[[RunContext, Inputs], object]


def run_job(
    job_file: Path,
    folder: Path,
    comm: Context,
    report: Report | None = None,
    until: str = "",
    go_on: bool = False,
    audit: Audit | None = None,
) -> RunFolder:
    """Runs a job file into a new run folder. Collective.

    Args:
        job_file: TOML; relative paths in it start from its folder.
        folder: made if it is not there; must not hold a run, unless ``go_on``.
        comm: the ranks.
        report: called on rank 0 with the run folder when all else is done.
        until: stop after this stage; ``resume_run`` goes on. Empty: to the end.
        go_on: if the folder holds a run, go on with it, by its own copy of the job file.
        audit: does the controls (``pipeline.audit``), where the job has them.

    Returns:
        the run folder, finished or done up to ``until``.

    Raises:
        UsageError: bad job file, the folder holds a run, or there is no stage ``until``.
        InputError: bad input; found before anything is written, but for images that are bad in themselves.
        Interrupted: a signal asked to stop; ``resume_run`` goes on.
    """
    place = RunFolder(Path(os.path.abspath(folder)))
    if go_on and on_root(comm, _has_begun, place, job_file):
        return resume_run(folder, comm, report, until, job_file=job_file, audit=audit)
    on_root(comm, _refuse_old_run, place)
    text, job = on_root(comm, read_job, job_file)
    run = RunContext(job, RunFolder(place.path, folder_stages(job)), comm, report=report, audit=audit)
    inputs = Inputs(job, run.folder, comm)
    on_root(comm, _check_until, run, until)
    prepare_device(run, until)
    on_root(comm, _preflight, inputs)
    check_machine(inputs)
    comm.install_signal_handlers()  # from the moment that the lock says who is to be told
    with ExitStack() as stack:
        run = _with_records(run, lambda: _create(run, inputs, text, stack))
        stack.enter_context(using_scratch(inputs, run.journal))
        _start(run, "run")
        _work_through(run, inputs, until)
    return run.folder


def resume_run(
    folder: Path,
    comm: Context,
    report: Report | None = None,
    until: str = "",
    trust: bool = False,
    other_version: bool = False,
    job_file: Path | None = None,
    audit: Audit | None = None,
) -> RunFolder:
    """Goes on with an interrupted run; on a finished one it checks the files and makes again what is lost. Collective.

    Args:
        until: as ``run_job``.
        trust: start the programs that the folder names, though somebody else started the run; from then on it is
            this user's own.
        other_version: go on although another version of the program worked on the run last. Stages that are not
            finished begin anew.
        job_file: the user's own; the programs that it names need no ``trust``.
        audit: as ``run_job``.

    Raises:
        UsageError: no run in this folder, another process works on it, there is no stage ``until``, or it is not this
            user's run and wants to be trusted.
        InputError: an input has changed since the run started, records are damaged, or another version wrote them.
        MissingError: no GPU, where the run computed on GPUs; or too little memory for what is left.
        Interrupted: as ``run_job``.
    """
    place = RunFolder(Path(os.path.abspath(folder)))
    on_root(comm, _require_version, place, other_version)
    _, job = on_root(comm, read_resolved, place)
    on_root(comm, lambda: require_trust(place, job, trust, _own_programs(job_file)))
    run = RunContext(job, RunFolder(place.path, folder_stages(job)), comm, report=report, audit=audit)
    inputs = Inputs(job, run.folder, comm)
    on_root(comm, _check_until, run, until)
    prepare_device(run, until)
    comm.install_signal_handlers()  # from the moment that the lock says who is to be told
    with ExitStack() as stack:
        run = _with_records(run, lambda: _reopen(run, inputs, stack))
        check_what_is_left(run, inputs, until)
        stack.enter_context(using_scratch(inputs, run.journal))
        _start(run, "resume")
        _work_through(run, inputs, until)
    return run.folder


# --- starting


def _refuse_old_run(run: RunFolder) -> None:
    if run.holds_a_run():
        raise UsageError(
            f"{run.path} holds a run already. Continue it with 'cryoiso resume {run.path}', or give another --out.",
            code="run-exists",
        )


def _has_begun(run: RunFolder, job_file: Path) -> bool:
    """Whether the folder holds a run that can go on; warns if the job file says something else than the run's own."""
    if not run.resolved.exists() or not run.manifest.exists():
        return False
    try:
        changed = provenance.job_key(read_job(job_file)[1]) != provenance.job_key(read_job(run.resolved)[1])
    except UsageError:
        changed = True
    if changed:
        logger.warning("%s is not the job that %s was started with; the run goes on as it began. For the new job give "
                       "another --out.", job_file, run.path)  # fmt: skip
    return True


def _own_programs(job_file: Path | None) -> dict[str, str]:
    """What a job file that the user gives says about programs; empty where it cannot be read."""
    with suppress(UsageError):
        return {} if job_file is None else programs_of(read_job(job_file)[1])
    return {}


def _check_until(run: RunContext, until: str) -> None:
    names = [stage.name for stage in stages_of(run.job, run.folder)]
    if until and until not in names:
        raise UsageError(f"--until: this job has no stage '{until}' (known: {', '.join(names)})", code="stage-unknown")


def prepare_device(run: RunContext, until: str = "") -> None:
    """Finds each rank's device as the job wants it, where a stage up to ``until`` computes on it. Collective.

    Raises:
        MissingError: there is none of the kind.
    """
    run.comm.device_preference = "cpu" if until in WITHOUT_GPU else run.job.run.device
    error = None
    try:
        run.comm.device()
    except CryoisoError as caught:
        error = caught
    agree(run.comm, error)


def _preflight(inputs: Inputs) -> None:
    logger.info("checking the inputs of '%s'", inputs.job.run.title or inputs.folder.path.name)
    check_job(inputs)
    check_space(inputs)
    particles, (box, pixel) = inputs.particles(), inputs.grid()
    logger.info("%s of %d px, %.4g Å per pixel, symmetry %s", quantity(len(particles), "particle"), box, pixel,
                inputs.job.sample.symmetry)  # fmt: skip


def _with_records(run: RunContext, opened: Callable[[], RunContext]) -> RunContext:
    """The run with the records that ``opened`` opens on rank 0, which alone has any. Collective."""
    on_rank = [run]

    def open_them() -> None:
        on_rank[0] = opened()

    on_root(run.comm, open_them)
    return on_rank[0]


def _create(run: RunContext, inputs: Inputs, text: str, stack: ExitStack) -> RunContext:
    folder, job = run.folder, run.job
    make_folder(folder.path)
    stack.enter_context(locked(folder.lock))
    _refuse_old_run(folder)
    manifest = provenance.new_manifest(job, images_of(inputs))
    manifest["signature"] = signature(job)
    write_text(folder.job, text)
    journal = Journal(folder.journal)
    provenance.write_manifest(folder, manifest)
    write_text(folder.resolved, job_to_toml(job))
    return replace(run, journal=journal, manifest=manifest)


def _require_version(run: RunFolder, other_version: bool) -> None:
    require_run(run)
    manifest = provenance.read_manifest(run.manifest)
    versions.require_version(manifest, run.manifest, other_version)
    for note in versions.notes(manifest):
        logger.warning("this run was %s", note)


def _reopen(run: RunContext, inputs: Inputs, stack: ExitStack) -> RunContext:
    folder, job = run.folder, run.job
    stack.enter_context(locked(folder.lock))
    manifest = provenance.read_manifest(folder.manifest)
    provenance.check_inputs(manifest, job)
    manifest["signature"] = signature(job)
    journal = Journal(folder.journal)
    if journal.last("end", "ingest") is None:
        provenance.check_images(manifest, images_of(inputs), job)
    folder.seal.unlink(missing_ok=True)
    for part in folder.path.glob("[!l]*.part"):  # the folder's own, not the lock's; a stage's go when it is opened
        part.unlink(missing_ok=True)
    return replace(run, journal=journal, manifest=manifest)


def _start(run: RunContext, event: str) -> None:
    """Opens the logs, notes who works. Collective."""
    comm, folder = run.comm, run.folder
    facts = environment.describe(comm, comm.device())
    on_root(comm, folder.logs.mkdir, exist_ok=True)
    _log_to_file(folder, comm.rank)
    comm.watch_other_hosts(folder.logs)
    before = versions.last_version(run.manifest) if run.manifest is not None else __version__
    other = {} if before == __version__ else {"goes_on_from": before}
    on_root(comm, provenance.note_start, folder, run.manifest, run.job, facts | other)
    if run.journal is not None:
        hosts = {host: len(ranks) for host, ranks in comm.nodes.items()}
        run.journal.append(event, cryoiso=__version__, **other, ranks=comm.size, hosts=hosts)
    logger.info("run folder %s, %s, %s", folder.path, quantity(comm.size, "rank"), comm.device())


def _log_to_file(run: RunFolder, rank: int) -> None:
    """All ranks log everything, each to its own file; stays open until the process ends."""
    for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()
    handler = PatientFileHandler(run.logs / f"rank-{rank:04d}.log", delay=True)
    handler.setFormatter(LineFormatter())
    handler.setLevel(logging.DEBUG)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)


# --- working


def _work_through(run: RunContext, inputs: Inputs, until: str) -> None:
    began = time.monotonic()
    try:
        with watching(run, inputs, until), image_hashed_meanwhile(run):
            check_given_shards(run)  # as the outputs of finished stages: read again at every start
            _all_stages(run, inputs, until)
    except BaseException as error:
        if run.journal is not None:
            event = "stop" if isinstance(error, Interrupted) else "error"
            with suppress(CryoisoError):  # on a full disk; what went wrong before is what the user must hear
                run.journal.append(event, message=str(error) or type(error).__name__, code=code_of(error))
        raise
    finally:
        save_timing(run)
    if until:
        if run.journal is not None:
            run.journal.append("until", stage=until)
            logger.info("done up to %s, as asked; 'cryoiso resume %s' goes on", until, run.folder.path)
        return
    if run.journal is not None:
        run.journal.append("done", seconds=round(time.monotonic() - began, 3))
        logger.info("done in %s: result in %s", duration(time.monotonic() - began), run.folder.result)
    on_root(run.comm, _seal, run)


def _seal(run: RunContext) -> None:
    if run.journal is None or run.manifest is None:
        raise ValueError("only rank 0 of a run seals it")
    write_seal(run.folder, run.journal, run.manifest, [s.name for s in stages_of(run.job, run.folder)])


def _all_stages(run: RunContext, inputs: Inputs, until: str) -> None:
    comm = run.comm
    stages = stages_of(run.job, run.folder)
    key = provenance.job_key(run.job)
    for number, stage in enumerate(stages, start=1):
        key = provenance.stage_key(stage.name, key, run.job)
        recorded, resume = on_root(comm, what_is_there, run, stage, key)
        outputs = recorded
        if recorded is not None and (wrong := verify_outputs(run.folder.path, recorded, comm)):
            if comm.rank == 0:
                logger.warning("%s: %s; the stage is done again", stage.name, wrong)
            outputs, resume = None, False
        if outputs is None:
            if comm.stop_requested():
                raise Interrupted(STOPPED)
            if comm.rank == 0:
                logger.info("stage %d of %d: %s%s", number, len(stages), stage.name, ", continued" * resume)
            outputs = do_stage(run, inputs, stage, key, resume=resume)
        elif comm.rank == 0:
            logger.info("stage %d of %d: %s is done already", number, len(stages), stage.name)
        key = next_key(key, stage.name, outputs)
        if stage.name == until:
            return


def what_is_there(run: RunContext, stage: Stage, key: str) -> tuple[dict[str, Any] | None, bool]:
    """The recorded outputs if the stage ended with this key, and whether an interrupted attempt may be continued."""
    journal = run.journal
    if journal is None:
        return None, False
    end, start = journal.last("end", stage.name), journal.last("start", stage.name)
    if end is not None and end["key"] == key:
        return end["outputs"], False
    ours = start is not None and start["key"] == key and start.get("cryoiso", __version__) == __version__
    return None, stage.continues and ours


def do_stage(run: RunContext, inputs: Inputs, stage: Stage, key: str, *, resume: bool) -> dict[str, Any]:
    """Runs one stage from its start or its continuation to its line in the journal. Collective."""
    began = time.monotonic()
    on_root(run.comm, _open_stage, run, stage, key, resume)
    board.begin(run.label + stage.name)
    cpu = time.process_time()
    stage.do(run, inputs, resume=resume)
    run.comm.barrier()
    board.end()
    outputs = hash_outputs(run.folder.path, stage.places, run.comm)
    seconds = round(time.monotonic() - began, 3)
    if run.journal is not None:
        run.journal.append("end", stage=stage.name, key=key, seconds=seconds, outputs=outputs)
        logger.info("%s took %s", run.label + stage.name, duration(seconds))
        note_timing(run, inputs, stage.name, seconds, time.process_time() - cpu, resumed=resume)
    return outputs


def _open_stage(run: RunContext, stage: Stage, key: str, resume: bool) -> None:
    """Makes the stage's folder, empty or, if the stage goes on, rid of unfinished files."""
    if run.folder.has(stage.name):
        folder = run.folder.stage(stage.name)
        if not resume and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        for part in folder.rglob("*.part"):
            part.unlink()
    if run.journal is not None:
        run.journal.append("start", stage=stage.name, key=key, resumed=resume, cryoiso=__version__)
