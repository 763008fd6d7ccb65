"""A shard folder from elsewhere: HDF5 that leads into other files, and columns and an index that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here

from cryoiso.core.config import ParticlesSection
from cryoiso.core.errors import EXIT_INPUT, InputError
from cryoiso.io.ingest import ingest
from cryoiso.io.shardcheck import first_not_finite
from cryoiso.io.shards import ShardSource, read_attributes, read_index
from cryoiso.io.staging import ScratchCopies
from cryoiso.pipeline.reproduce.compare import compare_files

N, BOX = 40, 24


@pytest.fixture(scope="module")
def written(data, tmp_path_factory) -> Path:
    """Good shards; not written to."""
    folder = tmp_path_factory.mktemp("ingest") / "shards"
    ingest(data / "particles.star", folder, ParticlesSection(file=""))
    return folder


@pytest.fixture
def shards(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "shards"))


def put(file: Any, name: str, values: Any, **how: Any) -> None:
    if name in file:
        del file[name]
    file.create_dataset(name, data=values, **how)


def link(file: Any, name: str, to: Any) -> None:
    del file[name]
    file[name] = to


def external(file: Any, secret: str) -> None:
    del file["images"]
    file.create_dataset("images", shape=(N, BOX, BOX), dtype="f2", external=[(secret, 0, h5py.h5f.UNLIMITED)])


def virtual(file: Any, other: str) -> None:
    del file["images"]
    layout = h5py.VirtualLayout((N, BOX, BOX), "f2")
    layout[:] = h5py.VirtualSource(other, "images", shape=(N, BOX, BOX))
    file.create_virtual_dataset("images", layout)


def huge(file: Any) -> None:
    del file["images"]
    file.create_dataset("images", shape=(N, BOX, BOX), dtype="f2", chunks=(1, BOX, BOX))


def unknown_filter(file: Any) -> None:
    del file["images"]
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_chunk((10, BOX, BOX))
    how.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (1,))
    h5py.h5d.create(file.id, b"images", h5py.h5t.IEEE_F16LE, h5py.h5s.create_simple((N, BOX, BOX)), how)


def images(dtype: str = "f2", shape: tuple[int, ...] = (N, BOX, BOX)) -> Any:
    return np.zeros(shape, dtype)


LEADS_OUT = {
    "external link": (lambda f, o: link(f, "images", h5py.ExternalLink(o, "/images")), "is a link (ExternalLink)"),
    "external link of uids": (lambda f, o: link(f, "uid", h5py.ExternalLink(o, "/uid")), "is a link (ExternalLink)"),
    "soft link": (lambda f, o: link(f, "images", h5py.SoftLink("/optics")), "is a link (SoftLink)"),
    "loop": (lambda f, o: link(f, "images", h5py.SoftLink("/images")), "is a link (SoftLink)"),
    "external storage": (lambda f, o: external(f, "/etc/passwd"), "lies in another file"),
    "virtual": (lambda f, o: virtual(f, o), "is virtual"),
    "compressed": (lambda f, o: put(f, "images", images(), compression="gzip"), "is packed by a filter"),
    "unknown filter": (lambda f, o: unknown_filter(f), "is packed by a filter"),
    "nothing stored": (lambda f, o: huge(f), "is not stored whole"),
    "group": (lambda f, o: link(f, "images", f.create_group("g")), "is no data set"),
    "objects": (lambda f, o: put(f, "uid", ["a"] * N, dtype=h5py.string_dtype()), "values of another kind"),
}


@pytest.mark.parametrize("case", LEADS_OUT)
def test_a_shard_that_leads_into_another_file_is_refused(case, shards, written):
    edit, words = LEADS_OUT[case]
    with h5py.File(shards / "shard-00000.h5", "r+") as file:
        edit(file, str(written / "shard-00000.h5"))
    with raises_code("shards-damaged", InputError, match="the data set") as error:
        ShardSource(shards)
    assert words in str(error.value) and str(shards / "shard-00000.h5") in str(error.value)


VALUES = {
    "3 images": (lambda f: put(f, "images", images(shape=(3, BOX, BOX))), "not as index.json says"),
    "2d": (lambda f: put(f, "images", images(shape=(N, BOX * BOX))), "not as index.json says"),
    "float32": (lambda f: put(f, "images", images("f4")), "found 40 x 24 x 24 in float32"),
    "texts": (lambda f: put(f, "images", images("S4")), "not as index.json says"),
    "one uid": (lambda f: put(f, "uid", 5), "column 'uid' has another shape or type"),
    "uid twice": (lambda f: put(f, "uid", np.r_[7, 8, 7, 10 : N + 7].astype("u8")), "rows 1 and 3 .* same uid.* 7"),
    "uid of fractions": (lambda f: put(f, "uid", np.arange(N) / 2), "column 'uid' has another shape or type"),
    "optics 99": (lambda f: put(f, "optics", np.full(N, 99, "i4")), "row 1: the column 'optics'.*expected 0 to 0"),
    "stack -1": (lambda f: put(f, "stack", np.full(N, -1, "i4")), "row 1: the column 'stack'.*found -1"),
    "half 7": (lambda f: put(f, "half", np.r_[np.ones(N - 1), 7].astype("i1")), "row 40: the column 'half'.*found 7"),
    "half here and there": (lambda f: put(f, "half", np.r_[np.ones(N - 1), -1].astype("i1")), "row 40: the col.*-1"),
    "defocus short": (lambda f: put(f, "defocus_u_A", np.zeros(3)), "column 'defocus_u_A' has another shape or type"),
    "defocus nan": (lambda f: put(f, "defocus_u_A", np.r_[np.zeros(4), np.nan, np.zeros(N - 5)]), "row 5: .*found nan"),
    "no uid": (lambda f: f.pop("uid"), "damaged shard"),
    "names of 5000": (lambda f: put(f, "stacks", np.array([b"a" * 5000])), "the names of the stacks"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_columns_that_cannot_be_are_named(case, shards):
    edit, words = VALUES[case]
    with h5py.File(shards / "shard-00000.h5", "r+") as file:
        edit(file)
    with raises_code("shards-damaged", InputError, match=words):
        ShardSource(shards)


def first(**change: Any) -> Any:
    return lambda index: {**index, "shards": [{**index["shards"][0], **change}]}


def group(**change: Any) -> Any:
    return lambda index: {**index, "groups": [{**index["groups"][0], **change}]}


INDEX = {
    "list": (lambda i: [], "no index of this version"),
    "text": (lambda i: "x", "no index of this version"),
    **{f"no {k}": (lambda i, k=k: {a: b for a, b in i.items() if a != k}, f"'{k}' is wrong or missing")
       for k in ("box_px", "images", "shards", "groups", "plan", "storage")},
    "null box": (lambda i: {**i, "box_px": None}, "'box_px' is wrong or missing"),
    "null shards": (lambda i: {**i, "shards": None}, "'shards' is wrong or missing"),
    "images 1e12": (lambda i: {**i, "images": 10**12}, "expected 40, as the shards have, found 1000000000000"),
    "images -5": (lambda i: {**i, "images": -5}, "'images' is wrong"),
    "true": (lambda i: {**i, "images": True}, "'images' is wrong"),
    "float64": (lambda i: {**i, "storage": "float64"}, "'storage' is wrong"),
    "start": (first(start=-10), "shard 0 is not described"),
    "gap": (first(start=3), "shard 0 is not contiguous"),
    "stop": (first(stop=10**12), "expected 1000000000000, as the shards have"),
    "no groups": (lambda i: {**i, "groups": []}, "'groups' is wrong"),
    "group": (lambda i: {**i, "groups": [7]}, "optics group 1: not an object"),
    "group key": (group(x=1), "unknown key 'x'"),
    "group lacks": (lambda i: {**i, "groups": [{"number": 1}]}, "optics group 1: 'amplitude_contrast' is missing"),
    "pixel": (group(pixel_size_A=0), "'pixel_size_A' is out of range"),
    "pixel text": (group(pixel_size_A="7"), "'pixel_size_A' is no finite number"),
    "voltage nan": (group(voltage_kV=float("nan")), "'voltage_kV' is no finite number"),
    "tilt": (group(beam_tilt_mrad=3.0), "'beam_tilt_mrad' is wrong"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEX)
def test_an_index_of_another_form_is_named(case, shards):
    edit, words = INDEX[case]
    (shards / "index.json").write_text(json.dumps(edit(json.loads((shards / "index.json").read_text()))))
    with pytest.raises(InputError, match=words) as error:
        read_index(shards)
    assert str(shards / "index.json") in str(error.value)


def test_the_box_of_index_and_images_is_the_same(shards):
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**index, "box_px": 64}))
    with raises_code("shards-damaged", InputError, match=r"expected 40 of 64 x 64 px in float16, found 40 x 24 x 24"):
        ShardSource(shards)


def test_an_image_that_is_no_numbers_is_named_when_it_is_read(shards):
    with h5py.File(shards / "shard-00000.h5", "r+") as file:
        file["images"][17, 3, 4] = np.inf
    source = ShardSource(shards)
    assert np.isfinite(source.read(np.arange(17))).all()
    for rows in (np.arange(N), np.array([3, 17, 2])):
        with raises_code(
            "shards-damaged", InputError, match=r"shard-00000\.h5, row 18: an image has values that are not numbers"
        ):
            source.read(rows)


def test_large_finite_values_are_numbers():
    values = np.full((2, 4, 4), 1e30, np.float32)  # their squares overflow
    assert first_not_finite(values) is None
    values[1, 2, 3] = np.nan
    assert first_not_finite(values) == 1


def test_a_copy_that_leads_elsewhere_is_not_used(shards, written, tmp_path):
    copy = Path(shutil.copy(shards / "shard-00000.h5", tmp_path / "copy.h5"))
    with h5py.File(copy, "r+") as file:
        external(file, "/etc/passwd")
    source, good = ShardSource(shards), ShardSource(written)
    source.use_copies(ScratchCopies({"shard-00000.h5": copy}))
    np.testing.assert_array_equal(source.read(np.arange(N)), good.read(np.arange(N)))


def test_what_replay_compares_leads_nowhere(shards, written):
    name = "shard-00000.h5"
    with h5py.File(shards / name, "r+") as file:
        external(file, "/etc/passwd")
    found = compare_files(name, shards / name, written / name, "C1")
    assert found is not None and "could not be compared further" in found.words and "another file" in found.words


def test_bytes_changed_at_random_are_an_error_or_nothing(shards, written):
    """Only this program's own errors, whatever HDF5 makes of it."""
    raw, good = (written / "shard-00000.h5").read_bytes(), ShardSource(written)
    rng = np.random.default_rng(5)
    refused = 0
    for turn in range(60):
        bad = bytearray(raw)
        for _ in range(20):
            bad[rng.integers(0, 8000) if turn % 2 else rng.integers(len(bad) - 9000, len(bad))] = rng.integers(256)
        (shards / "shard-00000.h5").write_bytes(bytes(bad))
        read_attributes(shards / "shard-00000.h5")
        try:
            with ShardSource(shards) as source:
                assert source.read(np.arange(N)).shape == (N, BOX, BOX) and len(source.particles) == len(good)
        except InputError:
            refused += 1
    assert refused > 20


def test_the_command_ends_with_one_line(shards, tmp_path):
    with h5py.File(shards / "shard-00000.h5", "r+") as file:
        external(file, "/etc/passwd")
    done = cryoiso_here("reconstruct", shards, "--out", tmp_path / "out")
    assert done.returncode in (2, EXIT_INPUT) and "Traceback" not in done.stderr
