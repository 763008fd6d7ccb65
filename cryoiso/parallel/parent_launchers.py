"""Launchers among this process's ancestors.

A launcher tells its ranks of each other by environment variables. If something on the way empties the environment
(``apptainer exec --cleanenv``, ``env -i``), every rank takes itself for the only one. The process tree still knows.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

LAUNCHERS = ("mpirun", "mpiexec", "hydra_pmi", "orted", "orterun", "prte", "slurmstepd", "palsd")
"""How the names of processes begin that start ranks as their children."""


def hidden_launcher(pid: int | None = None, proc: Path = Path("/proc")) -> tuple[str, int] | None:
    """The launcher that started this process beside others of this host, and how many it started here.

    None where there is no launcher, where it started nothing else here, and where the process tree cannot be seen
    (no /proc, or a container with process numbers of its own, as ``apptainer exec --containall`` makes it).

    Args:
        pid: process to begin with; default: this one.
        proc: where the kernel shows its processes.
    """
    pid = os.getpid() if pid is None else pid
    for _ in range(100):
        name, parent = _name_and_parent(proc / str(pid))
        if name.startswith(LAUNCHERS):
            return _if_several(name, _children(pid, proc))
        if parent <= 0:
            return None
        pid = parent
    return None


def _if_several(name: str, children: int) -> tuple[str, int] | None:
    return (name, children) if children > 1 else None


def _name_and_parent(folder: Path) -> tuple[str, int]:
    """Name (at most 15 letters) and parent of a process; "" and 0 where it cannot be read."""
    try:
        text = (folder / "stat").read_text(errors="replace")
    except OSError:
        return "", 0
    match = re.search(r"\((.*)\) \S (\d+)", text, re.DOTALL)  # the name may hold brackets and blanks itself
    return (match[1], int(match[2])) if match else ("", 0)


def _children(pid: int, proc: Path) -> int:
    return sum(_name_and_parent(folder)[1] == pid for folder in proc.iterdir() if folder.name.isdigit())
