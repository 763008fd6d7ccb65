"""The record ``manifest.json``, key by key. Any key may be absent where a manifest is read: an older version may have
written it."""

from __future__ import annotations

from typing import Any, TypedDict


class InputFacts(TypedDict, total=False):
    """An input of a run."""

    kind: str
    """file, stack or shard."""
    bytes: int
    sha256: str
    modified_ns: int | None
    """When the file had been modified last as the run hashed it."""


class ImageFacts(TypedDict, total=False):
    """The container that a start ran in."""

    kind: str
    image: str
    bytes: int
    modified_ns: int
    digest: str
    labels: dict[str, Any]
    """What the image says of itself, its build date among it."""


class StartRecord(TypedDict, total=False):
    """A start of the program in a run folder."""

    time: str
    cryoiso: str
    command: list[str]
    python: str
    platform: str
    packages: dict[str, str]
    git: dict[str, Any]
    container: ImageFacts
    scheduler: dict[str, str]
    ranks: int
    machine: list[dict[str, Any]]
    """Host, processor and device of each rank."""
    threads: int
    mpi: str


class StacksRecord(TypedDict, total=False):
    """The files that images are in, together."""

    number: int
    bytes: int
    sha256_of_names_and_sizes: str


class StageFacts(TypedDict):
    """A finished stage."""

    name: str
    key: str
    started: str
    ended: str
    seconds: float
    outputs: dict[str, Any]


class Manifest(TypedDict, total=False):
    """``manifest.json``."""

    schema: int
    cryoiso: str
    """Version that began the run."""
    seed: int
    title: str
    folder: str
    inputs: dict[str, InputFacts]
    """Path -> facts."""
    stacks: StacksRecord
    starts: list[StartRecord]
    config: dict[str, Any]
    """The job with every default."""
    job_key: str
    signature: dict[str, Any]
    """By which the user's later starts know the programs that the job may start (``trust.signature``)."""
    stages: list[StageFacts]
