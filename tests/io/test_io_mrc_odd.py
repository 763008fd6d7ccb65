"""MRC files that programs read differently (signs of bytes, axes, oblique cells, several volumes), and bounded work."""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import math
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.io import mrc, mrcheader
from cryoiso.io.mrc import build_header, read_header, read_map, read_raw_map
from cryoiso.io.stack import StackReader

RNG = np.random.default_rng(7)
MAP = RNG.normal(size=(8, 8, 8)).astype(np.float32)
BYTES = np.rint(RNG.normal(size=(8, 8, 8)) * 20).clip(-127, 127)
STAMP, FLAGS, MODE, ANGLES, AXES, STATS, GROUP, SAMPLES = 152, 156, 12, 52, 64, 76, 88, 28


def header(shape=(8, 8, 8), order="<", stack=False, at=None) -> bytes:
    """A header with numbers overwritten: ``at`` maps byte offsets to a struct format and values."""
    raw = bytearray(build_header(shape, 2, 6.0, stack=stack))
    for offset, (form, *values) in (at or {}).items():
        struct.pack_into("<" + form, raw, offset, *values)
    if order == ">":
        words = np.frombuffer(bytes(raw), "<u4").astype(">u4").tobytes()
        raw = bytearray(words[:208] + raw[208:212] + b"\x11\x11\0\0" + words[216:])
    return bytes(raw)


def write(path: Path, head: bytes, data: np.ndarray) -> Path:
    path.write_bytes(head + data.tobytes())
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("flags", "shift", "dtype"), [(0, 128, "u1"), (1, 0, "i1"), (4, 128, "u1"), (5, 0, "i1")])
def test_imod_says_whether_bytes_are_signed(tmp_path, order, flags, shift, dtype):
    head = header(order=order, at={MODE: ("i", 0), STAMP: ("2i", mrcheader.IMOD_STAMP, flags)})
    path = write(tmp_path / "a.mrc", head, (BYTES + shift).astype(dtype))
    np.testing.assert_array_equal(read_map(path).data, BYTES + shift)
    (tmp_path / "a.mrc.gz").write_bytes(gzip.compress(path.read_bytes()))
    np.testing.assert_array_equal(read_map(tmp_path / "a.mrc.gz").data, BYTES + shift)
    with StackReader() as reader:
        np.testing.assert_array_equal(reader.read(str(path), np.array([3, 1])), (BYTES + shift)[[3, 1]])
    assert not read_header(path).is_plain


def test_4_bit_values_of_imod_are_refused(tmp_path):
    head = header(at={MODE: ("i", 0), STAMP: ("2i", mrcheader.IMOD_STAMP, 16)})
    with raises_code("mrc-unsupported", InputError, match=r"a\.mrc: cannot use this kind of MRC data.*4-bit values"):
        read_map(write(tmp_path / "a.mrc", head, BYTES.astype("i1")))


@pytest.mark.parametrize(
    ("stats", "shift", "dtype", "words"),
    [
        ((-80.0, 90.0), 0, "i1", ""),  # the header's smallest and largest value decide
        ((30.0, 200.0), 128, "u1", ""),
        ((0.0, -1.0), 0, "i1", ""),  # not determined: the data decide
        ((0.0, 0.0), 128, "u1", "are unsigned"),
        ((float("nan"), float("nan")), 128, "u1", "are unsigned"),
    ],
)
def test_bytes_without_imod(tmp_path, stats, shift, dtype, words, caplog):
    path = write(tmp_path / "a.mrc", header(at={MODE: ("i", 0), STATS: ("2f", *stats)}), (BYTES + shift).astype(dtype))
    np.testing.assert_array_equal(read_map(path).data, BYTES + shift)
    assert words in caplog.text and bool(words) == bool(caplog.text)


@pytest.mark.parametrize("axes", list(itertools.permutations((1, 2, 3))))
def test_axes_of_maps_and_stacks(tmp_path, axes):
    """A map comes as (z, y, x) from any order; images come as (y, x), and sections along x or y are no images."""
    stored = np.ascontiguousarray(MAP.transpose([3 - a for a in reversed(axes)]))  # sections, rows, columns
    path = write(tmp_path / "a.mrc", header(at={AXES: ("3i", *axes)}), stored)
    np.testing.assert_array_equal(read_map(path).data, MAP)
    with StackReader() as reader:
        if axes[2] == 3:
            np.testing.assert_array_equal(reader.read(str(path), np.array([5, 0])), MAP[[5, 0]])
            assert read_header(path).is_plain == (axes == (1, 2, 3))
        else:
            with raises_code(
                "stack-not-of-images", InputError, match=rf"not a stack of images .*sections along {'xyz'[axes[2] - 1]}"
            ):
                reader.read(str(path), np.array([0]))


