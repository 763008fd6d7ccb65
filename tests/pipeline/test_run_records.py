"""One run at a time in a folder, and a journal that survives crashes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time

import pytest
from errors_helper import raises_code
from forks_helper import python

from cryoiso.core.errors import InputError, UsageError
from cryoiso.pipeline.records import lock
from cryoiso.pipeline.records.journal import Journal, read_journal


def test_two_runs_at_once_are_refused(tmp_path):
    with lock.locked(tmp_path / "lock.json"):
        code = (
            "from cryoiso.pipeline.records.lock import locked\nfrom pathlib import Path\n"
            f"with locked(Path({str(tmp_path)!r}, 'lock.json')): pass"
        )
        done = subprocess.run([python(), "-c", code], capture_output=True, text=True)
        assert "another run works in" in done.stderr and str(os.getpid()) in done.stderr
    assert not (tmp_path / "lock.json").exists()


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
    code = (
        "import os\nfrom cryoiso.pipeline.records.lock import locked\nfrom pathlib import Path\n"
        f"with locked(Path({str(tmp_path)!r}, 'lock.json')): os.kill(os.getpid(), 9)"
    )
    subprocess.run([python(), "-c", code])
    assert (tmp_path / "lock.json").exists()
    with lock.locked(tmp_path / "lock.json"):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_lock_of_a_container_that_numbers_its_processes_by_itself(tmp_path):
    """Its process 3 is not ours, so whether ours is there tells nothing; the lock is stale when nobody touches it."""
    path = tmp_path / "lock.json"
    mine = {"host": socket.gethostname(), "pid": 2**22 + 1, "started": "1", "job": "", "restart": "0"}
    path.write_text(json.dumps({**mine, "numbering": "pid:[1]"}))
    with raises_code("run-locked", UsageError), lock.locked(path):
        pass
    old = time.time() - lock.STALE_AFTER_S - 60
    os.utime(path, (old, old))
    with lock.locked(path):
        assert json.loads(path.read_text())["numbering"] == os.readlink("/proc/self/ns/pid")


def test_lock_of_another_host_is_stale_only_when_nobody_touches_it(tmp_path, monkeypatch):
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "job": "", "restart": "0"}))
    with raises_code("run-locked", UsageError, match="elsewhere"), lock.locked(path):
        pass
    old = time.time() - lock.STALE_AFTER_S - 60
    os.utime(path, (old, old))
    monkeypatch.setattr(lock, "WATCH_S", 0.2)
    with lock.locked(path):
        pass


@pytest.mark.parametrize(
    ("job", "start"),
    [("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("PBS_JOBID", "CRYOISO_JOB_START"), ("LSB_JOBID", "CRYOISO_JOB_START")],
)
def test_lock_of_an_earlier_start_of_the_same_job_is_stale_at_once(tmp_path, monkeypatch, job, start):
    path = tmp_path / "lock.json"
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(job, "77")
    monkeypatch.setenv(start, "2")
    holder = {"host": "elsewhere", "pid": 1, "started": "1", "job": "77"}
    for other in ({"restart": "2"}, {"restart": "1", "job": "76"}):
        path.write_text(json.dumps({**holder, **other}))
        with raises_code("run-locked", UsageError, match="elsewhere"), lock.locked(path):
            pass
    path.write_text(json.dumps({**holder, "restart": "1"}))
    with lock.locked(path):
        assert json.loads(path.read_text())["job"] == "77"


# --- the journal


def test_journal_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append("start", stage="ingest", key="k")
    journal.append("end", stage="ingest", key="k", seconds=1.5, outputs={})
    whole = (tmp_path / "j").read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        (tmp_path / "j").write_bytes(whole[:cut])
        again = Journal(tmp_path / "j")
        assert [line["event"] for line in again.lines] == ["start"]
        again.append("resume")
        assert [line["event"] for line in read_journal(tmp_path / "j")] == ["start", "resume"]
        (tmp_path / "j").unlink()


def test_damaged_journal_is_an_error(tmp_path):
    (tmp_path / "j").write_text('{"event": "run"}\nrubbish\n{"event": "done"}\n')
    with pytest.raises(InputError, match="damaged"):
        read_journal(tmp_path / "j")
