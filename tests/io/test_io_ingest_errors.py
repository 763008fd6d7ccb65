"""Ingest: every kind of bad input, a full disk and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from test_io_ingest import BOX, blobs, make_set, many_shards, settings, simple_set

from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.io import ingest as ing
from cryoiso.io.atomic import DiskFullError
from cryoiso.io.mrc import write_stack
from cryoiso.io.shards import ShardSource
from cryoiso.io.star.read import read_particles


def broken(tmp_path: Path, change) -> str:
    """Ingests a set that ``change`` has broken; gives the message after checking that nothing half-written is left."""
    star, _ = simple_set(tmp_path, 40)
    change(tmp_path, star)
    with pytest.raises(InputError) as caught:
        ing.ingest(star, tmp_path / "shards", settings())
    assert caught.value.exit_code == 65
    assert not [p for p in (tmp_path / "shards").glob("*")]
    return str(caught.value)


def row_of(star: Path, name: str, index: int) -> int:
    p = read_particles(star)
    return int(np.flatnonzero((p.index == index) & (p.stack == str(star.parent / name)))[0]) + 1


def patch_image(folder: Path, index: int, value: float, whole: bool = False) -> None:
    raw = np.memmap(folder / "b.mrcs", np.float32, "r+", 1024, (20, BOX, BOX))
    if whole:
        raw[index] = value
    else:
        raw[index, 3, 4] = value
    raw.flush()


@pytest.mark.parametrize(
    ("value", "whole", "words"), [(np.nan, False, "NaN"), (np.inf, False, "NaN or inf"), (7, True, "constant")]
)
def test_bad_pixels_are_named(tmp_path, value, whole, words):
    message = broken(tmp_path, lambda folder, star: patch_image(folder, 13, value, whole))
    assert words in message and f"row {row_of(tmp_path / 'p.star', 'b.mrcs', 13)}:" in message
    assert "image 14 of" in message and "b.mrcs" in message


def test_a_missing_stack_is_named(tmp_path):
    message = broken(tmp_path, lambda folder, star: (folder / "b.mrcs").unlink())
    assert "b.mrcs: no such file" in message and "p.star, row" in message


def test_a_truncated_stack_is_named(tmp_path):
    message = broken(tmp_path, lambda folder, star: os.truncate(folder / "b.mrcs", 1024 + 7 * BOX * BOX * 4 + 5))
    assert "b.mrcs" in message and "truncated" in message and "7 whole sections" in message


def test_a_row_beyond_its_stack_is_named(tmp_path):
    def change(folder, star):
        star.write_text(star.read_text().replace("000020@", "000999@", 1))

    message = broken(tmp_path, change)
    assert "found image 999" in message and "from 1 to 20" in message and "row" in message


def test_a_box_that_is_not_the_optics_group_s_is_named(tmp_path):
    def change(folder, star):
        with write_stack(folder / "b.mrcs", 20, 1.0) as stack:
            stack.append(blobs(20, 20))

    message = broken(tmp_path, change)
    assert "expected 16 px, found 20 px" in message and "optics group 2" in message


def test_the_same_image_under_two_names_is_noticed(tmp_path):
    star, _ = simple_set(tmp_path, 40)
    p = read_particles(star)
    twice = replace(
        p,
        index=np.where(np.arange(40) == 30, p.index[2], p.index),
        stack=np.where(np.arange(40) == 30, p.stack[2], p.stack),
    )
    with raises_code("duplicate-particles", InputError, match="row 31: the same image is in two rows: 3 and 31"):
        ing.check_stacks(twice, "p.star")


def test_values_too_large_for_float16_are_named(tmp_path):
    star = make_set(tmp_path, {"a.mrcs": blobs(5) * 1e5}, [("a.mrcs", k, 0) for k in range(5)])
    with raises_code("images-not-normalised", InputError, match=r"do not fit float16.*65504.*float32"):
        ing.ingest(star, tmp_path / "shards", settings(normalise=False))
    ing.ingest(star, tmp_path / "shards", settings(normalise=False, storage="float32"))


def test_a_bad_image_leaves_finished_shards_and_no_index(tmp_path, monkeypatch):
    many_shards(monkeypatch)
    star, _ = simple_set(tmp_path)
    p = read_particles(star)
    row = int(np.flatnonzero(p.stack == str(tmp_path / "b.mrcs"))[-1])
    raw = np.memmap(tmp_path / "b.mrcs", np.float32, "r+", 1024, (300, BOX, BOX))
    raw[p.index[row], 0, 0] = np.nan
    raw.flush()
    with raises_code("image-unusable", InputError):
        ing.ingest(star, tmp_path / "shards", settings())
    assert sorted(f.name for f in (tmp_path / "shards").iterdir()) == [f"shard-{k:05d}.h5" for k in range(3)]
    with raises_code("shards-missing", InputError, match="no shards in this folder"):
        ShardSource(tmp_path / "shards")
    with raises_code("shards-missing", CryoisoError, match=r"1 shards are missing, first shard-00003"):
        ing.finish_index(ing.plan(p, settings(), star), tmp_path / "shards")


def test_damaged_shards_are_named(tmp_path):
    star, _ = simple_set(tmp_path)
    index = ing.ingest(star, tmp_path / "shards", settings())
    os.truncate(tmp_path / "shards/shard-00000.h5", 5000)
    with raises_code("shards-damaged", InputError, match=r"shard-00000\.h5"):
        ShardSource(tmp_path / "shards")
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "version": 99}))
    with raises_code("version-mismatch", InputError, match="of this version"):
        ShardSource(tmp_path / "shards")
    index.write_text("{")
    with raises_code("shards-damaged", InputError, match=r"index\.json"):
        ShardSource(tmp_path / "shards")


LIMITED = """
import resource, sys
from cryoiso.core.errors import CryoisoError
from cryoiso.io.imageprep import IngestSettings
from cryoiso.io.ingest import ingest
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    ingest(sys.argv[1], sys.argv[2], IngestSettings(invert="no"))
except CryoisoError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_write_that_fails_half_way_is_one_error_and_leaves_nothing(tmp_path):
    """A file size limit makes write() fail in the middle of a shard, as a full disk or quota does."""
    star, _ = simple_set(tmp_path)
    run = subprocess.run([sys.executable, "-c", LIMITED, star, tmp_path / "shards"], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "shard-00000.h5" in run.stdout and "no space left" in run.stdout and "needs" in run.stdout
    assert all("Å across; is the pixel size" in line for line in run.stderr.splitlines())  # 16 px are few
    assert not list((tmp_path / "shards").iterdir())


def test_a_full_disk_while_writing_a_shard(tmp_path, monkeypatch):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("LOUD: cannot mount a small file system here (needs root)")
    try:
        star, _ = simple_set(tmp_path)
        with pytest.raises(DiskFullError, match=r"shard-00000\.h5: no space left.*needs .* KiB free"):
            ing.ingest(star, mount / "shards", settings())
        monkeypatch.setattr("cryoiso.io.atomic.require_space", lambda *a: None)
        with pytest.raises(DiskFullError, match=r"shard-00000\.h5: no space left"):
            ing.ingest(star, mount / "shards", settings())
        assert not list((mount / "shards").iterdir())
    finally:
        subprocess.run(["umount", str(mount)], check=True)


PEAK = """
import resource, sys
from cryoiso.io.imageprep import IngestSettings
from cryoiso.io.ingest import ingest
ingest(sys.argv[1], sys.argv[2], IngestSettings(invert="no", shard_mib=4))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_does_not_grow_with_the_stack(tmp_path):
    peaks = {}
    for n in (1000, 8000):
        folder = tmp_path / str(n)
        folder.mkdir()
        with write_stack(folder / "a.mrcs", 64, 1.0, mode=12) as stack:
            for k in range(n // 1000):
                stack.append(blobs(1000, 64, seed=k))
        star = folder / "p.star"
        rows = "".join(f"{i + 1}@{folder}/a.mrcs 1 10000 10000 0\n" for i in range(n))
        star.write_text(
            "data_optics\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n_rlnImagePixelSize\n"
            "1 300 2.7 0.1 1.5\n\ndata_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n_rlnDefocusU\n_rlnDefocusV\n"
            f"_rlnDefocusAngle\n{rows}"
        )
        run = subprocess.run(
            [sys.executable, "-c", PEAK, star, folder / "shards"], capture_output=True, text=True, check=True
        )
        peaks[n] = int(run.stdout) / 1024
    assert peaks[8000] - peaks[1000] < 35, f"MiB: {peaks}; the 7,000 images more are 109 MiB as float32"
