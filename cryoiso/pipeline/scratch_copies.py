"""Shards on the nodes' own disks: copied once a node, read there by its ranks, removed at the end (``run.scratch``).

Nothing depends on a copy being there. Where there is none, or where it goes away, the shared files are read instead,
and the result is the same.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.core.errors import Interrupted
from cryoiso.core.log import ProgressLine, duration, quantity
from cryoiso.io import scratch_lease as leases
from cryoiso.io.atomic import write_text
from cryoiso.io.shards import ShardSource
from cryoiso.io.staging import CopyStopped, NotStaged, ScratchCopies, copy_checked, find_place, require_room
from cryoiso.parallel import signals
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import owned_chunks
from cryoiso.pipeline.records.hashing import digest_of, sha256_of
from cryoiso.pipeline.records.journal import Journal
from cryoiso.refine.batches import BatchReader

logger = logging.getLogger("cryoiso")
STOPPED = "stopped by a signal while images were copied to scratch"


@dataclass
class _Set:
    """A set of shards as this rank sees it: which of them its node wants, and what became of that."""

    key: str
    names: list[str]
    """Of all shards that this rank's node wants."""
    hashes: dict[str, str]
    target: Path | None = None
    """Folder of the copies; None: the originals are read."""
    why_not: str = ""
    bytes: int = 0
    """Copied by this rank."""
    reused: int = 0
    """Bytes found there already, of this rank's share."""