@pytest.mark.parametrize("axes", [(1, 1, 1), (9, 9, 9), (1, 2, 0), (-1, -2, -3)])
def test_axes_that_cannot_be(tmp_path, axes):
    with raises_code("mrc-malformed", InputError):
        read_map(write(tmp_path / "a.mrc", header(at={AXES: ("3i", *axes)}), MAP))


def test_axes_of_old_files_are_zero(tmp_path):
    np.testing.assert_array_equal(
        read_map(write(tmp_path / "a.mrc", header(at={AXES: ("3i", 0, 0, 0), ANGLES: ("3f", 0, 0, 0)}), MAP)).data, MAP
    )


@pytest.mark.parametrize("angles", [(90, 90, 120), (90, 94.3, 90), (60, 90, 90), (float("nan"), 90, 90)])
def test_oblique_cells_are_refused(tmp_path, angles):
    """Of images only the angle between x and y matters."""
    path = write(tmp_path / "a.mrc", header(at={ANGLES: ("3f", *angles)}), MAP)
    message = r"not at right angles \(expected cell angles of 90°, found .*°"
    with raises_code("mrc-unsupported", InputError, match=message):
        read_map(path)
    np.testing.assert_array_equal(read_raw_map(path)[0], MAP)
    with StackReader() as reader:
        if angles[2] == 90:
            np.testing.assert_array_equal(reader.read(str(path), np.array([3])), MAP[[3]])
        else:
            with raises_code("mrc-unsupported", InputError, match=message):
                reader.read(str(path), np.array([0]))


@pytest.mark.parametrize("angles", [(90, 90, 0), (0, 0, 90), (math.pi / 2,) * 3, (1e-38, 0, 90)])
def test_right_angles_in_other_words(tmp_path, angles):
    """Angles that a program left out, one by one, or wrote in radians."""
    path = write(tmp_path / "a.mrc", header(at={ANGLES: ("3f", *angles)}), MAP)
    np.testing.assert_array_equal(read_map(path).data, MAP)
    with StackReader() as reader:
        np.testing.assert_array_equal(reader.read(str(path), np.array([3])), MAP[[3]])


def test_several_volumes(tmp_path, caplog):
    cube = header(at={GROUP: ("i", 401), SAMPLES: ("3i", 8, 8, 4)})
    for read in (read_map, lambda p: StackReader().read(str(p), np.array([0]))):
        with pytest.raises(InputError, match="found 2"):
            read(write(tmp_path / "a.mrc", cube, MAP))
    one = header(at={GROUP: ("i", 401)})
    np.testing.assert_array_equal(read_map(write(tmp_path / "b.mrc", one, MAP)).data, MAP)
    assert not caplog.text
    images = write(tmp_path / "c.mrcs", header(stack=True), MAP)
    np.testing.assert_array_equal(read_map(images).data, MAP)
    assert "stack of images" in caplog.text


def test_longer_files_and_extended_headers(tmp_path, caplog):
    path = write(tmp_path / "a.mrc", header(), MAP)
    path.write_bytes(path.read_bytes() + bytes(100))
    np.testing.assert_array_equal(read_map(path).data, MAP)
    assert "100 bytes longer" in caplog.text
    (tmp_path / "a.mrc.gz").write_bytes(gzip.compress(path.read_bytes()))
    np.testing.assert_array_equal(read_map(tmp_path / "a.mrc.gz").data, MAP)
    caplog.clear()
    with StackReader() as reader:
        for _ in range(2):
            np.testing.assert_array_equal(reader.read(str(path), np.array([7])), MAP[[7]])
    assert caplog.text.count("last 100 bytes") == 1
    raw = header(at={92: ("i", 160)}) + bytes(range(160)) + MAP.tobytes()
    (tmp_path / "b.mrc").write_bytes(raw)
    np.testing.assert_array_equal(read_map(tmp_path / "b.mrc").data, MAP)
    (tmp_path / "b.mrc").write_bytes(raw[:-1])
    with raises_code("file-truncated", InputError, match=r"truncated.*7 whole sections"):
        read_map(tmp_path / "b.mrc")


