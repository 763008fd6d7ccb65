"""Fixtures and switches for all tests.

Tests that need something of the outside (RELION, a GPU, mpirun, the folder of shared reference data) are skipped where
it is missing, and the end of the run says so in a box: a missing oracle must never look like a pass.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# also for the processes that tests start
HERE = [str(ROOT), str(ROOT / "tests" / "helpers")]
sys.path[:0] = HERE
import forks_helper  # noqa: E402 (lies in helpers)

os.environ["PYTHONPATH"] = os.pathsep.join([*HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("MPLBACKEND", "Agg")
# processes that compile all of cryoiso again and again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# the key that signs runs: not that of the user
os.environ["CRYOISO_STATE_DIR"] = str(Path(tempfile.gettempdir()) / f"cryoiso-tests-{os.getuid()}")
# numba's threads would become torch's as well, and the bits of this process others than those of a rank
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

LOUD = "LOUD: "


def shared_folder() -> Path:
    """Where the reference data lies: CRYOISO_SHARED, else the folder ``shared`` beside this repository."""
    return Path(os.environ.get("CRYOISO_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared reference data, or a loud skip."""
    folder = shared_folder()
    if not (folder / "data").is_dir():
        pytest.skip(f"{LOUD}no reference data at {folder}; set CRYOISO_SHARED to its folder")
    return folder


@pytest.fixture
def shared_data(shared: Path) -> Path:
    """Its sub-folder ``data``: particles, poses, maps, models and what other programs made of them."""
    return shared / "data"


@pytest.fixture(scope="session")
def reference_numbers() -> Path:
    """Our own half-maps and view files, with the numbers that other programs give for them: always there."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder of a simulated set of 40 particles with a job file; not written to."""
    from pipeline_helper import simulate

    return simulate(tmp_path_factory.mktemp("data")).parent


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A finished run of ``data``, made by stand-ins; not written to."""
    from pipeline_helper import forget_signals, quick_report, use_quick_parts

    from cryoiso.parallel.context import Context
    from cryoiso.pipeline.run import run_job

    with pytest.MonkeyPatch.context() as patch:
        use_quick_parts(patch)
        folder = run_job(data / "job.toml", tmp_path_factory.mktemp("runs") / "run", Context(), quick_report).path
    forget_signals()
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run elsewhere, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "elsewhere" / "copy"))


@pytest.fixture
def quick(monkeypatch):
    """Runs of this process use stand-ins for the slow parts."""
    from pipeline_helper import forget_signals, use_quick_parts

    use_quick_parts(monkeypatch)
    yield
    forget_signals()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--shapes", action="store_true", help="check the shapes that signatures name, in every call")
    parser.addoption("--costs", metavar="FILE", type=Path, help="append what every test costs, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--costs"):
        from costs_helper import Costs

        config.pluginmanager.register(Costs(config.getoption("--costs").resolve()))
    forks_helper.let_spawned_processes_be_forks()
    if config.getoption("--slow"):
        os.environ["CRYOISO_TEST_SLOW"] = "1"
    if config.getoption("--shapes"):
        import shapes_helper

        shapes_helper.install()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _missing(item: pytest.Item) -> str:
    """Why this test cannot run here; empty if it can."""
    if item.get_closest_marker("relion") and shutil.which("relion_refine") is None:
        return "RELION is not on the PATH (apt-get install relion)"
    if item.get_closest_marker("slurm"):
        from slurm_helper import why_no_slurm_here

        if why := why_no_slurm_here():
            return why
    if item.get_closest_marker("mpi"):
        from mpi_helper import why_no_mpi

        if why := why_no_mpi():
            return why
    if item.get_closest_marker("apptainer"):
        if shutil.which("apptainer") is None:
            return "apptainer is not on the PATH"
        if not Path(os.environ.get("CRYOISO_IMAGE", "")).is_file():
            return "no container image: build one (containers/build.sh) and name it in CRYOISO_IMAGE"
    if item.get_closest_marker("gpu") and not _has_cuda():
        return "no CUDA device"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Restores the signal handlers: those that a run in this process leaves would let pytest ignore SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if why := _missing(item):
        pytest.skip(LOUD + why)


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    loud: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if LOUD in reason:
            reason = reason.split(LOUD, 1)[1]
            loud[reason] = loud.get(reason, 0) + 1
    if loud:
        terminalreporter.section("NOT CHECKED HERE: something was missing", sep="!", red=True)
        for reason, count in sorted(loud.items()):
            terminalreporter.write_line(f"{count} test(s): {reason}")
