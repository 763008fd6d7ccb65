"""The server of forks_helper: has imported everything once, and forks for every program that a test wants to start.

    python fork_server.py SOCKET

A forked process is what ``python ARGUMENTS`` would be after its imports: a process of its own, with its own exit
status, files, signals and MPI rank; nothing of cryoiso has run in it. The server ends when its standard input does.
"""

from __future__ import annotations

import ast
import atexit
import ctypes
import fcntl
import gc
import importlib
import itertools
import logging
import multiprocessing.spawn
import multiprocessing.util
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import types
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

CRITICAL = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMBA_", "TORCH_", "TORCHDYNAMO", "TRITON_INTERPRET",
    "LD_", "LC_", "LANG", "PYTHON", "MPL",
)  # fmt: skip
"""How variables begin that libraries read while they are imported: for other values a fork would come too late."""
HARMLESS = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
LIBRARIES = (
    "torch._dynamo", "torch.distributed", "torch.nn.parallel", "torch.optim", "scipy.fft", "scipy.ndimage",
    "scipy.optimize", "scipy.stats", "scipy.spatial.transform", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg", "mrcfile", "h5py", "gemmi", "jinja2", "rich.console", "multiprocessing.spawn",
    "concurrent.futures.thread", "email.message", "mpi4py",
)  # fmt: skip
HEADER = struct.Struct("!I")


def critical(environment: dict[str, str]) -> dict[str, object]:
    """Those variables, the folders of PYTHONPATH in any order."""
    values: dict[str, object] = {k: v for k, v in environment.items() if k.startswith(CRITICAL) and k not in HARMLESS}
    values.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the program sets it before it loads numpy
    values["PYTHONPATH"] = {*environment.get("PYTHONPATH", "").split(os.pathsep)} - {""}
    return values


def surroundings() -> dict[str, Any]:
    """What a fork cannot take over from the process that asks for it: user, limits, namespaces.

    The client has the same lines.
    """
    import resource

    return {
        "user": (os.getresuid(), os.getresgid(), sorted(os.getgroups())),
        "limits": [resource.getrlimit(n) for n in range(16)],
        "spaces": [os.readlink(f"/proc/self/ns/{n}") for n in ("net", "mnt", "pid", "user", "uts", "ipc")],
    }


def import_everything() -> None:
    """All modules of cryoiso and the libraries they use; none may start a thread, which a fork would lose."""
    import cryoiso

    names = [m.name for m in pkgutil.walk_packages(cryoiso.__path__, "cryoiso.")]
    names = [name for name in names if not name.startswith("cryoiso.ccpem")]  # its GUI's libraries start threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in [*LIBRARIES, *names]:
            with suppress(ImportError):
                importlib.import_module(name)
    atexit._clear()  # exit handlers of libraries take as long as a fork
    for needed in (logging.shutdown, multiprocessing.util._exit_function, weakref.finalize._exitfunc):  # type: ignore
        atexit.register(needed)
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1 or threading.active_count() != 1:
        sys.exit(f"the imports started {threads - 1} threads")


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A client's request: its arguments, environment, working directory, and its open files."""
    files: list[int] = []
    first, ancillary, _, _ = connection.recvmsg(HEADER.size, socket.CMSG_SPACE(253 * 4))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            files += struct.unpack(f"{len(data) // 4}i", data)
    text = b""
    (length,) = HEADER.unpack(first)
    while len(text) < length and (more := connection.recv(length - len(text))):
        text += more
    return ast.literal_eval(text.decode(errors="surrogateescape")), files


