"""Files copied to a node's own disk and read there in place of the originals."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from cryoiso.core.batch_system import PBS, SLURM
from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.io.atomic import temporary_name
from cryoiso.io.regular_file import open_regular

logger = logging.getLogger("cryoiso")
BLOCK = 8 << 20
VARIABLES = (SLURM.local_disk, "LOCAL_SCRATCH", "SNIC_TMP", PBS.local_disk, "TMPDIR")
"""Where sites say that a node's own disk is, the more telling names first."""
NETWORK = (
    "nfs", "lustre", "gpfs", "beegfs", "fhgfs", "cifs", "smb", "ceph", "glusterfs", "pvfs", "orangefs", "afs", "9p",
    "panfs", "wekafs", "fuse.", "virtiofs", "ocfs", "gfs", "quobyte", "moosefs",
)  # fmt: skip
MEMORY = ("tmpfs", "ramfs")
SPARE = 0.02
"""This share of the file system stays free."""
SPARE_FILES = 64


class NotStaged(CryoisoError):
    """Why files are read where they are; not a failure."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="scratch-not-used")


class CopyStopped(Exception):
    """A stop signal came while a file was copied; nothing of it is left."""


def find_place(wanted: str, originals: Path, host: str) -> Path:
    """The folder for copies on this node.

    Args:
        wanted: "auto", or the name of a folder, in which environment variables and {host} are replaced.
        originals: the folder of the files to copy.

    Raises:
        NotStaged: there is none, with the reason.
    """
    if wanted != "auto":
        name = os.path.expanduser(os.path.expandvars(wanted.replace("{host}", host)))
        if "$" in name:
            raise NotStaged(f"{wanted}: such a variable is not set here")
        if not os.path.isdir(name):
            raise NotStaged(f"{name}: no such folder")
        return Path(name)
    why = f"none of {', '.join('$' + v for v in VARIABLES)} is set"
    for variable in VARIABLES:
        if folder := os.environ.get(variable):
            reason = _unfit(folder, originals)
            if not reason:
                return Path(folder)
            why = f"${variable} ({folder}) {reason}"
    raise NotStaged(f"no disk of the node's own: {why}")


def _unfit(folder: str, originals: Path) -> str:
    """Why a folder is no disk of the node's own; empty if it is one."""
    if not os.path.isdir(folder):
        return "is not there"
    if os.stat(folder).st_dev == os.stat(originals).st_dev:
        return "is on the file system that the images are on"
    kind = file_system(folder)
    if kind.startswith(NETWORK):
        return f"is not the node's own ({kind})"
    if kind in MEMORY:
        return f"is memory ({kind}); name the folder in run.scratch if you want that"
    return ""


def file_system(folder: object) -> str:
    """Type of the file system that a folder lies on (ext4, nfs4, tmpfs, ...); empty if the system does not say."""
    path, best = os.path.realpath(str(folder)), ("", "")
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                left, _, right = line.partition(" - ")
                mount = left.split()[4].encode().decode("unicode_escape")
                inside = mount == "/" or path == mount or path.startswith(mount + "/")
                if inside and len(mount) >= len(best[0]):
                    best = (mount, right.split()[0])
    except (OSError, IndexError):
        return ""
    return best[1]


def require_room(folder: Path, need_bytes: int, files: int) -> None:
    """Makes sure that so much fits, and that a little is left for others.

    Raises:
        NotStaged: it does not.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize - int(SPARE * status.f_blocks * status.f_frsize)
    if free < need_bytes:
        raise NotStaged(f"{folder}: {max(free, 0) / 1e9:.3g} GB to spare, the images take {need_bytes / 1e9:.3g} GB")
    if status.f_files and status.f_favail < files + SPARE_FILES:
        raise NotStaged(f"{folder}: only {status.f_favail} more files fit on this file system")


def copy_checked(
    source: Path, target: Path, sha256: str, stop: Callable[[], str], on_bytes: Callable[[int], None]
) -> None:
    """Copies a file in one pass that also takes its SHA-256; it has its name only when it is whole and right.

    Args:
        sha256: what it must be; empty: whatever it is.
        stop: asked now and then; anything but an empty text stops the copying.
        on_bytes: called with the number of bytes of each block that is written.

    Raises:
        NotStaged: another checksum than expected, or it cannot be written; nothing is left.
        CopyStopped: ``stop`` said so; nothing is left.
    """
    part = temporary_name(target).with_suffix(f".{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with open_regular(source) as come, open(part, "wb", buffering=0) as go:
            _reserve(go.fileno(), os.fstat(come.fileno()).st_size)
            while block := come.read(BLOCK):
                if stop():
                    raise CopyStopped
                digest.update(block)
                view = memoryview(block)
                while view:
                    view = view[go.write(view) :]
                on_bytes(len(block))
            os.fsync(go.fileno())
        if sha256 and digest.hexdigest() != sha256:
            raise NotStaged(f"{source}: was read with another checksum than it was written with")
        os.replace(part, target)
    except InputError as error:
        raise NotStaged(str(error)) from None
    except OSError as error:
        raise NotStaged(f"{target}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _reserve(handle: int, size: int) -> None:
    """Takes the room of the whole file now, so that a full disk is noticed before anything is copied."""
    try:
        if size:
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (95, 22):  # the file system cannot
            raise


class ScratchCopies:
    """Which files have a copy, by name. A copy that fails its reader is not used again."""

    def __init__(self, files: Mapping[str, Path] | None = None) -> None:
        self._files = dict(files or {})
        self._told = False

    def __len__(self) -> int:
        return len(self._files)

    def get(self, name: str) -> Path | None:
        """The copy of a file, or None."""
        return self._files.get(name)

    def lost(self, name: str, error: object) -> None:
        """From now on the original is read; said once."""
        path = self._files.pop(name, None)
        if path is not None and not self._told:
            self._told = True
            what = str(error).split(" (")[0]  # HDF5 goes on for several lines
            logger.warning("%s: the copy on scratch cannot be read any more (%s); reading goes on from the originals",
                           path, what)  # fmt: skip
