"""Local sockets that only their owner can reach, and callers of a listening socket kept within bounds.

Imported by a process that must answer fast: standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import stat
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SOCKET = "socket"
_LONGEST_PATH = 100
"""Bytes; Linux allows 107 for the address of a socket."""
YOUNG_S = 60.0
"""A folder that is younger may be one in which its owner is about to listen."""


def private_folder(purpose: str) -> Path | None:
    """A new folder of mode 700 on this host for a local socket; None if no temporary folder will do.

    Folders that earlier processes of this user left on this host when they were killed are removed.
    """
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    prefix = f"cryoiso-{purpose}-{host}-"
    for parent in dict.fromkeys([tempfile.gettempdir(), "/tmp"]):
        if len(os.fsencode(parent)) + len(prefix) + 20 > _LONGEST_PATH:
            continue
        with suppress(OSError):
            remove_dead(Path(parent), prefix)
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    return None


def remove_dead(parent: Path, prefix: str) -> None:
    """Removes this user's socket folders in which nobody listens any more; one that is just being set up, or whose
    owner is too busy to answer, stays."""
    for folder in parent.glob(f"{prefix}*"):
        if _is_dead(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    try:
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or time.time() - about.st_mtime < YOUNG_S:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            caller.settimeout(0.2)
            caller.connect(str(folder / SOCKET))
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except OSError:  # a full queue, no file descriptors, no permission: nothing is known of it
        return False
    return False


def listen(family: int, address: object, backlog: int = 64) -> socket.socket:
    """A listening socket whose ``accept`` never waits."""
    door = socket.socket(family, socket.SOCK_STREAM)
    try:
        door.bind(address)  # type: ignore[arg-type]
        door.listen(backlog)
        door.setblocking(False)
    except OSError:
        door.close()
        raise
    return door


def accept_all(door: socket.socket, most: int) -> list[tuple[socket.socket, str]]:
    """Connections that wait, at most so many, each with its source; strangers on a local socket are turned away.

    What the system refuses (no file descriptors left) is left for the next call.
    """
    accepted: list[tuple[socket.socket, str]] = []
    for _ in range(most):
        try:
            connection, peer = door.accept()
        except OSError:
            break
        local = door.family == socket.AF_UNIX
        if local and peer_uid(connection) not in (os.getuid(), 0):
            connection.close()
            continue
        accepted.append((connection, "local" if local else str(peer[0])))
    return accepted


def peer_uid(connection: socket.socket) -> int:
    """User number of the process at the other end of a local socket, -1 where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return -1
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return -1
    return int(struct.unpack("3i", credentials)[1])


def surplus(sources: Sequence[str], most: int) -> list[int]:
    """Which callers, given by their source with the oldest first, have to leave so that no more than ``most`` stay.

    Those of the busiest source go first, its oldest before its newer ones: one host cannot push out the others.

    >>> surplus(["a", "b", "a", "a"], 2)
    [0, 2]
    """
    counts, leaving = Counter(sources), []
    left = list(range(len(sources)))
    while len(left) > most:
        busiest = max(counts, key=lambda source: counts[source])
        index = next(i for i in left if sources[i] == busiest)
        left.remove(index)
        counts[busiest] -= 1
        leaving.append(index)
    return leaving
