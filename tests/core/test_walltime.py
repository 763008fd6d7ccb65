"""The job's end: finding it, and stopping with a checkpoint before it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from mpi_helper import run_mpi
from pipeline_helper import cryoiso, forget_signals, hash_files, simulate, write_job

from cryoiso.core.errors import EXIT_REQUEUE, Interrupted
from cryoiso.parallel import signals
from cryoiso.parallel.context import Context
from cryoiso.pipeline.batch.walltime import End, job_end
from cryoiso.pipeline.planning import forecast
from cryoiso.pipeline.planning.forecast import Forecast
from cryoiso.pipeline.records import hashing
from cryoiso.pipeline.records.journal import read_journal
from cryoiso.pipeline.run import resume_run, run_job
from cryoiso.refine.iterate import Refinement

NOON = time.mktime((2026, 3, 1, 12, 0, 0, 0, 0, -1))


@pytest.fixture(autouse=True)
def quiet_signals():
    yield
    forget_signals()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small set for the real engine."""
    return simulate(tmp_path_factory.mktemp("data")).parent


# --- who knows the end


@pytest.mark.parametrize(
    "env, answers, end, source",
    [
        ({"CRYOISO_END_TIME": "1000", "SLURM_JOB_END_TIME": "2000"}, {}, 1000.0, "CRYOISO_END_TIME"),
        ({"SLURM_JOB_END_TIME": "2000", "SLURM_JOB_ID": "7"}, {}, 2000.0, "SLURM_JOB_END_TIME"),
        ({"SLURM_JOB_ID": "7"}, {"squeue": "2026-03-01T12:00:00\n"}, NOON, "squeue"),
        ({"SLURM_JOB_ID": "7"}, {"squeue": "N/A", "scontrol": " X EndTime=2026-03-01T12:00:00 Y"}, NOON, "scontrol"),
        ({"PBS_JOBID": "7"}, {"qstat": "  Walltime.Remaining = 300\n"}, 5300.0, "qstat"),
        ({"PBS_JOBID": "7"}, {"qstat": " Resource_List.walltime = 01:00:00\n stime = Sun Mar  1 11:00:00 2026\n"}, NOON,
         "qstat"),
        ({"LSB_JOBID": "7"}, {"bjobs": "1:30 L\n"}, 5000.0 + 5400, "bjobs"),
    ],
)  # fmt: skip
def test_the_end_is_found(env, answers, end, source):
    found = job_end(env, lambda command: answers.get(command[0], ""), 5000.0)
    assert found == End(end, source)


@pytest.mark.parametrize(
    "env", [{}, {"SLURM_JOB_ID": "7"}, {"PBS_JOBID": "7"}, {"LSB_JOBID": "7"}, {"CRYOISO_END_TIME": "?"}]
)
def test_nobody_knows_the_end(env):
    assert job_end(env, lambda command: "UNLIMITED", 5000.0) is None


