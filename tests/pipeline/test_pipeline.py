"""Runs: order, records, and the promise that an interrupted run ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from errors_helper import raises_code
from mpi_helper import run_mpi, start_mpi
from pipeline_helper import (
    cryoiso,
    forget_signals,
    hash_files,
    quick_report,
    write_cube,
    write_job,
)

from cryoiso.core.config import ParticlesSection
from cryoiso.core.errors import (
    EXIT_INPUT,
    EXIT_REQUEUE,
    EXIT_USAGE,
    InputError,
    Interrupted,
    MissingError,
    UsageError,
)
from cryoiso.parallel import signals
from cryoiso.parallel.context import Context
from cryoiso.pipeline.commands.ingest import ingest_files
from cryoiso.pipeline.records.journal import Journal, read_journal
from cryoiso.pipeline.records.run_folder import REFINE_STAGES
from cryoiso.pipeline.run import resume_run, run_job


def events(folder: Path) -> list[tuple[str, str]]:
    return [(line["event"], line.get("stage", "")) for line in read_journal(folder / "journal.jsonl")]


# --- a whole run


def test_run_folder_has_what_is_promised(data, tmp_path, quick):
    run_job(data / "job.toml", tmp_path / "run", Context(), quick_report)
    folder = tmp_path / "run"
    for name in ("job.toml", "resolved.toml", "manifest.json", "journal.jsonl", "report.html", "logs/rank-0000.log"):
        assert (folder / name).stat().st_size > 0, name
    assert {p.name for p in (folder / "result").iterdir()} == {
        "particles.star", "half1.mrc", "half2.mrc", "map.mrc", "map_weighted.mrc", "mask.mrc", "fsc.xml",
        "fsc_unmasked.xml", "SHA256SUMS", "additional_local_resolution.mrc",
    }  # fmt: skip
    assert (folder / "job.toml").read_bytes() == (data / "job.toml").read_bytes()
    assert not (folder / "lock.json").exists() and not list(folder.rglob("*.part"))
    ends = [stage for event, stage in events(folder) if event == "end"]
    assert ends == [*REFINE_STAGES, "report"] and events(folder)[-1] == ("done", "")
    assert (folder / "04_reconstruct/truth_poses/map.mrc").exists()
    numbers = json.loads((folder / "05_diagnose/diagnose.json").read_text())
    assert numbers["particles"] == 40 and numbers["half_counts"] == [20, 20] and "pose_errors" in numbers


def test_manifest_traces_inputs_and_machine(data, tmp_path, quick):
    import hashlib

    run_job(data / "job.toml", tmp_path / "run", Context())
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    for name in ("particles.star", "particles.mrcs", "truth_map.mrc", "truth.star"):
        expected = hashlib.sha256((data / name).read_bytes()).hexdigest()
        assert manifest["inputs"][str(data / name)]["sha256"] == expected
    (start,) = manifest["starts"]
    assert start["ranks"] == 1 and start["machine"][0]["device"] and start["packages"]["numpy"] == np.__version__
    assert manifest["seed"] == 1


def test_resolved_job_has_every_default_and_runs_the_same(data, tmp_path, quick):
    run_job(data / "job.toml", tmp_path / "a", Context())
    text = (tmp_path / "a/resolved.toml").read_text()
    assert "lowpass_A = 30.0" in text and "# refinement engine" in text and str(data) in text
    shutil.copy(tmp_path / "a/resolved.toml", tmp_path / "again.toml")
    run_job(tmp_path / "again.toml", tmp_path / "b", Context())
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")


def test_same_seed_same_bits_other_seed_other_halves(data, tmp_path, quick):
    jobs = {"a": write_job(data, "a.toml"), "b": write_job(data, "b.toml"), "c": write_job(data, "c.toml", run_seed=5)}
    found = {name: hash_files(run_job(job, tmp_path / name, Context()).path) for name, job in jobs.items()}
    assert found["a"] == found["b"]
    assert found["a"]["01_ingest/shard-00000.h5"] != found["c"]["01_ingest/shard-00000.h5"]


def test_a_run_of_shards_gives_what_a_run_of_their_stacks_gives(data, tmp_path, quick):
    ingest_files(ParticlesSection(file=str(data / "particles.star")), tmp_path / "shards", Context())
    job = write_job(data, "shards.toml", particles_file=str(tmp_path / "shards"))
    run_job(data / "job.toml", tmp_path / "a", Context())
    run_job(job, tmp_path / "b", Context())
    facts = [json.loads((tmp_path / run / "01_ingest/ingest.json").read_text()) for run in "ab"]
    assert facts[1] == {**facts[0], "folder": str(tmp_path / "shards")} and facts[0]["particles"] == 40
    maps = [{k: v for k, v in hash_files(tmp_path / run).items() if k.endswith(".mrc")} for run in "ab"]
    assert maps[0] == maps[1] and len(maps[0]) > 5
    assert [p.name for p in (tmp_path / "b/01_ingest").iterdir()] == ["ingest.json"]


# --- refusals


def test_a_folder_with_a_run_is_refused(data, tmp_path, quick):
    run_job(data / "job.toml", tmp_path / "run", Context())
    before = hash_files(tmp_path / "run")
    with raises_code("run-exists", UsageError):
        run_job(data / "job.toml", tmp_path / "run", Context())
    assert hash_files(tmp_path / "run") == before


def test_resume_needs_a_run(tmp_path):
    with raises_code("run-missing", UsageError):
        resume_run(tmp_path, Context())
    assert list(tmp_path.iterdir()) == []


# --- resume


def in_child(action) -> int:
    """Runs something in a forked process; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        torch.set_num_threads(1)  # the threads that earlier tests started were not forked along; do not wait for them
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


