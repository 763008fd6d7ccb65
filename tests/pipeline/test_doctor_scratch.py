"""What ``doctor`` says of the nodes' scratch: the facts, whether a run would use it, and that nothing stays there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lease_helper import holder, root_of
from mpi_helper import run_mpi
from pipeline_helper import cryoiso_here, forget_signals, quick_report, use_quick_parts, write_job

from cryoiso.core.errors import EXIT_DONE
from cryoiso.io import scratch_lease, staging
from cryoiso.io.shards import ShardSource
from cryoiso.parallel.context import Context
from cryoiso.pipeline.finding import FINE, NOTE, WARNING
from cryoiso.pipeline.run import run_job
from cryoiso.pipeline.scratch_copies import shards_of_ranks
from cryoiso.pipeline.site import filesystem, scratch_probe
from cryoiso.pipeline.site.scratch_checks import scratch_findings
from cryoiso.pipeline.site.scratch_probe import Images, look_for_scratch

HUGE = 10**15
NODE = {
    "wanted": "auto", "path": "/local", "folder": "/local", "type": "xfs", "free_bytes": 2**38, "free_inodes": 10**6,
    "problem": "", "write_MBps": 900.0, "read_MBps": 2000.0, "small_file_s": 0.002, "needed_bytes": 2**36,
    "needed_files": 256, "why_not": "", "why_partly": "",
}  # fmt: skip


@pytest.fixture
def scratch(tmp_path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def doctor(folder: Path, job: Path) -> tuple[list[dict], dict[str, dict]]:
    """Findings about scratch, and the facts of every host."""
    done = cryoiso_here("doctor", folder, "--job", job, "--json")
    assert done.returncode == EXIT_DONE, done.stderr
    told = json.loads(done.stdout)
    return [f for f in told["findings"] if f["check"] == "scratch"], told["folders"]["scratch"]


def look(scratch: Path, run: Path, **images) -> dict:
    (found,) = look_for_scratch(Context(), Images(str(scratch), **{"raw": (1000,), **images}), run).values()
    return found


def test_room_inodes_and_writing_are_told_and_nothing_stays(data, tmp_path, scratch):
    job = write_job(data, "doctor.toml", run_scratch=str(scratch))
    (found,), nodes = doctor(tmp_path, job)
    host = Context().hostname
    assert found["severity"] == FINE and all(s in found["found"] for s in (str(scratch), host, "free", "MB/s", "files"))
    node, whole = nodes[host], os.statvfs(scratch)
    assert 0 < node["free_inodes"] <= whole.f_files and 0 < node["free_bytes"] <= whole.f_blocks * whole.f_frsize
    assert node["write_MBps"] > 0 and node["small_file_s"] > 0 and node["problem"] == node["why_not"] == ""
    assert node["type"] == filesystem.filesystem_of(scratch)["type"] and node["needed_files"] == 1
    assert list(scratch.iterdir()) == []
    scratch.rename(tmp_path / "elsewhere")
    (found,), nodes = doctor(tmp_path, job)
    assert found["severity"] == WARNING and "no such folder" in found["found"] and nodes[host]["free_bytes"] is None


def test_what_is_expected_is_what_a_run_copies(data, tmp_path, scratch, monkeypatch):
    job = write_job(data, "run.toml", run_scratch=str(scratch))
    _, before = doctor(tmp_path, job)
    use_quick_parts(monkeypatch)
    run = run_job(job, tmp_path / "run", Context(), quick_report).path
    forget_signals()
    (copied,) = json.loads((run / "logs/timing.json").read_text())["scratch"]
    (node,) = before.values()
    assert node["needed_bytes"] == pytest.approx(copied["bytes"], rel=0.1)
    job = write_job(data, "shards.toml", run_scratch=str(scratch), particles_file=str(run / "01_ingest"))
    (node,) = doctor(tmp_path, job)[1].values()
    assert node["needed_bytes"] == copied["bytes"] and node["needed_files"] == copied["nodes"][0]["shards"]


def test_a_disk_that_is_too_small_is_no_fine_one(tmp_path, scratch):
    assert look(scratch, tmp_path)["why_not"] == ""
    whole = look(scratch, tmp_path, raw=(HUGE, HUGE), everywhere=True)
    with pytest.raises(staging.NotStaged) as run:  # what the run says
        staging.require_room(scratch, 2 * HUGE, 2)
    assert whole["why_not"] == str(run.value) and whole["needed_bytes"] == 2 * HUGE
    partly = look(scratch, tmp_path, auxiliary=(HUGE,), everywhere=True)
    assert partly["why_not"] == "" and "to spare" in partly["why_partly"]
    found = list(scratch_findings({"n1": whole, "n2": partly}))
    assert [f.severity for f in found] == [FINE, WARNING, WARNING]
    assert "not used on n1" in found[1].found and "only for the particles themselves on n2" in found[2].found
    assert list(scratch.iterdir()) == []


def test_too_few_inodes_are_found(tmp_path, scratch, monkeypatch):
    real = os.statvfs

    def few(folder):
        found = list(real(folder))
        found[5:8] = [100_000, 70, 70]
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", few)
    assert look(scratch, tmp_path)["why_not"] == "" and look(scratch, tmp_path)["free_inodes"] == 70
    assert "only 70 more files" in look(scratch, tmp_path, raw=(10,) * 7)["why_not"]


def test_a_folder_that_is_not_ours_or_cannot_be_written_to_is_found(tmp_path, scratch, monkeypatch):
    def no_locks(*given):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        assert "no lock: No locks available" in look(scratch, tmp_path)["why_not"]
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "_read", lambda *given: (_ for _ in ()).throw(ValueError("not what was written")))
        assert "not what was written" in look(scratch, tmp_path)["why_not"]
    assert list(scratch.iterdir()) == []
    (scratch / f"cryoiso-{os.getuid()}").write_text("mine")
    assert "is not a folder of this user" in look(scratch, tmp_path)["why_not"]


def test_what_a_dead_job_left_counts_as_room_and_stays_for_the_next(tmp_path, scratch, monkeypatch):
    root, asked = root_of(scratch), []
    living, dead = holder(root, "living"), holder(root, "dead")
    living.stdout.readline()
    os.kill(int(dead.stdout.readline()), signal.SIGKILL)
    dead.kill()
    dead.wait()
    monkeypatch.setattr(scratch_probe, "require_room", lambda folder, size, files: asked.append((folder, size, files)))
    try:
        kept = sorted(p.name for p in root.rglob("*"))
        old = sum(p.stat().st_size for p in (root / "dead").rglob("*") if p.is_file())
        found = look(scratch, tmp_path)
        assert found["left_behind_bytes"] == old > 0 and found["folder"] == str(root)
        assert asked[0][:2] == (root, 1000 - old) and sorted(p.name for p in root.rglob("*")) == kept
    finally:
        living.kill()
        living.wait()


def test_a_file_called_lock_of_somebody_else_is_left_alone(tmp_path, scratch):
    (scratch / "lock").write_text("theirs")
    (scratch / "data/leases").mkdir(parents=True)
    assert scratch_lease.left_behind(scratch) == (0, 0) and look(scratch, tmp_path)["left_behind_bytes"] == 0


def test_a_node_needs_what_its_ranks_read(data, tmp_path):
    cryoiso_here("ingest", data / "particles.star", tmp_path / "shards")
    source = ShardSource(tmp_path / "shards")
    source.particles = replace(
        source.particles.take(np.arange(1200) % len(source)), half=1 + (np.arange(1200) * 7 // 5 % 2).astype(np.int8)
    )
    source._edges = np.arange(5) * 300  # as if there were four shards
    images = Images("auto", raw=(1, 10, 100, 1000), auxiliary=(5,))
    for ranks, size in (([0, 1, 2, 3], 4), ([0, 1], 4), ([3], 4), ([0, 2], 4), ([1], 12)):
        expected, auxiliary = images.of_node(ranks, size)
        read = {images.raw[k] for k in shards_of_ranks(source, ranks, size)}
        assert read <= set(expected) and auxiliary == []
    assert images.of_node([3], 4)[0] == [100, 1000] and images.of_node([0], 12)[0] == [1, 10]
    assert replace(images, everywhere=True).of_node([1], 4) == ([1, 10, 100, 1000], [5])


def test_only_what_is_copied_is_expected(data):
    from cryoiso.pipeline.job_inputs import Inputs
    from cryoiso.pipeline.jobfile import read_job
    from cryoiso.pipeline.records.run_folder import RunFolder
    from cryoiso.pipeline.workflow import folder_stages

    def images(**changes) -> Images:
        _, job = read_job(write_job(data, "images.toml", run_scratch="auto", **changes))
        inputs = Inputs(job, RunFolder(data / "run", folder_stages(job)), Context())
        return scratch_probe.images_of(inputs, 1)

    plain, relion = images(), images(refine_engine="relion")
    assert plain.raw and not plain.auxiliary and not plain.everywhere and not relion.raw
    both = images(run_workflow="auxiliary", auxiliary_rounds=2)
    assert both.raw == plain.raw and len(both.auxiliary) >= 2 and both.everywhere
    assert images(run_workflow="auxiliary", auxiliary_rounds=2, auxiliary_export=True) == both
    exported = images(run_workflow="auxiliary", refine_engine="relion")
    assert exported.raw == plain.raw and not exported.auxiliary, "RELION reads stacks"


CASES = {
    "no disk": ({"why_not": "no such folder"}, WARNING, "not used on n1: no such folder", "shared files"),
    "slow": ({"write_MBps": 12.0}, WARNING, "/local on n1 takes only 12 MB/s", "faster disk"),
    "memory": ({"type": "tmpfs"}, NOTE, "lie in memory", "memory of the job"),
    "network": ({"type": "nfs4"}, NOTE, "network file system", "disk of the node"),
    "nothing to copy": ({"needed_bytes": 0}, NOTE, "no stage of this job makes copies", "scratch_dir"),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_every_trouble_is_named_with_its_remedy(case):
    change, severity, words, remedy = CASES[case]
    (found,) = [f for f in scratch_findings({"n1": NODE | change}) if f.severity == severity]
    assert words in found.found and remedy in found.remedy and found.exit_code == EXIT_DONE


def test_hosts_with_one_reason_are_told_together():
    nodes = {f"n{i}": NODE | {"why_not": "no such folder" * (i > 1)} for i in range(1, 4)}
    found = list(scratch_findings(nodes))
    assert [f.severity for f in found] == [FINE, WARNING] and "on n2, n3:" in found[1].found
    assert "64.0 GiB" in found[0].found and "256.0 GiB, 1,000,000 files free" in found[0].found


@pytest.mark.mpi
def test_one_rank_a_node_looks(data, tmp_path, scratch):
    job = write_job(data, "ranks.toml", run_scratch=str(scratch))
    done = run_mpi(2, ["-m", "cryoiso.cli.main", "doctor", tmp_path, "--job", job, "--json"])
    (node,) = json.loads(done.stdout)["folders"]["scratch"].values()
    assert node["why_not"] == "" and node["needed_files"] == 1 and list(scratch.iterdir()) == []
