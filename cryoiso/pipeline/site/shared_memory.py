"""Shared-memory files that killed MPI jobs left on a host; they take its memory until somebody removes them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryoiso.parallel.context import Context
from cryoiso.pipeline.finding import NOTE, WARNING, Finding, gib

SHM = Path("/dev/shm")
PROC = Path("/proc")
OF_MPI = re.compile(r"(mpich_shm_|vader_segment\.|sm_segment\.|psm2?_shm|psm3_shm|ucx_shm_|cray-shared-mem)")
"""Names that MPICH, Open MPI, Intel's PSM, UCX and Cray MPICH give to the memory that ranks of a host share."""
YOUNG_S = 60.0
"""A file may be younger than the mappings that were looked at."""
MUCH_BYTES = 2**30


def abandoned(shm: Path = SHM, proc: Path = PROC) -> list[dict[str, Any]]:
    """This user's shared-memory files of MPI jobs that no visible process has mapped.

    MPICH and Open MPI remove theirs when a job ends, not when its processes are killed with SIGKILL.

    Returns:
        ``path``, ``bytes`` and ``age_s`` of each, the oldest first.
    """
    files = {}
    with suppress(OSError):
        for entry in os.scandir(shm):
            with suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                age_s = time.time() - about.st_mtime
                if OF_MPI.match(entry.name) and about.st_uid == os.getuid() and age_s > YOUNG_S:
                    files[entry.path] = {"path": entry.path, "bytes": about.st_blocks * 512, "age_s": round(age_s)}
    if files:
        for path in _in_use(proc):
            files.pop(path, None)
    return sorted(files.values(), key=lambda file: -file["age_s"])


def _in_use(proc: Path) -> Iterator[str]:
    """Files that a process of this user has mapped."""
    for process in proc.glob("[0-9]*"):
        with suppress(OSError):
            for line in (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
                if "/" in line:
                    yield line[line.index("/") :]


def look_for_abandoned(comm: Context) -> dict[str, list[dict[str, Any]]]:
    """Host -> its abandoned files, on every rank. Collective."""
    own_files = (comm.hostname, abandoned()) if comm.local_rank == 0 else None
    return dict(entry for entry in comm.allgather(own_files) if entry is not None)


def shared_memory_findings(facts: dict[str, Any]) -> Iterator[Finding]:
    """What is to be said of the files that ``look_for_abandoned`` found."""
    for host, files in facts.get("shared_memory", {}).items():
        if not files:
            continue
        total = sum(file["bytes"] for file in files)
        names = ", ".join(file["path"] for file in files[:3]) + (", ..." if len(files) > 3 else "")
        yield Finding(
            "shared memory",
            WARNING if total > MUCH_BYTES else NOTE,
            f"{len(files)} file(s) of MPI jobs of yours that were killed hold {gib(total)} of memory on {host}: "
            f"{names}",
            "If none of your jobs runs there (a job in a container with process numbers of its own cannot be seen "
            "from here), remove them with rm.",
        )