PLACES = ("before rename", "after rename", "before line", "after line")


def kill_at(place: str, count: int) -> None:
    """From now on the ``count``-th rename or journal line of this process is its last act, or never happens."""
    calls = {"n": 0}
    real_replace, real_append = os.replace, Journal.append

    def die_if_due(moment: str) -> None:
        calls["n"] += moment == place
        if moment == place and calls["n"] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace(*a, **k):
        die_if_due("before rename")
        real_replace(*a, **k)
        die_if_due("after rename")

    def append(self, *a, **k):
        die_if_due("before line")
        real_append(self, *a, **k)
        die_if_due("after line")

    os.replace, Journal.append = replace, append


@pytest.mark.parametrize(
    "place, first, step",
    [
        # of every rename and of every line one side; the other side with --slow
        ("before rename", 1, 2),
        ("after rename", 2, 2),
        ("before line", 1, 2),
        ("after line", 2, 2),
        *(pytest.param(place, 1, 1, marks=pytest.mark.slow) for place in PLACES),
    ],
)
def test_killed_at_any_instant_resume_ends_with_the_same_bits(place, first, step, data, tmp_path, quick):
    job = write_job(data, "kill.toml", particles_shard_mib=1)
    expected = hash_files(run_job(job, tmp_path / "whole", Context(), quick_report).path)
    for n, count in enumerate(range(first, 100, step)):
        folder = tmp_path / f"killed{count}"

        def attempt(folder=folder, count=count):
            kill_at(place, count)
            run_job(job, folder, Context(), quick_report)

        status = in_child(attempt)
        if status == 0:
            assert count > 8, "nothing was killed"
            return
        assert status == -signal.SIGKILL
        again = n % 2 == 1  # 'run' with go_on and 'resume' in turn
        if again or not (folder / "resolved.toml").exists():  # killed before there was anything to resume
            run_job(job, folder, Context(), quick_report, go_on=again)
        else:
            resume_run(folder, Context(), quick_report)
        assert hash_files(folder) == expected, f"killed {place} {count}"
        assert not list(folder.rglob("*.part")) and events(folder)[-1] == ("done", "")
    raise AssertionError("never ran to its end")


def test_resume_of_a_finished_run_does_nothing_again(data, tmp_path, quick):
    run_job(data / "job.toml", tmp_path / "run", Context(), quick_report)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.mrc")}
    resume_run(tmp_path / "run", Context(), quick_report)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.mrc")} == before
    assert sum(event == "start" for event, _ in events(tmp_path / "run")) == len(REFINE_STAGES) + 1


@pytest.mark.parametrize(
    "lost, again",
    [
        ("01_ingest/shard-00000.h5", ["ingest"]),
        ("03_refine/half", []),
        ("04_reconstruct/map.mrc", ["reconstruct"]),
        ("result/map.mrc", ["report"]),
    ],
)
def test_a_damaged_file_is_made_again_and_nothing_else(lost, again, data, tmp_path, quick):
    run_job(data / "job.toml", tmp_path / "run", Context(), quick_report)
    before, lines = hash_files(tmp_path / "run"), len(events(tmp_path / "run"))
    if (tmp_path / "run" / lost).exists():
        with open(tmp_path / "run" / lost, "r+b") as stream:
            stream.seek(-3, os.SEEK_END)
            stream.write(b"xyz")
    resume_run(tmp_path / "run", Context(), quick_report)
    assert hash_files(tmp_path / "run") == before
    assert [stage for event, stage in events(tmp_path / "run")[lines:] if event == "start"] == again


