"""One run at a time in a folder.

The lock names its holder (host, process, batch job) and is touched every few seconds while the run lives. A lock is
stale when its process is gone (same host), when the same batch job was requeued, or when nobody touched it for long
and nobody touches it while one watches. A container may number its processes by itself: what another one calls by the
same number is another process.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cryoiso.core.batch_system import this_start
from cryoiso.core.errors import CryoisoError, InputError, UsageError
from cryoiso.io.atomic import disk_full, is_full
from cryoiso.io.regular_file import read_regular_text
from cryoiso.io.scratch_lease import pid_namespace, start_of

BEAT_S = 20.0
STALE_AFTER_S = 300.0
WATCH_S = 2.5 * BEAT_S

logger = logging.getLogger("cryoiso")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file while the block runs; the lock of a dead run is taken over.

    Raises:
        UsageError: another run works in this folder.
    """
    _acquire(path)
    done = threading.Event()
    beat = threading.Thread(target=_keep_touching, args=(path, done), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        with suppress(OSError):
            path.unlink()


def _acquire(path: Path) -> None:
    try:
        for _ in range(3):
            if _take(path):
                return
    except FileNotFoundError:
        raise CryoisoError(f"{path.parent}: the run folder was removed", code="folder-removed") from None
    except OSError as error:
        if is_full(error):
            raise disk_full(path) from None
        raise InputError(
            f"the run folder cannot be written to: {error.strerror}", file=path.parent, code="not-writable"
        ) from None
    raise UsageError(
        f"{path}: several runs were started in this folder at the same time; start only one", code="run-locked"
    )


def _take(path: Path) -> bool:
    """Makes the lock; False if there was a stale one, which is gone now."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        holder = _read(path)
        if holder is not None and not _is_stale(holder, path):
            raise UsageError(_busy(path, holder), code="run-locked") from None
        path.unlink(missing_ok=True)
        return False
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(_self(), stream)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "numbering": pid_namespace(),
        "started": start_of(os.getpid()),
        **this_start(),
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(read_regular_text(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        owner = None
    if isinstance(owner, dict) and isinstance(owner.get("host"), str) and isinstance(owner.get("pid"), int):
        return owner
    return {"host": "", "pid": 0}  # written by a run that died while taking the lock, or that takes it right now


def _is_stale(holder: dict[str, Any], path: Path) -> bool:
    own = _self()
    if (holder["host"], holder.get("numbering", own["numbering"])) == (own["host"], own["numbering"]):
        return start_of(int(holder["pid"])) != holder.get("started") or holder["pid"] == own["pid"]
    if bool(own["job"]) and holder.get("job") == own["job"] and holder.get("restart") != own["restart"]:
        return True
    if not holder["host"]:
        return _age_s(path) > 5.0
    return _age_s(path) > STALE_AFTER_S and _is_left_alone(path)


def _is_left_alone(path: Path) -> bool:
    """Whether nobody touches the lock for longer than a living run would wait: a clock that was set forward makes every
    lock look old."""
    before = _touched(path)
    logger.info("%s looks abandoned; watching it for %.0f s", path, WATCH_S)
    until = time.monotonic() + WATCH_S
    while time.monotonic() < until:
        time.sleep(min(0.5, WATCH_S))
        if _touched(path) != before:
            return False
    return True


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _age_s(path: Path) -> float:
    """Seconds since the lock was touched, by the clock of the file server."""
    probe = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _keep_touching(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with suppress(OSError):
            os.utime(path)


def _busy(path: Path, holder: dict[str, Any]) -> str:
    return (
        f"another run works in {path.parent} (process {holder['pid']} on {holder['host'] or 'an unknown host'}). "
        f"Wait for it, or stop it. If it is certainly gone, remove {path}."
    )
