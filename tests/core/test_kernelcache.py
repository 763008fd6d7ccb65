"""Where compiled kernels are kept if the program lies where nothing can be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cryoiso.core.kernelcache import VARIABLE, settle_kernel_cache

READ_ONLY = Path("/installed/cryoiso")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """No cache is set; temporary and home folder are empty and this test's own."""
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in ("tmp", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    really = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != READ_ONLY and really(path, mode))
    yield tmp_path
    os.environ.pop(VARIABLE, None)


def settled(**options) -> Path | None:
    settle_kernel_cache(READ_ONLY, **options)
    return Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def test_kernels_lie_beside_a_source_that_can_be_written_to(place):
    settle_kernel_cache(place)
    assert VARIABLE not in os.environ and not any((place / "tmp").iterdir())


def test_the_users_choice_stays(place, monkeypatch):
    monkeypatch.setenv(VARIABLE, "/chosen")
    assert settled() == Path("/chosen")


def test_a_folder_of_this_user_alone(place):
    found = settled()
    assert found is not None and found.parent == place / "tmp" and found.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["open to others", "link", "file"])
def test_a_folder_that_others_can_fill_is_not_used(place, trap):
    first = settled()
    del os.environ[VARIABLE]
    if trap == "open to others":
        first.chmod(0o777)
    else:
        first.rmdir()
        first.symlink_to(place) if trap == "link" else first.touch()
    assert settled().parent == place / "home"


def test_shipped_kernels_fill_an_empty_cache_once(place):
    shipped = place / "shipped"
    (shipped / "physics_1").mkdir(parents=True)
    (shipped / "physics_1" / "kernel.nbi").write_text("compiled")
    found = settled(shipped=shipped)
    assert (found / "physics_1" / "kernel.nbi").read_text() == "compiled"
    (found / "physics_1" / "kernel.nbi").write_text("for this host")
    del os.environ[VARIABLE]
    assert settled(shipped=shipped) == found
    assert (found / "physics_1" / "kernel.nbi").read_text() == "for this host"
    assert [path.name for path in found.iterdir()] == ["physics_1"]


def test_numba_takes_kernels_that_were_shipped(place):
    """The whole way: compiled into one folder, copied, used from there without compiling."""
    code = """
import sys
import numpy as np
from cryoiso.physics._kernels import _to_places
_to_places(np.ones((2, 3), np.int64))
print("hits", sum(_to_places.stats.cache_hits.values()), "misses", sum(_to_places.stats.cache_misses.values()))
"""

    def call(folder: Path) -> str:
        env = {**os.environ, VARIABLE: str(folder)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout

    shipped = place / "shipped"
    assert call(shipped).strip() == "hits 0 misses 1"
    assert call(settled(shipped=shipped)).strip() == "hits 1 misses 0"
