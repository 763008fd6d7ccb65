"""Which RELION is installed, and the mpirun that starts its MPI programs.

RELION's MPI is seldom the one that this program's ranks run on, and the first ``mpirun`` on the PATH is often that of
the wrong one: every process would then be a RELION of its own. So the library that the program is linked to decides.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryoiso.core.errors import MissingError
from cryoiso.engines.process import clean_environment
from cryoiso.parallel.mpi_probe import MPICH, OPEN_MPI, family_of_library


@dataclass(frozen=True)
class Relion:
    """A RELION program as it was found."""

    program: str
    version: str
    """e.g. "3.1.3"; empty if it does not say"""
    family: str
    """MPI that it is linked to, OPEN_MPI or MPICH (and its kin); empty if unknown"""
    library: str
    mpirun: str
    """of that MPI; empty if none was found"""

    @property
    def major(self) -> int:
        """3 where the version is not known."""
        match = re.match(r"\d+", self.version)
        return int(match[0]) if match else 3


@lru_cache(maxsize=4)
def find_relion(program: str = "relion_refine_mpi") -> Relion:
    """Looks for RELION's refinement program.

    Raises:
        MissingError: it is not on the PATH.
    """
    path = shutil.which(program)
    if path is None:
        raise MissingError(
            f"{program} is not on the PATH. Load RELION's module, or name the program with its path (relion.program); "
            "'cryoiso doctor' shows what is found.",
            code="program-missing",
        )
    libraries = _ask(["ldd", path])
    family, library = _mpi_of(libraries)
    said = _ask([path, "--version"])
    if not said.strip():  # MPI programs may refuse to start without a launcher
        sister = shutil.which("relion_refine", path=f"{Path(path).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        said = _ask([sister, "--version"]) if sister else ""
    match = re.search(r"version:?\s*([0-9][\w.\-]*)", said, re.IGNORECASE)
    return Relion(path, match[1] if match else "", family, library, _mpirun_of(family, library))


def _ask(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=clean_environment())
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def _mpi_of(libraries: str) -> tuple[str, str]:
    """Family and path of the MPI library in the output of ldd."""
    lines = [line.strip() for line in libraries.splitlines()]
    paths = [line.split("=>")[1].split("(")[0].strip() for line in lines if "libmpi" in line and "=>" in line]
    named = [path for path in paths if re.search(r"/libmpi(ch|_abi)?\.so", path)]
    library = (named or paths or [""])[0]
    if re.search(r"libopen-(rte|pal)|libmpi\.so\.(20|40)|libmpi_cxx\.so\.(20|40)", libraries):
        return OPEN_MPI, library
    if "/libmpi_abi.so" in library:  # Open MPI and MPICH both have one: their mpirun tells
        beside = Path(library).resolve().parents[1] / "bin" / "mpirun"
        return _family_of(str(beside)) or MPICH, library
    return (MPICH, library) if library else ("", "")


def _mpirun_of(family: str, library: str) -> str:
    """The mpirun of an MPI: the one beside its library, else the first on the PATH that says it belongs to it."""
    if not family:
        return ""
    folders = [str(above / "bin") for above in list(Path(library).resolve().parents)[:5]]
    names = ("mpirun.openmpi", "mpirun") if family == OPEN_MPI else ("mpirun.mpich", "mpiexec.hydra", "mpirun")
    for folder in [*folders, *os.environ.get("PATH", "").split(os.pathsep)]:
        for name in names:
            path = shutil.which(name, path=folder) if folder else None
            if path and _family_of(path) == family:
                return path
    return ""


def _family_of(mpirun: str) -> str:
    return family_of_library(_ask([mpirun, "--version"]))
