"""What all benchmarks share: start programs, count their CPU seconds and memory, describe the machine, write tables."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import forked

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
CRYOISO = (sys.executable, "-m", "cryoiso.cli.main")


@dataclass(frozen=True)
class Cost:
    """What a finished process and all that it started have used."""

    cpu_s: float
    """User and system time of the whole process tree: the figure of merit, a loaded machine changes it least."""
    of_which_system_s: float
    wall_s: float
    peak_mib: float
    """Largest resident size of any one process of the tree."""

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


class Failed(RuntimeError):
    """A program ended with a status other than 0."""


def measure(argv: Sequence[object], log: Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Cost:
    """Runs a program with one thread a process, its output in ``log``.

    Raises:
        Failed: with the last lines of its output.
    """
    words = [str(a) for a in argv]
    started = time.monotonic()
    if forked.ready and words[:2] == [sys.executable, "-m"] and cwd is None and env is None:
        status, usage = forked.run(words[2:], log)
        code = os.waitstatus_to_exitcode(status)
    else:
        variables = {**environment(), **(env or {})}
        with open(log, "wb") as out:
            child = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env=variables)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = code = os.waitstatus_to_exitcode(status)
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise Failed(f"{' '.join(words[:4])} ... ended with {code}:\n{tail}")
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(cpu, usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / 1024)


def environment() -> dict[str, str]:
    """One thread a process, this repository importable, byte code kept as an installed package has it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    path = os.pathsep.join(p for p in (str(REPO), env.get("PYTHONPATH", "")) if p)
    return {**env, **ONE_THREAD, "PYTHONPATH": path}


REPLACING = (
    "reconstruct", "refine", "realign", "classify", "micelle", "correct", "ctf-refine", "rebalance", "symmetry",
    "auxiliary",
)  # fmt: skip
"""Commands that refuse to replace an earlier result in --out."""


def cryoiso(command: str, *arguments: object, log: Path, cwd: Path | None = None) -> Cost:
    """Runs a command of this repository's cryoiso in a process of its own; a result of an earlier run is replaced."""
    replace = ("--overwrite",) if command in REPLACING and "--resume" not in arguments else ()
    return measure([*CRYOISO, command, *arguments, *replace], log, cwd)


def open_mpi() -> list[str] | None:
    """Start of an mpirun command of the Open MPI that RELION was built with, or None."""
    found = shutil.which("mpirun.openmpi") or shutil.which("mpirun")
    if found is None:
        return None
    return [found, *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "--oversubscribe", "--bind-to", "none"]


def skip(reason: str) -> None:
    """Says loudly what is left out."""
    print(f"\n*** SKIPPED: {reason} ***\n", file=sys.stderr, flush=True)


def repeat(times: int, once: Callable[[], Cost]) -> Cost:
    """The cheapest of several runs: other users of the machine only ever add to the cost."""
    return min((once() for _ in range(times)), key=lambda cost: cost.cpu_s)


def machine() -> dict[str, Any]:
    """Processor, memory and versions."""
    import numba
    import numpy
    import torch

    from cryoiso import __version__

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": round(memory, 1),
        "system": platform.platform(aliased=True, terse=True),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "numba": numba.__version__,
        "cryoiso": __version__,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; None becomes a dash."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join("-" if v is None else str(v) for v in row) + " |" for row in rows]
    return "\n".join(lines)


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {path}", file=sys.stderr)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Exclusive lock of a folder, or of a file made for it, between threads and processes."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The given folder, kept; else a temporary one, removed at the end."""
    import tempfile

    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="cryoiso-benchmark-") as name:
        yield Path(name)
