"""Opening files that a user names: only regular files and links to them.

A named pipe would block the program until somebody writes into it, a device may deliver data without end, and neither
gives way to a signal. Such names are refused before anything is read from them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, cast

from cryoiso.core.errors import InputError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def open_regular(path: object) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading bytes; never waits for the other end of a pipe.

    Raises:
        OSError: as ``open`` raises it, for example FileNotFoundError.
        InputError: a folder, named pipe, socket or device; a name with a NUL character.
    """
    return cast(BinaryIO, os.fdopen(open_regular_handle(path), "rb"))


def open_regular_handle(path: object) -> int:
    """As ``open_regular``, but gives the file descriptor, which the caller closes."""
    name = os.fspath(path) if isinstance(path, os.PathLike) else str(path)
    try:
        # Opening a device may have effects of its own (a tape rewinds), so its kind is looked up by name first; the
        # second look, at what was opened, cannot be outrun by a change of the folder.
        _check_kind(os.stat(name).st_mode, path)
        handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError:  # NUL, or characters that no file name can have
        raise InputError(
            "not a file name", file=repr(name[:80]), expected="a name without NUL characters", code="file-not-regular"
        ) from None
    try:
        _check_kind(os.fstat(handle).st_mode, path)
        os.set_blocking(handle, True)
    except BaseException:
        os.close(handle)
        raise
    return handle


def require_regular_file(path: object) -> None:
    """Makes sure that a name is that of a regular file that can be read, for libraries that open files by their names.

    Raises:
        InputError: no such file, no permission, or not a regular file.
    """
    try:
        os.close(open_regular_handle(path))
    except FileNotFoundError:
        raise InputError("no such file", file=path, code="file-not-found") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path, code="file-unreadable") from None


def read_regular_bytes(path: object) -> bytes:
    """The contents of a regular file; errors as ``open_regular``."""
    with open_regular(path) as stream:
        return stream.read()


def read_regular_text(path: Path | str) -> str:
    """The text of a regular file in UTF-8, with line ends as ``Path.read_text`` gives them.

    Raises:
        OSError, InputError: as ``open_regular``. UnicodeDecodeError: not UTF-8.
    """
    text = read_regular_bytes(path).decode("utf-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_kind(mode: int, path: object) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _KINDS if test(mode)), "something else")
    raise InputError(
        "not a regular file", file=path, expected="a file, or a link to one", found=kind, code="file-not-regular"
    )
