"""Tasks handed from small processes to ranks that wait: on one host, over the network, through files; and refusals."""

from __future__ import annotations

import doctest
import json
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.parallel import private_socket, task_socket
from cryoiso.parallel.private_socket import listen
from cryoiso.parallel.task_socket import Address, HandoverError, TaskServer, request


@pytest.fixture
def server(tmp_path):
    made = TaskServer(tmp_path / "callback.json", ["127.0.0.1"])
    yield made
    made.close()


def serve(server, count, answer=lambda call: call.answer(True, f"done {call.task['n']}"), limit_s=10.0):
    """Answers ``count`` calls once they are all there; returns their tasks."""
    calls, until = [], time.monotonic() + limit_s
    while len(calls) < count:
        calls += server.look()
        assert time.monotonic() < until, f"only {len(calls)} calls came"
        time.sleep(0.01)
    for call in calls:
        answer(call)
    return [call.task for call in calls]


def in_thread(function, *args, **options):
    """Result or error of a call that runs beside the test."""
    found = {}

    def run():
        try:
            found["result"] = function(*args, **options)
        except Exception as error:
            found["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


ROADS = ("local", "network", "files")


def take_road(monkeypatch, file, road):
    """Leaves a caller with one way to the server."""
    address = Address.read(file)
    if road != "local":
        monkeypatch.setattr(task_socket.socket, "gethostname", lambda: "another-host")
    if road == "files":
        Address(**{**address.__dict__, "port": 0, "numbers": ()}).write(file)


@pytest.mark.parametrize("road", ROADS)
def test_several_callers_at_once_each_get_their_own_answer(server, tmp_path, monkeypatch, road):
    file = tmp_path / "callback.json"
    take_road(monkeypatch, file, road)
    callers = [in_thread(request, file, {"n": n}) for n in range(6)]
    tasks = serve(server, 6)
    for thread, _ in callers:
        thread.join(10)
    assert sorted(task["n"] for task in tasks) == list(range(6))
    assert [found.get("result") for _, found in callers] == [f"done {n}" for n in range(6)]


@pytest.mark.parametrize("road", ROADS)
def test_a_refusal_and_its_reason_reach_the_caller(server, tmp_path, monkeypatch, road):
    take_road(monkeypatch, tmp_path / "callback.json", road)
    thread, found = in_thread(request, tmp_path / "callback.json", {"n": 1})
    serve(server, 1, lambda call: call.answer(False, "the network broke", "network-file-damaged"))
    thread.join(10)
    assert isinstance(found["error"], HandoverError) and "network broke" in str(found["error"])
    assert found["error"].code == "network-file-damaged"


@pytest.mark.parametrize("road", ROADS)
def test_a_server_that_closes_frees_its_callers_at_once(server, tmp_path, monkeypatch, road):
    take_road(monkeypatch, tmp_path / "callback.json", road)
    thread, found = in_thread(request, tmp_path / "callback.json", {"n": 1})
    serve(server, 1, lambda call: None)
    began = time.monotonic()
    server.close()
    thread.join(10)
    assert isinstance(found["error"], HandoverError) and time.monotonic() - began < 5
    assert not (tmp_path / "callback.json").exists()


def test_a_caller_that_was_not_looked_at_yet_is_freed_too(server, tmp_path):
    thread, found = in_thread(request, tmp_path / "callback.json", {"n": 1})
    time.sleep(0.2)
    server.close()
    thread.join(10)
    assert isinstance(found["error"], HandoverError)


def test_a_caller_gives_up_after_its_time(server, tmp_path):
    thread, found = in_thread(request, tmp_path / "callback.json", {"n": 1}, limit_s=0.5)
    calls = []
    while thread.is_alive():
        calls += server.look()
        time.sleep(0.01)
    assert isinstance(found["error"], HandoverError) and "in time" in str(found["error"])
    assert len(calls) == 1 and calls[0].gone()


@pytest.mark.parametrize("road", ROADS)
def test_a_wrong_secret_is_not_let_in(server, tmp_path, monkeypatch, road):
    file = tmp_path / "callback.json"
    take_road(monkeypatch, file, road)
    forged = tmp_path / "forged.json"
    Address(**{**Address.read(file).__dict__, "secret": "00" * 32}).write(forged)
    thread, found = in_thread(request, forged, {"n": 1}, limit_s=1.5)
    until = time.monotonic() + 3
    while thread.is_alive() and time.monotonic() < until:
        assert server.look() == []
        time.sleep(0.01)
    thread.join(5)
    assert isinstance(found["error"], HandoverError)


def test_what_was_said_before_cannot_be_said_again(tmp_path):
    """A recorded task is worth nothing on another connection: the server draws a new number for each."""
    server = TaskServer(tmp_path / "callback.json", [])
    secret = bytes.fromhex(Address.read(tmp_path / "callback.json").secret)
    old = os.urandom(16)
    mine = os.urandom(16)
    recorded = mine + task_socket._framed(b'{"n": 1}', secret, b"task", old, mine)
    with task_socket._connect(Address.read(tmp_path / "callback.json"), 2.0) as connection:
        connection.sendall(recorded)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert server.look() == []
            time.sleep(0.02)
    server.close()


def test_silent_and_noisy_strangers_do_not_hold_up_the_server(server, tmp_path):
    address = Address.read(tmp_path / "callback.json")
    silent, noisy = (task_socket._connect(address, 2.0) for _ in range(2))
    noisy.sendall(os.urandom(4096))
    thread, found = in_thread(request, tmp_path / "callback.json", {"n": 7})
    serve(server, 1)
    thread.join(10)
    assert found["result"] == "done 7"
    silent.close(), noisy.close()


STRANGERS = """
import os, socket, sys, time
if sys.argv[3] != "0":
    os.setuid(int(sys.argv[3]))
lines = []
for _ in range(int(sys.argv[2])):
    line = socket.socket(socket.AF_UNIX if sys.argv[1].startswith("/") else socket.AF_INET)
    line.settimeout(2)
    try:
        line.connect(sys.argv[1] if sys.argv[1].startswith("/") else ("127.0.0.1", int(sys.argv[1])))
    except OSError as error:
        print(type(error).__name__, flush=True)
    lines.append(line)
print("there", flush=True)
try:
    print(lines[0].recv(16), flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
time.sleep(60)
"""


def strangers(where, count, user=0):
    words = [sys.executable, "-c", STRANGERS, str(where), str(count), str(user)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("way", ["local", "network"])
def test_a_crowd_of_strangers_neither_ends_the_run_nor_takes_its_file_descriptors(server, tmp_path, way):
    address = Address.read(tmp_path / "callback.json")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    crowd = strangers(address.local if way == "local" else address.port, 400)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 24, hard))  # fewer than the server would like to keep
    try:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert server.look() == []
            assert len(server._callers) <= task_socket.MOST_CALLERS
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        thread, found = in_thread(request, tmp_path / "callback.json", {"n": 3}, limit_s=20.0)
        serve(server, 1, limit_s=20.0)
        thread.join(20)
        assert found["result"] == "done 3"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        crowd.kill(), crowd.wait()