def test_a_batch_system_that_hangs_is_left_alone(tmp_path, monkeypatch):
    from cryoiso.pipeline.batch import walltime

    monkeypatch.setattr(walltime, "ASK_S", 0.3)
    for name in ("squeue", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexec sleep 60\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert job_end({"SLURM_JOB_ID": "7"}) is None


# --- stopping


def test_a_run_stops_before_the_end_and_resumes_to_the_same_bits(data, tmp_path, monkeypatch):
    """The end comes while the second iteration works."""
    job = write_job(data, "walltime.toml", refine_max_iterations=3)
    whole = hash_files(run_job(job, tmp_path / "whole", Context()).path)
    ends: list[Forecast] = []
    made, maximise = forecast.Forecast, Refinement._maximise

    def remember(*args, **options):
        ends.append(made(*args, **options))
        return ends[-1]

    def then_the_end(self, model, *args):
        found = maximise(self, model, *args)
        ends[-1].end = End(time.time() + 60, "test")  # the margin is 120 s
        for _ in range(200):
            if signals.stop_signal():
                return found
            time.sleep(0.05)
        raise AssertionError("nobody asked to stop")

    monkeypatch.setattr(forecast, "Forecast", remember)
    monkeypatch.setattr(Refinement, "_maximise", then_the_end)
    with pytest.raises(Interrupted):
        run_job(job, tmp_path / "run", Context())
    monkeypatch.setattr(Refinement, "_maximise", maximise)
    signals.clear()
    lines = read_journal(tmp_path / "run/journal.jsonl")
    assert [line["event"] for line in lines[-3:]] == ["forecast", "checkpoint", "stop"] and lines[-3]["stopping"]
    assert lines[-2]["iteration"] == 1
    resume_run(tmp_path / "run", Context())
    assert hash_files(tmp_path / "run") == whole


def test_a_job_that_is_over_exits_75(data, tmp_path):
    done = cryoiso("run", data / "job.toml", "--out", tmp_path / "run", CRYOISO_END_TIME=str(int(time.time())))
    assert done.returncode == EXIT_REQUEUE and "the job ends at" in done.stderr, done.stderr


@pytest.mark.mpi
def test_all_ranks_leave_together_when_rank_0_sees_the_end(data, tmp_path):
    words = ["-m", "cryoiso.cli.main", "run", str(data / "job.toml"), "--out", str(tmp_path / "run")]
    done = run_mpi(2, words, env={"CRYOISO_END_TIME": str(int(time.time()))}, check=False)
    assert done.returncode == EXIT_REQUEUE, done.stderr
    assert read_journal(tmp_path / "run/journal.jsonl")[-1]["event"] == "stop"


# --- places where a signal is heeded


def test_passes_over_the_images_before_the_first_iteration_can_be_stopped(data, tmp_path, monkeypatch):
    from cryoiso.refine import initial_model

    read = initial_model.mean_power

    def signalled(run):
        signals.ask_to_stop("test")
        return read(run)

    monkeypatch.setattr(initial_model, "mean_power", signalled)
    with pytest.raises(Interrupted):
        run_job(data / "job.toml", tmp_path / "run", Context())
    assert not list((tmp_path / "run").rglob("*.part"))


def test_a_shard_that_is_interrupted_leaves_nothing(data, tmp_path, monkeypatch):
    from cryoiso.pipeline.stages import ingest

    monkeypatch.setattr(ingest.io_ingest, "BLOCK_IMAGES", 8)
    told = ingest._heed_and_tell

    def signalled(line, done):
        signals.ask_to_stop("test")
        told(line, done)

    monkeypatch.setattr(ingest, "_heed_and_tell", signalled)
    with pytest.raises(Interrupted):
        run_job(data / "job.toml", tmp_path / "run", Context())
    assert list((tmp_path / "run/01_ingest").iterdir()) == []


def test_reading_many_files_can_be_stopped(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 10)
    hashing.hash_outputs(tmp_path, ("a",), Context())
    signals.ask_to_stop("test")
    hashing.hash_outputs(tmp_path, ("a",), Context())  # little to read: it is read
    monkeypatch.setattr(hashing, "MUCH_BYTES", 5)
    with pytest.raises(Interrupted):
        hashing.hash_outputs(tmp_path, ("a",), Context())


def test_diagnosis_can_be_stopped_between_its_parts():
    from cryoiso.methods.assess.measure import diagnose

    maps = np.random.default_rng(0).standard_normal((2, 16, 16, 16)).astype(np.float32)
    signals.ask_to_stop("test")
    with pytest.raises(Interrupted):
        diagnose(*maps, None, 3.0, None)


@pytest.mark.mpi
def test_a_signal_to_any_rank_stops_the_work_of_rank_0():
    """As the diagnosis: the others wait for rank 0, and one of them is told to stop."""
    run_mpi(
        3,
        "import time\n"
        "from cryoiso.core.errors import Interrupted\n"
        "from cryoiso.parallel import signals\n"
        "from cryoiso.parallel.group_stop import on_root_heeding\n"
        "from cryoiso.parallel.context import get_context\n"
        "ctx = get_context()\n"
        "def work():\n"
        "    until = time.monotonic() + 30\n"
        "    while time.monotonic() < until:\n"
        "        signals.heed()\n"
        "        time.sleep(0.01)\n"
        "done = []\n"
        "on_root_heeding(ctx, done.append, 1)\n"
        "assert done == [1] * (ctx.rank == 0)\n"
        "if ctx.rank == 2:\n"
        "    signals.ask_to_stop('test')\n"
        "try:\n"
        "    on_root_heeding(ctx, work)\n"
        "except Interrupted:\n"
        "    pass\n"
        "else:\n"
        "    raise SystemExit(f'rank {ctx.rank} was not interrupted')\n"
        "assert ctx.allgather(ctx.stop_requested()) == [True] * 3\n",
    )


def test_the_stage_of_the_diagnosis_listens_to_all_ranks(monkeypatch):
    """What it does on rank 0 receives the stop signal that the others send."""
    from types import SimpleNamespace

    from cryoiso.parallel.group_stop import StopSignal
    from cryoiso.pipeline.stages import diagnose

    monkeypatch.setattr(diagnose, "_diagnose", lambda run, inputs: signals.heed())
    diagnose.diagnose(SimpleNamespace(comm=Context()), None, resume=False)
    monkeypatch.setattr(StopSignal, "received", lambda stop_signal: True)
    with pytest.raises(Interrupted):
        diagnose.diagnose(SimpleNamespace(comm=Context()), None, resume=False)


def test_tiles_of_a_prediction_can_be_stopped():
    from cryoiso.methods.anisotropy.predict import predict
    from cryoiso.nets.unet import Unet3d, UnetConfig
    from cryoiso.parallel.ddp import training_group

    def stop() -> None:
        raise Interrupted("test")

    network = Unet3d(UnetConfig((4,), 1))
    with training_group(Context(), range(1)) as group, pytest.raises(Interrupted):
        predict(network, np.zeros((16, 16, 16), np.float32), 16, group, False, stop)
