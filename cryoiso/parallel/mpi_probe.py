"""What MPI this environment has, found out without touching MPI in this process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

_ASK = """
import json, warnings
warnings.simplefilter("ignore")
import mpi4py
def loaded():
    paths = sorted({line.split()[-1] for line in open("/proc/self/maps") if "libmpi" in line and "/" in line})
    return next((path for path in paths if "libmpi_abi" in path), paths[0] if paths else "")
try:
    from mpi4py import MPI
except ImportError:
    if "libmpi_abi" not in loaded():
        raise
    why = f"mpi4py {mpi4py.__version__} has no module for the standard MPI ABI, which it found as {loaded()}"
    print(json.dumps({"mpi4py": mpi4py.__version__, "path": loaded(), "abi": True, "error": why}))
    raise SystemExit
library = MPI.Get_library_version().split(chr(10))[0].strip(chr(0) + " ")
print(json.dumps({"mpi4py": mpi4py.__version__, "library": library, "path": loaded(), "abi": "libmpi_abi" in loaded()}))
"""
OPEN_MPI, MPICH = "Open MPI", "MPICH"
"""Families of MPI libraries and launchers; ranks of one do not see each other under the launcher of the other."""
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_STEP", "SLURM_PROCID", "MPI_LOCAL", "HYDRA_", "PALS_")


def outside_launcher() -> dict[str, str]:
    """This environment without what an MPI launcher put there, for starting programs of their own."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_PREFIXES)}


def probe_mpi(timeout: float = 60.0) -> dict[str, Any]:
    """Which MPI library mpi4py loads and which mpirun belongs to it; ``error`` says why there is none.

    ``abi``: it is ``libmpi_abi``, the library of the standard ABI of MPI 5, which Open MPI and MPICH offer beside
    their own. mpi4py has a separate module for it, which not all of its wheels contain.
    """
    beside = Path(sys.executable).parent / "mpirun"
    facts: dict[str, Any] = {"mpirun": str(beside) if beside.exists() else shutil.which("mpirun") or ""}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=timeout, env=outside_launcher()
        )
    except subprocess.TimeoutExpired:
        return {**facts, "error": f"loading MPI took more than {timeout:.0f} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {**facts, "error": lines[-1] if lines else f"exit status {done.returncode}"}
    return {**facts, **json.loads(done.stdout.strip().splitlines()[-1])}


def family_of_library(said: str) -> str:
    """OPEN_MPI or MPICH (and its kin: Intel, Cray, MVAPICH) by what a library says of itself; empty if it is another.

    >>> family_of_library("Open MPI v5.0.6, package: ..."), family_of_library("MPICH Version: 4.2.3")
    ('Open MPI', 'MPICH')
    """
    if re.search(r"Open ?MPI|OpenRTE|PRRTE|prte", said):
        return OPEN_MPI
    return MPICH if re.search(r"HYDRA|MPICH|Intel\(R\) MPI|MVAPICH", said, re.IGNORECASE) else ""


def family_of_launcher(mpirun: str, timeout: float = 20.0) -> str:
    """The same of an ``mpirun``, by its --version."""
    try:
        done = subprocess.run(
            [mpirun, "--version"], capture_output=True, text=True, timeout=timeout, env=outside_launcher()
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return family_of_library(done.stdout + done.stderr)
