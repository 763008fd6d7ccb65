"""What a stage left behind: every file with its size and SHA-256."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.core.errors import Interrupted
from cryoiso.core.log import ProgressLine
from cryoiso.io.regular_file import open_regular
from cryoiso.parallel.context import Context

_BLOCK = 4 << 20
_PER_FILE = 1 << 20
"""Opening a file costs as much as reading so many bytes."""
MUCH_BYTES = 8 << 30
"""Files of more than this take longer to read than a signal may wait."""
Outputs = dict[str, dict[str, Any]]


def is_outputs(value: Any) -> bool:
    """Whether something read from a record has the form of ``Outputs``."""
    return isinstance(value, dict) and all(
        isinstance(facts, dict) and isinstance(facts.get("bytes"), int) and isinstance(facts.get("sha256"), str)
        for facts in value.values()
    )


class HashingStopped(Exception):
    """Raised when hashing is cancelled."""


def sha256_of(path: Path, seen: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, read in blocks.

    Args:
        seen: called with the bytes of each block; may raise ``HashingStopped``.
    """
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            if seen is not None:
                seen(len(block))
    return digest.hexdigest()


def share_by_size(sizes: list[int], ranks: int) -> list[int]:
    """Which rank reads which file, so that all read about as many bytes: the largest file to the least loaded one."""
    load = [(0, rank) for rank in range(ranks)]
    owner = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        have, rank = heapq.heappop(load)
        owner[number] = rank
        heapq.heappush(load, (have + sizes[number] + _PER_FILE, rank))
    return owner


def digest_of(*texts: str) -> str:
    """SHA-256 of some texts, each kept apart from the next."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def list_outputs(folder: Path, places: tuple[str, ...]) -> list[str]:
    """Files under some places (files or folders) of a run folder, but temporary ones and timings; sorted, relative."""
    outputs: list[Path] = []
    for place in places:
        path = folder / place
        outputs += [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sorted(str(p.relative_to(folder)) for p in outputs if p.suffix != ".part" and p.name != products.TIMING)


def hash_outputs(folder: Path, places: tuple[str, ...], comm: Context) -> Outputs:
    """Size and hash of every file under some places; ranks share the reading. Collective, the same on every rank."""
    names = comm.bcast(list_outputs(folder, places) if comm.rank == 0 else None)
    return hash_shared(folder, names, comm)


def next_key(key: str, stage: str, outputs: Outputs) -> str:
    """The key of the stage after one with this key and these outputs."""
    return digest_of(key, stage, json.dumps(outputs, sort_keys=True))


def verify_outputs(folder: Path, recorded: Outputs, comm: Context, label: str = "") -> str:
    """Empty if the recorded files are there with the recorded hashes, else what is wrong with one. Collective.

    Args:
        label: as ``hash_shared``.
    """
    wrong = ""
    if comm.rank == 0:
        for name, facts in recorded.items():
            path = folder / name
            if not path.is_file():
                wrong = f"{path} is gone"
            elif path.stat().st_size != facts["bytes"]:
                wrong = f"{path} has another size"
    if problem := str(comm.bcast(wrong)):
        return problem
    for name, facts in hash_shared(folder, list(recorded), comm, label).items():
        if facts["sha256"] != recorded[name]["sha256"]:
            return f"{folder / name} has changed"
    return ""


def hash_shared(folder: Path, names: list[str], comm: Context, label: str = "") -> Outputs:
    """Size and hash of files, relative to a folder or absolute, that are there. Collective, the same on every rank.

    Where there is much to read, a signal is heeded between two files.

    Args:
        names: the same on every rank.
        label: names the work in a line that shows how far rank 0 is with its share; empty: no line.

    Raises:
        Interrupted: a signal came; what was read is read again then.
    """
    sizes = comm.bcast([(folder / name).stat().st_size for name in names] if comm.rank == 0 else None)
    owner = share_by_size(sizes, comm.size)
    shares = [[n for n, its in enumerate(owner) if its == rank] for rank in range(comm.size)]
    share = sum(sizes[n] for n in shares[comm.rank])
    line = ProgressLine(label, share >> 20, active=bool(label) and comm.rank == 0)
    much, own_digests, done = sum(sizes) > MUCH_BYTES, {}, 0

    def seen(size: int) -> None:
        nonlocal done
        done += size
        line.update(done >> 20, "MiB of this rank's share")

    for turn in range(max(map(len, shares))):
        if much and comm.stop_requested():
            raise Interrupted("stopped by a signal while reading the files of a stage")
        for n in shares[comm.rank][turn : turn + 1]:
            own_digests[names[n]] = {"bytes": sizes[n], "sha256": sha256_of(folder / names[n], seen)}
    merged: Outputs = {}
    for part in comm.allgather(own_digests):
        merged.update(part)
    return {name: merged[name] for name in names}
