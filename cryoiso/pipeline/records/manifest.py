"""Where a run's numbers come from: inputs with their hashes, the job with every default, seed, and every start with
versions, ranks, devices, container and batch job; of a finished run also its stages."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.io.atomic import write_text
from cryoiso.io.cs import passthrough_beside
from cryoiso.io.regular_file import read_regular_text
from cryoiso.io.shards import read_index
from cryoiso.pipeline.records.hashing import digest_of, sha256_of
from cryoiso.pipeline.records.manifest_record import ImageFacts, InputFacts, Manifest, StartRecord
from cryoiso.pipeline.records.run_folder import RunFolder

SCHEMA = 2
HASH_LIMIT = 2 << 30
"""With run.hash_inputs = "small" images up to this size together are hashed; of more only the sizes are noted."""
NO_RESULT = ("title", "device", "hash_inputs", "scratch", "stop_before_end_s")
"""Keys of [run] that do not decide the result."""
IMAGES = ("stack", "shard")
"""Kinds of inputs that images are in."""
PUT_BACK = "Put the old file back, or start a new run."


def input_files(job: Job) -> list[Path]:
    """The small files a job names, in the order of the job file."""
    names = (
        job.particles.file, *passthrough_files(job), job.reference.file, job.reference.fit, job.sample.mask,
        job.truth.particles, job.truth.map, job.diagnose.model, job.diagnose.compare_model,
        job.audit.other_reference, job.audit.background,
    )  # fmt: skip
    files = [Path(name) for name in names if name]
    return [path / products.INDEX if path.is_dir() else path for path in files]  # particles may be a folder of shards


def passthrough_files(job: Job) -> list[str]:
    """The passthrough files that a .cs file's fields may come from: the given ones, else those beside it."""
    if job.particles.passthrough or not job.particles.file.lower().endswith(".cs"):
        return list(job.particles.passthrough)
    return [str(path) for path in passthrough_beside(job.particles.file)]


def new_manifest(job: Job, images: list[Path]) -> Manifest:
    """What is known when a run begins. The images are hashed later, while they are ingested.

    Args:
        job: with absolute paths.
        images: the files that the particles' images lie in: stacks, or shards where the job names a folder of them.

    Raises:
        InputError: one of them is gone.
    """
    folder = Path(job.particles.file)
    kind = "shard" if folder.is_dir() else "stack"
    sizes = _sizes(images, kind)
    inputs: dict[str, InputFacts] = {path: {"kind": kind, "bytes": size} for path, size in sizes.items()}
    for shard in read_index(folder)["shards"] if folder.is_dir() else ():
        if "sha256" in shard:
            inputs[os.path.abspath(folder / shard["file"])]["sha256"] = shard["sha256"]
    files: dict[str, InputFacts] = {str(path): {"kind": "file", "bytes": path.stat().st_size, "sha256": sha256_of(path)}
             for path in input_files(job)}  # fmt: skip
    return {
        "schema": SCHEMA,
        "cryoiso": __version__,
        "seed": job.run.seed,
        "title": job.run.title,
        "inputs": {**files, **inputs},
        "stacks": {
            "number": len(sizes),
            "bytes": sum(sizes.values()),
            "sha256_of_names_and_sizes": digest_of(json.dumps(sizes, sort_keys=True)),
        },
        "starts": [],
    }


def _sizes(images: list[Path], kind: str) -> dict[str, int]:
    try:
        return {str(path): path.stat().st_size for path in images}
    except OSError as error:
        raise InputError(
            f"a {kind} of this run is gone", file=error.filename, hint=PUT_BACK, code="run-inputs-changed"
        ) from None


def job_key(job: Job) -> str:
    """Digest of what decides the result: the whole job but for its title, its device, how inputs are hashed, where
    images are read, when it stops, how it is sent to a batch system, and the controls that are run afterwards."""
    facts = job.model_dump(exclude={"launch", "audit"})
    facts["run"] = {k: v for k, v in facts["run"].items() if k not in NO_RESULT}
    return digest_of(json.dumps(facts, sort_keys=True))


def stage_key(stage: str, key: str, job: Job) -> str:
    """The key of a stage from the one that follows from the job and the stages before it: the settings of the controls
    decide the stage of the controls alone."""
    if stage != "audit":
        return key
    return digest_of(key, json.dumps(job.audit.model_dump(exclude={"enable"}), sort_keys=True))


def to_hash(manifest: Manifest, job: Job) -> dict[str, int]:
    """Path -> bytes of the images' files that are to be hashed while images are ingested: those that no start of this
    run has hashed."""
    if job.run.hash_inputs != "all" and manifest["stacks"]["bytes"] > HASH_LIMIT:
        return {}
    images = {path: facts for path, facts in manifest["inputs"].items() if facts.get("kind") in IMAGES}
    return {path: facts["bytes"] for path, facts in images.items() if not _is_read(facts)}


