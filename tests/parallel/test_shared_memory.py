"""Memory that MPI jobs left behind when they were killed: named by doctor, and whose it is."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time

import pytest
from mpi_helper import start_mpi

from cryoiso.pipeline.finding import NOTE, WARNING
from cryoiso.pipeline.site import shared_memory
from cryoiso.pipeline.site.shared_memory import abandoned, shared_memory_findings


def make(folder, name: str, size: int = 8192, age_s: float = 3600.0):
    file = folder / name
    file.write_bytes(b"\1" * size)
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def test_only_old_files_of_mpi_that_nobody_has_mapped(tmp_path):
    left = make(tmp_path, "mpich_shm_868dba4e_0", age_s=7200)
    other = make(tmp_path, "vader_segment.vm.0.2dc20001.0")
    make(tmp_path, "sem.somebody's")
    make(tmp_path, "mpich_shm_young", age_s=5)
    used = make(tmp_path, "mpich_shm_used")
    with open(used, "r+b") as stream, mmap.mmap(stream.fileno(), 0):
        found = abandoned(tmp_path)
    assert [file["path"] for file in found] == [str(left), str(other)]
    assert found[0]["bytes"] == 8192 and 7199 <= found[0]["age_s"] <= 7300
    assert str(used) in [file["path"] for file in abandoned(tmp_path)], "its process has let it go"
    assert abandoned(tmp_path / "nowhere") == []


def test_what_is_said_of_them():
    files = [{"path": f"/dev/shm/mpich_shm_{i}", "bytes": 2**20, "age_s": 100} for i in range(5)]
    (found,) = shared_memory_findings({"shared_memory": {"n1": files, "n2": []}})
    assert found.severity == NOTE and found.exit_code == 0
    assert "5 file(s)" in found.found and "on n1" in found.found and "mpich_shm_2, ..." in found.found
    files[0]["bytes"] = 2**31
    assert next(shared_memory_findings({"shared_memory": {"n1": files}})).severity == WARNING
    assert not list(shared_memory_findings({}))


@pytest.mark.mpi
def test_doctor_names_what_a_killed_job_left(monkeypatch, tmp_path):
    before = {file["path"] for file in abandoned()}
    monkeypatch.setattr(shared_memory, "YOUNG_S", -1.0)
    body = "from cryoiso.parallel.context import get_context as g; c = g(); print('up', flush=True); import time; " \
        "time.sleep(60)"  # fmt: skip
    job = start_mpi(2, body)
    assert job.stdout.readline() == "up\n"
    while_running = {file["path"] for file in abandoned()}
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    subprocess.run(["pkill", "-9", "-f", body[:60]], check=False)
    time.sleep(0.5)
    new = {file["path"] for file in abandoned()} - while_running - before
    if not new:
        pytest.skip("LOUD: this MPI leaves nothing in /dev/shm when it is killed")
    try:
        for path in new:
            os.utime(path, (1, 1))
        words = [sys.executable, "-m", "cryoiso.cli.main", "doctor", str(tmp_path), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        files = [file for host in json.loads(done.stdout)["shared_memory"].values() for file in host]
        assert new <= {file["path"] for file in files}
    finally:
        for path in new:
            os.unlink(path)
