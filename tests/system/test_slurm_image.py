"""``cryoiso launch --image`` in a real Slurm: folders, signals and a requeue, as root and in user namespaces. Minutes.

Wants an image, whose name is in CRYOISO_IMAGE.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from pipeline_helper import SERIAL, hash_files, simulate, write_job
from slurm_helper import slurm
from test_slurm import launch, log_of

DEBIAN_MPIRUN = "/usr/bin/mpirun.openmpi"
AS_ROOT = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
pytestmark = [pytest.mark.slurm, pytest.mark.mpi, pytest.mark.slow]


@pytest.fixture(scope="module")
def image() -> str:
    if "CRYOISO_IMAGE" not in os.environ or shutil.which("apptainer") is None:
        pytest.skip("LOUD: this test needs apptainer, and an image in CRYOISO_IMAGE")
    return os.environ["CRYOISO_IMAGE"]


@pytest.fixture(scope="module")
def cluster(shared):
    with slurm(shared, 1) as found:
        yield found


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A job whose stack is a link to a folder that an image does not see by itself."""
    folder, elsewhere = tmp_path_factory.mktemp("data"), Path(tempfile.mkdtemp(prefix="stacks", dir="/run"))
    simulate(folder)
    stack = folder / "particles.mrcs"
    shutil.move(stack, elsewhere)
    stack.symlink_to(elsewhere / stack.name)
    yield write_job(folder, "long.toml", refine_max_iterations=20)
    shutil.rmtree(elsewhere)


@pytest.fixture(scope="module")
def expected(job, image) -> dict[str, str]:
    """The files of a run by one process in the image that nobody interrupted."""
    folders = f"{job.parent},{(job.parent / 'particles.mrcs').resolve().parent}"
    words = ["apptainer", "exec", "--bind", folders, image, "cryoiso", "run", job, "--out", job.parent / "serial"]
    done = subprocess.run(list(map(str, words)), env=SERIAL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return hash_files(job.parent / "serial")


@pytest.mark.parametrize("mpi", ["pmix", "mpirun"])
@pytest.mark.parametrize("how", ["apptainer exec", "apptainer exec --userns"])
def test_a_signal_a_checkpoint_a_requeue_and_the_same_bits(how, mpi, image, cluster, job, expected, tmp_path):
    if mpi == "mpirun" and " 4.1." not in (said := mpirun_here()):
        pytest.skip(f"LOUD: the host's mpirun is not that of the image's Open MPI 4.1: {said}")
    run = tmp_path / "run"
    hosts = ("--mpirun", f"{DEBIAN_MPIRUN} -n {{ranks}}", "--setup", AS_ROOT) if mpi == "mpirun" else ()
    (number,) = launch(job, run, "--image", image, "--image-command", how, "--mpi", mpi, *hosts)
    cluster.wait_for_text(run / "journal.jsonl", '"checkpoint", "stage": "refine"', number)
    cluster.ask("scancel", "--batch", "--signal=USR1", number)
    cluster.start_again(number, 1)
    facts, log = cluster.end_of(number), log_of(run, number)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "start 2" in log and "Bus error" not in log and "session_dir" not in log, log
    assert hash_files(run) == expected


def mpirun_here() -> str:
    if not Path(DEBIAN_MPIRUN).exists():
        return "none"
    return subprocess.run([DEBIAN_MPIRUN, "--version"], capture_output=True, text=True).stdout