def modified_since(manifest: Manifest, job: Job) -> dict[str, int]:
    """Path -> bytes of the images' files whose time is another one than when this run hashed them."""
    images = {path: facts for path, facts in manifest["inputs"].items() if facts.get("kind") in IMAGES}
    return {p: f["bytes"] for p, f in images.items() if _is_read(f) and f["modified_ns"] != modified_ns(p)}


def _is_read(facts: InputFacts) -> bool:
    """Whether the run itself made this hash; that of a given shard may be what its index says."""
    return "sha256" in facts and "modified_ns" in facts


def modified_ns(path: str) -> int | None:
    """When a file was changed last, as the file system says; None if it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def note_hashes(manifest: Manifest, hashes: dict[str, tuple[str, int | None]]) -> None:
    """Puts hashes of inputs where they belong; the caller writes the manifest.

    Args:
        hashes: path -> (SHA-256, when the file had been modified last as it was read).

    Raises:
        InputError: another hash is known already.
    """
    for path, (sha256, modified) in hashes.items():
        facts = manifest["inputs"][path]
        if facts.setdefault("sha256", sha256) != sha256:
            problem, hint = f"a {facts['kind']} has changed since this run started", PUT_BACK
            code = "run-inputs-changed"
            if facts["kind"] == "shard" and not _is_read(facts):
                problem = "a shard is not what its index.json says"
                hint, code = "Remove it, and run the same 'cryoiso ingest' again.", "shards-damaged"
            raise InputError(
                problem,
                file=path,
                expected=f"sha256 {facts['sha256']}",
                found=sha256,
                hint=hint,
                code=code,
            )
        facts["modified_ns"] = modified


def given_shards(manifest: Manifest) -> dict[str, dict[str, object]]:
    """The shards that a job was given as its particles, as far as the run has hashed them: path -> bytes, sha256."""
    return {p: dict(f) for p, f in manifest.get("inputs", {}).items() if f.get("kind") == "shard" and _is_read(f)}


def note_start(folder: RunFolder, manifest: Manifest, job: Job, machine: dict[str, Any]) -> None:
    """Adds this start (command, versions, machine) and the job as it is now, and writes the manifest."""
    manifest["title"], manifest["seed"], manifest["folder"] = job.run.title, job.run.seed, str(folder.path)
    manifest["config"], manifest["job_key"] = job.model_dump(), job_key(job)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"time": time, "cryoiso": __version__, "command": sys.argv, **machine}
    manifest["starts"].append(cast(StartRecord, start))
    _share_digests(manifest)
    write_manifest(folder, manifest)


def unknown_image(manifest: Manifest) -> str:
    """The container image of the latest start, if its digest is not known and it can be read; else empty."""
    image = manifest["starts"][-1].get("container") or {}
    readable = _which(image) is not None and "digest" not in image and os.access(image["image"], os.R_OK)
    return image["image"] if readable else ""


def note_image(folder: RunFolder, manifest: Manifest, sha256: str) -> None:
    """Notes the digest of the latest start's container image, also for earlier starts in it; writes the manifest."""
    manifest["starts"][-1]["container"]["digest"] = f"sha256:{sha256}"
    _share_digests(manifest)
    write_manifest(folder, manifest)


def _share_digests(manifest: Manifest) -> None:
    """Starts in the same image have the same digest."""
    images = [start.get("container") or {} for start in manifest["starts"]]
    known = {_which(image): image["digest"] for image in images if "digest" in image and _which(image) is not None}
    for image in images:
        if _which(image) in known:
            image.setdefault("digest", known[_which(image)])


def _which(image: ImageFacts) -> tuple[Any, ...] | None:
    """What tells an image file from others without reading it; None where it was not seen from within."""
    facts = tuple(image.get(key) for key in ("image", "bytes", "modified_ns"))
    return None if None in facts else facts


def note_stages(folder: RunFolder, manifest: Manifest, names: list[str], lines: list[dict[str, Any]]) -> None:
    """Adds what the journal says of the finished stages: key, times and outputs; writes the manifest."""
    last = {(line["event"], line.get("stage")): line for line in lines}
    manifest["stages"] = []
    for name in names:
        start, end = last.get(("start", name)), last.get(("end", name))
        if start and end:
            manifest["stages"].append({
                "name": name, "key": end["key"], "started": start["time"], "ended": end["time"],
                "seconds": end["seconds"], "outputs": end["outputs"],
            })  # fmt: skip
    write_manifest(folder, manifest)


def write_manifest(folder: RunFolder, manifest: Manifest) -> None:
    write_text(folder.manifest, json.dumps(manifest, indent=2) + "\n")


