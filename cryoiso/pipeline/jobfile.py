"""The job file: read, checked against the schema, its relative paths made absolute."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from cryoiso.core.config import Job, parse_job
from cryoiso.core.errors import InputError, UsageError
from cryoiso.io.regular_file import read_regular_text
from cryoiso.pipeline.records.run_folder import RunFolder

PATHS = (
    ("particles", "file"),
    ("particles", "project"),
    ("reference", "file"),
    ("reference", "fit"),
    ("sample", "mask"),
    ("truth", "particles"),
    ("truth", "map"),
    ("diagnose", "model"),
    ("diagnose", "compare_model"),
    ("audit", "other_reference"),
    ("audit", "background"),
)

AUTO = "auto"
"""Symmetry of a job that asks for a proposal."""


def read_job(path: Path) -> tuple[str, Job]:
    """The text of a job file and the job in it, with absolute paths.

    Raises:
        UsageError: not there, not TOML, an unknown key, a wrong value.
    """
    try:
        text = read_regular_text(path).removeprefix("\ufeff")  # a mark that Windows editors put first
        data = tomllib.loads(text)
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such job file. 'cryoiso init particles.star' writes one.", code="file-not-found"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the job file cannot be read: {error}", code="file-unreadable") from None
    except InputError as error:
        raise UsageError(str(error), code=error.code) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}", code="toml-malformed") from None
    job = without_auto(parse_job(data, path), path)
    for name, value in (("particles.file", job.particles.file), ("reference.file", job.reference.file)):
        if not value.strip():
            raise UsageError(f"{path}: '{name}' is empty", code="job-key-missing")
    return text, with_absolute_paths(job, path.absolute().parent)


def without_auto(job: Job, path: Path) -> Job:
    """The job with the symmetry C1 and a proposal at the end in place of "auto".

    Raises:
        UsageError: a workflow in which more follows from the symmetry than one refinement.
    """
    if job.sample.symmetry.strip().lower() != AUTO:
        return job
    if job.run.workflow != "refine":
        raise UsageError(
            f"{path}: sample.symmetry = 'auto' refines in C1 and proposes a point group; that is for the workflow "
            f"'refine' (found '{job.run.workflow}'). Name the group here once it is known, or C1.",
            code="options-conflict",
        )
    copy = job.model_copy(deep=True)
    copy.sample.symmetry, copy.run.propose_symmetry = "C1", True
    return copy


def read_resolved(run: RunFolder) -> tuple[str, Job]:
    """Text and job of a run folder.

    Raises:
        UsageError: there is no run in it.
    """
    require_run(run)
    return read_job(run.resolved)


def require_run(run: RunFolder) -> None:
    """Stops unless there is a run that has begun.

    Raises:
        UsageError: no run, or one whose records are gone.
    """
    gone = [path.name for path in (run.resolved, run.manifest) if not path.exists()]
    if gone and run.holds_a_run():
        raise UsageError(
            f"{run.path}: {' and '.join(gone)} of this run {'is' if len(gone) == 1 else 'are'} missing. Put "
            f"{'it' if len(gone) == 1 else 'them'} back from a copy, or start a new run in another folder",
            code="run-missing",
        )
    if not run.resolved.exists() or not run.manifest.exists():
        raise UsageError(f"{run.path} holds no run. Start one with 'cryoiso run job.toml'.", code="run-missing")


def with_absolute_paths(job: Job, folder: Path) -> Job:
    """A copy of the job whose relative paths start from ``folder`` (that of the job file) and are absolute."""
    copy = job.model_copy(deep=True)
    for section, key in PATHS:
        value = getattr(getattr(copy, section), key)
        if value:
            setattr(getattr(copy, section), key, _absolute(value, folder))
    copy.particles.passthrough = [_absolute(name, folder) for name in copy.particles.passthrough]
    return copy


def _absolute(name: str, folder: Path) -> str:
    return os.path.abspath(folder / Path(name).expanduser())
