"""What is to be said of a folder: whether all hosts see it, its room, its speed, its clock, its striping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cryoiso.core.errors import EXIT_INPUT, EXIT_OTHER
from cryoiso.pipeline.finding import ERROR, FINE, GIB, NOTE, WARNING, Finding, Needs, gib
from cryoiso.pipeline.site.filesystem import NETWORK

CLOCKS_APART_S = 5.0
SLOW_MBPS = 50.0
SLOW_FILE_S = 0.25
LARGE_FILE_BYTES = 1 << 30


def folder_findings(name: str, folder: dict[str, Any], facts: dict[str, Any], needs: Needs | None) -> Iterator[Finding]:
    """Findings of a folder as ``filesystem.look_at_folder`` found it; ``needs`` where a run will write to it."""
    where, kind = folder["folder"], folder["type"] or "unknown type"
    if folder["problem"]:
        yield Finding(
            name,
            ERROR,
            f"{where}: nothing can be written here: {folder['problem']}",
            "Choose another folder.",
            EXIT_INPUT,
            code="not-writable",
        )
        return
    if folder["unseen_from"]:
        yield Finding(
            name,
            ERROR,
            f"{where} is not the same folder on {', '.join(folder['unseen_from'])}: a file written "
            "by rank 0 is not seen there",
            "Choose a folder on a file system that all nodes share.",
            EXIT_INPUT,
            code="folder-not-shared",
        )
    yield from _room(name, folder, needs)
    yield Finding(name, FINE, f"{where} ({kind}): {free_words(folder)}{speed_words(folder)}")
    yield from _speed(name, folder)
    ahead = folder["server_clock_ahead_s"] or 0.0
    if abs(ahead) > CLOCKS_APART_S:
        yield Finding(
            name,
            WARNING,
            f"the clock of the file server of {where} is {abs(ahead):.0f} s "
            f"{'ahead of' if ahead > 0 else 'behind'} this host's",
            "Tell the site (NTP).",
        )
    if folder["type"] == "lustre":
        yield from _lustre(name, folder, facts, needs)


def free_words(folder: dict[str, Any]) -> str:
    """Free bytes and, where the file system counts them, inodes."""
    inodes = "" if folder["free_inodes"] is None else f", {folder['free_inodes']:,} files"
    return f"{gib(folder['free_bytes'])}{inodes} free"


def speed_words(folder: dict[str, Any]) -> str:
    """Speed where it was measured, else empty."""
    if not folder["write_MBps"]:
        return ""
    return (
        f"; writes {folder['write_MBps']:.0f} MB/s, reads {folder['read_MBps']:.0f} MB/s, a small file takes "
        f"{1000 * folder['small_file_s']:.1f} ms"
    )


def _room(name: str, folder: dict[str, Any], needs: Needs | None) -> Iterator[Finding]:
    free, inodes, where = folder["free_bytes"], folder["free_inodes"], folder["folder"]
    bytes_needed, files = (needs.disk_bytes, needs.files) if needs else (0, 0)
    if free < bytes_needed:
        yield Finding(
            name,
            ERROR,
            f"{gib(free)} are free in {where}, the run will need {gib(bytes_needed)}",
            "Free some space or choose another folder with --out.",
            EXIT_OTHER,
            code="disk-full",
        )
    elif free < max(1.2 * bytes_needed, GIB):
        yield Finding(
            name, WARNING, f"only {gib(free)} are free in {where}", "Free some space; a quota may be smaller still."
        )
    if inodes is not None and inodes < max(files, 1):
        yield Finding(
            name,
            ERROR,
            f"no more than {inodes:,} files can be made in {where}, the run will make about {files:,}",
            "Remove files there (a quota on their number?) or choose another folder.",
            EXIT_OTHER,
            code="disk-full",
        )
    elif inodes is not None and inodes < 1000:
        yield Finding(name, WARNING, f"only {inodes:,} more files can be made in {where}", "Remove files there.")


def _speed(name: str, folder: dict[str, Any]) -> Iterator[Finding]:
    where = folder["folder"]
    if folder["write_MBps"] and folder["write_MBps"] < SLOW_MBPS:
        yield Finding(
            name,
            WARNING,
            f"{where} takes only {folder['write_MBps']:.0f} MB/s",
            "Shards and checkpoints will wait for it: choose a faster file system.",
        )
    if folder["small_file_s"] and folder["small_file_s"] > SLOW_FILE_S:
        yield Finding(
            name,
            WARNING,
            f"a small file takes {folder['small_file_s']:.2f} s in {where}",
            "Every checkpoint and journal line waits so long: choose another file system.",
        )
    if folder["type"] in ("tmpfs", "overlay", "ramfs"):
        yield Finding(
            name,
            WARNING,
            f"{where} is on {folder['type']}: it is gone when the node or the container ends",
            "Choose a folder that stays.",
        )
    elif folder["type"] in NETWORK - {"lustre"}:
        yield Finding(
            name,
            NOTE,
            f"{where} is on a network file system ({folder['type']})",
            "Every rank reads its shards in large blocks; a file system for large files suits it best.",
        )


def _lustre(name: str, folder: dict[str, Any], facts: dict[str, Any], needs: Needs | None) -> Iterator[Finding]:
    """One client and files over 1 GiB: 4 to 8 stripes; many clients: 8 or more; small files: one."""
    hosts = len({rank["host"] for rank in facts["ranks"]})
    stripes, where = folder.get("stripes"), folder["folder"]
    shard = needs.job.particles.shard_mib << 20 if needs else 256 << 20
    largest = max(shard, needs.largest_input_bytes if needs else 0)
    if stripes is None:
        yield Finding(
            name, NOTE, f"{where} is on Lustre; lfs does not tell its striping", "Look with lfs getstripe -d."
        )
    elif shard >= LARGE_FILE_BYTES and stripes in (0, 1):
        wanted = 4 if hosts == 1 else 8
        yield Finding(
            name,
            NOTE,
            f"{where} is on Lustre with {stripes or 'the default'} stripe(s), and shards are {gib(shard)} each",
            f"Before the first run: mkdir the run folder, lfs setstripe -c {wanted} on it.",
        )
    elif shard < LARGE_FILE_BYTES and (stripes > 4 or stripes == -1):
        yield Finding(
            name,
            NOTE,
            f"{where} is on Lustre with {stripes if stripes > 0 else 'all'} stripes a file, and shards "
            f"are only {gib(shard)} each",
            "Fewer servers a file are better here: lfs setstripe -c 1 (to 4) on the run folder before the first run.",
        )
    if largest >= LARGE_FILE_BYTES and largest > shard:
        yield Finding(
            name,
            NOTE,
            f"the largest stack has {gib(largest)}",
            "If it lies on Lustre with one stripe, many readers "
            f"share one server: lfs migrate -c {4 if hosts == 1 else 8} on it.",
        )