@dataclass
class Scratch:
    """All copies of a run. One rank a node holds the leases."""

    wanted: str
    """run.scratch"""
    comm: Context
    run: Path
    everything: bool
    """Every node copies all shards; else only those that its ranks read in a refinement."""
    journal: Journal | None = None
    """of the run, on rank 0: knows the hashes of the shards"""
    _held: dict[str, leases.Lease] = field(default_factory=dict)
    _copies: dict[str, ScratchCopies] = field(default_factory=dict)
    """By folder of the originals."""
    facts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def mates(self) -> list[int]:
        """The ranks of this rank's node; the first one is responsible for it."""
        return self.comm.nodes[self.comm.hostname]

    def attach(self, source: ShardSource, *, everything: bool = False, once: bool = False) -> None:
        """Lets a source read from this node's copies, which are made if need be. Collective.

        Args:
            everything: copy all shards; else what ``self.everything`` says.
            once: the images will be read but once or twice: not worth a copy, only used where there is one.

        Raises:
            Interrupted: a stop signal.
        """
        name = str(source.folder)
        if name not in self._copies and not once:
            hashes = recorded_hashes(self.journal, source.folder, self.comm)
            self._copies[name] = self._stage(source, hashes, everything or self.everything)
        if name in self._copies:
            source.use_copies(self._copies[name])

    def close(self) -> None:
        """Gives the leases back; copies that nobody else reads are removed."""
        while self._held:
            self._held.popitem()[1].release()

    def _stage(self, source: ShardSource, hashes: dict[str, str], everything: bool) -> ScratchCopies:
        began = time.monotonic()
        names = [str(s["file"]) for s in source.index["shards"]]
        own_names = names if everything else [names[k] for k in shards_of_ranks(source, self.mates, self.comm.size)]
        known = {n: hashes[n] for n in own_names if n in hashes}
        copies = _Set(_key(source, hashes), own_names, known)
        if self.comm.rank == self.mates[0]:
            self._prepare(source.folder, copies)
        outcome = self.comm.allgather((copies.target, copies.why_not))
        copies.target, copies.why_not = outcome[self.mates[0]]
        self._copy(source.folder, copies)
        if copies.why_not:
            self._drop(copies.key)
        self._tell(source, copies, time.monotonic() - began)
        target = copies.target if not copies.why_not else None
        return ScratchCopies({n: target / n for n in own_names} if target else None)

    def _prepare(self, originals: Path, copies: _Set) -> None:
        """Takes the lease and makes sure that there is room; notes why not where that fails."""
        try:
            place = find_place(self.wanted, originals, self.comm.hostname)
            root = leases.own_root(place)
            for gone in leases.sweep(root, copies.key):
                logger.info("scratch: removed %s, which a job left behind that is gone", root / gone)
            held = self._held[copies.key] = leases.take(root, copies.key, run=str(self.run))
            missing = [originals / n for n in copies.names if not (held.files / n).exists()]
            require_room(root, sum(path.stat().st_size for path in missing), len(missing))
            copies.target = held.files
        except NotStaged as why:
            copies.why_not = str(why)
        except OSError as error:
            copies.why_not = f"{error.filename or self.wanted}: {error.strerror or error}"
        if copies.why_not:
            self._drop(copies.key)

    def _drop(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            held.release()

    def _copy(self, originals: Path, copies: _Set) -> None:
        """The ranks of a node share the copying; after each file all agree whether to go on. Collective."""
        comm, mates = self.comm, self.mates
        own_names = [] if copies.why_not else copies.names[mates.index(comm.rank) :: len(mates)]
        rounds = int(comm.max_all(len(own_names)))
        sizes = [(originals / n).stat().st_size for n in own_names]
        line = ProgressLine("copying images to scratch, MB", int(sum(comm.allgather(sum(sizes)))) // 1_000_000,
                            active=comm.rank == 0)  # fmt: skip
        others = 0
        for number in range(rounds):
            if number < len(own_names) and not copies.why_not:

                def told(_: int, before: int = others) -> None:
                    line.update((before + copies.bytes) // 1_000_000)

                _copy_one(originals, own_names[number], copies, told)
            state = comm.allgather((copies.why_not, copies.bytes + copies.reused))
            copies.why_not = next((state[r][0] for r in mates if state[r][0]), "")
            others = sum(done for _, done in state) - copies.bytes
            if comm.stop_requested():
                raise Interrupted(STOPPED)
        line.close()

    def _tell(self, source: ShardSource, copies: _Set, seconds: float) -> None:
        """One line for each kind of outcome, and the numbers of every node for ``logs/timing.json``."""
        comm = self.comm
        node_facts = {
            "host": comm.hostname, "folder": str(copies.target or ""), "why_not": copies.why_not,
            "bytes": copies.bytes, "reused_bytes": copies.reused, "shards": len(copies.names),
        }  # fmt: skip
        nodes: dict[str, dict[str, Any]] = {}
        for each in comm.allgather(node_facts):
            node = nodes.setdefault(each["host"], {**each, "bytes": 0, "reused_bytes": 0})
            for name in ("bytes", "reused_bytes"):
                node[name] += each[name]
        copied = sum(node["bytes"] for node in nodes.values())
        rate = round(copied / 1e6 / max(seconds, 1e-3), 1)
        facts = {
            "images": str(source.folder), "bytes": copied, "seconds": round(seconds, 3), "MB_per_s": rate,
            "nodes": list(nodes.values()),
        }  # fmt: skip
        self.facts.append(facts)
        if comm.rank == 0:
            _log(facts)
            on_disk = self.run / "logs" / products.TIMING
            with suppress(OSError):  # numbers to read, not worth a run
                on_disk.parent.mkdir(exist_ok=True)
                write_text(on_disk, json.dumps({"scratch": self.facts}, indent=1) + "\n")


def _copy_one(originals: Path, name: str, copies: _Set, on_bytes: Any) -> None:
    if copies.target is None:
        return
    target, expected = copies.target / name, copies.hashes.get(name, "")
    try:
        if expected and target.is_file() and sha256_of(target) == expected:
            copies.reused += target.stat().st_size
            return

        def count(n: int) -> None:
            copies.bytes += n
            on_bytes(n)

        copy_checked(originals / name, target, expected, signals.stop_signal, count)
    except NotStaged as why:
        copies.why_not = str(why)
    except OSError as error:
        copies.why_not = f"{error.filename or target}: {error.strerror or error}"
    except CopyStopped:
        pass  # all ranks hear of the signal at the end of this round


def _log(facts: dict[str, Any]) -> None:
    there = [node for node in facts["nodes"] if not node["why_not"]]
    if there:
        reused = sum(node["reused_bytes"] for node in there)
        logger.info(
            "scratch: %.3g GB copied to %s on %s in %s, %.0f MB/s%s", facts["bytes"] / 1e9, there[0]["folder"],
            quantity(len(there), "node"), duration(facts["seconds"]), facts["MB_per_s"],
            f"; {reused / 1e9:.3g} GB were there already" if reused else "",
        )  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for node in facts["nodes"]:
        if node["why_not"]:
            reasons.setdefault(node["why_not"], []).append(node["host"])
    for why, hosts in reasons.items():
        logger.warning("scratch is not used on %s, images are read from %s: %s", ", ".join(hosts), facts["images"], why)


def shards_of_ranks(source: ShardSource, ranks: list[int], size: int) -> list[int]:
    """The shards that some ranks read in a refinement and a reconstruction by the native engine.

    Each rank has the same contiguous share of every half-set's batches in all iterations, so a node reads little more
    than its share of the shards.
    """
    reader = BatchReader(source, source.particles, 1.0)
    wanted: set[int] = set()
    for half in (1, 2):
        plan = reader.plan((half,))
        for rank in ranks:
            for k in owned_chunks(len(plan), rank, size):
                wanted.update(source.shards_of(plan[k]))
    return sorted(wanted)


def _key(source: ShardSource, hashes: dict[str, str]) -> str:
    """Name of the copy: what is in the shards, or, where their hashes are not known, which files they are."""
    names = [str(s["file"]) for s in source.index["shards"]]
    facts: list[Any] = [source.index["plan"]]
    if all(name in hashes for name in names):
        facts += [[name, hashes[name]] for name in names]
    else:
        for name in names:
            status = (source.folder / name).stat()
            facts.append([str(source.folder.resolve()), name, status.st_size, status.st_mtime_ns])
    return digest_of(json.dumps(facts))[:24]


def recorded_hashes(journal: Journal | None, folder: Path, comm: Context) -> dict[str, str]:
    """SHA-256 by name of a stage's files, as the journal has them; empty where there is none. Collective."""

    def read() -> dict[str, str]:
        prefix = f"{folder.name}/"
        for line in reversed(journal.lines if journal is not None else []):
            outputs = line.get("outputs") or {}
            if line["event"] == "end" and any(name.startswith(prefix) for name in outputs):
                return {n.removeprefix(prefix): f["sha256"] for n, f in outputs.items() if n.startswith(prefix)}
        return {}

    return on_root(comm, read)
