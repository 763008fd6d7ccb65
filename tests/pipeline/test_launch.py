"""Batch scripts: every template filled, and the scripts' own logic in bash."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from errors_helper import raises_code
from launch_helper import asked, check_bash, in_bash, make_job, script

from cryoiso.core.config import LaunchSection, job_to_toml, parse_job
from cryoiso.core.errors import EXIT_MISSING, EXIT_REQUEUE, CryoisoError, UsageError
from cryoiso.parallel import launcher
from cryoiso.pipeline.batch import launch, mpi_launcher, submit
from cryoiso.pipeline.batch.fill_template import OWN

ROOT = Path(__file__).resolve().parents[2]
SCHEDULERS = ("slurm", "pbs", "lsf", "mpirun")
FULL = {
    "nodes": 2, "gpus": 4, "gpu_type": "a100", "ranks_per_node": 4, "cpus_per_rank": 8, "ram_gb": 64.5,
    "time": "1-12:30:00", "grace_s": 240, "account": "lab7", "queue": "gpu", "modules": ["cuda/12", "openmpi"],
    "setup": ["source env.sh", "ulimit -n 4096"], "name": "my run", "mpirun": "mpirun -n {ranks} -ppn {ranks_per_node}",
    "mpi": "mpirun",
}  # fmt: skip


@pytest.fixture
def job(tmp_path) -> Path:
    return make_job(tmp_path / "my data")


# --- this program's templates


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("given", [{}, FULL, {"image": "cryoiso.sif", "gpus": 1}, {"requeue": False}])
def test_every_template_is_filled_and_is_bash(scheduler, given, job):
    text = script(job, scheduler=scheduler, **given)
    check_bash(text)
    assert f"'{job}' --out '{job.with_name('run')}' --continue" in text
    if given is FULL:
        assert "module load cuda/12" in text and "ulimit -n 4096" in text and "export OMP_NUM_THREADS=8" in text
        assert "mpirun -n 8 -ppn 4" in text
        if scheduler != "mpirun":
            assert "lab7" in text and "my-run" in text and "my run" not in text


@pytest.mark.parametrize(
    "scheduler, lines",
    [
        ("slurm", ["--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gres=gpu:a100:4", "--mem=64500M",
                   "--time=36:30:00", "--partition=gpu", "--signal=B:USR1@240", "--requeue", "--open-mode=append"]),
        ("pbs", ["select=2:ncpus=32:mpiprocs=4:ompthreads=8:ngpus=4:gpu_type=a100:mem=64500mb", "-l walltime=36:30:00",
                 "-A lab7", "-q gpu", "-r y", "sleep 131160 "]),
        ("lsf", ["-n 64", 'span[ptile=32]', 'num=4:mode=shared:j_exclusive=yes:gmodel=a100"', "-W 36:30", "-P lab7",
                 "-q gpu", "-wa USR1", "-wt 4", '-Q "75"', "mem=64500MB"]),
        ("mpirun", ["again || break"]),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_batch_system(scheduler, lines, job):
    text = script(job, scheduler=scheduler, **FULL)
    for line in lines:
        assert line in text, line
    once = script(job, scheduler=scheduler, requeue=False)
    assert not re.search(r"scontrol requeue|qrerun|-Q \"75\"|if again|again \|\||--requeue|-r y", once)


def test_an_expedited_requeue_is_asked_of_slurm_alone_and_of_one_that_knows_it(job, tmp_path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    for version, known in (("25.11.1", True), ("26.05.0", True), ("25.05.4", False), ("22.05.8", False)):
        sbatch.write_text(f"#!/bin/sh\necho slurm-wlm {version}\n")
        sbatch.chmod(0o755)
        if known:
            text = script(job, expedite=True)
            assert "\n#SBATCH --requeue=expedite\n" in text and "scontrol requeue" in text
        else:
            with raises_code("options-conflict", UsageError, match=version[:5]):
                script(job, expedite=True)
    for wrong in ({"scheduler": "pbs"}, {"requeue": False}):
        with raises_code("options-conflict", UsageError):
            script(job, expedite=True, **wrong)


def test_extra_lines_get_the_word_of_the_scheduler_once(job):
    text = script(job, extra=["--qos=long", "#SBATCH --exclusive"])
    assert "\n#SBATCH --qos=long\n#SBATCH --exclusive\n" in text


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_script_tells_the_run_its_image_unless_that_was_replaced(scheduler, job):
    image, folder = job.with_name("x.sif"), job.parent
    image.write_bytes(b"an image")
    apptainer = folder / "bin" / "apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text('#!/bin/bash\necho "${CRYOISO_IMAGE_DIGEST:-none}" >> digests\n')
    apptainer.chmod(0o755)
    for number in range(3):
        in_bash(job, scheduler, "", image="x.sif").communicate(timeout=60)
        if number == 1:  # the script that was written for the first image starts another one
            text = (folder / "go.sh").read_text()
            image.write_bytes(b"a newer image")
            (folder / "go.sh").write_text(text)
            env = {"PATH": f"{folder}/bin:/usr/bin:/bin", "PBS_JOBID": "5.host", "PBS_NODEFILE": "plan"}
            subprocess.run(["bash", "go.sh"], cwd=folder, env=env, capture_output=True, timeout=60, check=False)
    first, new = (f"sha256:{hashlib.sha256(text).hexdigest()}" for text in (b"an image", b"a newer image"))
    assert (folder / "digests").read_text().split() == [first, first, "none", new]
    assert "DIGEST" not in script(job, image="docker://a/b") and "DIGEST" not in script(job, image="gone.sif")


def test_one_rank_needs_no_launcher(job):
    assert "mpirun -n" not in script(job, ranks_per_node=1)
    assert "srun --mpi=pmix --ntasks=1" in script(job, ranks_per_node=1, mpi="pmix")


@pytest.mark.parametrize(
    "library, knows, expected",
    [
        ("Open MPI v5.0.1, x", "none pmi2 pmix", "srun --mpi=pmix"),
        ("MPICH 5.0.2", "none pmi2 pmix", "srun --mpi=pmi2"),
        ("MPICH 5.0.2", "none pmix", "mpirun -n 8 -ppn 4"),
        ("Open MPI v4", "none", "mpirun -n 8 --map-by ppr:4:node"),
        ("Intel(R) MPI Library 2021", "none pmi2 pmix", "mpirun -n 8 -ppn 4"),
        ("MPICH 4", "", "srun --mpi=pmi2"),
    ],
)
def test_the_library_decides_how_ranks_are_started(library, knows, expected, job, monkeypatch):
    monkeypatch.setattr(mpi_launcher, "probe_mpi", lambda: {"library": library})
    monkeypatch.setattr(mpi_launcher, "_srun_knows", lambda: set(knows.split()))
    assert expected in script(job, mpi="auto", nodes=2, ranks_per_node=4)


def test_an_srun_that_fails_is_not_taken_for_one_without_pmi(job, monkeypatch, tmp_path):
    """A controller that cannot be reached just now says nothing of what srun can."""
    monkeypatch.setattr(mpi_launcher, "probe_mpi", lambda: {"library": "MPICH 5.0.2"})
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    monkeypatch.setenv("PATH", f"{srun.parent}:/usr/bin:/bin")
    for code, expected in ((1, "srun --mpi=pmi2"), (0, "mpirun -n 4")):
        srun.write_text(f"#!/bin/bash\necho 'srun: fatal: Could not establish a configuration' >&2\nexit {code}\n")
        srun.chmod(0o755)
        assert expected in script(job, mpi="auto", ranks_per_node=4)


def test_without_a_library_the_question_is_asked(job, monkeypatch):
    monkeypatch.setattr(mpi_launcher, "probe_mpi", lambda: {"error": "cannot load MPI library"})
    with raises_code("mpi-missing", CryoisoError, match=r"set launch\.mpi") as caught:
        script(job, mpi="auto")
    assert caught.value.exit_code == EXIT_MISSING
    script(job, mpi="pmix")


def test_a_chain_is_two_scripts(job):
    main = {"mpi": "pmix", "gpus": 4, "queue": "gpu", "extra": ["--gpus-per-task=1"], "ram_gb": 400}
    known = launch.read_launch(job, {**main, "cpu_queue": "cpu", "cpu_ranks": 6, "cpu_extra": ["--qos=cpu"]})
    first, second = launch.scripts_of(known, job, job.with_name("run"), job.with_name("go.sh"), True)
    assert (first.path.name, second.path.name) == ("go-ingest.sh", "go.sh")
    assert "--until reference" in first.text and "--until" not in second.text
    assert "gres" not in first.text and "--partition=cpu" in first.text and "--ntasks=6" in first.text
    assert "--gres=gpu:4" in second.text and "--partition=gpu" in second.text
    assert "--gpus-per-task=1" not in first.text and "--mem" not in first.text and "--qos=cpu" in first.text
    assert "--gpus-per-task=1" in second.text and "--mem=400000M" in second.text and "--qos" not in second.text
    check_bash(first.text)
    for scheduler, words in (("slurm", "--dependency=afterok:7 --kill-on-invalid-dep=yes"), ("lsf", "-w done(7)"),
                             ("pbs", "-W depend=afterok:7")):  # fmt: skip
        assert words in " ".join(submit.submit_command(scheduler, Path("x"), "7"))
    with raises_code("options-conflict", UsageError, match="needs a batch system"):
        script(job, chain=True, scheduler="mpirun")


# --- what the scripts do, in bash


@pytest.mark.parametrize("code", [0, 1, 2, 65, 69])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_other_statuses_are_passed_on(code, scheduler, job):
    process = in_bash(job, scheduler, f"{code} end\n")
    process.communicate(timeout=60)
    assert process.returncode == code and asked(job) == []


def test_75_asks_for_a_requeue(job):
    process = in_bash(job, "slurm", "75 checkpoint\n")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, "the script waits for Slurm to end it"
    assert asked(job) == ["scontrol requeue 5"] and "queued again" in out
    (job.parent / "scontrol.fails").write_text("yes")
    process = in_bash(job, "slurm", "75 checkpoint\n")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE and "submit the same script again" in out


def test_pbs_asks_and_if_that_is_not_allowed_submits_again(job):
    (job.parent / "qrerun.fails").write_text("yes")
    process = in_bash(job, "pbs", "75 checkpoint\n")
    process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE
    assert asked(job) == ["qrerun 5.host", f"qsub {job.with_name('go.sh')}"]
    assert "goes on from its last checkpoint" in (job.parent / "run-5.log").read_text()


def test_the_rest_of_a_chain_follows_the_job_that_pbs_got_instead(job):
    """The job that waited for the first is dropped, because that ended with 75."""
    (job.parent / "qrerun.fails").write_text("yes")
    process = in_bash(job, "pbs", "75 checkpoint\n", first_of_chain=True)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE
    first, second = job.with_name("go-ingest.sh"), job.with_name("go.sh")
    assert asked(job)[1:] == [f"qsub {first}", f"qsub -W depend=afterok:7.host {second}"]


def test_pbs_script_is_its_own_alarm_clock(job):
    """62 s of wall-time, 61 of them reserved: the signal comes after one second."""
    (job.parent / "qrerun.fails").write_text("yes")
    process = in_bash(job, "pbs", "wait checkpoint\n", time="00:01:02", grace_s=61)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE and len(asked(job)) == 2


def test_lsf_leaves_the_requeue_to_lsf(job):
    process = in_bash(job, "lsf", "75 checkpoint\n")
    process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE
    process = in_bash(job, "lsf", "75 stop\n")
    (job.parent / "run/journal.jsonl").write_text('{"event": "stop"}\n' * 2)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "got no further" in out


def test_mpirun_goes_on_until_the_run_is_done_or_gets_no_further(job):
    process = in_bash(job, "mpirun", "75 checkpoint\n75 stop\n75 stop\n0 end\n")
    process.communicate(timeout=60)
    assert process.returncode == 0
    calls = job.with_name("calls").read_text().splitlines()
    assert len(calls) == 4 and len(set(calls)) == 1 and calls[0].endswith("--continue")
    process = in_bash(job, "mpirun", "75 stop\n" * 9)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE
    assert len(job.with_name("plan").read_text().splitlines()) == 6, "three starts that got no further"
    assert "got no further" in (job.parent / "run.log").read_text()


@pytest.mark.parametrize("number, again", [("USR1", 1), ("TERM", 0)])
def test_signals_reach_the_program_and_only_usr1_asks_for_a_requeue(number, again, job):
    process = in_bash(job, "slurm", "wait checkpoint\n")
    while not job.with_name("ready").exists():
        assert process.poll() is None
    subprocess.run(["kill", f"-{number}", str(process.pid)], check=True)
    process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGTERM if again else EXIT_REQUEUE) and len(asked(job)) == again


# --- the section, and where the templates are


def test_the_section_survives_the_resolved_job_file():
    facts = {"setup": ['say "hi"', "a\\b"], "variables": {"extra1": "8gb", "n": 3}, "modules": []}
    job = parse_job({"particles": {"file": "a"}, "reference": {"file": "b"}, "launch": facts})
    again = parse_job(tomllib.loads(job_to_toml(job)))
    assert again == job and again.launch.variables == {"extra1": "8gb", "n": 3}
    assert all(info.description for info in LaunchSection.model_fields.values())


def test_wall_times():
    found = [launch.seconds_of(text) for text in ("1-02:00:00", "00:30:00", "48:00", "100:00:01")]
    assert found == [93600, 1800, 172800, 360001]
    for wrong in ("", "5", "1:2:3", "00:00:00", "1d"):
        with pytest.raises(UsageError, match=r"launch\.time"):
            launch.seconds_of(wrong)


def test_the_launch_folder_leads_to_the_templates():
    for name in SCHEDULERS:
        assert (ROOT / "launch" / "templates" / f"{name}.sh").resolve() == OWN / f"{name}.sh"
    assert "cryoiso launch" in (ROOT / "launch" / "README.md").read_text()


@pytest.mark.slow
def test_an_installed_package_has_the_templates(tmp_path):
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", ".venv", "build", "demo"))
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    done = subprocess.run(words, cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = "cryoiso/pipeline/batch/templates"
    assert [path.name for path in OWN.glob("*.sh") if f"{inside}/{path.name}" not in names] == []


def test_doubt_about_srun_and_the_library():
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    assert "--mpi=pmix" in launcher.doubt("Open MPI v4.1.4, x", step)
    assert "wants pmi2" in launcher.doubt("MPICH 5", {**step, "PMIX_RANK": "0"})
    assert "wants pmix" in launcher.doubt("Open MPI v5", {**step, "PMI_RANK": "0"})
    fine = [("Open MPI v5", {**step, "PMIX_RANK": "0"}), ("MPICH 5", {**step, "PMI_RANK": "0"}),
            ("MPICH 5", step), ("Cray MPICH", step), ("Open MPI v5", {}),
            ("Open MPI v4", {**step, "OMPI_COMM_WORLD_SIZE": "2"})]  # fmt: skip
    assert [launcher.doubt(*case) for case in fine] == [""] * len(fine)
