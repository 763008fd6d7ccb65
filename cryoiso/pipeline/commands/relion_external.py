"""The command ``relion-external``: a step of cryoiso as an External job of RELION's GUI."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.core.errors import CryoisoError, InputError, Interrupted, MissingError, UsageError
from cryoiso.engines.process import Program, clean_environment, describe_status
from cryoiso.engines.relion import external_job
from cryoiso.engines.relion.external_job import DENSITY, HALF_MAP, MASK, PARTICLES, OutputNode

RUN_FOLDER = "run"
"""Folder of a whole run inside the job's, which RELION has filled already."""
GRACE_S = 60.0
"""A stopped step writes its checkpoint within this time."""


@dataclass(frozen=True)
class ExternalJob:
    """What RELION's GUI gives an External job."""

    folder: Path
    particles: Path | None = None
    reference: Path | None = None
    mask: Path | None = None
    half_maps: tuple[Path, Path] | None = None
    """Named by parameters; otherwise they are found from the reference or the particles."""
    job_file: Path | None = None
    threads: int = 1
    ranks: int = 1
    options: tuple[str, ...] = ()
    """Further options of the step, as they were given."""


@dataclass(frozen=True)
class Step:
    """A command of cryoiso that can be an External job."""

    arguments: Callable[[ExternalJob], list[str]]
    outputs: tuple[OutputNode, ...]
    parallel: bool
    """Whether ranks share the work."""


def run_external_job(step: str, job: ExternalJob, *, poll_s: float = 1.0) -> None:
    """Runs a step in the folder of an External job; RELION learns of its end, whatever happens.

    Raises:
        CryoisoError: the step failed, with its exit status.
        Interrupted: aborted in the GUI, or stopped by a signal.
    """
    external_job.begin(job.folder)
    try:
        with _signals_raise():
            command = _command(step, job)
            _run(command, job, poll_s)
            external_job.write_output_nodes(job.folder, STEPS[step].outputs)
    except Interrupted:
        external_job.finish(job.folder, external_job.ABORTED)
        raise
    except BaseException:
        external_job.finish(job.folder, external_job.FAILURE)
        raise
    external_job.finish(job.folder, external_job.SUCCESS)


