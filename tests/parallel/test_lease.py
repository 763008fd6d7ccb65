"""Leases on copies of images: a copy lives as long as somebody reads it, and what is dead is told by proof."""

from __future__ import annotations

import os
import signal
import time

import pytest
from lease_helper import gone, holder, root_of

from cryoiso.io import scratch_lease


def test_a_copy_goes_with_its_last_lease(tmp_path):
    root = root_of(tmp_path)
    other = holder(root, "same")
    heir = int(other.stdout.readline())
    mine = scratch_lease.take(root, "same", run="mine")
    (mine.files / "shard-00001.h5").write_text("y")
    assert len(list((root / "same/leases").iterdir())) == 2
    mine.release()
    assert sorted(p.name for p in (root / "same/files").iterdir()) == ["shard-00000.h5", "shard-00001.h5"]
    assert scratch_lease.sweep(root) == []
    other.kill()
    other.wait()
    assert gone(root / "same"), "the heir tidies up after a killed holder"
    end = time.monotonic() + 20
    while scratch_lease.start_of(heir) and time.monotonic() < end:
        time.sleep(0.05)
    assert scratch_lease.start_of(heir) == "", "and then ends"


def test_only_the_provably_dead_are_swept(tmp_path):
    root = root_of(tmp_path)
    living, dead = holder(root, "living"), holder(root, "dead")
    living.stdout.readline()
    os.kill(int(dead.stdout.readline()), signal.SIGKILL)  # its heir, as a batch system that kills everything would
    dead.kill()
    dead.wait()
    old = time.time() - 10 * 86400
    os.utime(next((root / "living/leases").iterdir()), (old, old))  # a clock proves nothing
    try:
        assert scratch_lease.sweep(root, keep="dead") == [] and (root / "dead").exists()
        assert scratch_lease.sweep(root) == ["dead"]
        assert (root / "living/files/shard-00000.h5").exists()
    finally:
        living.kill()
        living.wait()


def test_a_foreign_folder_is_not_ours(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"cryoiso-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        scratch_lease.own_root(tmp_path)
