"""External programs: followed without waiting, ended with the job, started without the launcher's environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from errors_helper import raises_code

from cryoiso.core.errors import MissingError
from cryoiso.engines.process import Program, clean_environment, describe_status


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, limit_s=8.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_output_comes_as_it_is_written_and_nobody_waits(tmp_path):
    with Program(["sh", "-c", "echo one; sleep 0.4; echo two >&2; exit 3"], tmp_path / "log", folder=tmp_path) as run:
        until(lambda: (tmp_path / "log").read_text() == "one\n")
        assert run.output() == "one\n" and run.output() == "" and run.status() is None
        until(lambda: run.status() is not None)
        assert run.status() == 3 and run.output() == "two\n"


def test_stopping_ends_everything_that_was_started(tmp_path):
    """A child that ignores SIGTERM, and one in a process group of its own, as Open MPI's ranks are."""
    code = (
        "import os, signal, subprocess, sys, time\n"
        "a = subprocess.Popen(['sh', '-c', 'trap \"\" TERM; while :; do sleep 0.1; done'])\n"
        "b = subprocess.Popen(['sleep', '60'], process_group=0)\n"
        "print(a.pid, b.pid, flush=True)\ntime.sleep(60)\n"
    )
    run = Program([sys.executable, "-c", code], tmp_path / "log", folder=tmp_path)
    until(lambda: (tmp_path / "log").read_text().strip())
    children = [int(word) for word in run.output().split()]
    assert all(map(alive, children))
    run.stop(grace_s=0.5)
    assert not any(map(alive, children)) and run.status() == -signal.SIGTERM


def test_a_program_does_not_outlive_a_killed_job(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom cryoiso.engines.process import Program\n"
        f"run = Program(['sleep', '60'], Path({str(tmp_path / 'log')!r}), folder=Path({str(tmp_path)!r}))\n"
        "print(run._child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    child = int(done.stdout)
    until(lambda: not alive(child))


def test_a_missing_program_is_one_clear_error(tmp_path):
    with raises_code("program-missing", MissingError, match="no_such_program cannot be started"):
        Program(["no_such_program"], tmp_path / "log", folder=tmp_path)


def test_the_launchers_environment_does_not_reach_an_inner_launcher(monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "HYDRA_X", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMPI_MCA_ess_base_jobid", "1")
    monkeypatch.setenv("OMPI_MCA_btl", "self,tcp")  # the user's
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    clean = clean_environment({"ADDED": "x"})
    assert clean["ADDED"] == "x" and clean["OMPI_MCA_btl"] == "self,tcp" and clean["PATH"] == os.environ["PATH"]
    assert not [k for k in clean if k.startswith(("PMI", "SLURM_", "HYDRA_", "OMPI_COMM", "OMPI_MCA_ess"))]
    kept = clean_environment(keep_allocation=True)
    assert kept["SLURM_JOB_ID"] == "42" and "SLURM_PROCID" not in kept and "SLURM_STEP_ID" not in kept


def test_exit_statuses_in_words():
    assert describe_status(1) == "ended with status 1" and describe_status(-9) == "was ended by SIGKILL"
