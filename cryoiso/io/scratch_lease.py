"""Who uses a copy on a node's own disk, so that no job removes what another one still reads.

A copy is a folder ``files`` beside a folder ``leases``. Each job that reads it holds a lease there: a file that names
host, process and batch job, is touched now and then (so that cleaners of /tmp leave the copy alone), and is locked
(flock) as long as its process lives. The kernel drops the lock when the process is gone, however that ended; so a lease
that can be locked is dead, whatever the clock says. A copy goes with its last living lease.

It is also run as a file by a bare interpreter, ``python -I -S scratch_lease.py LEASE``, which waits for the end of its
standard input (the holder is gone) and then does what the holder would have done. A job that was killed leaves nothing
behind. So the module's head imports the standard library only, and nothing that ``_inherit`` calls needs the package.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BEAT_S = 60.0
FILES, LEASES = "files", "leases"


def start_of(pid: int) -> str:
    """When a process of this host started, so that a later process with the same number is not taken for it.

    Empty if there is no such process, or if it has ended and only waits for its parent to notice.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] in ("Z", "X") else fields[19]
    except (OSError, IndexError):
        return ""


def whoami() -> dict[str, Any]:
    """This process, as nothing else is called: host and its boot, number and start, and the batch job it belongs to."""
    from cryoiso.core.batch_system import this_start  # this file is also started alone, without the package

    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid_namespace": pid_namespace(),
        "pid": os.getpid(),
        "started": start_of(os.getpid()),
        **this_start(),
    }


def own_root(folder: Path) -> Path:
    """This user's place in a folder that many share, for this host alone; made if it is not there.

    Raises:
        OSError: it cannot be made, or somebody else made it.
    """
    own_folder = _of_user(folder)
    with suppress(FileExistsError):
        os.mkdir(own_folder, 0o700)
    _require_own(own_folder)
    root = own_folder / socket.gethostname()
    root.mkdir(exist_ok=True)
    return root


def nearest_to_root(folder: Path) -> Path:
    """The last folder on the way from this one to ``own_root(folder)`` that is there; makes nothing.

    Raises:
        OSError: somebody else made it.
    """
    own_folder = _of_user(folder)
    if not os.path.lexists(own_folder):
        return folder
    _require_own(own_folder)
    root = own_folder / socket.gethostname()
    return root if root.is_dir() else own_folder


def _of_user(folder: Path) -> Path:
    return folder / f"cryoiso-{os.getuid()}"


def _require_own(own_folder: Path) -> None:
    status = os.lstat(own_folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(13, "is not a folder of this user", str(own_folder))


def try_lock(file: Path) -> None:
    """Locks a file as a lease is locked, and lets it go.

    Raises:
        OSError: its file system knows no locks, or somebody else holds it.
    """
    handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OSError(error.errno, f"no lock: {error.strerror}", str(file)) from None
    finally:
        os.close(handle)


class Lease:
    """A lease that this process holds on the copy ``root / key``."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle = path, handle
        self._done = threading.Event()
        self._beat = threading.Thread(target=self._touch, name="lease", daemon=True)
        self._beat.start()
        self._heir = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    @property
    def files(self) -> Path:
        """Where the copied files are."""
        return self.path.parent.parent / FILES

    def release(self) -> None:
        """Gives the lease back; the copy goes if nobody else reads it."""
        self._done.set()
        self._beat.join()
        with suppress(OSError):
            _let_go(self.path, self._handle)
        if self._heir.stdin is not None:
            with suppress(OSError):
                self._heir.stdin.write(b"released")
            with suppress(OSError):
                self._heir.stdin.close()
        self._heir.wait()

    def _touch(self) -> None:
        while not self._done.wait(BEAT_S):
            for path in (self.path, *self.files.glob("*")):
                with suppress(OSError):
                    os.utime(path)


def take(root: Path, key: str, **facts: Any) -> Lease:
    """A lease on the copy of this name, whose folders are made if they are not there.

    Args:
        facts: noted in the lease for people to read.

    Raises:
        OSError: the folder cannot be written to, or its file system knows no locks.
    """
    me = whoami()
    path = root / key / LEASES / f"{me['host']}-{me['pid']}-{me['started']}.json"
    with _alone(root):
        (root / key / FILES).mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(handle, json.dumps({**me, **facts}).encode() + b"\n")
        except OSError:
            os.close(handle)
            raise
    return Lease(path, handle)


def sweep(root: Path, keep: str = "") -> list[str]:
    """Removes the copies of this user on this host that no living process reads; returns their names.

    Args:
        keep: a copy that stays in any case.
    """
    with _alone(root):
        gone = _dead(root, keep)
        for copy in gone:
            shutil.rmtree(copy, ignore_errors=True)
    return [copy.name for copy in gone]


def left_behind(folder: Path) -> tuple[int, int]:
    """Bytes and files of the copies that ``sweep(own_root(folder))`` would remove; removes and makes nothing."""
    root, sizes = _of_user(folder) / socket.gethostname(), []
    if not (root / "lock").exists():
        return 0, 0
    with _alone(root):
        for file in (f for copy in _dead(root) for f in copy.rglob("*")):
            with suppress(OSError):
                sizes.append(file.stat().st_size if file.is_file() else 0)
    return sum(sizes), len(sizes)


def _dead(root: Path, keep: str = "") -> list[Path]:
    """The copies but ``keep`` that no living process reads."""
    copies = sorted(copy for copy in root.iterdir() if copy.is_dir() and copy.name != keep)
    return [copy for copy in copies if not any(map(is_alive, copy.glob(f"{LEASES}/*")))]


def is_alive(path: Path) -> bool:
    """Whether the holder of a lease may still be there: True unless the contrary is proven."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return _process_is_there(path)


def _process_is_there(path: Path) -> bool:
    """Whether the process named in a lease runs, as far as this process can see it."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return False  # torn by a process that died while writing it: the lock is free
    if holder.get("boot") != _boot() or holder.get("pid_namespace") != pid_namespace():
        return False
    return bool(holder["started"]) and start_of(int(holder["pid"])) == holder["started"]


def _let_go(path: Path, handle: int | None) -> None:
    copy = path.parent.parent
    with _alone(copy.parent):
        path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)  # gives up the lock
        if not any(map(is_alive, copy.glob(f"{LEASES}/*"))):
            shutil.rmtree(copy, ignore_errors=True)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process of this user at a time takes, looks at or gives back leases here."""
    handle = os.open(root / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def pid_namespace() -> str:
    """The kernel's name of the space in which processes are numbered (a container's own, it may be); empty: unknown."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _inherit(path: Path, patience_s: float = 60.0) -> None:
    """Waits for the holder's end, then gives its lease back for it."""
    if sys.stdin.buffer.read():
        return
    until = time.monotonic() + patience_s
    while is_alive(path) and time.monotonic() < until:
        time.sleep(0.1)
    if path.exists() and not is_alive(path):
        with suppress(OSError):
            _let_go(path, None)


if __name__ == "__main__":
    _inherit(Path(sys.argv[1]))
