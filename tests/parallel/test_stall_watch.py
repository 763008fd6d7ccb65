"""Ranks that have stopped are named: on the same host by /proc, on another one by the log file they renew."""

from __future__ import annotations

import doctest
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpi_helper import start_mpi

from cryoiso.parallel import stall_watch
from cryoiso.parallel.stall_watch import LocalNeighbour, Process, RemoteNeighbour, StallWatch, read_stat


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(stall_watch, "LOOK_S", 0.05)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if getattr(record, "by_any_rank", False)]


def test_doctests():
    failed, tried = doctest.testmod(stall_watch)
    assert tried and not failed


def test_a_suspended_process_is_named_once_and_when_it_goes_on(quick, caplog):
    sleeper = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        found = read_stat(sleeper.pid)
        neighbour = LocalNeighbour(3, "n1", Process(sleeper.pid, found[1]))
        for _ in range(2 * stall_watch.LOCAL_LOOKS):
            time.sleep(0.02)
            assert neighbour.look()
        assert not warnings_of(caplog), "one that works is not silent"
        os.kill(sleeper.pid, signal.SIGSTOP)
        for _ in range(2 * stall_watch.LOCAL_LOOKS + 2):
            time.sleep(0.01)
            assert neighbour.look()
        (told,) = warnings_of(caplog)
        assert f"rank 3 on n1 (process {sleeper.pid}) has been silent" in told and f"kill -CONT {sleeper.pid}" in told
        os.kill(sleeper.pid, signal.SIGCONT)
        time.sleep(0.1)
        assert neighbour.look()
        assert warnings_of(caplog)[1].endswith("goes on again")
    finally:
        sleeper.kill(), sleeper.wait()
    assert not neighbour.look(), "a process that ended is no longer looked at"
    assert not LocalNeighbour(3, "n1", Process(os.getpid(), 1)).look(), "another process with the same number"


def test_waiting_for_a_disk_is_silence_only_without_any_work(caplog, tmp_path):
    fake = tmp_path / "7"
    fake.mkdir()
    neighbour = LocalNeighbour(1, "n1", Process(7, 99), tmp_path)

    def look(state: str, cpu: int) -> None:
        words = [state, *["0"] * 10, str(cpu), "0", *["0"] * 6, "99"]
        (fake / "stat").write_text("7 (a name) with spaces) " + " ".join(words))
        assert neighbour.look()

    for i in range(40):
        look("D", i)
    for _ in range(40):
        look("S", 50)
    assert not warnings_of(caplog)
    for _ in range(stall_watch.LOCAL_LOOKS + 1):
        look("D", 50)
    assert ["network file system" in told for told in warnings_of(caplog)] == [True]


def test_another_host_is_silent_when_its_log_is_no_longer_renewed(caplog, tmp_path):
    file = tmp_path / "rank-0002.log"
    neighbour = RemoteNeighbour(2, "n2", file)
    for _ in range(30):
        assert neighbour.look()  # not there
    for i in range(5):
        file.touch()
        os.utime(file, ns=(10**18 + i, 10**18 + i))
        neighbour.look(), neighbour.look()
    assert not warnings_of(caplog)
    for _ in range(stall_watch.REMOTE_LOOKS + 1):
        neighbour.look()
    (told,) = warnings_of(caplog)
    assert told.startswith("rank 2 on n2 has been silent for 3 min")
    os.utime(file)
    neighbour.look()
    assert warnings_of(caplog)[1] == "rank 2 on n2 goes on again"


def test_a_rank_renews_its_own_log(quick, tmp_path):
    file = tmp_path / "rank-0000.log"
    file.touch()
    os.utime(file, (1, 1))
    watch = StallWatch()
    watch.renew(file)
    watch.start()
    until = time.monotonic() + 5
    while file.stat().st_mtime < 2 and time.monotonic() < until:
        time.sleep(0.02)
    watch.stop()
    assert time.time() - file.stat().st_mtime < 10


RANKS = """
import logging, os, sys, time
from cryoiso.parallel import stall_watch
stall_watch.LOOK_S = 0.1
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from cryoiso.parallel.context import get_context
ctx = get_context()
ctx.install_signal_handlers()
print("rank", ctx.rank, "is", os.getpid(), flush=True)
ctx.barrier()
print("through", flush=True)
until = time.monotonic() + 60
while not os.path.exists(sys.argv[1]) and time.monotonic() < until:
    time.sleep(0.02)
ctx.barrier()
"""


@pytest.mark.mpi
def test_the_others_name_a_rank_that_is_stopped(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    process = start_mpi(3, [script, tmp_path / "end"])
    try:
        numbers: dict[int, int] = {}
        through = 0
        while through < 3:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            through += line.startswith("through")
            if match := re.match(r"rank (\d) is (\d+)", line):
                numbers[int(match[1])] = int(match[2])
        for rank in (2, 0):
            os.kill(numbers[rank], signal.SIGSTOP)
            assert f"rank {rank} on " in (told := process.stdout.readline()) and "has been silent" in told
            os.kill(numbers[rank], signal.SIGCONT)
            assert f"rank {rank} on " in (told := process.stdout.readline()) and "goes on again" in told
        Path(tmp_path / "end").touch()
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
