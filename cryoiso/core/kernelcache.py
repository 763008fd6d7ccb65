"""Where compiled CPU kernels are kept when the program itself lies where nothing can be written.

Compiling them takes half a minute. numba keeps them beside the source; in a container image or in an installation for a
whole site that is read-only, and where the home folder is not at hand either, numba refuses to start at all.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from cryoiso import __version__

VARIABLE = "NUMBA_CACHE_DIR"
SHIPPED = Path(sys.prefix) / "share" / "cryoiso" / "kernels"
"""Kernels compiled when an image was built. Each is stored with the CPU that it is for, others leave it alone."""


def settle_kernel_cache(package: Path | None = None, shipped: Path = SHIPPED) -> None:
    """Sets ``NUMBA_CACHE_DIR``, unless it is set or kernels can lie beside the source. Call it before importing numba.

    The folder is this user's on this host first: hosts of a cluster may differ in their CPUs, and many ranks that read
    a shared home at once are slow.

    Args:
        package: folder of the source; default: that of cryoiso.
        shipped: folder to fill a new cache from.
    """
    package = Path(__file__).resolve().parent.parent if package is None else package
    if os.environ.get(VARIABLE) or os.access(package, os.W_OK):
        return
    name = f"cryoiso-{__version__}-kernels"
    folder = _own_folder(Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}")
    folder = folder or _own_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name)
    if folder is None:
        return  # numba has its say
    _fill(folder, shipped)
    os.environ[VARIABLE] = str(folder)


def _own_folder(path: Path) -> Path | None:
    """The folder, made if need be; None where it is not this user's alone: what lies in it will be executed."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = path.lstat()
    except OSError:
        return None
    alone = stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid() and not there.st_mode & 0o022
    return path if alone and os.access(path, os.W_OK) else None


def _fill(folder: Path, shipped: Path) -> None:
    """Copies kernels into an empty cache, each sub-folder at once; several ranks may do so at the same time."""
    with suppress(OSError):
        for source in shipped.iterdir():
            if not (folder / source.name).exists():
                copy = Path(tempfile.mkdtemp(prefix=".part", dir=folder))
                shutil.copytree(source, copy, dirs_exist_ok=True)
                try:
                    os.rename(copy, folder / source.name)
                except OSError:
                    shutil.rmtree(copy, ignore_errors=True)
