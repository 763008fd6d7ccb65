"""What the environment tells about the launcher (mpirun, srun, ...), before any MPI library is touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

OVERRIDE = "CRYOISO_MPI"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

SRUN_REMEDY = "'srun --mpi=pmi2' with MPICH, 'srun --mpi=pmix' with Open MPI, or mpirun inside the allocation"


@dataclass(frozen=True)
class Launcher:
    """How this process was started. ``size``, ``rank`` and ``local_size`` are None where the launcher does not say."""

    name: str
    size: int | None
    rank: int | None
    local_size: int | None


# Innermost launcher first: mpirun inside a Slurm step sets its own variables beside those of the step.
_KNOWN = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI (MPICH, Intel MPI, Cray MPICH)", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    ("PALS", "PALS_SIZE", "PALS_RANKID", "PALS_LOCAL_SIZE"),
)


def find_launcher(env: Mapping[str, str] | None = None) -> Launcher | None:
    """The launcher that started this process, or None for a plain command. Pure: reads the environment only.

    A batch script's own shell also has SLURM_NTASKS; only inside a step (srun) is SLURM_STEP_ID set beside a task rank.
    """
    env = os.environ if env is None else env
    if env.get(OVERRIDE, "") == "0":
        return None
    for name, size, rank, local in _KNOWN:
        if size in env:
            return Launcher(name, _int(env, size), _int(env, rank), _int(env, local))
    step_size = _int(env, "SLURM_STEP_NUM_TASKS") or _int(env, "SLURM_NTASKS")
    in_step = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    if in_step and step_size is not None:
        return Launcher("srun", step_size, _int(env, "SLURM_PROCID"), None)
    if "PMIX_RANK" in env:
        return Launcher("PMIx", None, _int(env, "PMIX_RANK"), None)
    if "PALS_RANKID" in env:
        return Launcher("PALS", None, _int(env, "PALS_RANKID"), None)
    if "MPI_LOCALNRANKS" in env:
        return Launcher("MPICH", None, None, _int(env, "MPI_LOCALNRANKS"))
    if env.get(OVERRIDE, "") == "1":
        return Launcher(f"{OVERRIDE}=1", None, None, None)
    return None


def wants_mpi(launcher: Launcher | None, env: Mapping[str, str] | None = None) -> bool:
    """Whether to load MPI: there is a launcher and it started (or may have started) more than one rank."""
    env = os.environ if env is None else env
    return launcher is not None and (launcher.size != 1 or env.get(OVERRIDE, "") == "1")


def in_srun(env: Mapping[str, str] | None = None) -> bool:
    """Whether Slurm's srun started this process itself; mpirun inside a job starts its helpers with srun as well."""
    env = os.environ if env is None else env
    return "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and "OMPI_COMM_WORLD_SIZE" not in env


def doubt(library: str, env: Mapping[str, str] | None = None) -> str:
    """Why this MPI library will probably end the process when it looks for the other ranks under srun; else empty.

    Args:
        library: what it calls itself.
    """
    env = os.environ if env is None else env
    if not in_srun(env):
        return ""
    offered = "pmix" if "PMIX_RANK" in env else "pmi2" if "PMI_RANK" in env else "none"
    wanted = "pmix" if library.startswith("Open MPI") else "pmi2" if library.startswith("MPICH") else offered
    if offered == wanted or (wanted == "pmi2" and offered == "none"):  # MPICH runs alone then, which is found out later
        return ""
    name = library.split(",")[0]
    return f"srun offers {offered}, {name} usually wants {wanted}. If MPI fails now, use {SRUN_REMEDY}."


def speaks() -> bool:
    """Whether this process should print what all ranks would say alike, as far as the launcher alone can tell."""
    launcher = find_launcher()
    return launcher is None or not launcher.rank


def user_set_threads(env: Mapping[str, str] | None = None) -> bool:
    """Whether the user chose the number of threads."""
    env = os.environ if env is None else env
    return bool(env.get("OMP_NUM_THREADS")) and env.get("CRYOISO_THREADS_SET") != "1"


def thread_count() -> int:
    """Threads that a rank computes with: OMP_NUM_THREADS (of a list the first), else the cores it may run on."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() else len(os.sched_getaffinity(0))


def set_threads(count: int) -> None:
    """Gives numerical libraries, loaded or still to come, ``count`` threads; a user's OMP_NUM_THREADS wins."""
    if user_set_threads():
        return
    os.environ["CRYOISO_THREADS_SET"] = "1"
    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    if "numba" in sys.modules:
        numba = sys.modules["numba"]
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


def limit_threads_early() -> None:
    """Before numpy is loaded: a cautious share of the cores, so that R ranks of a node start no R x cores threads.

    Threads that wait sleep: OpenMP's default is to spin, which on a shared node takes the cores from those at work.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if user_set_threads():
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
        return
    launcher = find_launcher()
    if launcher is not None and launcher.local_size:
        set_threads(max(1, len(os.sched_getaffinity(0)) // launcher.local_size))


def _int(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdigit() else None
