"""Files appear whole or not at all: written to a temporary name in the same folder, fsynced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cryoiso.core.errors import CryoisoError, InputError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class DiskFullError(CryoisoError):
    """No room (or quota) left for a file; nothing half-written stays behind."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="disk-full")


def temporary_name(path: Path) -> Path:
    """The name a file has until it is complete."""
    return path.with_name(path.name + ".part")


def fsync_dir(folder: object) -> None:
    """Makes a rename in this folder survive a power cut (silently skipped where the file system cannot)."""
    with suppress(OSError):
        handle = os.open(str(folder), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_full(error: BaseException) -> bool:
    """Whether an error means that the disk, the quota or a size limit is exhausted (HDF5 hides errno in its text)."""
    number = getattr(error, "errno", None)
    return number in _FULL or any(os.strerror(n) in str(error) for n in _FULL)


def disk_full(path: object, need_bytes: int | None = None) -> DiskFullError:
    """The one error a full disk makes: which file, how much is needed, how much there is, what to do."""
    folder = Path(str(path)).parent
    facts = f"needs {_size(need_bytes)}, " if need_bytes is not None else ""
    try:
        facts += f"{_size(shutil.disk_usage(folder).free)} free in {folder}"
    except OSError:
        facts += f"folder {folder}"
    return DiskFullError(
        f"{path}: no space left on the disk, or over the quota or size limit ({facts}). "
        "Free some space or choose another folder, then run the same command again."
    )


def require_space(path: object, need_bytes: int) -> None:
    """Stops before a file is begun that cannot fit.

    Raises:
        DiskFullError: fewer than ``need_bytes`` are free in the file's folder.
    """
    if shutil.disk_usage(Path(str(path)).parent).free < need_bytes:
        raise disk_full(path, need_bytes)


def make_folder(path: object) -> None:
    """Makes a folder that a user named, and those above it.

    Raises:
        InputError: a file has this name, or the name of a folder above it, or it may not be made there.
        DiskFullError: the disk is full.
    """
    folder = Path(str(path))
    require_folder_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise InputError(
                f"cannot make the folder: {error.strerror}", file=folder, hint="Give another folder.",
                code="not-writable",
            ) from None  # fmt: skip
        if is_full(error):
            raise disk_full(folder) from error
        raise


def require_folder_name(path: object) -> None:
    """Stops where a folder cannot be made, and makes nothing yet.

    Raises:
        InputError: a file has this name, or the name of a folder above it.
    """
    folder = Path(str(path))
    there = next((p for p in (folder, *folder.parents) if p.exists() or p.is_symlink()), None)
    if there is not None and not there.is_dir():
        raise InputError(
            "a file is where the folder is to be made", file=there, hint="Give another folder.", code="not-writable"
        )


MAP_SUFFIXES = (".mrc", ".map", ".ccp4", ".rec")
"""Of files that other programs take for MRC maps, in any case."""


def require_target(path: object) -> None:
    """Stops before anything is computed for a file that cannot be written.

    Raises:
        InputError: its folder does not exist, or the name is that of a folder or a device.
    """
    final = Path(str(path))
    if not final.parent.is_dir():
        raise InputError(
            "the folder to write into does not exist", file=final, hint=f"Create {final.parent} first.",
            code="folder-not-found",
        )  # fmt: skip
    if (kind := _what_is_there(final)) != "file":
        raise InputError(
            f"this is a {kind}, where a file is to be written", file=final, hint="Give the name of a file.",
            code="file-not-regular",
        )  # fmt: skip


def require_map_target(path: object) -> None:
    """``require_target`` for an MRC map, whose name is to tell other programs what it is.

    Raises:
        InputError: as ``require_target``.
        UsageError: an ending other than ``MAP_SUFFIXES``.
    """
    require_target(path)
    final = Path(str(path))
    if final.suffix.lower() not in MAP_SUFFIXES:
        raise UsageError(
            f"{final}: the file to write is an MRC map, and other programs would not know it by this name; "
            f"let the name end in {MAP_SUFFIXES[0]}", code="option-malformed",
        )  # fmt: skip


def _what_is_there(final: Path) -> str:
    """What has this name already; "file" also where nothing has. A rename would put a file in place of a device."""
    if final.is_dir():
        return "folder"
    folder = str(final.parent.resolve())
    if (final.exists() and not final.is_file()) or folder in ("/dev", "/dev/fd") or folder.startswith("/proc/"):
        return "device, pipe or socket"
    return "file"


@contextmanager
def atomic_path(path: object, need_bytes: int | None = None) -> Iterator[Path]:
    """Gives a temporary name in the same folder; on success it is fsynced and renamed to ``path``, on error removed.

    Args:
        path: the final name. Its folder must exist.
        need_bytes: size of the finished file if known, for the error message and an early check.

    Raises:
        DiskFullError: the disk is full.
        InputError: the folder is missing or not writable, or the name is that of a folder.
    """
    final = Path(str(path))
    require_target(final)
    if need_bytes is not None:
        require_space(final, need_bytes)
    part = temporary_name(final)
    try:
        yield part
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(part, final)
        fsync_dir(final.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            raise InputError(
                f"not allowed to write this file: {error.strerror}", file=final, code="not-writable"
            ) from error
        if isinstance(error, FileNotFoundError) and not final.parent.is_dir():
            raise CryoisoError(
                f"{final}: the folder was removed while this file was written", code="folder-removed"
            ) from error
        if isinstance(error, OSError) and is_full(error):
            raise disk_full(final, need_bytes) from error
        raise


@contextmanager
def atomic_write(path: object, mode: str = "wb", need_bytes: int | None = None) -> Iterator[IO[Any]]:
    """Like ``open(path, mode)`` for writing, but the file appears under its name only if the block succeeds.

    Raises:
        DiskFullError, InputError: as ``atomic_path``.
    """
    encoding = None if "b" in mode else "utf-8"
    with atomic_path(path, need_bytes) as part, open(part, mode, encoding=encoding) as stream:
        yield stream


def write_text(path: object, text: str) -> None:
    """Writes a whole text file atomically."""
    with atomic_write(path, "w") as stream:
        stream.write(text)


def write_json(path: Path, facts: Mapping[str, object]) -> None:
    """A JSON file, atomically."""
    write_text(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def _size(n: int | None) -> str:
    value = float(n or 0)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
