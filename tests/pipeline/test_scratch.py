"""Images on the nodes' own disks: the same bits, nobody else's copy touched, nothing left behind, no failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lease_helper import gone, holder, root_of
from mpi_helper import run_mpi, start_mpi
from pipeline_helper import (
    QuickEngine,
    cryoiso,
    cryoiso_here,
    hash_files,
    quick_report,
    use_quick_parts,
    write_job,
)

from cryoiso.core.errors import CryoisoError, InputError, Interrupted
from cryoiso.io import scratch_lease, staging
from cryoiso.io.shards import ShardSource
from cryoiso.io.staging import NotStaged, ScratchCopies
from cryoiso.parallel import signals
from cryoiso.parallel.context import Context
from cryoiso.pipeline import scratch_copies as pipeline_scratch
from cryoiso.pipeline.run import resume_run, run_job


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory) -> dict[str, str]:
    """Hashes of a run without scratch."""
    with pytest.MonkeyPatch.context() as patch:
        use_quick_parts(patch)
        folder = tmp_path_factory.mktemp("plain") / "run"
        return hash_files(run_job(data / "job.toml", folder, Context(), quick_report).path)


@pytest.fixture
def scratch(tmp_path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def copies_in(scratch: Path) -> list[Path]:
    return sorted(scratch.rglob("shard-*"))


def facts(run: Path) -> dict:
    return json.loads((run / "logs/timing.json").read_text())["scratch"][0]


# --- places


def test_where_scratch_is(tmp_path, monkeypatch):
    for name in staging.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotStaged, match=r"none of \$SLURM_TMPDIR"):
        staging.find_place("auto", tmp_path, "n1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(NotStaged, match="file system that the images are on"):
        staging.find_place("auto", tmp_path, "n1")
    if staging.file_system("/dev/shm") == "tmpfs":
        monkeypatch.setenv("LOCAL_SCRATCH", "/dev/shm")
        with pytest.raises(NotStaged, match=r"\$TMPDIR"):
            staging.find_place("auto", tmp_path, "n1")
        assert staging._unfit("/dev/shm", tmp_path).startswith("is memory (tmpfs)")
    monkeypatch.setattr(staging, "file_system", lambda folder: "nfs4")
    assert staging._unfit("/dev/shm", tmp_path).startswith("is not the node's own (nfs4)")
    monkeypatch.setattr(staging, "file_system", lambda folder: "xfs")
    assert staging.find_place("auto", Path("/proc"), "n1") == Path(os.environ.get("LOCAL_SCRATCH", tmp_path))
    (tmp_path / "n1").mkdir()
    assert staging.find_place("$TMPDIR/{host}", tmp_path, "n1") == tmp_path / "n1"
    with pytest.raises(NotStaged, match="no such folder"):
        staging.find_place("$TMPDIR/{host}", tmp_path, "n2")
    with pytest.raises(NotStaged, match="not set here"):
        staging.find_place("$NO_SUCH_SCRATCH/x", tmp_path, "n1")


def test_the_file_system_of_a_folder():
    assert staging.file_system("/proc/self") == "proc" and staging.file_system("/")


# --- reading


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    done = cryoiso_here("ingest", data / "particles.star", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_source_reads_copies_and_goes_on_without_them(shards, tmp_path, caplog):
    folder = tmp_path / "originals"
    shutil.copytree(shards, folder)
    source = ShardSource(folder)
    rows = np.arange(len(source))[::-7]
    expected = source.read(rows)
    (tmp_path / "copy").mkdir()
    names = [p.name for p in folder.glob("shard-*")]
    files = {name: tmp_path / "copy" / name for name in names}
    for name, path in files.items():
        staging.copy_checked(folder / name, path, "", lambda: "", lambda n: None)
    source.use_copies(ScratchCopies(files))
    assert np.array_equal(source.read(rows), expected)
    assert {f.filename for f in source._open.values()} <= set(map(str, files.values()))
    source.close()
    for how in ("gone", "cut", "rubbish"):
        for path in files.values():
            if how == "gone":
                path.unlink()
            else:
                path.write_bytes((folder / path.name).read_bytes()[:3000] if how == "cut" else b"rubbish" * 999)
        other, copies = ShardSource(folder), ScratchCopies(files)
        for reader in (source, other):
            reader.use_copies(copies)
        caplog.clear()
        assert np.array_equal(other.read(rows), expected) and len(copies) == 0
        assert np.array_equal(source.read(rows), expected)
        assert sum("reading goes on from the originals" in r.message for r in caplog.records) == 1
    shard = folder / names[0]
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(InputError):
        ShardSource(folder)


def test_a_wrong_checksum_leaves_nothing(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    with pytest.raises(NotStaged, match="another checksum"):
        staging.copy_checked(tmp_path / "a", tmp_path / "b", "0" * 64, lambda: "", lambda n: None)
    with pytest.raises(staging.CopyStopped):
        staging.copy_checked(tmp_path / "a", tmp_path / "b", "", lambda: "SIGTERM", lambda n: None)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# --- runs


def test_a_run_with_scratch_has_the_same_bits_and_leaves_nothing(data, tmp_path, scratch, quick):
    plain = run_job(data / "job.toml", tmp_path / "plain", Context(), quick_report).path
    job = write_job(data, "scratch.toml", run_scratch=str(scratch))
    run = run_job(job, tmp_path / "run", Context(), quick_report).path
    assert hash_files(run) == hash_files(plain) and copies_in(scratch) == []
    size = sum(p.stat().st_size for p in (run / "01_ingest").glob("shard-*"))
    found = facts(run)
    assert found["bytes"] == size and found["nodes"][0]["why_not"] == "" and found["MB_per_s"] > 0
    assert "GB copied to" in (run / "logs/rank-0000.log").read_text()
    keys = [
        [json.loads(line).get("key") for line in (folder / "journal.jsonl").read_text().splitlines()]
        for folder in (plain, run)
    ]
    assert keys[0] == keys[1], "scratch decides no result"


def test_images_are_read_from_the_copy(data, tmp_path, scratch, quick, monkeypatch):
    read: set[str] = set()
    real = ShardSource._block

    def noted(self, number, rows):
        block = real(self, number, rows)
        read.add(self._open[number].filename)
        return block

    monkeypatch.setattr(ShardSource, "_block", noted)
    run_job(write_job(data, "s.toml", run_scratch=str(scratch)), tmp_path / "run", Context())
    assert read and all(name.startswith(str(scratch)) for name in read)


@pytest.mark.parametrize("why", ["no folder", "full", "not allowed", "foreign", "checksum"])
def test_no_scratch_is_no_failure(why, data, tmp_path, scratch, quick, monkeypatch, expected):
    wanted, said = str(scratch), ""
    if why == "no folder":
        wanted, said = str(tmp_path / "nowhere"), "no such folder"
    elif why == "full":
        monkeypatch.setattr(pipeline_scratch, "require_room", _no_room)
        said = "to spare"
    elif why == "not allowed":
        monkeypatch.setattr(scratch_lease, "own_root", _not_allowed)
        said = "Permission denied"
    elif why == "foreign":
        (scratch / f"cryoiso-{os.getuid()}").write_text("mine")
        said = "not a folder of this user"
    else:
        monkeypatch.setattr(
            pipeline_scratch, "recorded_hashes", lambda journal, folder, comm: {"shard-00000.h5": "0" * 64}
        )
        said = "another checksum"
    job = write_job(data, f"{why.replace(' ', '')}.toml", run_scratch=wanted)
    run = run_job(job, tmp_path / "run", Context(), quick_report).path
    assert hash_files(run) == expected and copies_in(scratch) == []
    log = (run / "logs/rank-0000.log").read_text()
    assert log.count("scratch is not used") == 1 and said in log and said in facts(run)["nodes"][0]["why_not"]


def _no_room(folder, need, files):
    raise NotStaged(f"{folder}: 0 GB to spare, the images take {need / 1e9} GB")


def _not_allowed(folder):
    raise PermissionError(13, "Permission denied", str(folder))


def test_a_relative_scratch_is_refused(data, tmp_path):
    done = cryoiso_here("run", write_job(data, "rel.toml", run_scratch="scratch"), "--out", tmp_path / "run")
    assert done.returncode == 2 and "run.scratch = 'scratch'" in done.stderr and not (tmp_path / "run").exists()


def test_a_copy_of_a_dead_job_is_used_and_of_a_living_one_shared(data, tmp_path, scratch, quick, monkeypatch, expected):
    """Killed with everything that belongs to it, in the refinement; the resumed run finds its copy."""
    job = write_job(data, "killed.toml", run_scratch=str(scratch))
    pid = os.fork()
    if pid == 0:
        import torch

        torch.set_num_threads(1)
        QuickEngine.refine = _die_with_heir
        try:
            run_job(job, tmp_path / "run", Context(), quick_report)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert copies_in(scratch)
    other = holder(root_of(scratch), next(p.parent.parent.name for p in copies_in(scratch)))
    other.stdout.readline()  # it spoils the copy as well
    try:
        run = resume_run(tmp_path / "run", Context(), quick_report).path
        assert len(copies_in(scratch)) == 1, "somebody else still reads it"
        assert facts(run)["nodes"][0]["why_not"] == "" and facts(run)["bytes"] > 0
    finally:
        other.kill()
        other.wait()
    assert hash_files(run) == expected
    assert all(gone(path) for path in copies_in(scratch))


def _die_with_heir(self, request, comm):
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            mine = int(Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1]) == os.getpid()
        except OSError:
            continue
        if mine and any(w.endswith(b"scratch_lease.py") for w in words):
            os.kill(int(name), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def test_scratch_that_goes_away_in_the_middle(data, tmp_path, scratch, quick, monkeypatch, expected):
    real = QuickEngine.refine

    def without(self, request, comm):
        for path in copies_in(scratch):
            path.unlink()
        real(self, request, comm)

    monkeypatch.setattr(QuickEngine, "refine", without)
    run = run_job(write_job(data, "v.toml", run_scratch=str(scratch)), tmp_path / "run", Context(), quick_report).path
    monkeypatch.setattr(QuickEngine, "refine", real)
    assert hash_files(run) == expected
    assert (run / "logs/rank-0000.log").read_text().count("reading goes on from the originals") == 1


def test_an_error_and_a_signal_leave_nothing(data, tmp_path, scratch, quick, monkeypatch):
    job = write_job(data, "e.toml", run_scratch=str(scratch))
    for number, error in enumerate((CryoisoError("no", code="unexpected-error"), Interrupted("stop"), ValueError("?"))):

        def fail(self, request, comm, error=error):
            assert copies_in(scratch)
            raise error

        monkeypatch.setattr(QuickEngine, "refine", fail)
        with pytest.raises(type(error)):
            run_job(job, tmp_path / f"run{number}", Context(), quick_report)
        assert copies_in(scratch) == []


def test_a_signal_while_images_are_copied(data, tmp_path, scratch, quick, monkeypatch, expected):
    real = pipeline_scratch.copy_checked

    def then_stop(*given):
        os.kill(os.getpid(), signal.SIGUSR1)
        real(*given)

    job = write_job(data, "stop.toml", run_scratch=str(scratch))
    monkeypatch.setattr(pipeline_scratch, "copy_checked", then_stop)
    with pytest.raises(Interrupted, match="while images were copied to scratch"):
        run_job(job, tmp_path / "run", Context(), quick_report)
    assert [p for p in scratch.rglob("*") if "shard" in p.name] == []
    signals.clear()
    monkeypatch.setattr(pipeline_scratch, "copy_checked", real)
    resume_run(tmp_path / "run", Context(), quick_report)
    assert hash_files(tmp_path / "run") == expected


# --- ranks


def test_a_node_copies_what_its_ranks_read(shards):
    source = ShardSource(shards)
    source.particles = replace(
        source.particles.take(np.arange(1200) % len(source)), half=1 + (np.arange(1200) * 7 // 5 % 2).astype(np.int8)
    )
    source._edges = np.arange(5) * 300  # as if there were four shards
    assert pipeline_scratch.shards_of_ranks(source, [0, 1, 2, 3], 4) == [0, 1, 2, 3]
    parts = [pipeline_scratch.shards_of_ranks(source, [r], 2) for r in range(2)]
    assert parts == [[0, 1, 2], [2, 3]]


@pytest.mark.mpi
def test_ranks_share_a_copy_and_a_killed_job_leaves_none(data, tmp_path, scratch):
    """The command ``refine``, serial without scratch and on two ranks with it."""
    given = ("refine", data / "particles.star", "--ref", data / "truth_map.mrc", "--symmetry", "C3",
             "--healpix-order", 1)  # fmt: skip
    assert cryoiso(*given, "--max-iterations", 1, "--out", tmp_path / "plain").returncode == 0
    with_scratch = ["-m", "cryoiso.cli.main", *given, "--scratch", scratch, "--max-iterations"]
    done = run_mpi(2, [*with_scratch, 1, "--out", tmp_path / "two"], 300)
    assert "GB copied to" in done.stderr
    assert hash_files(tmp_path / "two") == hash_files(tmp_path / "plain") and copies_in(scratch) == []
    (node,) = facts(tmp_path / "two")["nodes"]
    size = sum(p.stat().st_size for p in (tmp_path / "two/shards").glob("shard-*"))
    assert node["bytes"] == size, "once, by one of the ranks"
    process = start_mpi(2, [*with_scratch, 30, "--out", tmp_path / "killed"])
    end = time.monotonic() + 120
    while not copies_in(scratch) and time.monotonic() < end:
        time.sleep(0.02)
    (copy, *_) = copies_in(scratch)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert gone(copy)