def test_an_edited_job_makes_its_stages_again(data, tmp_path, quick):
    run_job(data / "job.toml", tmp_path / "run", Context(), quick_report)
    resolved = tmp_path / "run/resolved.toml"
    resolved.write_text(resolved.read_text().replace('title = ""', 'title = "new"'))
    lines = len(events(tmp_path / "run"))
    resume_run(tmp_path / "run", Context(), quick_report)
    assert "start" not in [event for event, _ in events(tmp_path / "run")[lines:]], "a title changes no result"
    resolved.write_text(resolved.read_text().replace("seed = 1", "seed = 2"))
    resume_run(tmp_path / "run", Context(), quick_report)
    other = run_job(write_job(data, "seed2.toml", run_seed=2), tmp_path / "fresh", Context(), quick_report)
    assert hash_files(tmp_path / "run") == hash_files(other.path)


def test_until_stops_after_a_stage_and_resume_goes_on(data, tmp_path, quick):
    whole = run_job(data / "job.toml", tmp_path / "whole", Context(), quick_report)
    run_job(data / "job.toml", tmp_path / "run", Context(), quick_report, until="reference")
    names = sorted(path.name for path in (tmp_path / "run").glob("0*"))
    assert names == ["01_ingest", "02_reference"] and events(tmp_path / "run")[-1] == ("until", "reference")
    resume_run(tmp_path / "run", Context(), quick_report, until="reconstruct")
    assert not (tmp_path / "run/result").exists() and (tmp_path / "run/04_reconstruct/map.mrc").exists()
    resume_run(tmp_path / "run", Context(), quick_report)
    assert events(tmp_path / "run")[-1] == ("done", "") and hash_files(tmp_path / "run") == hash_files(whole.path)
    assert sum(event == "start" for event, _ in events(tmp_path / "run")) == len(REFINE_STAGES) + 1


def test_until_an_unknown_stage_is_refused_before_anything_is_written(data, tmp_path, quick):
    with raises_code("stage-unknown", UsageError, match=r"no stage 'train-1'.*known: ingest, reference, refine"):
        run_job(data / "job.toml", tmp_path / "run", Context(), until="train-1")
    assert not (tmp_path / "run").exists()
    run_job(data / "job.toml", tmp_path / "run", Context(), until="ingest")
    with raises_code("stage-unknown", UsageError):
        resume_run(tmp_path / "run", Context(), until="ingets")


