"""What a run was done with: program, packages, processors, GPUs, MPI library, container and batch job."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cryoiso
from cryoiso.core import batch_system
from cryoiso.parallel.context import Context
from cryoiso.parallel.launcher import thread_count

PACKAGES = (
    *(
        "torch",
        "numpy",
        "scipy",
        "numba",
        "h5py",
        "mrcfile",
        "starfile",
        "pandas",
        "pyarrow",
        "gemmi",
        "mpi4py",
        "matplotlib",
    ),
    *("pydantic", "typer"),
)
LABELS = Path("/.singularity.d/labels.json")
"""Where Apptainer and Singularity keep the labels of an image, its build date among them."""


def describe(comm: Context, device: str) -> dict[str, Any]:
    """Everything about the machine and the program that a start of a run notes (rank 0's is whole). Collective."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "git": git_state(Path(cryoiso.__file__).parent.parent) if comm.rank == 0 else {},
        "container": container(),
        "scheduler": batch_job(),
        "ranks": comm.size,
        "machine": comm.allgather({"host": comm.hostname, "cpu": cpu_model(), "device": device, **gpu(device)}),
        "threads": thread_count(),
        "mpi": comm.library(),
    }


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of packages, those that numbers may depend on; empty text for one that is not there."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    return versions


def git_state(checkout: Path) -> dict[str, Any]:
    """Commit of the checkout that the program runs from, and whether files differ from it; empty if there is none."""
    if not (checkout / ".git").exists():
        return {}
    said = []
    for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(
                ["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=20, check=True
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return {}
        said.append(done.stdout.strip())
    return {"commit": said[0], "changed_files": len(said[1].splitlines())}


def container(env: Mapping[str, str] | None = None, labels: Path = LABELS) -> dict[str, Any]:
    """The container image that the program runs in; empty outside of one.

    The image's SHA-256 is not made here, since that may take a minute; CRYOISO_IMAGE_DIGEST gives it at once.
    """
    env = os.environ if env is None else env
    image = env.get("APPTAINER_CONTAINER") or env.get("SINGULARITY_CONTAINER") or ""
    digest = env.get("CRYOISO_IMAGE_DIGEST", "")
    if not image and not digest:
        kinds = {"/.dockerenv": "Docker", "/run/.containerenv": "Podman"}
        return next(({"kind": kind} for file, kind in kinds.items() if Path(file).exists()), {})
    facts: dict[str, Any] = {"kind": "Apptainer"} if image else {}
    facts |= {key: value for key, value in (("image", image), ("digest", digest)) if value}
    with suppress(OSError):
        status = os.stat(image)
        facts["bytes"], facts["modified_ns"] = status.st_size, status.st_mtime_ns
    with suppress(OSError, ValueError):
        facts["labels"] = json.loads(labels.read_text(encoding="utf-8"))
    return facts


def batch_job(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The batch job that the program runs in, as its batch system tells; empty outside of one."""
    system, facts = batch_system.current(env), batch_system.job_facts(env)
    if system is None:
        return {}
    if "nodes" in facts and os.path.isfile(facts["nodes"]):
        with suppress(OSError):
            lines = Path(facts["nodes"]).read_text(encoding="utf-8").splitlines()
            facts["nodes"] = ",".join(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
    return {"name_of_system": system.title, **facts}


def cpu_model() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "cpu model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def computes_on(device: str) -> str:
    """Processor and threads, or the GPU, for people who read numbers that were measured on it."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_properties(device).name
    return f"{cpu_model()}, {thread_count()} thread(s)"


def gpu(device: str) -> dict[str, Any]:
    """Name, memory, driver and CUDA version of a rank's GPU; empty on a CPU."""
    if not device.startswith("cuda"):
        return {}
    import torch

    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {"gpu": properties.name, "gpu_GiB": round(properties.total_memory / 2**30, 1)}
    facts["cuda"] = str(torch.version.cuda or torch.version.hip or "")
    with suppress(OSError):
        facts["driver"] = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].strip()
    return facts
