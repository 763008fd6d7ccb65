"""What the ranks find on their machines: processors, memory, GPUs, limits, clocks. Facts only.

``checks`` judges them. Nothing here needs a run folder, and nothing stays behind.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryoiso.parallel.context import Context, asked_for_gpus
from cryoiso.parallel.launcher import thread_count
from cryoiso.pipeline.records.environment import package_versions
from cryoiso.pipeline.site.filesystem import look_at_folder
from cryoiso.pipeline.site.shared_memory import look_for_abandoned

PACKAGES = (
    "torch", "numpy", "scipy", "numba", "h5py", "mrcfile", "starfile", "pandas", "pyarrow", "gemmi", "mpi4py",
    "matplotlib",
)  # fmt: skip
INFINIBAND = Path("/sys/class/infiniband")


def look(comm: Context, folders: Sequence[tuple[str, Path]], *, thorough: bool) -> dict[str, Any]:
    """Facts of all ranks and of some folders, on every rank (collective).

    Args:
        folders: (what it is for, path); of a path that does not exist the nearest folder above is looked at.
        thorough: also find out what takes a second or more: MPI library, launchers, speed of the folders, RELION,
            shared memory that killed jobs left.
    """
    from cryoiso.parallel.launcher import find_launcher

    launcher = find_launcher()
    clocks = _clocks(comm)
    facts: dict[str, Any] = {
        "ranks": comm.allgather(_rank(comm)),
        "clock_spread_s": max(clocks) - min(clocks),
        "launcher": launcher.name if launcher else "",
        "folders": {name: look_at_folder(comm, path, thorough=thorough) for name, path in folders},
        "library": comm.library(),
    }
    if thorough:
        report = {"cryoiso": _program(), "mpi": _mpi(comm), "relion": _relion()} if comm.rank == 0 else None
        facts |= comm.bcast(report)
        facts["shared_memory"] = look_for_abandoned(comm)
    return facts


def _clocks(comm: Context) -> list[float]:
    """Every rank's clock at the same moment: what differs by more than the network's latency is set wrong."""
    comm.barrier()
    return comm.allgather(time.time())


def _rank(comm: Context) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    return {
        "rank": comm.rank,
        "host": comm.hostname,
        "threads": thread_count(),
        "cores": cores,
        "cores_of_host": os.cpu_count() or len(cores),
        **_gpus(comm),
        **memory(),
        "limits": {
            "open_files": _limit(resource.RLIMIT_NOFILE),
            "locked_memory_bytes": _limit(resource.RLIMIT_MEMLOCK),
        },
        "infiniband": INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
    }


def _limit(which: int) -> int | None:
    """Soft limit; None: none."""
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _gpus(comm: Context) -> dict[str, Any]:
    """The GPUs that this rank sees, and why it sees none where there is a driver."""
    import torch

    facts: dict[str, Any] = {
        "gpus": [],
        "driver": Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists(),
        "torch_gpu": torch.version.cuda or getattr(torch.version, "hip", None) or "",
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "asked": asked_for_gpus(),
        "why_none": "",
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        facts["why_none"] = str(caught[0].message).split(" (Triggered")[0] if caught else ""
        return facts
    count = torch.cuda.device_count()
    index = comm.local_rank % count if count else 0
    for number in range(count):
        gpu = torch.cuda.get_device_properties(number)
        device_facts = {"name": gpu.name, "total_bytes": gpu.total_memory, "id": str(getattr(gpu, "uuid", number))}
        if number == index and comm.device_preference != "cpu":  # asking for the others would take memory on each
            device_facts |= {"used_by_this_rank": True, "free_bytes": torch.cuda.mem_get_info(number)[0]}
        facts["gpus"].append(device_facts)
    return facts


def memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> dict[str, int | None]:
    """Memory of this host that is there, that is free, and that the batch system allows this job (None: all of it)."""
    values = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    free = values.get("MemAvailable", values.get("MemFree", values["MemTotal"]))
    return {
        "memory_bytes": values["MemTotal"],
        "memory_free_bytes": free,
        "memory_limit_bytes": _cgroup_limit(proc, cgroups, values["MemTotal"]),
    }


def _cgroup_limit(proc: Path, cgroups: Path, total: int) -> int | None:
    """Smallest memory limit of this process's control group and those above it; None if it is no less than all."""
    limits = []
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root, name = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
            here = root / path.lstrip("/")
            for folder in (here, *here.parents):
                with suppress(OSError, ValueError):
                    limits.append(int((folder / name).read_text()))
                if folder == root:
                    break
    return min(limits) if limits and min(limits) < total else None


def _program() -> dict[str, Any]:
    from cryoiso import __version__

    return {"version": __version__, "python": platform.python_version(), "packages": package_versions(PACKAGES)}


def _mpi(comm: Context) -> dict[str, Any]:
    """The library that mpi4py loads, and what the launchers at hand belong to."""
    from cryoiso.parallel.mpi_probe import family_of_launcher, family_of_library, probe_mpi

    facts = probe_mpi()
    path = shutil.which("mpirun") or ""
    launchers = [name for name in dict.fromkeys((facts["mpirun"], path)) if name]
    return {
        **facts,
        "ranks": comm.size,
        "hosts": {host: len(ranks) for host, ranks in comm.nodes.items()},
        "family": family_of_library(facts.get("library", "")),
        "mpirun_family": family_of_launcher(facts["mpirun"]) if facts["mpirun"] else "",
        "launchers": {name: family_of_launcher(name) for name in launchers},
        "first_on_path": path,
    }


def _relion() -> dict[str, str]:
    """Which RELION there is, and the launcher that belongs to its MPI (often another one than this program's)."""
    from dataclasses import asdict

    from cryoiso.core.errors import MissingError
    from cryoiso.engines.relion.install import find_relion

    for program in ("relion_refine_mpi", "relion_refine"):
        with suppress(MissingError):
            return {key: str(value) for key, value in asdict(find_relion(program)).items()}
    return {}