def test_stages_without_a_gpu_run_where_there_is_none(data, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = write_job(data, "cuda.toml", run_device="cuda")
    run_job(job, tmp_path / "run", Context(), until="reference")
    with raises_code("gpu-missing", MissingError):
        resume_run(tmp_path / "run", Context())


def test_continue_starts_or_goes_on_and_warns_of_another_job(data, tmp_path, quick, caplog):
    job = write_job(data, "first.toml")
    run = run_job(job, tmp_path / "run", Context(), quick_report, until="ingest", go_on=True)
    write_job(data, "first.toml", launch_nodes=7)
    run_job(job, run.path, Context(), quick_report, until="ingest", go_on=True)
    assert "is not the job" not in caplog.text, "how a job is launched changes no result"
    write_job(data, "first.toml", run_seed=9)
    run_job(job, run.path, Context(), quick_report, go_on=True)
    assert "is not the job" in caplog.text
    whole = run_job(data / "job.toml", tmp_path / "whole", Context(), quick_report)
    assert hash_files(run.path) == hash_files(whole.path)
    job.unlink()
    run_job(job, run.path, Context(), quick_report, go_on=True)


def test_changed_input_stops_a_resume(data, tmp_path, quick):
    folder = tmp_path / "copy"
    shutil.copytree(data, folder)
    run_job(folder / "job.toml", tmp_path / "run", Context())
    write_cube(folder / "truth_map.mrc", 24, 7.0)
    with raises_code("run-inputs-changed", InputError):
        resume_run(tmp_path / "run", Context())
    (folder / "truth_map.mrc").unlink()
    with pytest.raises(InputError, match="is gone"):
        resume_run(tmp_path / "run", Context())


def test_a_signal_stops_between_stages_and_is_noted(data, tmp_path, quick, monkeypatch):
    from cryoiso.pipeline.stages import reference

    real = reference._write_reference

    def then_signal(*given):
        real(*given)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(reference, "_write_reference", then_signal)
    with pytest.raises(Interrupted):
        run_job(data / "job.toml", tmp_path / "run", Context(), quick_report)
    assert events(tmp_path / "run")[-1] == ("stop", "") and not (tmp_path / "run/03_refine/particles.star").exists()
    signals.clear()
    monkeypatch.setattr(reference, "_write_reference", real)
    resume_run(tmp_path / "run", Context(), quick_report)
    whole = run_job(data / "job.toml", tmp_path / "whole", Context(), quick_report)
    assert hash_files(tmp_path / "run") == hash_files(whole.path)


def test_a_resumed_run_goes_on_within_an_iteration(data, tmp_path, monkeypatch, request):
    """Told to stop after the first batch of the refinement: that batch is not searched again."""
    from cryoiso.refine import expectation

    request.addfinalizer(forget_signals)
    searched: list[int] = []

    class Signalled(expectation.Searcher):
        def search(self, batch, white, given=None):
            searched.append(int(batch.rows[0]))
            if len(searched) == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().search(batch, white, given)

    monkeypatch.setattr(expectation, "Searcher", Signalled)
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        run_job(data / "job.toml", run, Context(), quick_report)
    assert len(list(run.glob("03_refine/checkpoint/searched-*"))) == len(searched) == 1
    signals.clear()
    resume_run(run, Context(), quick_report)
    stopped = list(searched)
    searched[:] = [-1]
    whole = run_job(data / "job.toml", tmp_path / "whole", Context(), quick_report)
    assert stopped == searched[1:]
    assert hash_files(run) == hash_files(whole.path) and not list(run.rglob("searched-*"))


# --- the real engine, in processes of their own


def test_whole_run_from_the_command_line(data, tmp_path):
    done = cryoiso("run", data / "job.toml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run/report.html")
    page = (tmp_path / "run/report.html").read_text()
    assert "<html" in page and len(page) > 50_000
    again = cryoiso("run", data / "job.toml", "--out", tmp_path / "run")
    assert again.returncode == EXIT_USAGE and "cryoiso resume" in again.stderr and "Traceback" not in again.stderr
    assert cryoiso("resume", tmp_path / "run").returncode == 0


@pytest.mark.mpi
def test_any_number_of_ranks_and_a_kill_give_the_same_bits(data, tmp_path):
    """Serial; on 3 ranks; on 2 ranks killed in the refinement and resumed on 3."""
    job = data / "job.toml"
    assert cryoiso("run", job, "--out", tmp_path / "serial").returncode == 0
    expected = hash_files(tmp_path / "serial")
    words = ["-m", "cryoiso.cli.main"]
    run_mpi(3, [*words, "run", job, "--out", tmp_path / "three"], 600)
    assert hash_files(tmp_path / "three") == expected

    process = start_mpi(2, [*words, "run", job, "--out", tmp_path / "killed"])
    _wait_for(tmp_path / "killed/journal.jsonl", '"checkpoint", "stage": "refine"', process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    _wait_until_unlocked(tmp_path / "killed/lock.json")
    run_mpi(3, [*words, "resume", tmp_path / "killed"], 600)
    assert hash_files(tmp_path / "killed") == expected
    assert any(line.get("resumed") for line in read_journal(tmp_path / "killed/journal.jsonl"))


@pytest.mark.mpi
def test_sigterm_to_one_rank_checkpoints_and_exits_75(data, tmp_path):
    job = write_job(data, "long.toml", refine_max_iterations=20)
    words = ["-m", "cryoiso.cli.main"]
    process = start_mpi(2, [*words, "run", job, "--out", tmp_path / "run"])
    _wait_for(tmp_path / "run/journal.jsonl", '"checkpoint", "stage": "refine"', process)
    holder = json.loads((tmp_path / "run/lock.json").read_text())["pid"]
    os.kill(holder, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_REQUEUE and err.count("error:") == 1 and "resume" in err
    assert events(tmp_path / "run")[-1] == ("stop", "") and not (tmp_path / "run/lock.json").exists()


def _wait_for(path: Path, text: str, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{text} never came")


def _wait_until_unlocked(path: Path) -> None:
    """Until the killed rank 0 is gone, so that its lock is stale."""
    pid = json.loads(path.read_text())["pid"]
    for _ in range(1200):  # a minute: on a loaded machine the launcher's proxy is slow to see that mpirun is gone
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("rank 0 survived its launcher")


def test_refine_and_reconstruct_alone_on_plain_files(data, tmp_path):
    options = ["--ref", data / "truth_map.mrc", "--symmetry", "C3", "--max-iterations", 1, "--healpix-order", 1]
    done = cryoiso("refine", data / "particles.star", "--out", tmp_path / "refined", *options)
    assert done.returncode == 0, done.stderr
    star = tmp_path / "refined/particles.star"
    assert star.exists() and (tmp_path / "refined/half2.mrc").exists()
    done = cryoiso("refine", tmp_path / "refined/shards", "--out", tmp_path / "from_shards", *options)
    assert done.returncode == 0, done.stderr
    same = [(tmp_path / name / "half1.mrc").read_bytes() for name in ("refined", "from_shards")]
    assert same[0] == same[1]
    done = cryoiso("reconstruct", star, "--out", tmp_path / "maps", "--symmetry", "C3", "--project", data, cwd=data)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"half1.mrc", "half2.mrc", "map.mrc", "map_weighted.mrc"}
    assert cryoiso("reconstruct", data / "particles.star", "--out", tmp_path / "no").returncode == EXIT_INPUT