class Server:
    """Answers clients: ``no`` (start a Python of your own), or the number of a new process and later its status."""

    def __init__(self, path: str, environment: dict[str, object]) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)
        self.clients: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        self.environment = environment
        self.surroundings = surroundings()
        self.wake, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._theirs = theirs

    def serve(self) -> tuple[dict[str, Any], list[int]] | None:
        """Returns None at the end, in a forked process what it is to do."""
        self.selector.register(0, selectors.EVENT_READ)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.wake, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    for number in self.clients:
                        _kill(number)
                    return None
                if key.fileobj is self.wake:
                    self.wake.recv(4096)
                    self._reap()
                elif key.fileobj is self.listener:
                    request = self._accept()
                    if request:
                        return request
                elif key.data in self.clients:  # a client that says anything more is gone
                    self._end(key.data)

    def _accept(self) -> tuple[dict[str, Any], list[int]] | None:
        connection, _ = self.listener.accept()
        request, files = receive(connection)
        if not self._can_be(request):
            connection.sendall(b"no\n")
            connection.close()
            for file in files:
                os.close(file)
            return None
        number = os.fork()
        if number == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.selector.close()
            for other in (*self.clients.values(), connection, self.listener, self.wake, self._theirs):
                other.close()
            return request, files
        for file in files:
            os.close(file)
        self.clients[number] = connection
        self.selector.register(connection, selectors.EVENT_READ, number)
        with suppress(OSError):
            connection.sendall(b"%d\n" % number)
        return None

    def _can_be(self, request: dict[str, Any]) -> bool:
        """Whether a fork is what the client asks for; CRYOISO_TEST_FORKS=verbose tells on stderr why not."""
        flags = {*itertools.takewhile(lambda w: w[:1] == "-" and w not in ("-c", "-m"), request["arguments"])}
        asked = {**critical(request["environment"]), **request["surroundings"], "flags": flags - {"-u", "-B"}}
        ours = {**self.environment, **self.surroundings, "flags": set()}
        if asked != ours and os.environ.get("CRYOISO_TEST_FORKS") == "verbose":
            differ = {k: (asked.get(k), ours.get(k)) for k in {*asked, *ours} if asked.get(k) != ours.get(k)}
            print("no fork:", request["arguments"][:4], differ, file=sys.stderr, flush=True)
        return asked == ours and len(request["arguments"]) > len(flags)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                number, status = os.waitpid(-1, os.WNOHANG)
                if number == 0:
                    return
                connection = self.clients.pop(number, None)
                if connection is not None:
                    self.selector.unregister(connection)
                    with suppress(OSError):
                        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                    connection.close()

    def _end(self, number: int) -> None:
        """The client was killed: its process goes as well."""
        _kill(number)
        connection = self.clients.pop(number)
        self.selector.unregister(connection)
        connection.close()


def _kill(number: int) -> None:
    with suppress(OSError):
        os.kill(number, signal.SIGKILL)


def become(request: dict[str, Any], files: list[int]) -> None:
    """Makes a forked process the one that was asked for."""
    os.setsid()
    # exit handlers of the libraries used from here on are run (MPI's takes leave of the launcher), those of the
    # libraries loaded by the server are not
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)
    high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 400) for file in files]
    for file in files:
        os.close(file)
    for file, wanted in zip(high, request["files"]):
        os.dup2(file, wanted, inheritable=True)
        os.close(file)
    for number in (0, 1, 2):
        if number not in request["files"]:
            os.close(number)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    multiprocessing.spawn.set_executable(request["client"])
    os.environ.clear()
    os.environ.update(request["environment"])


def run(arguments: list[str]) -> None:
    """As ``python ARGUMENTS``: -c CODE, -m MODULE or a file."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    while arguments[0] in ("-u", "-B"):
        unbuffered |= arguments[0] == "-u"
        arguments = arguments[1:]
    sys.stdout.reconfigure(write_through=unbuffered)  # type: ignore[union-attr]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    main.__dict__["__builtins__"] = __builtins__
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path[0] = ""
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = list(arguments)
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        main.__dict__["__file__"] = arguments[0]
        exec(compile(Path(arguments[0]).read_bytes(), arguments[0], "exec"), main.__dict__)


def leave(code: int) -> None:
    """Ends a forked process as Python does, without taking apart the modules that it shares with the server."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    ctypes.CDLL(None).exit(code)


def run_and_leave(arguments: list[str]) -> None:
    try:
        run(arguments)
    except SystemExit as left:
        if left.code is not None and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
        leave(0 if left.code is None else left.code & 0xFF if isinstance(left.code, int) else 1)
    except BaseException as error:
        frames = error.__traceback__ and error.__traceback__.tb_next and error.__traceback__.tb_next.tb_next
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        leave(1)
    leave(0)


if __name__ == "__main__":
    environment = critical(dict(os.environ))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # the program does, too
    import_everything()
    server = Server(sys.argv[1], environment)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    if work := server.serve():
        become(*work)
        arguments = work[0]["arguments"]
        del server, work
        run_and_leave(arguments)
    os._exit(0)
