"""The Slurm script on two nodes, each a network host of its own; all of it takes minutes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpi_helper import network_hosts
from pipeline_helper import cryoiso, hash_files, simulate, write_job
from slurm_helper import DEBIAN_MPI, slurm
from test_slurm import launch, log_of

pytestmark = [pytest.mark.slurm, pytest.mark.mpi, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(shared):
    with network_hosts(shared), slurm(shared, 2, hosts=True) as found:
        yield found


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A job file, and the files of its run by one process."""
    folder = tmp_path_factory.mktemp("data")
    simulate(folder)
    job = write_job(folder, "long.toml", refine_max_iterations=20)
    assert cryoiso("run", job, "--out", folder / "serial", OMP_NUM_THREADS="1").returncode == 0
    return job, hash_files(folder / "serial")


@pytest.mark.parametrize("mpi, library", [("pmi2", ""), ("pmix", "debian"), ("mpirun", "")])
def test_two_nodes_a_requeue_and_the_bits_of_one_process(mpi, library, cluster, serial, tmp_path):
    if library and not DEBIAN_MPI.exists():
        pytest.skip(f"LOUD: no {DEBIAN_MPI} (apt-get install libopenmpi3)")
    (job_file, expected), run = serial, tmp_path / "run"
    env = {"MPI4PY_LIBMPI": str(DEBIAN_MPI)} if library else {}
    (job,) = launch(job_file, run, "--mpi", mpi, "--nodes", 2, "--ranks-per-node", 1, **env)
    cluster.wait_for_text(run / "journal.jsonl", '"checkpoint", "stage": "refine"', job)
    cluster.ask("scancel", *["--batch"] * (mpi == "mpirun"), "--signal=USR1", job)
    cluster.start_again(job, 1)
    facts, log = cluster.end_of(job), log_of(run, job)
    assert facts["JobState"] == "COMPLETED" and "start 2" in log, log
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [sorted(rank["host"] for rank in start["machine"]) for start in starts] == [["n1", "n2"]] * 2
    assert hash_files(run) == expected