def test_a_caller_that_lost_its_place_goes_by_the_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr(task_socket, "MOST_CALLERS", 1)
    address = Address.read(tmp_path / "callback.json")
    monkeypatch.setattr(server, "_doors", [DropsAll(door) for door in server._doors])
    thread, found = in_thread(request, tmp_path / "callback.json", {"n": 5}, limit_s=20.0)
    serve(server, 1, limit_s=20.0)
    thread.join(20)
    assert found["result"] == "done 5" and address.local


class DropsAll:
    """A listening socket whose connections are closed at once, as those of callers that lose their place."""

    def __init__(self, door):
        self._door, self.family = door, door.family

    def accept(self):
        connection, peer = self._door.accept()
        connection.close()
        return connection, peer

    def close(self):
        self._door.close()


def test_the_deadline_is_for_the_whole_task(server, tmp_path, monkeypatch):
    monkeypatch.setattr(task_socket, "_HELLO_S", 0.4)
    trickle = task_socket._connect(Address.read(tmp_path / "callback.json"), 2.0)
    began = time.monotonic()
    with trickle, pytest.raises(OSError):
        while time.monotonic() < began + 10:
            trickle.send(b"x")
            server.look()
            time.sleep(0.02)
    assert time.monotonic() < began + 5 and not server._callers


def test_the_local_socket_is_for_its_owner_alone(server, tmp_path):
    local = Path(Address.read(tmp_path / "callback.json").local)
    assert os.stat(local.parent).st_mode & 0o777 == 0o700 and stat.S_ISSOCK(os.stat(local).st_mode)
    if os.getuid() != 0:
        pytest.skip("LOUD: another user's connection needs root")
    crowd = strangers(local, 1, user=65534)
    assert crowd.stdout.readline() == "PermissionError\n"
    crowd.kill(), crowd.wait()
    os.chmod(local.parent, 0o755), os.chmod(local, 0o777)  # even where the folder lets them in
    crowd = strangers(local, 1, user=65534)
    assert crowd.stdout.readline() == "there\n"
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert server.look() == [] and not server._callers
        time.sleep(0.05)
    assert crowd.stdout.readline() in ("b''\n", "ConnectionResetError\n")
    crowd.kill(), crowd.wait()


