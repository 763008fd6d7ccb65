"""Programs in processes of their own without the second or three that Python and torch take to start.

``python()`` is used like ``sys.executable``: a tiny program that takes the same arguments (-c, -m, a file) and hands
them, with its environment, working directory and open files, to a server that has imported everything already
(fork_server.py, one per process of pytest). It lives as long as the process that the server forks for it: signals are
passed on, the exit status is the same, and when it is killed so is the other. mpirun starts it like any rank. Where
a fork is not what was asked for (another user, network, limit or number of threads), a real Python is started.

Not for tests of the start itself: what is imported when, memory from the start on, the parents of a process, or what
a killed process has left in the same instant. CRYOISO_TEST_FORKS=0 lets every test start a real Python.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing.spawn
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

CLIENT = r"""#!{python} -IS
import _socket, os, resource, sys
import _signal as signal
SERVER, PYTHON = {server!r}, {python!r}
def on_my_own():
    os.execv(PYTHON, [PYTHON, *sys.argv[1:]])
try:
    link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    link.connect(SERVER)
except OSError:
    on_my_own()
files = []
for name in os.listdir("/proc/self/fd"):
    number = int(name)
    if number == link.fileno():
        continue
    try:
        if number < 3 or os.get_inheritable(number):
            files.append(number)
    except OSError:
        pass
umask = os.umask(0o22)
os.umask(umask)
surroundings = dict(
    user=(os.getresuid(), os.getresgid(), sorted(os.getgroups())),
    limits=[resource.getrlimit(n) for n in range(16)],
    spaces=[os.readlink("/proc/self/ns/" + n) for n in ("net", "mnt", "pid", "user", "uts", "ipc")],
)
text = repr(dict(
    arguments=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd(), files=files, umask=umask,
    cores=os.sched_getaffinity(0), surroundings=surroundings, client=sys.argv[0],
)).encode(errors="surrogateescape")
rights = b"".join(n.to_bytes(4, sys.byteorder) for n in files)
link.sendmsg([len(text).to_bytes(4, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
view = memoryview(text)
while view:
    view = view[link.send(view):]
said = b""
def line():
    global said
    while b"\n" not in said:
        more = link.recv(64)
        if not more:
            sys.exit(1)
        said += more
    first, said = said.split(b"\n", 1)
    return first
first = line()
if first == b"no":
    link.close()
    on_my_own()
process = int(first)
for number in files:
    if number > 2:
        os.close(number)
def pass_on(number, frame):
    try:
        os.kill(process, number)
    except OSError:
        pass
for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "CONT"):
    signal.signal(getattr(signal, "SIG" + name), pass_on)
status = int(line())
if status < 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@functools.cache
def _server() -> subprocess.Popen[str] | None:
    """The server of this process of pytest, started at the first call; None where there is none."""
    if os.environ.get("CRYOISO_TEST_FORKS") == "0" or sys.platform != "linux":
        return None
    folder = Path(tempfile.mkdtemp(prefix="cryoiso-forks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(folder / "socket")]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=env)
    atexit.register(stop, server)
    assert server.stdout is not None
    ready = server.stdout.readline() == "ready\n"
    server.stdout.close()
    if not ready:
        warnings.warn("the server of forks did not start: every process of a test imports everything", stacklevel=2)
        return None
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, server=str(folder / "socket")))
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    server.client = str(client)  # type: ignore[attr-defined]
    return server


def let_spawned_processes_be_forks() -> None:
    """``multiprocessing``'s new interpreters, too."""
    multiprocessing.spawn.get_executable = lambda: os.fsencode(python())  # type: ignore[assignment]


def stop(server: subprocess.Popen[str]) -> None:
    with suppress(OSError):
        server.stdin.close()  # type: ignore[union-attr]
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


def python() -> str:
    """What starts programs in forked processes; ``sys.executable`` where there is no server."""
    server = _server()
    return sys.executable if server is None else server.client  # type: ignore[attr-defined]


def forks_cpu_seconds() -> float:
    """CPU seconds of the server and of all processes it has forked and seen end."""
    if not _server.cache_info().currsize or (server := _server()) is None or server.poll() is not None:
        return 0.0
    fields = Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
