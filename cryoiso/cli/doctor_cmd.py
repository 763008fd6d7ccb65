"""``cryoiso doctor``: what this machine has of what the program can use."""

from __future__ import annotations

import json
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGES = (
    "torch", "numpy", "scipy", "numba", "h5py", "mrcfile", "starfile", "pandas", "gemmi", "mpi4py", "matplotlib"
)  # fmt: skip


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder that runs would be written to.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Check the machine and the installation.

    Tells versions, MPI library, GPUs, RELION, memory and free space. Under mpirun or srun it also checks that all ranks
    see each other.
    """
    from cryoiso.parallel.context import get_context

    ctx = get_context()
    mine = {"rank": ctx.rank, "host": ctx.hostname, "threads": _threads(), "gpus": _gpus()}
    ranks = ctx.allgather(mine)
    if ctx.rank:
        return
    facts = {
        "cryoiso": _cryoiso(),
        "mpi": {**_mpi(), "ranks": ctx.size, "hosts": {h: len(r) for h, r in ctx.nodes.items()}},
        "ranks": ranks,
        "relion": _relion(),
        "memory_GiB": _memory_gib(),
        "free_space_GiB": _free_gib(folder),
    }
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts, folder)))


def _cryoiso() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    from cryoiso import __version__

    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = ""
    return {"version": __version__, "python": platform.python_version(), "packages": packages}


def _mpi() -> dict[str, Any]:
    from cryoiso.parallel.launcher import find_launcher
    from cryoiso.parallel.probe import probe_mpi

    launcher = find_launcher()
    return {**probe_mpi(), "launcher": launcher.name if launcher else ""}


def _threads() -> int:
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdigit() else len(os.sched_getaffinity(0))


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]


def _relion() -> dict[str, str]:
    """Which RELION there is, and the launcher that belongs to its MPI (often another one than this program's)."""
    from dataclasses import asdict

    from cryoiso.core.errors import MissingError
    from cryoiso.engines.relion.install import find_relion

    for program in ("relion_refine_mpi", "relion_refine"):
        with suppress(MissingError):
            return {key: str(value) for key, value in asdict(find_relion(program)).items()}
    return {}


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _free_gib(folder: Path) -> float | None:
    try:
        return round(shutil.disk_usage(folder).free / 2**30, 1)
    except OSError:
        return None


def _relion_lines(relion: dict[str, str]) -> list[str]:
    if not relion:
        return ["RELION       not found (needed for --engine relion only)"]
    lines = [f"RELION       {relion['version'] or 'version unknown'} ({relion['program']})"]
    if not relion["family"]:
        return [*lines, "             no relion_refine_mpi that is linked to an MPI: --engine relion needs one"]
    launcher = relion["mpirun"] or "no mpirun of it found: set relion.launcher"
    return [*lines, f"             its MPI: {relion['family']} ({relion['library']}), started by {launcher}"]


def _lines(facts: dict[str, Any], folder: Path) -> list[str]:
    own, mpi, ranks, relion = facts["cryoiso"], facts["mpi"], facts["ranks"], facts["relion"]
    missing = [name for name, version in own["packages"].items() if not version]
    lines = [
        f"cryoiso      {own['version']} on Python {own['python']}",
        "packages     " + ", ".join(f"{name} {version}" for name, version in own["packages"].items() if version),
    ]
    if missing:
        lines.append(f"             MISSING: {', '.join(missing)}; install cryoiso again with pip")
    if mpi.get("error"):
        lines.append(f"MPI          none: {mpi['error']}. For several ranks: pip install 'cryoiso[mpich]'")
    else:
        lines.append(f"MPI          {mpi['library']} ({mpi['path'] or 'path unknown'}), mpi4py {mpi['mpi4py']}")
    lines.append(f"mpirun       {mpi['mpirun'] or 'none found'}")
    hosts = ", ".join(f"{host} x {count}" for host, count in mpi["hosts"].items())
    launcher = f", started by {mpi['launcher']}" if mpi["launcher"] else ""
    lines.append(f"ranks        {mpi['ranks']} on {hosts}{launcher}")
    gpus = sorted({gpu for rank in ranks for gpu in rank["gpus"]})
    lines.append(f"threads      {', '.join(sorted({str(rank['threads']) for rank in ranks}))} a rank")
    lines.append(f"GPU          {'; '.join(gpus) if gpus else 'none: the CPU is used'}")
    lines += _relion_lines(relion)
    lines.append(f"memory       {facts['memory_GiB']} GiB on this host")
    free = facts["free_space_GiB"]
    lines.append(f"free space   {f'{free} GiB' if free is not None else 'no such folder'} in {folder.resolve()}")
    return lines