def check_inputs(manifest: Manifest, job: Job) -> None:
    """Stops if an input is not what it was when the run started; of stacks and shards the sizes are looked at.

    Raises:
        InputError: names the file.
    """
    for path in input_files(job):
        facts = manifest["inputs"].get(str(path))
        if facts is None:
            continue
        if not path.is_file():
            raise InputError("an input of this run is gone", file=path, hint=PUT_BACK, code="run-inputs-changed")
        if sha256_of(path) != facts["sha256"]:
            raise InputError(
                "an input of this run has changed since it started", file=path, expected=f"sha256 {facts['sha256']}",
                hint=PUT_BACK, code="run-inputs-changed",
            )  # fmt: skip
    for name, facts in manifest["inputs"].items():
        kind = facts.get("kind")
        if kind == "shard" and not os.path.isfile(name):
            raise InputError("a shard of this run is gone", file=name, hint=PUT_BACK, code="run-inputs-changed")
        if kind in IMAGES and os.path.isfile(name) and os.stat(name).st_size != facts["bytes"]:
            raise InputError(
                f"a {kind} has changed since this run started", file=name, expected=f"{facts['bytes']} bytes",
                found=f"{os.stat(name).st_size} bytes", hint=PUT_BACK, code="run-inputs-changed",
            )  # fmt: skip


def check_images(manifest: Manifest, images: list[Path], job: Job) -> None:
    """Stops if the files of the images are not those that the run started with; for a run that still has to read them.
    What is in them is looked at while they are read (``stages.input_hashes.hashed_meanwhile``).

    Raises:
        InputError: names the file, or, where there are many, says that one has another name or size.
    """
    sizes = _sizes(images, "shard" if Path(job.particles.file).is_dir() else "stack")
    if digest_of(json.dumps(sizes, sort_keys=True)) != manifest["stacks"]["sha256_of_names_and_sizes"]:
        raise InputError(
            "one of the image files of this run has another name or size than when it started",
            file=job.particles.file, hint=PUT_BACK, code="run-inputs-changed",
        )  # fmt: skip


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object that a run keeps about itself in a file; empty if there is no file.

    Raises:
        InputError: not JSON, or not an object.
    """
    try:
        record = json.loads(read_regular_text(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"cannot be read as JSON: {error}", file=path, code="record-damaged") from None
    if not isinstance(record, dict):
        raise InputError(
            "not a JSON object", file=path, expected="{...}", found=type(record).__name__, code="record-damaged"
        )
    return record


def manifest_record(path: Path) -> Manifest:
    """The manifest as it stands in a file, not yet checked; empty if there is no file.

    Raises:
        InputError: not JSON, or not an object.
    """
    return cast(Manifest, read_record(path))


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run.

    Raises:
        InputError: it cannot be read.
    """
    try:
        manifest = manifest_record(path)
    except InputError as error:
        raise InputError(
            f"the manifest is damaged: {error.problem}", file=path, hint="Start a new run.", code="record-damaged"
        ) from None
    if not manifest:
        raise InputError("the manifest is gone or empty", file=path, hint="Start a new run.", code="record-damaged")
    check_manifest(manifest, path)
    return manifest


def check_manifest(manifest: Manifest, path: Path) -> None:
    """Makes sure that a manifest has what is read of it; an empty one, of a folder without, passes.

    Raises:
        InputError: names what is missing.
    """
    if not manifest:
        return
    inputs, starts, stacks = manifest.get("inputs"), manifest.get("starts"), manifest.get("stacks")
    missing = ""
    if not isinstance(manifest.get("schema"), int) or not isinstance(manifest.get("cryoiso"), str):
        missing = "schema (a number) and cryoiso (a version)"
    elif not isinstance(inputs, dict) or not all(map(_is_input, inputs.values())):
        missing = "inputs, each with bytes and, where it was hashed, sha256"
    elif not isinstance(starts, list) or not all(map(_is_start, starts)):
        missing = "starts, a list of objects"
    elif not isinstance(stacks, dict) or not isinstance(stacks.get("sha256_of_names_and_sizes"), str):
        missing = "stacks with sha256_of_names_and_sizes"
    if missing:
        raise InputError(
            "the manifest is damaged", file=path, expected=missing,
            hint="Take it from a copy of the run folder, or start a new run.", code="record-damaged",
        )  # fmt: skip


def _is_input(facts: Any) -> bool:
    known = {"bytes": int, "sha256": str, "kind": str, "modified_ns": int | None}
    return isinstance(facts, dict) and "bytes" in facts and all(
        isinstance(facts[key], kind) for key, kind in known.items() if key in facts
    )  # fmt: skip


def _is_start(facts: Any) -> bool:
    known = {"time": str, "cryoiso": str, "packages": dict, "git": dict, "container": dict, "machine": list | None}
    return isinstance(facts, dict) and all(isinstance(facts[k], t) for k, t in known.items() if k in facts)
