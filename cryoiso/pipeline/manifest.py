"""Where a run's numbers come from: inputs with their hashes, seed, and every start with versions, ranks and devices."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryoiso import __version__
from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.io.atomic import write_text
from cryoiso.parallel.context import Context
from cryoiso.pipeline.hashing import digest_of, sha256_of
from cryoiso.pipeline.layout import RunFolder

PACKAGES = ("torch", "numpy", "scipy", "numba", "h5py", "mrcfile", "starfile", "pandas", "gemmi", "mpi4py")
HASH_LIMIT = 2 << 30
"""Stacks up to this size together are hashed; of more only the sizes are noted (the shards have hashes)."""
LIST_LIMIT = 20
"""More stacks than this are not listed one by one."""


def input_files(job: Job) -> list[Path]:
    """The small files a job names, in the order of the job file."""
    names = (
        job.particles.file, job.reference.file, job.reference.fit, job.sample.mask, job.truth.particles, job.truth.map,
    )  # fmt: skip
    return [Path(name) for name in names if name]


def new_manifest(job: Job, stacks: list[Path]) -> dict[str, Any]:
    """What is known when a run begins.

    Args:
        job: with absolute paths.
        stacks: the image stacks that the particles lie in.
    """
    sizes = {str(path): path.stat().st_size for path in stacks}
    few = len(stacks) <= LIST_LIMIT and sum(sizes.values()) <= HASH_LIMIT
    return {
        "cryoiso": __version__,
        "seed": job.run.seed,
        "title": job.run.title,
        "inputs": {str(path): _facts(path) for path in [*input_files(job), *(stacks if few else [])]},
        "stacks": {
            "number": len(sizes),
            "bytes": sum(sizes.values()),
            "sha256_of_names_and_sizes": digest_of(json.dumps(sizes, sort_keys=True)),
        },
        "starts": [],
    }


def note_start(folder: RunFolder, manifest: dict[str, Any], machine: dict[str, Any]) -> None:
    """Adds this start (command, versions, machine) and writes the manifest."""
    manifest["starts"].append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": _versions(),
            **machine,
        }
    )
    write_text(folder.manifest, json.dumps(manifest, indent=2) + "\n")


def describe_machine(comm: Context, device: str) -> dict[str, Any]:
    """Number of ranks, each one's host and device, threads a rank and MPI library. Collective."""
    return {
        "ranks": comm.size,
        "machine": comm.allgather({"host": comm.hostname, "device": device}),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        "mpi": comm.library(),
    }


def check_inputs(manifest: dict[str, Any], job: Job) -> None:
    """Stops if an input is not what it was when the run started.

    Raises:
        InputError: names the file.
    """
    for path in input_files(job):
        facts = manifest["inputs"].get(str(path))
        if facts is None:
            continue
        if not path.is_file():
            raise InputError("an input of this run is gone", file=path, hint="Put it back, or start a new run.")
        if sha256_of(path) != facts["sha256"]:
            raise InputError(
                "an input of this run has changed since it started", file=path, expected=f"sha256 {facts['sha256']}",
                hint="Put the old file back, or start a new run.",
            )  # fmt: skip


def check_stacks(manifest: dict[str, Any], stacks: list[Path], job: Job) -> None:
    """Stops if the image stacks are not what they were when the run started; for a run that still has to read them.

    Raises:
        InputError: names the stack, or, where there are many, says that one has another size.
    """
    hint = "Put the old file back, or start a new run."
    try:
        sizes = {str(path): path.stat().st_size for path in stacks}
    except OSError as error:
        raise InputError("a stack of this run is gone", file=error.filename, hint=hint) from None
    if digest_of(json.dumps(sizes, sort_keys=True)) != manifest["stacks"]["sha256_of_names_and_sizes"]:
        raise InputError(
            "one of the image stacks of this run has another size than when it started", file=job.particles.file,
            hint=hint,
        )  # fmt: skip
    for path in stacks:
        facts = manifest["inputs"].get(str(path))
        if facts is not None and sha256_of(path) != facts["sha256"]:
            raise InputError("a stack of this run has changed since it started", file=path, hint=hint)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"the manifest is damaged: {error}", file=path, hint="Start a new run.") from None


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found
