"""A Slurm of the tests' own: daemons on this machine, with one node or two, and what to ask of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mpi_helper import turn

CONF = Path("/etc/slurm")
DEBIAN_MPI = Path("/usr/lib/x86_64-linux-gnu/libmpi.so.40")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # daemons live on and would hold a pipe open


def why_no_slurm_here() -> str:
    """Empty if this machine has what it takes, else what is missing."""
    if not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd"))) or not Path("/usr/sbin/munged").exists():
        return "no Slurm (apt-get install --no-install-recommends slurm-wlm munge)"
    if os.getuid() != 0:
        return "a Slurm of the tests' own needs root"
    return ""


def why_not_now() -> str:
    """Empty if nobody else's Slurm is in the way."""
    if CONF.joinpath("slurm.conf").exists():
        if "ClusterName=ci\n" not in CONF.joinpath("slurm.conf").read_text():
            return "this machine belongs to a Slurm cluster; the tests leave it alone"
        if "is UP" in subprocess.run(["scontrol", "ping"], capture_output=True, text=True).stdout:
            return "somebody else uses the tests' Slurm"
    return ""


@contextmanager
def slurm(shared: Path, nodes: int, *, hosts: bool = False) -> Iterator[Slurm]:
    """A running Slurm; its daemons end with the block. Test processes take turns.

    Args:
        hosts: every node is a network host of its own (tools/netns-nodes.sh).
    """
    script = shared / "tools" / "slurm-ci.sh"
    if not script.exists():
        pytest.skip(f"LOUD: no {script}")
    if why := why_no_slurm_here():
        pytest.skip(f"LOUD: {why}")
    with turn("slurm"):
        yield from _started(script, nodes, hosts)


def _started(script: Path, nodes: int, hosts: bool) -> Iterator[Slurm]:
    if why := why_not_now():
        pytest.skip(f"LOUD: {why}")
    had_conf, had_munge = CONF.joinpath("slurm.conf").exists(), _alive(Path("/run/munge/munged.pid"))
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/run"))
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT")}  # nproc heeds them
    env["SLURM_CI_DIR"] = str(folder)
    try:
        started = subprocess.run(["bash", script, "start", str(nodes), *["netns"] * hosts], env=env, **QUIET)
        cluster = Slurm(nodes)
        if started.returncode != 0 or cluster.idle() != nodes:
            pytest.skip("LOUD: a Slurm of the tests' own does not start on this machine")
        yield cluster
        subprocess.run(["scancel", "--user", "root"], **QUIET)
        cluster.wait_until(lambda: not cluster.ask("squeue", "-h"), "all jobs are gone")
    finally:
        for file in [*folder.glob("run/*.pid"), *([] if had_munge else [Path("/run/munge/munged.pid")])]:
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), 15)
        if not had_conf:
            for name in ("slurm.conf", "gres.conf"):
                CONF.joinpath(name).unlink(missing_ok=True)
        time.sleep(0.5)
        shutil.rmtree(folder, ignore_errors=True)


def _alive(file: Path) -> bool:
    with suppress(OSError, ValueError):
        os.kill(int(file.read_text()), 0)
        return True
    return False


class Slurm:
    """Questions to the running Slurm."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def ask(self, *words: object) -> str:
        return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True).stdout.strip()

    def idle(self) -> int:
        return int(self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") or 0)

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` tells."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)

    def wait_until(self, holds, what: str, seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"never came: {what}\n{self.ask('scontrol', 'show', 'job')}"
            time.sleep(0.2)

    def wait_for_text(self, file: Path, text: str, job: str) -> None:
        """Until a job has written something."""

        def there() -> bool:
            assert self.facts(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), self.facts(job)
            return file.exists() and text in file.read_text()

        self.wait_until(there, f"{text} in {file}")

    def start_again(self, job: str, starts: int) -> None:
        """Waits until a job was requeued, and lets it start soon instead of in two minutes.

        Not at once: the end of its old script, where Slurm hears of it late, would be taken for that of the new one.
        """
        self.wait_until(lambda: self.facts(job)["Restarts"] == str(starts), f"job {job} is queued again")
        self.wait_until(lambda: self.facts(job)["JobState"] == "PENDING", f"job {job} has left its node")
        at_work = ["pgrep", "-f", rf"^slurmstepd: \[{job}\."]
        self.wait_until(lambda: subprocess.run(at_work, **QUIET).returncode != 0, "the old script is gone")
        time.sleep(5)
        self.ask("scontrol", "update", f"jobid={job}", "starttime=now")

    def end_of(self, job: str) -> dict[str, str]:
        """The facts of a job that has ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_until(lambda: self.facts(job)["JobState"] in over, f"the end of job {job}")
        return self.facts(job)

    def batch(self, folder: Path, *lines: str, tasks: int = 2) -> tuple[dict[str, str], str]:
        """Runs a few lines as a batch job to its end: its facts, and what it printed."""
        script, out = folder / "batch.sh", folder / "batch.out"
        out.unlink(missing_ok=True)
        script.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        words = ["--nodes", self.nodes, "--ntasks", tasks, "--time", "10", "--output", out]
        facts = self.end_of(self.ask("sbatch", "--parsable", *words, script))
        return facts, out.read_text()
