"""What a .cs file may not be: damaged headers, lying sizes, other types, odd half-sets; and what it may: large headers,
unicode paths, several passthrough files, cryoSPARC's compressed format."""

from __future__ import annotations

import struct
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cs_helper import save, table
from errors_helper import raises_code
from pipeline_helper import cryoiso

from cryoiso.core.config import Job, job_to_toml, parse_job
from cryoiso.core.errors import InputError
from cryoiso.io import csfile
from cryoiso.io.cs import read_cs
from cryoiso.io.csfile import load_cs
from cryoiso.pipeline.jobfile import with_absolute_paths
from cryoiso.pipeline.records.manifest import input_files


def with_header(path: Path, text: str, body: bytes = b"", version: int = 1, length: int | None = None) -> Path:
    data = text.encode("latin-1")
    size = len(data) if length is None else length
    path.write_bytes(
        b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", size) + data + body
    )
    return path


def header(shape: str, descr: object = table().dtype.descr) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}"


UID = ("uid", "<u8")
HEADERS = {
    "a billion rows": (header("(1000000000,)"), "truncated"),
    "10^30 rows": (header(f"({10**30},)"), "truncated"),
    "fewer rows than there are": (header("(1,)"), "longer than its header"),
    "negative": (header("(-4,)"), "structured array"),
    "true": (header("(True,)"), "structured array"),
    "no dimension": (header("()"), "one dimension"),
    "two dimensions": (header("(2, 2)"), "one dimension"),
    "nested": ("(" * 9000, "header cannot be read"),
    "minus": ("-" * 9000 + "1", "header cannot be read"),
    "no text": ("{'descr': '''abc", "header cannot be read"),
    "not a dict": ("[1, 2]", "header cannot be read"),
    "nothing": ("", "header cannot be read"),
    "name twice": (header("(1,)", [UID, UID]), "header cannot be read"),
    "objects": (header("(1,)", [UID, ("x", "|O")]), "Python objects"),
    "no bytes per row": (header("(9000000000,)", [("uid", "|V0")]), "impossible rows"),
    "2 GB per row": (header("(1,)", [UID, ("x", "|S2147483647")]), "header cannot be read"),
    "huge cells": (header("(1,)", [UID, ("x", "<f4", (2000000000, 2000000000))]), "header cannot be read"),
    "20,001 columns": (header("(1,)", [(f"x{i}", "|u1") for i in range(20_001)]), "20,001 fields"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_refused_before_anything_is_read(tmp_path, name):
    text, words = HEADERS[name]
    body = np.zeros(4, table().dtype).tobytes()
    path = with_header(tmp_path / "bad.cs", text, body, version=2)
    with pytest.raises(InputError, match=words) as caught:
        load_cs(path)
    assert caught.value.file == path and len(str(caught.value)) < 400


@pytest.mark.parametrize(("version", "length"), [(1, 60_000), (2, 4_000_000_000), (3, 2_000_000_000), (2, 3_000_000)])
def test_a_header_longer_than_the_file_or_the_limit(tmp_path, version, length):
    path = with_header(tmp_path / "bad.cs", "{}", bytes(4_000_000 if length == 3_000_000 else 0), version, length)
    with raises_code("cs-malformed", InputError, match=r"header is truncated or too long .*2,097,152"):
        load_cs(path)


def test_every_length_of_a_file_cut_short_is_one_error(tmp_path):
    whole = save(tmp_path / "whole.cs", table()).read_bytes()
    for length in [*range(0, 12), 50, 128, len(whole) - 200, len(whole) - 1]:
        path = tmp_path / "cut.cs"
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            load_cs(path)


@pytest.mark.filterwarnings("ignore:Stored array in format 2.0")
def test_a_large_header_of_many_classes_is_read(tmp_path):
    fields = ("class_posterior", "cross_cor", "error", "alpha", "weight", "pose_ess", "shift_ess")
    more = {f"alignments_class3D_{i}/{k}": np.zeros(4, "f4") for i in range(300) for k in fields}
    path = save(tmp_path / "classes.cs", table(**more))
    assert len(path.read_bytes()) - 4 * table(**more).dtype.itemsize > 60_000
    np.testing.assert_allclose(read_cs(path).defocus_u_A, np.linspace(1e4, 2e4, 4), rtol=1e-6)


def test_a_header_of_python_2_and_big_endian_numbers(tmp_path):
    data = table()
    text = f"{{'descr': {data.dtype.descr!r}, 'fortran_order': False, 'shape': (4L,), }}"
    old = with_header(tmp_path / "old.cs", text, data.tobytes(), version=2)
    big = save(tmp_path / "big.cs", data.astype(data.dtype.newbyteorder(">")))
    for path in (old, big):
        found = read_cs(path)
        assert found.uid.tolist() == [10, 11, 12, 13] and found.uid.dtype == np.uint64
        np.testing.assert_allclose(found.defocus_u_A, np.linspace(1e4, 2e4, 4), rtol=1e-6)


def test_unicode_and_odd_image_names(tmp_path):
    unicode = read_cs(save(tmp_path / "u.cs", table(**{"blob/path": np.array([">J1/é.mrc"] * 4)})))
    coded = read_cs(save(tmp_path / "s.cs", table(**{"blob/path": np.array([">J1/é.mrc".encode()] * 4)})))
    assert [Path(name).name for name in unicode.stack] == ["é.mrc"] * 4 == [Path(name).name for name in coded.stack]
    for bad in (b"", b">", b"a\0b", b"a\xff.mrc", b"a\nb"):
        with raises_code("image-name-invalid", InputError) as caught:
            read_cs(save(tmp_path / "bad.cs", table(**{"blob/path": np.array([b"a.mrc", bad, b"b.mrc", b"c"], "S9")})))
        assert caught.value.row == 2


WRONG_TYPES = {
    "uid": np.array([b"a", b"b", b"c", b"d"]),
    "blob/path": np.arange(4),
    "blob/idx": np.arange(4.0),
    "blob/shape": np.full(4, 64, "u4"),
    "blob/psize_A": np.array([b"1.5"] * 4),
    "ctf/df1_A": np.zeros((4, 2), "f4"),
    "ctf/exp_group_id": np.array([b"5"] * 4),
    "ctf/phase_shift_rad": np.array([b"0"] * 4),
    "alignments3D/pose": np.zeros((4, 2), "f4"),
    "alignments3D/shift": np.zeros(4, "f4"),
    "alignments3D/split": np.array([b"0"] * 4),
}


def test_image_names_without_numbers_are_no_images(tmp_path):
    path = save(tmp_path / "a.cs", table(**{"blob/idx": None}))
    assert read_cs(path, require=("ctf",)).stack.tolist() == [""] * 4
    with raises_code("cs-field-missing", InputError, match=r"a field is missing \(expected blob/idx\)"):
        read_cs(path)


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_fields_of_another_type_are_named(tmp_path, name):
    poses = {"alignments3D/pose": np.zeros((4, 3), "f4"), "alignments3D/shift": np.zeros((4, 2), "f4")}
    path = save(tmp_path / "bad.cs", table(**{**poses, name: WRONG_TYPES[name]}))
    with raises_code("cs-malformed", InputError, match=f"field {name} is of the wrong type") as caught:
        read_cs(path)
    assert caught.value.expected == csfile.FIELDS[name].words


BAD_VALUES = {
    "alignments3D/pose": np.array([[0, 0, 0], [0, 0, 0], [0, np.nan, 0], [0, 0, 0]], "f4"),
    "alignments3D/shift": np.array([[0, 0], [0, 0], [0, np.inf], [0, 0]], "f4"),
    "ctf/phase_shift_rad": np.array([0, 0, np.nan, 0], "f4"),
    "blob/psize_A": np.array([1.5, 1.5, np.nan, 1.5], "f4"),
    "blob/idx": np.array([0, 1, -1, 2], "i8"),
    "blob/shape": np.array([[64, 64], [64, 64], [64, 32], [64, 64]], "u4"),
    "alignments3D/split": np.array([0, 1, 2, 1], "u4"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_one_bad_value_is_named_by_row(tmp_path, name):
    path = save(tmp_path / "bad.cs", table(**{name: BAD_VALUES[name]}))
    with pytest.raises(InputError, match=name) as caught:
        read_cs(path)
    assert caught.value.row == 3 and caught.value.found is not None


def test_the_half_sets_are_kept_and_one_odd_value_does_not_drop_them(tmp_path):
    def halves(*split):
        return read_cs(save(tmp_path / "h.cs", table(**{"alignments3D/split": np.array(split)}))).half

    assert halves(0, 1, 1, 0).tolist() == [1, 2, 2, 1]
    assert halves(0.0, 1.0, 1.0, 0.0).tolist() == [1, 2, 2, 1]
    assert halves(0, 0, 0, 0) is None, "one split for all is no split"
    for odd in ((0, 1, 2, 1), (0, 1, -1, 1), (0.0, 1.0, np.nan, 1.0), (0, 0, 2, 0)):
        with raises_code("half-set-missing", InputError) as caught:
            halves(*odd)
        assert (caught.value.row, caught.value.expected) == (3, "0 or 1")


def test_what_is_no_numpy_file_says_what_it_is(tmp_path):
    pointer = tmp_path / "pointer.cs"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with raises_code("cs-malformed", InputError, match="git-lfs"):
        load_cs(pointer)
    with zipfile.ZipFile(tmp_path / "zip.cs", "w") as archive:
        archive.writestr("a.cs", b"x")
    (tmp_path / "broken.cs").write_bytes(b"PK\x03\x04garbage")
    for name in ("zip.cs", "broken.cs"):
        with raises_code("cs-malformed", InputError, match="zip archive"):
            load_cs(tmp_path / name)
    with raises_code("file-not-found", InputError):
        load_cs(tmp_path / "nowhere.cs")


def test_the_compressed_format_needs_cryosparcs_own_package(tmp_path, monkeypatch):
    path = tmp_path / "c.cs"
    path.write_bytes(b"\x95CSDAT" + bytes(50))
    monkeypatch.setitem(__import__("sys").modules, "cryosparc.dataset", None)
    with raises_code("cs-compressed", InputError, match=r"CSDAT.*cryosparc-tools.*format=1"):
        load_cs(path)


def test_the_compressed_format_is_read_through_cryosparcs_own_package(tmp_path):
    dataset = pytest.importorskip("cryosparc.dataset", reason="LOUD: cryosparc-tools is not installed")
    whole = table(**{"alignments3D/split": np.array([0, 1, 0, 1], "u4")})
    dataset.Dataset(whole).save(str(tmp_path / "c.cs"), format=dataset.CSDAT_FORMAT)
    plain, packed = read_cs(save(tmp_path / "p.cs", whole)), read_cs(tmp_path / "c.cs")
    for name in ("uid", "index", "defocus_u_A", "half", "optics"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(packed, name))
    assert plain.groups == packed.groups and plain.stack.tolist() == packed.stack.tolist()
    (tmp_path / "bad.cs").write_bytes((tmp_path / "c.cs").read_bytes()[:40])
    with raises_code("cs-malformed", InputError, match="cryosparc-tools cannot read it"):
        read_cs(tmp_path / "bad.cs")


def parts(folder: Path) -> tuple[np.ndarray, Path]:
    """A set whose CTF lies in one passthrough file and whose split in another; the whole, and the main file."""
    whole = table(**{"alignments3D/split": np.array([0, 1, 1, 0], "u4")})
    ctf = [name for name in whole.dtype.names if name.startswith("ctf") or name == "uid"]
    blob = [name for name in whole.dtype.names if not name.startswith(("ctf", "align"))]
    save(folder / "J2_ctf.cs", whole[ctf][::-1])
    save(folder / "J2_split.cs", whole[["uid", "alignments3D/split"]][[2, 0, 3, 1]])
    return whole, save(folder / "J2_particles.cs", whole[blob])


def test_several_passthrough_files_are_joined(tmp_path):
    whole, main = parts(tmp_path)
    with raises_code("cs-field-missing", InputError, match=r"a field is missing.*--passthrough"):
        read_cs(main)
    found = read_cs(main, passthrough=[tmp_path / "J2_ctf.cs", tmp_path / "J2_split.cs"])
    np.testing.assert_allclose(found.defocus_u_A, whole["ctf/df1_A"])
    assert found.half.tolist() == [1, 2, 2, 1]


def test_several_passthrough_files_beside_it(tmp_path):
    whole, main = parts(tmp_path)
    (tmp_path / "J2_ctf.cs").rename(tmp_path / "J2_passthrough_particles.cs")
    other = np.zeros(2, whole[["uid", "ctf/df1_A"]].dtype)
    other["uid"] = [900, 901]  # another job's particles
    save(tmp_path / "J3_passthrough_particles.cs", other)
    np.testing.assert_allclose(read_cs(main).defocus_u_A, whole["ctf/df1_A"])
    same = np.load(tmp_path / "J2_passthrough_particles.cs")
    save(tmp_path / "J4_passthrough_particles.cs", same[::-1])
    np.testing.assert_allclose(read_cs(main).defocus_u_A, whole["ctf/df1_A"])
    same["ctf/df1_A"][1] += 1
    save(tmp_path / "J4_passthrough_particles.cs", same)
    with raises_code(
        "passthrough-mismatch", InputError, match=r"differ in ctf/df1_A: J2_passthrough.* and J4_passthrough"
    ):
        read_cs(main)
    chosen = read_cs(main, passthrough=[tmp_path / "J4_passthrough_particles.cs"])
    assert np.abs(chosen.defocus_u_A - whole["ctf/df1_A"]).max() == pytest.approx(1.0)


def test_passthrough_files_come_by_job_file_and_command_line(tmp_path):
    parts(tmp_path)
    words = ["init", "J2_particles.cs", "--passthrough", "J2_ctf.cs", "--passthrough", "J2_split.cs"]
    done = cryoiso(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "job.toml").read_text()
    assert 'passthrough = ["J2_ctf.cs", "J2_split.cs"]' in text
    job = with_absolute_paths(parse_job(tomllib.loads(text), "job.toml"), tmp_path)
    assert isinstance(job, Job) and job_to_toml(job).count(str(tmp_path)) >= 3
    names = [path.name for path in input_files(job)]
    assert names[:3] == ["J2_particles.cs", "J2_ctf.cs", "J2_split.cs"]
