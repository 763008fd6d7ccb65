"""Batch scripts for a container image: what it sees, how its ranks are told to stop, and that it finds its GPUs."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest
from errors_helper import raises_code
from launch_helper import check_bash, make_job, script

from cryoiso.core.errors import MissingError
from cryoiso.parallel.context import Context
from cryoiso.pipeline.records import lock


@pytest.fixture
def job(tmp_path) -> Path:
    return make_job(tmp_path / "my data")


def test_an_image_sees_the_folders_of_the_run_and_gpus_where_there_are_any(job):
    (text,) = re.findall(r"^.*apptainer exec.*$", script(job, image="x.sif", gpus=2), flags=re.MULTILINE)
    assert "apptainer exec --nv --bind" in text and f"'{job.parent}/x.sif' cryoiso run" in text
    assert f"--bind '{job.parent}'" in text, "one folder holds the job, its inputs and the run"
    assert "--nv" not in script(job, image="x.sif")
    own = script(job, image="docker://a/b", image_command="singularity exec --rocm")
    assert "singularity exec --rocm --bind" in own and " docker://a/b cryoiso" in own
    assert "srun --mpi=pmix --ntasks=4" in script(job, image="x.sif", mpi="auto")


def bound(text: str) -> set[str]:
    (folders,) = re.findall(r"--bind (?:'([^']*)'|\S+)", text)
    return set(folders.split(","))


def test_an_image_sees_the_stacks_of_a_project_and_what_links_lead_to(tmp_path):
    """A STAR file of one job of a project names the stacks of another, which are links to somewhere else."""
    project, data = tmp_path / "a project", tmp_path / "raw data"
    job = make_job(project / "Refine3D/job020", ("Extract/job010/a.mrcs", "Extract/job010/b.mrcs"))
    data.mkdir()
    (project / "Extract/job010").mkdir(parents=True)
    for name in ("a.mrcs", "b.mrcs"):
        (data / name).write_text("")
        (project / "Extract/job010" / name).symlink_to(data / name)
    found = bound(script(job, image="x.sif"))
    assert found == {str(job.parent), str(project / "Extract/job010"), str(data)}


def runtime_binds(text: str, folder: Path, **env: str) -> list[str]:
    """What the script adds on a node, whose Slurm is a stand-in."""
    (part,) = re.findall(r"^while read -r folder.*?^export \w+$", text, flags=re.MULTILINE | re.DOTALL)
    tool = folder / "bin/scontrol"
    tool.parent.mkdir(exist_ok=True)
    spool, tmp = folder / "spool", folder / "tmp"
    facts = f"SlurmdSpoolDir          = {spool}/%n\nTmpFS                   = {tmp}/%h/x\nTopologyParam = /"
    tool.write_text(f"#!/bin/bash\necho '{facts}'\n")
    tool.chmod(0o755)
    words = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder), **env}
    done = subprocess.run(["bash", "-c", f'{part}\necho "$APPTAINER_BIND"'], env=words, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip().split(",")


def test_slurm_and_an_image_meet_in_folders_of_slurm_that_are_there(job, tmp_path):
    text = script(job, image="x.sif", mpi="auto")
    for name in ("spool", "tmp"):
        (tmp_path / name).mkdir()
    assert runtime_binds(text, tmp_path) == [str(tmp_path / "spool"), str(tmp_path / "tmp")]
    (tmp_path / "spool").rmdir()
    assert runtime_binds(text, tmp_path, APPTAINER_BIND="/mine") == ["/mine", str(tmp_path / "tmp")]
    assert "scontrol show config" not in script(job, image="x.sif", mpi="mpirun")
    own = script(job, image="x.sif", mpi="pmix", image_command="/opt/bin/singularity exec")
    assert "export SINGULARITY_BIND" in own and "APPTAINER_BIND" not in own


@pytest.mark.parametrize("scheduler", ["slurm", "pbs", "lsf", "mpirun"])
@pytest.mark.parametrize(
    "wanted, env, seen",
    [
        ("auto", {"TMPDIR": "/tmp/job7"}, "/tmp"), ("auto", {}, ""), ("/nowhere/x", {}, ""),
        ("$FAST/x", {"FAST": "/dev"}, "/dev"),
        ("~/x", {"HOME": "/usr/me"}, "/usr"), ("/dev/{host}", {}, "/dev"), ("/var/tmp/{host}/x", {}, "/var/tmp"),
    ],
)  # fmt: skip
def test_an_image_sees_the_scratch_of_every_node(wanted, env, seen, scheduler, tmp_path):
    """By its topmost folder: what lies below may be called otherwise on another node, and an image that is to see a
    folder that is not there does not start."""
    text = script(make_job(tmp_path / "job", run=f"scratch = '{wanted}'"), image="x.sif", scheduler=scheduler)
    check_bash(text)
    assert runtime_binds(text, tmp_path, **env) == [seen]


def test_only_a_scratch_makes_the_script_look_for_one(job, tmp_path):
    assert "while read -r folder" not in script(job, image="x.sif")
    check_bash(script(make_job(tmp_path / "odd", run="scratch = '/a \"b\" $(touch c) `touch d`'"), image="x.sif"))


def test_only_the_first_rank_of_an_image_is_told(job):
    """By its number in the lock of the run, if it is on this host; else srun is told."""
    text = script(job, image="x.sif", mpi="pmix")
    assert "--signal=B:USR1" in text and "--signal=USR1" in script(job, mpi="pmix")
    (tell,) = re.findall(r"^tell\(\) \{.*?^\}$", text, flags=re.MULTILINE | re.DOTALL)
    run = job.with_name("run")
    run.mkdir()

    def told() -> str:
        code = f"""{tell}
            sleep 60 & ranks=$!
            tell
            sleep 0.3
            if [ -n "$(jobs -r)" ]; then echo first; kill "$ranks"; else echo srun; fi"""
        first = subprocess.Popen(["sleep", "60"])
        try:
            (run / "lock.json").write_text(json.dumps({**holder, "pid": first.pid if holder["pid"] else 0}))
            out = subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout
            return f"{out.strip()} {'ended' if first.poll() is not None or not _runs(first) else 'runs'}"
        finally:
            first.kill()
            first.wait()

    holder = lock._self()
    assert told() == "first ended"
    for other in ({"host": "elsewhere"}, {"numbering": "pid:[1]"}, {"pid": 0}):
        holder = {**lock._self(), **other}
        assert told() == "srun runs", other
    assert holder["host"] == socket.gethostname()


def _runs(process: subprocess.Popen) -> bool:
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        return True
    return False


def test_a_job_that_asked_for_gpus_does_not_compute_without(job, monkeypatch):
    assert "export CRYOISO_GPUS=2 " in script(job, gpus=2) and "CRYOISO_GPUS" not in script(job)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Context().device("auto") == "cpu"
    monkeypatch.setenv("CRYOISO_GPUS", "2")
    with raises_code("gpu-missing", MissingError, match="asked for GPUs, but rank 0"):
        Context().device("auto")
    assert Context().device("cpu") == "cpu"