def _run(command: Sequence[str], job: ExternalJob, poll_s: float) -> None:
    """Starts the step, which writes to the job's run.out, and waits for its end."""
    threads = {"OMP_NUM_THREADS": str(job.threads), "NUMBA_NUM_THREADS": str(job.threads)}
    environment = clean_environment(threads, keep_allocation=job.ranks > 1)
    program = Program(command, job.folder / external_job.RUN_OUT, folder=Path.cwd(), environment=environment)
    said = ""
    try:
        while (status := program.status()) is None:
            if external_job.abort_wanted(job.folder):
                raise Interrupted("aborted in RELION's GUI; what is finished is kept")
            time.sleep(poll_s)
            said = (said + program.output())[-4000:]
    finally:
        program.stop(GRACE_S)
    said = (said + program.output()).strip()
    if status:
        last = said.splitlines()[-1].removeprefix("error: ") if said else "it wrote nothing"
        error = CryoisoError(f"the step {describe_status(status)}: {last}", code="external-step-failed")
        error.exit_code = status if status > 0 else error.exit_code
        raise error


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGUSR1, with which batch systems announce the end of a job, interrupt it."""

    def stop(*_: object) -> None:
        raise Interrupted("stopped by a signal; what is finished is kept")

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command(step: str, job: ExternalJob) -> list[str]:
    """The command line of a step."""
    if step not in STEPS:
        raise UsageError(f"{step!r} is not a step. Choose one of: {', '.join(STEPS)}", code="choice-unknown")
    if job.ranks > 1 and not STEPS[step].parallel:
        raise UsageError(f"{step} runs on one rank: leave out --ranks", code="options-conflict")
    arguments = STEPS[step].arguments(job)  # first, since it checks them
    program = [sys.executable, "-m", "cryoiso.cli.main"]
    return [*_launcher(job.ranks), *program, *arguments, *(word for word in job.options if word)]


def _launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return []
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise MissingError("--ranks needs an mpirun on the PATH", code="program-missing")
    return [mpirun, "-n", str(ranks)]


def _diagnose(job: ExternalJob) -> list[str]:
    half1, half2 = half_maps_of(job)
    poses = [] if job.particles is None else ["--particles", str(job.particles)]
    facts = job.folder / products.facts("diagnose")
    return ["diagnose", str(half1), str(half2), "--out", str(facts), *poses, *_mask(job)]


def _correct(job: ExternalJob) -> list[str]:
    half1, half2 = half_maps_of(job)
    return ["correct", str(half1), str(half2), "--out", str(job.folder), *_mask(job), "--resume"]


def _rebalance(job: ExternalJob) -> list[str]:
    # a job that RELION continues begins anew in its own folder
    return ["rebalance", str(_needed(job.particles, "Input particles")), "--out", str(job.folder), "--overwrite"]


def _refine(job: ExternalJob) -> list[str]:
    particles = _needed(job.particles, "Input particles")
    reference = _needed(job.reference, "Input 3D reference")
    files = [str(particles), "--ref", str(reference), "--out", str(job.folder)]
    return ["refine", *files, *_mask(job), "--resume"]


def _whole_run(job: ExternalJob) -> list[str]:
    from cryoiso.pipeline.jobfile import read_job

    if job.job_file is None:
        raise UsageError("run needs a job file: give it as the parameter job", code="option-missing")
    named = read_job(job.job_file)[1]
    pairs = (
        ("Input particles", job.particles, named.particles.file),
        ("Input 3D reference", job.reference, named.reference.file),
        ("Input 3D mask", job.mask, named.sample.mask),
    )
    for entry, provided, wanted in pairs:  # RELION draws its flow chart from these entries: they must not lie
        if provided is not None and (wanted is None or provided.resolve() != Path(wanted).resolve()):
            raise UsageError(
                f"{entry} is {provided}, but the job file {job.job_file} names {wanted}. Name the same file in both, "
                f"or "
                "leave the entry empty.",
                code="options-conflict",
            )
    return ["run", str(job.job_file), "--out", str(job.folder / RUN_FOLDER), "--continue"]


def _mask(job: ExternalJob) -> list[str]:
    return [] if job.mask is None else ["--mask", str(job.mask)]


def _needed(file: Path | None, entry: str) -> Path:
    if file is None:
        raise UsageError(f"fill in '{entry}' on the Input tab", code="option-missing")
    return file


def half_maps_of(job: ExternalJob) -> tuple[Path, Path]:
    """The two half-maps of an External job.

    They are those that are named by parameters; else the reference, if its name says that it is a half-map, and its
    counterpart; else the half-maps of the job that wrote the reference or the particles.

    Raises:
        UsageError: nothing leads to half-maps.
        InputError: they are not there.
    """
    if job.half_maps is not None:
        return job.half_maps
    for file in filter(None, (job.reference, job.particles)):
        for candidate in _candidates(file):
            two = candidate.with_name(_other_half(candidate.name))
            if candidate.exists() and two.exists():
                return candidate, two
    if job.reference is None and job.particles is None:
        raise UsageError(
            "choose a half-map as 'Input 3D reference' on the Input tab, or give the parameters half1 and half2",
            code="option-missing",
        )
    raise InputError(
        "no half-maps belong to it", file=job.reference or job.particles, code="file-not-found",
        expected="a half-map, or half-maps in the same folder",
        hint="Choose run_half1_class001_unfil.mrc or the like as 'Input 3D reference', or give half1 and half2.",
    )  # fmt: skip


def _candidates(file: Path) -> list[Path]:
    """Where half-map 1 may be: RELION's and cryoiso's names."""
    if "half1" in file.name or "half2" in file.name:
        return [file.with_name(file.name.replace("half2", "half1"))]
    stem = file.name.removesuffix(".mrc").removesuffix("_data.star").removesuffix("_class001")
    names = (f"{stem}_half1_class001_unfil.mrc", products.half_map(1))
    return [file.with_name(name) for name in names]


def _other_half(name: str) -> str:
    before, _, after = name.rpartition("half1")
    return f"{before}half2{after}"


_IN_RUN = f"{RUN_FOLDER}/result/"
STEPS = {
    "diagnose": Step(_diagnose, (), parallel=False),
    "correct": Step(
        _correct, (OutputNode(products.CORRECTED_MAP, DENSITY), OutputNode(products.MASK, MASK)), parallel=True
    ),
    "rebalance": Step(
        _rebalance,
        (OutputNode("particles_kept.star", PARTICLES), OutputNode("particles_discarded.star", PARTICLES)),
        parallel=False,
    ),
    "refine": Step(
        _refine,
        (OutputNode(products.PARTICLES, PARTICLES), *(OutputNode(name, HALF_MAP) for name in products.HALF_MAPS)),
        parallel=True,
    ),
    "run": Step(
        _whole_run,
        (
            OutputNode(_IN_RUN + products.PARTICLES, PARTICLES),
            *(OutputNode(_IN_RUN + name, HALF_MAP) for name in products.HALF_MAPS),
            OutputNode(_IN_RUN + products.MAP, DENSITY),
            OutputNode(_IN_RUN + products.RESULT_CORRECTED_MAP, DENSITY),
            OutputNode(_IN_RUN + products.MASK, MASK),
        ),
        parallel=True,
    ),
}
"""What can be an External job, and the files that other jobs of the project can then use."""
