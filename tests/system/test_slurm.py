"""The Slurm script in a real Slurm of one node: signals, requeue, chains, and srun with another MPI."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from mpi_helper import mpi_environment
from pipeline_helper import cryoiso, forget_signals, hash_files, quick_report, simulate, use_quick_parts, write_job
from slurm_helper import DEBIAN_MPI, slurm

from cryoiso.core.errors import EXIT_MISSING
from cryoiso.parallel.context import Context
from cryoiso.parallel.mpi_probe import probe_mpi
from cryoiso.pipeline.run import run_job

pytestmark = [pytest.mark.slurm, pytest.mark.mpi]
ROOT = Path(__file__).resolve().parents[2]
QUICK = f"{sys.executable} {Path(__file__).parents[1] / 'helpers' / 'quick_program.py'}"
SMALL = ("--ranks-per-node", 2, "--cpus-per-rank", 1, "--time", "00:10:00", "--grace-s", 60)


@pytest.fixture(scope="module")
def cluster(shared):
    with slurm(shared, 1) as found:
        yield found


@pytest.fixture
def expected(data, tmp_path, monkeypatch) -> dict[str, str]:
    """The files of a run with the stand-ins that nobody interrupted."""
    use_quick_parts(monkeypatch)
    try:
        return hash_files(run_job(data / "job.toml", tmp_path / "whole", Context(), quick_report).path)
    finally:
        forget_signals()


def launch(job: Path, run: Path, *options: object, **env: str) -> list[str]:
    """Submits a job; the numbers it got."""
    words = ("launch", job, "--run", run, "--submit", *SMALL, *options)
    done = cryoiso(*words, **mpi_environment({"PMIX_MCA_psec": "native", **env}))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def log_of(run: Path, job: str) -> str:
    return run.with_name(f"{run.name}-{job}.log").read_text()


def test_a_signal_a_checkpoint_a_requeue_and_the_same_bits(cluster, data, tmp_path, expected):
    run = tmp_path / "run"
    (job,) = launch(data / "job.toml", run, "--program", QUICK, QUICK_WAIT="1")
    cluster.wait_for_text(run / "journal.jsonl", '"checkpoint", "stage": "refine"', job)
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.start_again(job, 1)
    facts, log = cluster.end_of(job), log_of(run, job)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert "start 1" in log and "queued again" in log and "start 2" in log and "continued" in log
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [start["ranks"] for start in starts] == [2, 2]
    assert hash_files(run) == expected


def test_srun_with_another_mpi_stops_with_the_remedy(cluster, tmp_path):
    if not probe_mpi().get("library", "").startswith("MPICH"):
        pytest.skip("LOUD: this test needs MPICH in the environment (pip install '.[mpich]')")
    facts, out = cluster.batch(tmp_path, f"srun --mpi=none {sys.executable} -m cryoiso.cli.main doctor")
    assert facts["ExitCode"] == f"{EXIT_MISSING}:0" and out.count("srun started 2 ranks but MPI sees 1") == 1, out
    assert "'srun --mpi=pmi2' with MPICH" in out


@pytest.mark.parametrize("flavour", ["none", "pmi2"])
def test_a_library_that_ends_the_process_is_preceded_by_the_remedy(flavour, cluster, tmp_path):
    if not DEBIAN_MPI.exists():
        pytest.skip(f"LOUD: no {DEBIAN_MPI} (apt-get install libopenmpi3)")
    words = f"{sys.executable} -m cryoiso.cli.main doctor"
    facts, out = cluster.batch(tmp_path, f"export MPI4PY_LIBMPI={DEBIAN_MPI}", f"srun --mpi={flavour} {words}")
    assert facts["ExitCode"] != "0:0"
    assert out.count("usually wants pmix") == 1 and "'srun --mpi=pmix' with Open MPI" in out, out


# --- minutes


@pytest.mark.slow
def test_three_commands_of_the_readme_lead_to_a_finished_run(cluster, tmp_path):
    """As a new user copies them; only what a site has is replaced: GPUs, account, queue, and a small job's size."""
    section = (ROOT / "README.md").read_text().split("\n## On a cluster\n")[1]
    commands = [line.split("  #")[0].strip() for line in section.split("```")[1].strip().splitlines()]
    assert [line.split()[:2] for line in commands] == [["cryoiso", name] for name in ("init", "plan", "launch")]
    simulate(tmp_path)
    (tmp_path / "job.toml").unlink()  # 'init' writes its own
    (tmp_path / "truth_map.mrc").rename(tmp_path / "homologue.mrc")
    replaced = {"homologue.cif": "homologue.mrc", "--account lab7": "", "--queue gpu": "--queue ci",
                "--gpus 4": "--ranks-per-node 2 --cpus-per-rank 1"}  # fmt: skip
    said = []
    for line in commands:
        for old, new in replaced.items():
            line = line.replace(old, new if "launch" in line or old == "homologue.cif" else "")
        words = shlex.split(line)[1:] + ["--time", "00:10:00"] * ("launch" in line)
        said.append(cryoiso(*words, cwd=tmp_path, **mpi_environment({"PMIX_MCA_psec": "native"})))
        assert said[-1].returncode == 0, said[-1].stderr
    job = said[-1].stdout.strip()
    facts, log = cluster.end_of(job), log_of(tmp_path / "job-run", job)
    assert facts["JobState"] == "COMPLETED", log
    assert (tmp_path / "job-run/report.html").exists() and (tmp_path / "job-run/result/CONTENTS.md").exists()