@pytest.mark.parametrize("pixel", [1e-7, 1e9, 0.05])
def test_pixel_sizes_that_cannot_be(tmp_path, pixel):
    path = write(tmp_path / "a.mrc", build_header((8, 8, 8), 2, pixel), MAP)
    with raises_code("value-out-of-range", InputError, match=r"impossible value in the pixel size.*0\.2 to 100 Å"):
        read_map(path)
    assert read_map(path, 3.0).pixel_size_A == 3.0


def test_packed_files(tmp_path):
    raw = header() + MAP.tobytes()
    packed = gzip.compress(raw, mtime=0)
    good = {
        "gz_by_another_name.mrc": packed,
        "b.map": bz2.compress(raw),
        "c.mrc.bz2": bz2.compress(raw),
        "plain.map.gz": raw,
    }
    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(read_map(tmp_path / name).data, MAP)
    bad = {
        "cut.gz": (packed[:-900], "cannot be unpacked"),
        "crc.gz": (packed[:-8] + b"12345678", "cannot be unpacked"),
        "bits.gz": (packed[:600] + bytes(64) + packed[664:], "cannot be unpacked"),
        "short.gz": (gzip.compress(raw[:-4]), "truncated"),
        "junk.mrc.gz": (bytes(2000), "not an MRC file"),
        "text.gz": (gzip.compress(b"hello" * 500), "not an MRC file"),
        "x.mrc": (lzma.compress(raw), "packed with xz"),
        "zip.mrc": (b"PK\3\4" + raw, "packed with zip"),
        "lfs.mrc": (b"version https://git-lfs.github.com/spec/v1\n" + bytes(1000), "git-lfs"),
    }
    for name, (data, words) in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=words) as error:
            read_map(tmp_path / name)
        assert name in str(error.value)
    (tmp_path / "s.mrcs").write_bytes(packed)
    with raises_code("mrc-malformed", InputError, match="packed with gzip: unpack it"):
        StackReader().read(str(tmp_path / "s.mrcs"), np.array([0]))


def test_what_a_packed_file_may_take(tmp_path, monkeypatch):
    """256 MiB of zeros behind a small map are not unpacked; nor is anything where the header promises too much."""
    bomb = tmp_path / "bomb.mrc.gz"
    with gzip.open(bomb, "wb", 1) as stream:
        stream.write(header() + MAP.tobytes())
        for _ in range(16):
            stream.write(bytes(1 << 24))
    promise = tmp_path / "promise.mrc.gz"
    promise.write_bytes(gzip.compress(header((2000, 2000, 2000)) + bytes(1000)))
    monkeypatch.setattr(mrc, "UNPACKED_LIMIT", 1 << 30)
    tracemalloc.start()
    with raises_code(
        "packed-file-unsupported",
        InputError,
        match=r"unpacks to more than twice what its header says .expected 3072 bytes",
    ):
        read_map(bomb)
    with raises_code(
        "packed-file-unsupported",
        InputError,
        match=r"too large to be read packed .*at most 1 GiB unpacked, found 29\.8 GiB",
    ):
        read_map(promise)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_sizes_that_are_refused_from_the_header(tmp_path):
    for name, shape, words, read in (
        ("a.mrc", (3000, 3000, 3000), "at most 2048 voxels", read_map),
        ("b.mrcs", (1, 20_000, 20_000), "at most 16384 px", lambda p: StackReader().read(str(p), np.array([0]))),
    ):
        with open(tmp_path / name, "wb") as stream:
            stream.write(header(shape))
            stream.truncate(1024 + 4 * int(np.prod(shape)))
        if os.stat(tmp_path / name).st_blocks * 512 > 1 << 20:
            pytest.skip("this file system has no sparse files")
        with raises_code("size-above-limit", InputError, match=words):
            read(tmp_path / name)


@pytest.mark.parametrize("value", [3e38, -1e20])
def test_voxels_that_overflow(tmp_path, value):
    bad = MAP.copy()
    bad[1, 2, 3] = value
    with raises_code("map-not-finite", InputError, match=r"cannot be densities .expected values up to 1e\+15, found "):
        read_map(write(tmp_path / "a.mrc", header(), bad))
    bad[1, 2, 3] = np.inf
    with raises_code("map-not-finite", InputError, match=r"NaN or infinite .found 1 of them"):
        read_map(write(tmp_path / "a.mrc", header(), bad))


def test_a_map_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(12, "Cannot allocate memory")

    path = write(tmp_path / "a.mrc", header(), MAP)
    monkeypatch.setattr(mrc.np, "memmap", full)
    with raises_code(
        "memory-short", CryoisoError, match=r"a\.mrc: .* GB cannot be mapped into memory: Cannot allocate memory"
    ):
        read_map(path)
