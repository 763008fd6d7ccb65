"""How a batch script starts the ranks: srun with the right --mpi, or mpirun."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from cryoiso.core.commands import fill_words, split_command
from cryoiso.core.config import LaunchSection
from cryoiso.core.errors import MissingError, UsageError
from cryoiso.parallel.mpi_probe import outside_launcher, probe_mpi

_FLAVOURS = (("Open MPI", "pmix"), ("MPICH", "pmi2"))
"""What the name of an MPI library begins with, and the --mpi of srun that it understands."""


@dataclass(frozen=True)
class RankLauncher:
    """How the ranks are started."""

    prefix: tuple[str, ...]
    """srun or mpirun with arguments; empty for one rank without a launcher"""
    flavour: str
    """--mpi of srun; mpirun; empty without a launcher"""
    why: str
    """for people"""

    @property
    def srun(self) -> bool:
        return self.flavour not in ("", "mpirun")


def how_to_start(section: LaunchSection, ranks: int, ranks_per_node: int) -> RankLauncher:
    """The launcher for a job.

    Raises:
        UsageError: srun without Slurm; a key in mpirun that is not known.
        MissingError: it is to be found out from the MPI library, and there is none.
    """
    if section.mpi not in ("auto", "mpirun") and section.scheduler != "slurm":
        raise UsageError(
            f"launch.mpi = '{section.mpi}' is an --mpi of Slurm's srun; with {section.scheduler}: mpirun",
            code="options-conflict",
        )
    if ranks == 1 and (section.mpi == "mpirun" or section.scheduler != "slurm"):
        return RankLauncher((), "", "one rank, no launcher")
    library = _library(section)
    flavour, why = _flavour(section, library)
    if flavour != "mpirun":
        words = ("srun", f"--mpi={flavour}", f"--ntasks={ranks}", f"--ntasks-per-node={ranks_per_node}",
                 f"--cpus-per-task={section.cpus_per_rank}")  # fmt: skip
        return RankLauncher(words, flavour, why)
    return RankLauncher(_mpirun(section, library, ranks, ranks_per_node), "mpirun", why)


def _library(section: LaunchSection) -> str:
    """Name and version of the MPI library of this installation, where it is needed; else empty.

    Raises:
        MissingError: it is needed and there is none.
    """
    asked = section.mpi == "auto" and section.scheduler == "slurm"
    if section.image or not (asked or (section.nodes > 1 and not section.mpirun)):
        return ""
    facts = probe_mpi()
    if facts.get("error") and asked:
        raise MissingError(
            f"no MPI library could be loaded here, so it is not known how ranks are started ({facts['error']}). Load "
            "the modules that the job will load, or set launch.mpi (--mpi) to mpirun, pmix or pmi2.",
            code="mpi-missing",
        )
    return " ".join(str(facts.get("library", "")).replace("Version:", "").split())


def _flavour(section: LaunchSection, library: str) -> tuple[str, str]:
    if section.mpi != "auto":
        return section.mpi, f"launch.mpi = {section.mpi}"
    if section.scheduler != "slurm":
        return "mpirun", f"{section.scheduler}: mpirun"
    if section.image:
        return "pmix", "an image: srun --mpi=pmix; set launch.mpi if its MPI is not Open MPI"
    flavour = next((flavour for name, flavour in _FLAVOURS if library.startswith(name)), "mpirun")
    known = _srun_knows()
    if known and flavour not in known:
        return "mpirun", f"{library}: mpirun, for this srun has no --mpi={flavour}"
    return flavour, f"{library}: " + ("mpirun" if flavour == "mpirun" else f"srun --mpi={flavour}")


def _srun_knows() -> set[str]:
    """What the --mpi of this machine's srun can be; empty where there is no srun, or it cannot tell just now."""
    if shutil.which("srun") is None:
        return set()
    try:
        done = subprocess.run(
            ["srun", "--mpi=list"], capture_output=True, text=True, timeout=30, env=outside_launcher(), check=False
        )
    except subprocess.TimeoutExpired:
        return set()
    if done.returncode != 0:
        return set()
    return set((done.stdout + done.stderr).replace(",", " ").split())


def _mpirun(section: LaunchSection, library: str, ranks: int, ranks_per_node: int) -> tuple[str, ...]:
    placed = ""
    if section.nodes > 1:
        placed = " --map-by ppr:{ranks_per_node}:node" if library.startswith("Open MPI") else ""
        placed = " -ppn {ranks_per_node}" if library.startswith(("MPICH", "Intel")) else placed
    text = section.mpirun or "mpirun -n {ranks}" + placed
    values = {"ranks": ranks, "ranks_per_node": ranks_per_node, "nodes": section.nodes}
    return tuple(fill_words(split_command(text, "launch.mpirun"), values, "launch.mpirun"))
