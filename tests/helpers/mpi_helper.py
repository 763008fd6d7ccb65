"""Runs a small Python script under mpirun, from tests: ``run_mpi(3, "print(...)")``."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from forks_helper import python

ROOT = Path(__file__).resolve().parents[2]
ENDS_ALL = """
def end_all(*error):
    sys.__excepthook__(*error)
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and MPI.COMM_WORLD.size > 1:
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
sys.excepthook = end_all
"""
"""Before a script: an error of one rank ends all, as in cryoiso (``parallel.abort``). Else the others wait for it in
MPI, and it for them in MPI_Finalize."""


def find_mpirun() -> str | None:
    """mpirun beside this Python first (an MPI wheel lives there), else the one on the PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def mpi_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread a rank; Open MPI is told that root and more ranks than cores are meant (MPICH needs nothing)."""
    env = dict(os.environ)
    env.update(
        OMP_NUM_THREADS="1",
        NUMBA_NUM_THREADS="1",
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        OMPI_MCA_rmaps_base_oversubscribe="1",
        PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe",
        OMPI_MCA_hwloc_base_binding_policy="none",
        PRTE_MCA_hwloc_default_binding_policy="none",
        OMPI_MCA_mpi_yield_when_idle="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )
    env.pop("PYTHONUNBUFFERED", None)  # a print() of one rank stays one line among those of the others
    env.update(extra or {})
    return env


def start_mpi(
    n: int, script: str | Sequence[str | Path], env: Mapping[str, str] | None = None, forks: bool = True, **popen
) -> subprocess.Popen[str]:
    """Starts ``script`` on n ranks and returns at once; see ``run_mpi``. The job has a process group of its own."""
    before = f"import sys; exec({ENDS_ALL!r}, dict(sys=sys))\n"
    command = ["-c", before + script] if isinstance(script, str) else [str(part) for part in script]
    mpirun = find_mpirun()
    if mpirun is None:
        raise RuntimeError("no mpirun: mark the test with pytest.mark.mpi")
    return subprocess.Popen(
        [mpirun, "-n", str(n), python() if forks else sys.executable, *command],
        env=mpi_environment(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, **popen,
    )  # fmt: skip


def run_mpi(
    n: int,
    script: str | Sequence[str | Path],
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    *,
    forks: bool = True,
    check: bool = True,
    **popen,
) -> subprocess.CompletedProcess[str]:
    """Runs a script on n ranks.

    Args:
        script: Python source, or the arguments of the Python interpreter, e.g. ["-m", "cryoiso.cli.main", "doctor"].
        timeout: seconds after which all ranks are killed and TimeoutExpired is raised.
        env: variables added to the environment.
        forks: the ranks are forks that have imported everything, see ``forks_helper``; else each starts a Python.
        check: raise AssertionError, with what the ranks printed, unless the exit status is 0.
        popen: further arguments of subprocess.Popen, e.g. cwd.
    """
    process = start_mpi(n, script, env, forks, **popen)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if check and process.returncode != 0:
        raise AssertionError(f"exit status {process.returncode} on {n} ranks\n--- stdout\n{out}\n--- stderr\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@functools.cache
def why_no_mpi() -> str:
    """Empty if mpirun starts two ranks that see each other, else the reason why not."""
    if find_mpirun() is None:
        return "no mpirun: pip install '.[mpich]'"
    try:
        done = run_mpi(2, "from mpi4py import MPI; print('ranks', MPI.COMM_WORLD.size)", 60, check=False)
    except subprocess.TimeoutExpired:
        return f"{find_mpirun()} hangs"
    if done.returncode != 0 or done.stdout.count("ranks 2") != 2:
        tail = (done.stdout + done.stderr)[-200:].strip()
        return f"{find_mpirun()} and mpi4py's MPI library do not fit together: {tail}"
    return ""


@contextmanager
def turn(name: str) -> Iterator[None]:
    """One test process at a time has what this machine has only once; the others wait."""
    with open(Path(tempfile.gettempdir()) / f"cryoiso-tests-{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def network_hosts(shared: Path) -> Iterator[list[str]]:
    """Two network hosts of this machine, n1 and n2, for ``vnode``; taken down afterwards. A loud skip where there are
    none."""
    script = shared / "tools" / "netns-nodes.sh"
    if os.getuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))) or not script.exists():
        pytest.skip("LOUD: two network hosts need root, ip, unshare, nsenter and tools/netns-nodes.sh")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the hosts live on and would hold a pipe open
    with turn("hosts"):
        if Path("/run/vnodes").exists():
            pytest.skip("LOUD: somebody else uses the network namespaces n1 and n2")
        try:
            if subprocess.run(["bash", str(script), "up", "2"], **quiet).returncode != 0:
                pytest.skip("LOUD: this machine does not let network namespaces be made")
            yield ["n1", "n2"]
        finally:
            subprocess.run(["bash", str(script), "down", "2"], **quiet)
