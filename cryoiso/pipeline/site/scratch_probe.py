"""What ``doctor`` finds out of each node's scratch: where it is, its room, its speed, and whether a run would use it.

The conditions are those of ``scratch_copies``, which falls back to the shared files where one fails. Nothing stays
behind.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryoiso.io import scratch_lease as leases
from cryoiso.io.staging import NotStaged, find_place, require_room
from cryoiso.parallel.context import Context
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.planning.job_size import disk, problem_of, shard_layout
from cryoiso.pipeline.site import filesystem
from cryoiso.pipeline.workflow import CO_REFINEMENTS, starts_a_program


@dataclass(frozen=True)
class Images:
    """What a job copies, all nodes together."""

    wanted: str
    """run.scratch"""
    raw: tuple[int, ...] = ()
    """Bytes of each shard of the particles; about, unless they are there already."""
    auxiliary: tuple[int, ...] = ()
    """Those of the auxiliary particles of all rounds."""
    everywhere: bool = False
    """Every node copies all of them; else those that its ranks read."""
    folder: Path | None = None
    """Where the shards are, if the particles are shards; else they will be in the run folder."""

    def of_node(self, ranks: list[int], size: int) -> tuple[list[int], list[int]]:
        """Sizes of the shards that a node copies at most: particles, auxiliary particles.

        A rank's share may begin in the shard before and end in the one after, as the half-sets' batches fall.
        """
        if self.everywhere:
            return list(self.raw), list(self.auxiliary)
        count, wanted = len(self.raw), set[int]()
        for rank in ranks:
            wanted.update(range(max(rank * count // size - 1, 0), min(-(-(rank + 1) * count // size) + 1, count)))
        return [self.raw[k] for k in sorted(wanted)], []


def images_of(inputs: Inputs, ranks: int) -> Images:
    """What the stages of a job will ask of scratch, see ``Scratch.attach`` (rank 0; reads the inputs)."""
    job = inputs.job
    with_auxiliary, relion = job.run.workflow in CO_REFINEMENTS, starts_a_program(job)
    if not job.run.scratch or (relion and not with_auxiliary):
        return Images(job.run.scratch)
    problem = problem_of(inputs)
    export = job.auxiliary.model_copy(update={"export": False})  # stacks that are written beside the shards
    stored = {s.name: s for s in disk(replace(problem, job=job.model_copy(update={"auxiliary": export})), ranks)}
    if problem.with_shards:
        raw = [path.stat().st_size for path in sorted(inputs.shards.glob("shard-*"))]
    else:
        section, all_bytes = job.particles, stored["ingest"].bytes
        counts = shard_layout(problem.particles, problem.box_px, section.storage, section.shard_mib)
        raw = [all_bytes * count // problem.particles for count in counts]
    generated = [s for name, s in stored.items() if name.startswith("generate-") and not relion]
    auxiliary = [s.bytes // s.files for s in generated for _ in range(s.files)]
    folder = inputs.shards if problem.with_shards else None
    return Images(job.run.scratch, tuple(raw), tuple(auxiliary), with_auxiliary, folder)


def look_for_scratch(comm: Context, images: Images, run: Path) -> dict[str, dict[str, Any]]:
    """Facts of every node's scratch, by host; empty if the job names none. Collective.

    Args:
        run: a folder on the file system that the run folder will be on.
    """
    own_facts = None
    if images.wanted and comm.rank == comm.nodes[comm.hostname][0]:
        raw, auxiliary = images.of_node(comm.nodes[comm.hostname], comm.size)
        own_facts = _look(images, images.folder or run, comm.hostname, raw, auxiliary)
    return {
        host: node_facts for host, node_facts in comm.allgather((comm.hostname, own_facts)) if node_facts is not None
    }


def _look(images: Images, originals: Path, host: str, raw: list[int], auxiliary: list[int]) -> dict[str, Any]:
    """Facts of this node's scratch. ``why_not``: why a run would not use it; ``why_partly``: why not for everything."""
    names = ("path", "folder", "type", "mount", "free_bytes", "free_inodes", "left_behind_bytes", "problem",
             "write_MBps", "read_MBps", "small_file_s", "server_clock_ahead_s")  # fmt: skip
    facts: dict[str, Any] = {
        "wanted": images.wanted, **dict.fromkeys(names), "needed_bytes": sum(raw) + sum(auxiliary),
        "needed_files": len(raw) + len(auxiliary), "why_not": "", "why_partly": "",
    }  # fmt: skip
    try:
        place = find_place(images.wanted, originals, host)
        facts["path"] = str(place)
        folder = leases.nearest_to_root(place)
        facts |= {"folder": str(folder), **filesystem.filesystem_of(folder), **filesystem.room(folder)}
        facts |= _try(folder, host, facts["free_bytes"])
        old = leases.left_behind(place)
        facts["left_behind_bytes"] = old[0]
        facts["why_not"] = facts["problem"] or _no_room(folder, raw, old)
        facts["why_partly"] = "" if facts["why_not"] else _no_room(folder, [*raw, *auxiliary], old)
    except NotStaged as why:
        facts["why_not"] = str(why)
    except OSError as error:
        facts["why_not"] = f"{error.filename or images.wanted}: {error.strerror or error}"
    return facts


def _try(folder: Path, host: str, free_bytes: int) -> dict[str, Any]:
    """Writes as ``filesystem.try_out`` does, less where little is free, and locks a file as leases are locked."""
    name = folder / f".cryoiso-{host}-{os.getpid()}.part"
    large = free_bytes > 4 * filesystem.PROBE_BYTES
    try:
        result = filesystem.try_out(
            name, filesystem.PROBE_BYTES if large else filesystem.SMALL_BYTES, filesystem.SMALL_FILES
        )
        if not result["problem"]:
            leases.try_lock(name)
    except OSError as error:
        result["problem"] = f"{error.filename}: {error.strerror}"
    finally:
        with suppress(OSError):
            name.unlink()
    return result


def _no_room(folder: Path, sizes: list[int], old: tuple[int, int]) -> str:
    """Why shards of these sizes do not fit, once the copies of dead jobs are gone; empty if they do."""
    try:
        require_room(folder, sum(sizes) - old[0], len(sizes) - old[1])
    except NotStaged as why:
        return str(why)
    return ""
