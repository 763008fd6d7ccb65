"""One program on two network hosts: two namespaces of this machine, each with an address, a name and shared memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mpi_helper import find_mpirun, mpi_environment, network_hosts
from pipeline_helper import cryoiso, hash_files, simulate, write_job

VNODE = "/usr/local/bin/vnode"


@pytest.fixture(scope="module")
def hosts(shared: Path):
    with network_hosts(shared) as names:
        yield names


@pytest.mark.mpi
def test_two_hosts_give_the_bits_of_one_process(hosts, tmp_path):
    """On the hosts each node reads its images from a disk of its own."""
    if "HYDRA" not in subprocess.run([str(find_mpirun()), "--version"], capture_output=True, text=True).stdout:
        pytest.skip("LOUD: this test speaks to MPICH's mpirun")
    job = simulate(tmp_path / "data", n=600)  # enough for a rank of the second host to have images
    assert cryoiso("run", job, "--out", tmp_path / "serial").returncode == 0
    with_disks = write_job(tmp_path / "data", "disks.toml", run_scratch=str(tmp_path / "disk-{host}"))
    for host in hosts:
        (tmp_path / f"disk-{host}").mkdir()
    launcher = [str(find_mpirun()), "-launcher", "rsh", "-launcher-exec", VNODE, "-hosts", "n1:2,n2:2", "-n", "4"]
    words = [sys.executable, "-m", "cryoiso.cli.main", "run", str(with_disks), "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [VNODE, "n1", *launcher, *words], env=mpi_environment(), capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (start,) = json.loads((tmp_path / "two/manifest.json").read_text())["starts"]
    assert sorted(rank["host"] for rank in start["machine"]) == ["n1", "n1", "n2", "n2"]
    (copied,) = json.loads((tmp_path / "two/logs/timing.json").read_text())["scratch"]
    assert {n["host"]: n["folder"].split("/cryoiso-")[0] for n in copied["nodes"]} == {
        host: str(tmp_path / f"disk-{host}") for host in hosts
    }
    assert all(n["bytes"] and not n["why_not"] for n in copied["nodes"])
    assert not list(tmp_path.glob("disk-*/**/shard-*"))
    assert hash_files(tmp_path / "two") == hash_files(tmp_path / "serial")
