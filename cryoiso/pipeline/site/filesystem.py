"""What kind of file system a folder lies on, how much room and how fast, and whether all hosts see the same one."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryoiso.io.atomic import fsync_dir
from cryoiso.parallel.context import Context

NETWORK = {
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs",
    "9p", "pvfs2", "wekafs", "panfs", "fuse.juicefs",
}  # fmt: skip
PROBE_BYTES = 32 << 20
SMALL_BYTES = 64 << 10
SMALL_FILES = 8
SEE_WITHIN_S = 5.0
"""Network file systems may show a new file late."""


def look_at_folder(comm: Context, path: Path, *, thorough: bool) -> dict[str, Any]:
    """Type, room and a write-fsync-rename-read test of a folder, or of the nearest one above that exists (collective).

    Args:
        thorough: write enough to tell a speed.
    """
    from cryoiso.pipeline.preflight import existing_parent

    where = comm.bcast(existing_parent(path.absolute()) if comm.rank == 0 else None)
    name = where / f".cryoiso-{socket.gethostname()}-{os.getpid()}.part"
    name = comm.bcast(name if comm.rank == 0 else None)
    facts: dict[str, Any] = {}
    if comm.rank == 0:
        facts = {"path": str(path), "folder": str(where), **filesystem_of(where), **room(where)}
        facts |= try_out(name, PROBE_BYTES if thorough else SMALL_BYTES, SMALL_FILES if thorough else 1)
        if facts["type"] == "lustre":
            facts["stripes"] = stripe_count(where)
    comm.barrier()
    leaders = {ranks[0]: host for host, ranks in comm.nodes.items()}
    sees = _sees(name) if comm.rank in leaders else None
    blind = [leaders[rank] for rank, seen in enumerate(comm.allgather(sees)) if seen is False]
    if comm.rank == 0:
        with suppress(OSError):
            name.unlink()
        facts["unseen_from"] = [] if facts["problem"] else blind
    shared: dict[str, Any] = comm.bcast(facts)
    return shared


def _sees(name: Path) -> bool:
    """Whether this host sees the file that rank 0 has just written."""
    until = time.monotonic() + SEE_WITHIN_S
    while not name.is_file():
        if time.monotonic() > until or not name.parent.is_dir():
            return False
        time.sleep(0.1)
    return True


def filesystem_of(folder: Path, mounts: Path = Path("/proc/mounts")) -> dict[str, str]:
    """Type and mount point, from the longest mount point that the folder lies under; empty if unknown."""
    best, kind = "", ""
    target = os.path.realpath(folder)
    with suppress(OSError):
        for line in mounts.read_text().splitlines():
            fields = line.split()
            if len(fields) < 3:
                continue
            point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), fields[1])
            inside = target == point or target.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, fields[2]
    return {"type": kind, "mount": best}


def room(folder: Path) -> dict[str, int | None]:
    """Free bytes and free inodes for this user; None where the file system does not count inodes."""
    status = os.statvfs(folder)
    return {"free_bytes": status.f_bavail * status.f_frsize, "free_inodes": status.f_favail if status.f_files else None}


def try_out(name: Path, size: int, repeats: int) -> dict[str, Any]:
    """Writes files as the program does (temporary name, fsync, rename, read back); leaves the last one as ``name``.

    Returns:
        problem (empty if it went well), MB/s of writing and reading ``size`` bytes, seconds a small file takes, and how
        far the file server's clock is ahead of this host's (s).
    """
    problem = ""
    facts: dict[str, Any] = dict.fromkeys(("write_MBps", "read_MBps", "small_file_s", "server_clock_ahead_s"))
    block = os.urandom(1 << 20)
    try:
        if size > SMALL_BYTES:
            seconds = _write(name, block, size)
            facts["write_MBps"] = round(size / seconds / 1e6, 1)
            facts["read_MBps"] = round(size / _read(name, block, size) / 1e6, 1)
        times = [_write(name, block[:SMALL_BYTES], SMALL_BYTES) for _ in range(repeats)]
        facts["small_file_s"] = round(sorted(times)[len(times) // 2], 5)
        _read(name, block[:SMALL_BYTES], SMALL_BYTES)
        before = time.time()
        os.utime(name)
        facts["server_clock_ahead_s"] = round(name.stat().st_mtime - (before + time.time()) / 2, 3)
    except (OSError, ValueError) as error:
        problem = str(error)
        for left in (name, name.with_suffix(".tmp")):
            with suppress(OSError):
                left.unlink()
    return {"problem": problem, **facts}


def _write(name: Path, block: bytes, size: int) -> float:
    start, part = time.monotonic(), name.with_suffix(".tmp")
    with open(part, "wb", buffering=0) as stream:
        for _ in range(max(1, size // len(block))):
            rest = memoryview(block)
            while rest:  # a disk that fills up takes a part, and says why at the next attempt
                rest = rest[stream.write(rest) :]
        os.fsync(stream.fileno())
    part.rename(name)
    fsync_dir(name.parent)
    return max(time.monotonic() - start, 1e-6)


def _read(name: Path, block: bytes, size: int) -> float:
    """Reads past the page cache where the system allows it, and compares."""
    start = time.monotonic()
    with open(name, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        want, done = hashlib.blake2b(block).digest(), 0
        while part := stream.read(len(block)):
            done += len(part)
            if hashlib.blake2b(part).digest() != want:
                raise ValueError("what was read back is not what was written")
    if done != max(1, size // len(block)) * len(block):
        raise ValueError(f"{done} bytes were read back where {size} had been written")
    return max(time.monotonic() - start, 1e-6)


def stripe_count(folder: Path) -> int | None:
    """Default stripe count of a Lustre folder; None if ``lfs`` cannot tell."""
    lfs = shutil.which("lfs")
    if lfs is None:
        return None
    try:
        done = subprocess.run([lfs, "getstripe", "-d", "-c", str(folder)], capture_output=True, text=True, timeout=10)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