def test_folders_of_killed_runs_are_removed_and_those_of_living_ones_stay(server, tmp_path, monkeypatch):
    living = Path(Address.read(tmp_path / "callback.json").local).parent
    dead, empty = (private_socket.private_folder("desk") for _ in range(2))
    listen(socket.AF_UNIX, str(dead / "socket")).close()
    busy, crowd = private_socket.private_folder("desk"), []
    deaf = listen(socket.AF_UNIX, str(busy / "socket"), backlog=1)
    for _ in range(4):  # more than the queue takes: a connection waits or is refused for now
        crowd.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        crowd[-1].setblocking(False)
        crowd[-1].connect_ex(str(busy / "socket"))
    young = private_socket.private_folder("desk")  # of a run that is about to listen
    for folder in (living, dead, empty, busy):
        os.utime(folder, (0, 0))
    other = private_socket.private_folder("desk")
    assert [p.exists() for p in (living, dead, empty, busy, young)] == [True, False, False, True, True]
    for thing in (deaf, *crowd):
        thing.close()
    os.utime(young, (0, 0)), os.utime(busy, (0, 0))
    private_socket.private_folder("desk").rmdir(), other.rmdir()
    assert not young.exists() and not busy.exists()
    server.close()
    assert not living.exists()
    monkeypatch.setattr(private_socket.tempfile, "gettempdir", lambda: "/" + "long" * 40)
    last = private_socket.private_folder("desk")
    assert last.parent == Path("/tmp")
    last.rmdir()


def test_a_desk_without_a_local_socket_has_the_other_ways(tmp_path, monkeypatch):
    gone = tmp_path / "gone"  # a cleaner of /tmp was quicker
    monkeypatch.setattr("cryoiso.parallel.task_socket.private_folder", lambda purpose: gone)
    without = TaskServer(tmp_path / "callback.json", ["127.0.0.1"])
    address = Address.read(tmp_path / "callback.json")
    assert address.local == "" and address.port > 0
    without.close()


def test_doctest_of_private_socket():
    failed, tried = doctest.testmod(private_socket)
    assert tried and not failed


def test_the_secret_is_for_its_owner_alone(server, tmp_path):
    file = tmp_path / "callback.json"
    assert os.stat(file).st_mode & 0o777 == 0o600
    os.chmod(file, 0o644)
    with raises_code("ranks-unreachable", InputError):
        request(file, {"n": 1})


def test_no_desk_is_one_clear_error(tmp_path):
    with raises_code("ranks-unreachable", InputError):
        request(tmp_path / "callback.json", {})


def test_files_of_an_earlier_desk_are_gone(tmp_path):
    file = tmp_path / "callback.json"
    first = TaskServer(file, [])
    (tmp_path / "callback.json.drop" / ("ab" * 16 + ".task")).write_bytes(b"old")
    old = Address.read(file)
    second = TaskServer(file, [])  # the first one's job was killed
    assert Address.read(file).secret != old.secret and second.look() == []
    assert not list((tmp_path / "callback.json.drop").iterdir())
    second.close(), first.close()


def test_the_callers_program_starts_without_numpy_torch_or_mpi(tmp_path):
    heavy = "{'numpy', 'torch', 'mpi4py', 'pandas', 'typer'}"
    code = f"import sys, cryoiso.engines.relion.callback; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_script_for_relion_hands_over_from_any_folder(server, tmp_path):
    from cryoiso.engines.relion.callback import write_script

    folder = tmp_path / "with space"
    folder.mkdir()
    words = write_script(folder / "callback.sh", tmp_path / "callback.json")
    process = subprocess.Popen(f"{words} run_it001.star", shell=True, cwd=folder, stderr=subprocess.PIPE, text=True)
    tasks = serve(server, 1, lambda call: call.answer(True))
    assert process.wait(10) == 0 and tasks[0]["star"] == str(folder / "run_it001.star")
    process = subprocess.Popen(f"{words} run_it002.star", shell=True, cwd=folder, stderr=subprocess.PIPE, text=True)
    serve(server, 1, lambda call: call.answer(False, "no such array"))
    _, said = process.communicate(timeout=10)
    assert process.returncode != 0 and "no such array" in said


def test_the_address_survives_a_round_through_its_file(server, tmp_path):
    found = Address.read(tmp_path / "callback.json")
    assert found.port > 0 and found.numbers == ("127.0.0.1",) and len(bytes.fromhex(found.secret)) == 32
    (tmp_path / "bad.json").write_text(json.dumps({"host": "x"}))
    os.chmod(tmp_path / "bad.json", 0o600)
    with pytest.raises(InputError):
        Address.read(tmp_path / "bad.json")
    assert Path(found.drop).is_dir()