@pytest.mark.slow
def test_the_wall_time_gives_the_signal(cluster, data, tmp_path, expected):
    """The job has three minutes, and Slurm sends USR1 by itself, one or two minutes before their end."""
    run = tmp_path / "run"
    (job,) = launch(
        data / "job.toml", run, "--program", QUICK, "--time", "00:03:00", "--grace-s", 60, QUICK_WAIT="1"
    )  # fmt: skip
    cluster.start_again(job, 1)
    facts, log = cluster.end_of(job), log_of(run, job)
    assert facts["JobState"] == "COMPLETED" and "start 2" in log, log
    assert hash_files(run) == expected


@pytest.mark.slow
@pytest.mark.parametrize("mpi, batch", [("pmix", False), ("mpirun", True), ("mpirun", False)])
def test_other_ways_to_start_the_ranks(mpi, batch, cluster, data, tmp_path):
    """The real engine; the signal goes to the ranks, or to the script, which hands it to mpirun."""
    env = {}
    if mpi == "pmix":
        if not DEBIAN_MPI.exists():
            pytest.skip(f"LOUD: no {DEBIAN_MPI} (apt-get install libopenmpi3)")
        env["MPI4PY_LIBMPI"] = str(DEBIAN_MPI)
    job_file, run = write_job(data, "long.toml", refine_max_iterations=20), tmp_path / "run"
    assert cryoiso("run", job_file, "--out", tmp_path / "serial", OMP_NUM_THREADS="1").returncode == 0
    (job,) = launch(job_file, run, "--mpi", mpi, **env)
    cluster.wait_for_text(run / "journal.jsonl", '"checkpoint", "stage": "refine"', job)
    cluster.ask("scancel", *["--batch"] * batch, "--signal=USR1", job)
    cluster.start_again(job, 1)
    facts, log = cluster.end_of(job), log_of(run, job)
    assert facts["JobState"] == "COMPLETED" and "start 2" in log, log
    assert hash_files(run) == hash_files(tmp_path / "serial")


@pytest.mark.slow
def test_mpirun_where_srun_starts_everything_with_pmix(cluster, data, tmp_path):
    """mpirun starts its helpers by srun; where a site's MpiDefault is pmix, they would take themselves for ranks."""
    run = tmp_path / "run"
    default = ("--setup", "export SLURM_MPI_TYPE=pmix")  # as MpiDefault=pmix does
    (job,) = launch(data / "job.toml", run, "--program", QUICK, "--mpi", "mpirun", *default)
    facts, log = cluster.end_of(job), log_of(run, job)
    assert facts["JobState"] == "COMPLETED", log
    assert json.loads((run / "manifest.json").read_text())["starts"][0]["ranks"] == 2


@pytest.mark.slow
def test_a_cancelled_job_leaves_a_checkpoint_and_does_not_come_again(cluster, data, tmp_path, expected):
    run = tmp_path / "run"
    (job,) = launch(data / "job.toml", run, "--program", QUICK, QUICK_WAIT="1")
    cluster.wait_for_text(run / "journal.jsonl", '"checkpoint", "stage": "refine"', job)
    cluster.ask("scancel", job)
    facts, log = cluster.end_of(job), log_of(run, job)
    assert facts["JobState"] == "CANCELLED" and facts["Restarts"] == "0" and "queued again" not in log
    assert json.loads((run / "journal.jsonl").read_text().splitlines()[-1])["event"] == "stop"
    (job,) = launch(data / "job.toml", run, "--program", QUICK)
    assert cluster.end_of(job)["JobState"] == "COMPLETED" and hash_files(run) == expected


@pytest.mark.slow
def test_a_chain_of_two_jobs(cluster, data, tmp_path, expected):
    job, run = write_job(data, "cpu.toml", run_device="cpu"), tmp_path / "run"  # the GPUs of this Slurm are pretended
    first, second = launch(job, run, "--program", QUICK, "--chain", "--cpu-ranks", 1, "--gpus", 1)
    assert f"afterok:{first}" in cluster.facts(second)["Dependency"]
    assert cluster.end_of(first)["JobState"] == "COMPLETED"
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert [line.get("stage") for line in events if line["event"] == "end"][:2] == ["ingest", "reference"]
    assert {"event": "until", "stage": "reference"}.items() <= next(e for e in events if e["event"] == "until").items()
    assert cluster.end_of(second)["JobState"] == "COMPLETED" and hash_files(run) == expected


@pytest.mark.slow
def test_a_failed_first_job_takes_the_second_with_it(cluster, data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "journal.jsonl").write_text("{}\n")  # something that is no run: 'run' refuses it
    first, second = launch(data / "job.toml", run, "--program", QUICK, "--chain", "--cpu-ranks", 1)
    assert cluster.end_of(first)["ExitCode"] == "2:0" and cluster.end_of(second)["JobState"] == "CANCELLED"
