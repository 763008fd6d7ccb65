"""Where a run's numbers come from: inputs with their hashes, the job with every default, seed, and every start with
versions, ranks, devices, container and batch job; of a finished run also its stages."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryoiso import __version__
from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.io.atomic import write_text
from cryoiso.pipeline.hashing import digest_of, sha256_of
from cryoiso.pipeline.layout import RunFolder

SCHEMA = 2
HASH_LIMIT = 2 << 30
"""With run.hash_inputs = "small" stacks up to this size together are hashed; of more only the sizes are noted."""
INDEX = "index.json"
NO_RESULT = ("title", "device", "hash_inputs", "scratch", "stop_before_end_s")
"""Keys of [run] that do not decide the result."""


def input_files(job: Job) -> list[Path]:
    """The small files a job names, in the order of the job file."""
    names = (
        job.particles.file, job.reference.file, job.reference.fit, job.sample.mask, job.truth.particles, job.truth.map,
    )  # fmt: skip
    files = [Path(name) for name in names if name]
    return [path / INDEX if path.is_dir() else path for path in files]  # particles may be a folder of shards


def new_manifest(job: Job, stacks: list[Path]) -> dict[str, Any]:
    """What is known when a run begins. The stacks are hashed later, while they are ingested.

    Args:
        job: with absolute paths.
        stacks: the image stacks that the particles lie in.
    """
    sizes = {str(path): path.stat().st_size for path in stacks}
    files = {str(path): {"kind": "file", "bytes": path.stat().st_size, "sha256": sha256_of(path)}
             for path in input_files(job)}  # fmt: skip
    return {
        "schema": SCHEMA,
        "cryoiso": __version__,
        "seed": job.run.seed,
        "title": job.run.title,
        "inputs": {**files, **{path: {"kind": "stack", "bytes": size} for path, size in sizes.items()}},
        "stacks": {
            "number": len(sizes),
            "bytes": sum(sizes.values()),
            "sha256_of_names_and_sizes": digest_of(json.dumps(sizes, sort_keys=True)),
        },
        "starts": [],
    }


def job_key(job: Job) -> str:
    """Digest of what decides the result: the whole job but for its title, its device, how inputs are hashed, where
    images are read, when it stops and how it is sent to a batch system."""
    facts = job.model_dump(exclude={"launch"})
    facts["run"] = {k: v for k, v in facts["run"].items() if k not in NO_RESULT}
    return digest_of(json.dumps(facts, sort_keys=True))


def unhashed(manifest: dict[str, Any], job: Job) -> dict[str, int]:
    """Path -> bytes of the stacks, and of the container image, that are to be hashed while images are ingested."""
    stacks = {p: f["bytes"] for p, f in manifest["inputs"].items() if f.get("kind") == "stack" and "sha256" not in f}
    wanted = job.run.hash_inputs == "all" or manifest["stacks"]["bytes"] <= HASH_LIMIT
    found = stacks if wanted else {}
    image = (manifest["starts"][-1] if manifest["starts"] else {}).get("container") or {}
    if job.run.hash_inputs == "all" and "bytes" in image and "digest" not in image and Path(image["image"]).is_file():
        found = {**found, image["image"]: image["bytes"]}
    return found


def note_hashes(folder: RunFolder, manifest: dict[str, Any], hashes: dict[str, str]) -> None:
    """Puts hashes of inputs, and of the container image, where they belong, and writes the manifest."""
    image = (manifest["starts"][-1] if manifest["starts"] else {}).get("container") or {}
    for path, sha256 in hashes.items():
        if path in manifest["inputs"]:
            manifest["inputs"][path]["sha256"] = sha256
        elif path == image.get("image"):
            image["digest"] = f"sha256:{sha256}"
    write_manifest(folder, manifest)


def note_start(folder: RunFolder, manifest: dict[str, Any], job: Job, machine: dict[str, Any]) -> None:
    """Adds this start (command, versions, machine) and the job as it is now, and writes the manifest."""
    manifest["title"], manifest["seed"], manifest["folder"] = job.run.title, job.run.seed, str(folder.path)
    manifest["config"], manifest["job_key"] = job.model_dump(), job_key(job)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    manifest["starts"].append({"time": time, "cryoiso": __version__, "command": sys.argv, **machine})
    write_manifest(folder, manifest)


def note_stages(folder: RunFolder, manifest: dict[str, Any], names: list[str], lines: list[dict[str, Any]]) -> None:
    """Adds what the journal says of the finished stages: key, times and outputs; writes the manifest."""
    last = {(line["event"], line.get("stage")): line for line in lines}
    manifest["stages"] = []
    for name in names:
        start, end = last.get(("start", name)), last.get(("end", name))
        if start and end:
            times = {"started": start["time"], "ended": end["time"], "seconds": end["seconds"]}
            manifest["stages"].append({"name": name, "key": end["key"], **times, "outputs": end["outputs"]})
    write_manifest(folder, manifest)


def write_manifest(folder: RunFolder, manifest: dict[str, Any]) -> None:
    write_text(folder.manifest, json.dumps(manifest, indent=2) + "\n")


def check_inputs(manifest: dict[str, Any], job: Job) -> None:
    """Stops if an input is not what it was when the run started; of stacks the sizes are looked at.

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
    for name, facts in manifest["inputs"].items():
        if facts.get("kind") == "stack" and os.path.isfile(name) and os.stat(name).st_size != facts["bytes"]:
            raise InputError(
                "a stack has changed since this run started", file=name, expected=f"{facts['bytes']} bytes",
                found=f"{os.stat(name).st_size} bytes", hint="Put the old file back, or start a new run.",
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
        facts = manifest["inputs"].get(str(path), {})
        if "sha256" in facts and sha256_of(path) != facts["sha256"]:
            raise InputError("a stack of this run has changed since it started", file=path, hint=hint)


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object that a run keeps about itself in a file; empty if there is no file.

    Raises:
        InputError: not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise InputError(f"cannot be read as JSON: {error}", file=path) from None
    if not isinstance(found, dict):
        raise InputError("not a JSON object", file=path, expected="{...}", found=type(found).__name__)
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        InputError: it cannot be read.
    """
    try:
        found = read_record(path)
    except InputError as error:
        raise InputError(f"the manifest is damaged: {error.problem}", file=path, hint="Start a new run.") from None
    if not found:
        raise InputError("the manifest is gone or empty", file=path, hint="Start a new run.")
    return found
