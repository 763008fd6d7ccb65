"""What disks, people and clocks do to a run: one clear error, nothing half-written, and once the fault is mended
``resume`` ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from pipeline_helper import (
    QuickEngine,
    cryoiso_here,
    forget_signals,
    hash_files,
    quick_report,
    use_quick_parts,
    write_job,
)

from cryoiso.core.errors import EXIT_INPUT, EXIT_OTHER, EXIT_USAGE
from cryoiso.engines.native import NativeEngine
from cryoiso.io import checkpoint, ingest, staging
from cryoiso.io.atomic import DiskFullError
from cryoiso.parallel import signals
from cryoiso.pipeline import run, scratch_copies
from cryoiso.pipeline.records import journal as journal_module
from cryoiso.pipeline.records import lock
from cryoiso.pipeline.records.journal import Journal, read_journal
from cryoiso.pipeline.stages import engines


@pytest.fixture
def quick(monkeypatch):
    use_quick_parts(monkeypatch)
    monkeypatch.setattr("cryoiso.report.build", quick_report)
    yield
    forget_signals()


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory) -> dict[str, str]:
    """Hashes of a run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        use_quick_parts(patch)
        patch.setattr("cryoiso.report.build", quick_report)
        folder = tmp_path_factory.mktemp("whole") / "run"
        done = cryoiso_here("run", data / "job.toml", "--out", folder)
        assert done.returncode == 0, done.stderr
        return hash_files(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("LOUD: a small file system needs root and mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill(folder: Path, leave: int = 0) -> None:
    """Takes all room of a file system but so many bytes."""
    with open(folder / "filler", "ab", buffering=0) as stream:
        free = os.statvfs(folder)
        try:
            os.posix_fallocate(stream.fileno(), 0, max(free.f_bavail * free.f_frsize - leave, 0))
            while not leave:
                stream.write(b"\0" * 4096)
        except OSError:
            pass


def fails(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One message with these words, no traceback, this exit status."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Logging error" not in done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    assert [word for word in words if word not in message] == [], message


def resumes(folder: Path, expected: dict[str, str]) -> str:
    """What resume said; it ended with the same bits."""
    signals.clear()
    done = cryoiso_here("resume", folder)
    assert done.returncode == 0, done.stderr
    assert hash_files(folder) == expected and not list(folder.rglob("*.part")) and not (folder / "lock.json").exists()
    return done.stderr


def whole_lines(folder: Path) -> bool:
    return all(json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines())


# --- full disks


def _full_in_ingest(patch, disk: Path) -> None:
    real = ingest.read_prepared

    def then_fill(*given, **options):
        fill(disk)
        return real(*given, **options)

    patch.setattr(ingest, "read_prepared", then_fill)


def _full_in_refine(patch, disk: Path) -> None:
    """The second checkpoint does not fit."""
    real, calls = checkpoint.save, []

    def save(*given):
        calls.append(given)
        if len(calls) == 2:
            fill(disk, 20_000)
        real(*given)

    patch.setattr(checkpoint, "save", save)


def _full_in_report(patch, disk: Path) -> None:
    def fill_first(folder):
        fill(disk)
        quick_report(folder)

    patch.setattr("cryoiso.report.build", fill_first)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (_full_in_ingest, ("01_ingest/shard-00000.h5", "no space left on the disk")),
        (_full_in_refine, ("03_refine/checkpoint", "no space left on the disk")),
        (_full_in_report, ("report.html", "no space left on the disk")),
    ],
)
def test_a_disk_that_fills_up(where, words, data, small_disk, quick, expected, tmp_path, monkeypatch):
    folder = small_disk / "run"
    if where is _full_in_refine:
        monkeypatch.setattr(engines, "engine", lambda name: NativeEngine())
        done = cryoiso_here("run", data / "job.toml", "--out", tmp_path / "real")
        assert done.returncode == 0, done.stderr
        expected = hash_files(tmp_path / "real")
    with pytest.MonkeyPatch.context() as patch:
        where(patch, small_disk)
        fails(cryoiso_here("run", data / "job.toml", "--out", folder), EXIT_OTHER, *words)
    assert not list(folder.rglob("*.part")) and not list(folder.rglob(".*.new")) and whole_lines(folder)
    fails(cryoiso_here("resume", folder), EXIT_OTHER, "no space left on the disk")
    (small_disk / "filler").unlink()
    said = resumes(folder, expected)
    assert where is not _full_in_refine or "goes on after iteration 1" in said


def test_a_journal_on_a_full_disk_keeps_whole_lines(small_disk):
    journal = Journal(small_disk / "journal.jsonl")
    journal.append("start", stage="ingest", key="k")
    fill(small_disk)
    facts = {"stage": "ingest", "key": "k", "seconds": 1.0, "outputs": {}, "more": "x" * 10_000}
    with pytest.raises(DiskFullError, match=r"journal\.jsonl: no space left"):
        journal.append("end", **facts)
    assert [line["event"] for line in journal.lines] == ["start"] and whole_lines(small_disk)
    (small_disk / "filler").unlink()
    journal.append("end", **facts)
    assert [line["event"] for line in read_journal(journal.path)] == ["start", "end"]


def test_a_scratch_that_fills_up(data, small_disk, quick, expected, tmp_path, monkeypatch):
    """It fills between the look at its size and the copying."""

    def then_fill(folder, need, files):
        staging.require_room(folder, need, files)
        fill(small_disk)

    monkeypatch.setattr(scratch_copies, "require_room", then_fill)
    job = write_job(data, "scratch.toml", run_scratch=str(small_disk))
    done = cryoiso_here("run", job, "--out", tmp_path / "run")
    assert done.returncode == 0 and done.stderr.count("No space left on device") == 1, done.stderr
    assert hash_files(tmp_path / "run") == expected and not list(small_disk.rglob("shard-*"))


def test_a_scratch_that_is_too_small(data, small_disk, quick, expected, tmp_path):
    fill(small_disk, 60_000)
    job = write_job(data, "small.toml", run_scratch=str(small_disk))
    done = cryoiso_here("run", job, "--out", tmp_path / "run")
    assert done.returncode == 0 and done.stderr.count("GB to spare, the images take") == 1, done.stderr
    assert hash_files(tmp_path / "run") == expected and not list(small_disk.rglob("shard-*"))


# --- folders


def test_a_disk_that_becomes_read_only(data, small_disk, quick, expected):
    folder, real = small_disk / "run", QuickEngine.refine

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    def read_only(self, request, comm):
        for handler in run.logger.handlers:  # an open log keeps the disk from being remounted
            handler.close()
        remount("ro")
        real(self, request, comm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuickEngine, "refine", read_only)
        fails(cryoiso_here("run", data / "job.toml", "--out", folder), EXIT_INPUT, "03_refine", "Read-only file system")
    fails(cryoiso_here("resume", folder), EXIT_INPUT, str(folder), "Read-only file system")
    other = small_disk / "other"
    fails(cryoiso_here("run", data / "job.toml", "--out", other), EXIT_INPUT, "not allowed to write here")
    remount("rw")
    assert not list(folder.rglob("*.part")) and not other.exists()
    resumes(folder, expected)


def test_a_run_folder_that_is_removed(data, tmp_path, quick, expected):
    folder, real = tmp_path / "run", QuickEngine.refine

    def remove(self, request, comm):
        shutil.rmtree(folder)
        real(self, request, comm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuickEngine, "refine", remove)
        done = cryoiso_here("run", data / "job.toml", "--out", folder)
        fails(done, done.returncode, str(folder), "folder")
        assert done.returncode in (EXIT_OTHER, EXIT_INPUT)
    assert not folder.exists(), "nothing of it comes back"
    fails(cryoiso_here("resume", folder), EXIT_USAGE, "holds no run")
    assert cryoiso_here("run", data / "job.toml", "--out", folder).returncode == 0
    assert hash_files(folder) == expected


def test_a_run_that_was_killed_before_it_had_begun_can_be_started_again(data, tmp_path, quick, expected):
    """The manifest is there, resolved.toml is not yet."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "job_to_toml", lambda job: os._exit(9))
        pid = os.fork()
        if pid == 0:
            cryoiso_here("run", data / "job.toml", "--out", folder)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert (folder / "manifest.json").exists() and not (folder / "resolved.toml").exists()
    fails(cryoiso_here("resume", folder), EXIT_USAGE, "holds no run")
    assert cryoiso_here("run", data / "job.toml", "--out", folder).returncode == 0
    assert hash_files(folder) == expected


def test_two_runs_start_in_one_folder_at_once(data, tmp_path, quick, expected):
    """Exactly one of them works."""
    go = time.monotonic() + 1.0
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            import torch

            torch.set_num_threads(1)
            time.sleep(max(0, go - time.monotonic()))
            done = cryoiso_here("run", data / "job.toml", "--out", tmp_path / "run")
            refused = "[run-locked]" in done.stderr or "[run-exists]" in done.stderr
            os._exit(done.returncode if done.returncode == 0 or refused else 99)
        pids.append(pid)
    statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    assert statuses == [0, EXIT_USAGE, EXIT_USAGE]
    assert hash_files(tmp_path / "run") == expected


# --- files that are not what they were


def _stopped(data: Path, folder: Path, stage: str, job: Path | None = None) -> None:
    """A run that was stopped by a signal at the start of a stage."""
    real = run.do_stage

    def stop_there(context, inputs, found, key, *, resume):
        if found.name == stage:
            os.kill(os.getpid(), signal.SIGTERM)
            if context.comm.stop_requested():
                from cryoiso.core.errors import Interrupted

                raise Interrupted("stopped")
        return real(context, inputs, found, key, resume=resume)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "do_stage", stop_there)
        assert cryoiso_here("run", job or data / "job.toml", "--out", folder).returncode == 75
    signals.clear()


def flip_a_byte(path: Path, where: int = -1000) -> None:
    """One bit of a file, its size and time unchanged."""
    times = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(where, os.SEEK_END if where < 0 else os.SEEK_SET)
        old = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_an_edited_shard_is_made_again(data, tmp_path, quick, expected):
    _stopped(data, tmp_path / "run", "refine")
    flip_a_byte(tmp_path / "run/01_ingest/shard-00000.h5")
    said = resumes(tmp_path / "run", expected)
    assert "shard-00000.h5 has changed; the stage is done again" in said


def test_an_edited_input_is_refused_until_it_is_back(data, tmp_path, quick):
    name, stage = "particles.star", "refine"
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    whole = cryoiso_here("run", copy / "job.toml", "--out", tmp_path / "whole")
    assert whole.returncode == 0
    _stopped(copy, tmp_path / "run", stage)
    flip_a_byte(copy / name)
    fails(cryoiso_here("resume", tmp_path / "run"), EXIT_INPUT, name, "has changed since it started", "Put the old")
    flip_a_byte(copy / name)
    resumes(tmp_path / "run", hash_files(tmp_path / "whole"))


def test_a_stack_of_another_size_is_refused(data, tmp_path, quick):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    _stopped(copy, tmp_path / "run", "ingest")
    with open(copy / "particles.mrcs", "ab") as stream:
        stream.write(b"x")
    fails(cryoiso_here("resume", tmp_path / "run"), EXIT_INPUT, "has changed since this run started", "Put the")


@pytest.mark.parametrize("how", ["cut", "empty", "byte"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, tmp_path, caplog):
    file = tmp_path / "state.npz"
    for number in (1, 2, 3):
        checkpoint.save(file, {"x": np.full(1000, number)}, {"n": number})
    if how == "byte":
        flip_a_byte(file, 2000)
    else:
        os.truncate(file, file.stat().st_size // 2 if how == "cut" else 0)
    arrays, values = checkpoint.load(file)
    assert values == {"n": 2} and arrays["x"][0] == 2 and "trying the one before it" in caplog.text
    os.truncate(checkpoint.previous(file), 10)
    assert checkpoint.load(file) is None


def test_a_refinement_goes_on_from_the_checkpoint_before(data, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(engines, "engine", lambda name: NativeEngine())
    job = write_job(data, "three.toml", refine_max_iterations=3)
    assert cryoiso_here("run", job, "--out", tmp_path / "whole").returncode == 0
    real, calls = checkpoint.save, []

    def stop_after(*given):
        real(*given)
        calls.append(given)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", stop_after)
        assert cryoiso_here("run", job, "--out", tmp_path / "run").returncode == 75
    file = tmp_path / "run/03_refine/checkpoint/state.npz"
    os.truncate(file, file.stat().st_size - 5000)
    said = resumes(tmp_path / "run", hash_files(tmp_path / "whole"))
    assert "trying the one before it" in said and "goes on after iteration 1" in said


def test_a_damaged_manifest_is_one_clear_error(data, tmp_path, quick):
    _stopped(data, tmp_path / "run", "refine")
    os.truncate(tmp_path / "run/manifest.json", 100)
    fails(cryoiso_here("resume", tmp_path / "run"), EXIT_INPUT, "the manifest is damaged")


@pytest.mark.parametrize("name", ["resolved.toml", "manifest.json"])
def test_a_record_that_is_gone_is_named(name, data, tmp_path, quick):
    _stopped(data, tmp_path / "run", "refine")
    (tmp_path / "run" / name).unlink()
    fails(cryoiso_here("resume", tmp_path / "run"), EXIT_USAGE, f"{name} of this run is missing", "Put it back")
    if name == "resolved.toml":
        fails(cryoiso_here("verify", tmp_path / "run"), EXIT_USAGE, f"{name} of this run is missing")


def test_a_run_without_its_copy_of_the_job_file_ends_and_is_sealed(data, tmp_path, quick, expected):
    folder = tmp_path / "run"
    _stopped(data, folder, "refine")
    (folder / "job.toml").unlink()
    done = cryoiso_here("resume", folder)
    assert done.returncode == 0 and "sealed without it" in done.stderr, done.stderr
    done = cryoiso_here("verify", folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_journal_torn_in_a_line(data, tmp_path, quick, expected):
    _stopped(data, tmp_path / "run", "reconstruct")
    file = tmp_path / "run/journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    where = next(i for i, line in enumerate(lines) if b'"end", "stage": "refine"' in line)
    file.write_bytes(b"".join(lines[:where]) + lines[where][: len(lines[where]) // 2])
    resumes(tmp_path / "run", expected)
    assert whole_lines(tmp_path / "run")


# --- clocks


class _Past(datetime):
    """A clock that was set back by a year."""

    @classmethod
    def now(cls, tz=None):
        return datetime.now(UTC) - timedelta(days=365)


def test_a_clock_that_goes_backwards(data, tmp_path, quick, expected, monkeypatch):
    """Files and journal lines come from the future of the resumed run."""
    _stopped(data, tmp_path / "run", "reconstruct")
    ahead = time.time() + 365 * 86400
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (ahead, ahead))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 365 * 86400)
    monkeypatch.setattr(journal_module, "datetime", _Past)
    resumes(tmp_path / "run", expected)
    times = [json.loads(line)["time"] for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
    assert times != sorted(times), "the clock did go backwards"


def test_a_clock_that_jumps_forward_steals_no_lock(tmp_path, monkeypatch):
    """The lock of a living run on another host looks old at once; but its holder touches it."""
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "job": "", "restart": "0"}))
    old = time.time() - 10 * lock.STALE_AFTER_S
    os.utime(path, (old, old))
    monkeypatch.setattr(lock, "WATCH_S", 3.0)
    beat = threading.Timer(0.4, os.utime, (path, (old + 20, old + 20)))
    beat.start()
    with pytest.raises(Exception, match="another run works in"), lock.locked(path):
        pass
    beat.join()
    assert json.loads(path.read_text())["host"] == "elsewhere"
