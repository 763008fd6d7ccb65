"""The command that writes and submits batch scripts: options, refusals, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_helper import check_bash, make_job
from pipeline_helper import cryoiso_here

from cryoiso.core.errors import EXIT_INPUT, EXIT_MISSING, EXIT_USAGE


@pytest.fixture
def job(tmp_path) -> Path:
    return make_job(tmp_path / "my data")


def test_out_writes_and_does_not_overwrite(job):
    out = job.with_name("go.sh")
    words = ("launch", job, "--mpi", "pmix", "--out", out)
    done = cryoiso_here(*words)
    assert done.returncode == 0 and "sbatch --parsable" in done.stdout, done.stderr
    check_bash(out.read_text())
    text = out.read_text()
    again = cryoiso_here(*words, "--gpus", 3)
    assert again.returncode == EXIT_USAGE and "--overwrite" in again.stderr and out.read_text() == text
    assert cryoiso_here(*words, "--gpus", 3, "--overwrite").returncode == 0 and "gpu:3" in out.read_text()


def test_options_go_before_the_job_file(job):
    job.write_text(job.read_text() + '[launch]\nnodes = 3\nqueue = "q1"\nmpi = "pmix"\nsetup = ["a", "b\\"c"]\n')
    done = cryoiso_here("launch", job, "--queue", "q2", "--module", "m1", "--module", "m2")
    assert done.returncode == 0, done.stderr
    assert "--nodes=3" in done.stdout and "partition=q2" in done.stdout and '\nb"c\n' in done.stdout
    assert "module load m1" in done.stdout and "module load m2" in done.stdout


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--scheduler", "oar"], EXIT_USAGE, "oar"),
        (["--time", "soon"], EXIT_USAGE, "launch.time"),
        (["--time", "00:04:00"], EXIT_USAGE, "launch.grace_s"),
        (["--scheduler", "pbs", "--mpi", "pmix"], EXIT_USAGE, "srun"),
        (["--scheduler", "mpirun", "--submit"], EXIT_USAGE, "bash"),
        (["--mpirun", "mpirun -n {cores}", "--mpi", "mpirun"], EXIT_USAGE, "launch.mpirun"),
        (["--template", "none.sh"], EXIT_INPUT, "none.sh"),
        (["--set", "extra1"], EXIT_USAGE, "KEY=VALUE"),
    ],
)
def test_wrong_settings_are_refused_with_one_sentence(words, code, said, job):
    before = sorted(job.parent.iterdir())
    done = cryoiso_here("launch", job, *([] if "--mpi" in words else ["--mpi", "mpirun"]), *words)
    assert done.returncode == code and said in done.stderr and done.stderr.count("error:") == 1, done.stderr
    assert sorted(job.parent.iterdir()) == before


def test_an_input_that_is_not_there_is_found_before_the_queue(job):
    job.with_name("ref.mrc").unlink()
    done = cryoiso_here("launch", job, "--mpi", "pmix", "--submit")
    assert done.returncode == EXIT_INPUT and "ref.mrc" in done.stderr


def test_submit_prints_the_numbers_of_the_jobs(job, tmp_path, monkeypatch):
    """Stand-ins for the batch systems' programs, which answer as the real ones do."""
    tools = tmp_path / "tools"
    tools.mkdir()
    answers = {"sbatch": "41;cluster", "qsub": "41.server", "bsub": "Job <41> is submitted to queue <normal>."}
    for name, answer in answers.items():
        (tools / name).write_text(f'#!/bin/bash\necho "$*" >> {tools}/words\ncat > {tools}/stdin\necho "{answer}"\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    for scheduler, number in (("slurm", "41"), ("pbs", "41.server"), ("lsf", "41")):
        done = cryoiso_here("launch", job, "--scheduler", scheduler, "--mpi", "mpirun", "--submit", "--chain")
        assert done.returncode == 0 and done.stdout.split() == [number, number], done.stderr
    assert "#BSUB" in (tools / "stdin").read_text(), "LSF reads the script from its standard input"
    assert "-w done(41)" in (tools / "words").read_text()
    (tools / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    done = cryoiso_here("launch", job, "--mpi", "mpirun", "--submit")
    assert done.returncode == 1 and "Invalid account" in done.stderr and done.stdout == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    done = cryoiso_here("launch", job, "--scheduler", "pbs", "--mpi", "mpirun", "--submit")
    assert done.returncode == EXIT_MISSING and "qsub" in done.stderr
