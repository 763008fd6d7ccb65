"""STAR files with odd names, two sets of images, one file under two names, and what would take for ever to read."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.engines.relion.images import usable_originals
from cryoiso.io.imageprep import IngestSettings, normalise
from cryoiso.io.ingest import check_stacks
from cryoiso.io.mrc import write_stack
from cryoiso.io.sources import StackSource
from cryoiso.io.star.read import parse_image_names, read_particles
from cryoiso.io.star.text import MAX_BLOCKS, MAX_COLUMNS, MAX_LINE, read_blocks

BOX = 16
COLUMNS = ("rlnImageName", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnVoltage", "rlnSphericalAberration",
           "rlnAmplitudeContrast", "rlnImagePixelSize")  # fmt: skip
REST = "15000 14000 30 300 2.7 0.1 3"


def star(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "data_particles\n\nloop_\n" + "".join(f"_{c}\n" for c in COLUMNS)
    path.write_text(head + "".join(f'"{n}" {REST}\n' for n in names))
    return path


def stack(path: Path, seed: int, n: int = 4) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).normal(size=(n, BOX, BOX)).astype(np.float32)
    with write_stack(path, BOX, 3.0) as writer:
        writer.append(images)
    return images


def images_of(path: Path, project: str = "") -> np.ndarray:
    class Settings:
        invert, normalise = "no", False

    source = StackSource(read_particles(path, project), Settings, path)
    images = source.read(np.arange(len(source.particles)))
    source.close()
    return images


# --- names


@pytest.mark.parametrize(
    ("name", "stack_", "index"),
    [
        ("000012@Extract/job1/a.mrcs", "Extract/job1/a.mrcs", 11),
        ("1@a@b/x.mrcs", "a@b/x.mrcs", 0),
        ("000003@user@host/a@b.mrcs", "user@host/a@b.mrcs", 2),
        ("2@x.mrcs:mrcs", "x.mrcs", 1),
        ("2@x.st:mrc", "x.st", 1),
        ("x.mrc", "x.mrc", 0),
        ("0000000000000000000000005@x.mrcs", "x.mrcs", 4),
        ("2147483648@x.mrcs", "x.mrcs", 2**31 - 1),
    ],
)
def test_names_of_images(name, stack_, index):
    stacks, numbers = parse_image_names([name], "p.star")
    assert stacks == [stack_] and numbers.tolist() == [index]


@pytest.mark.parametrize(
    "name",
    [
        "0@x.mrcs", "-1@x.mrcs", "+1@x.mrcs", "²@x.mrcs", "١@x.mrcs", "1_0@x.mrcs", "1.0@x.mrcs", " 1@x.mrcs",
        "@x.mrcs", "a@b/x.mrcs", f"{2**31 + 1}@x.mrcs", f"{2**63}@x.mrcs", f"{10**30}@x.mrcs", "9" * 5000 + "@x.mrcs",
        "1@", "", "1@a\0b.mrcs", "1@a\x1b[31m.mrcs", "1@a\nb.mrcs", "1@a\udcff.mrcs",
        "1@" + "a/" * 600 + "x.mrcs", "1@:mrcs",
    ],
)  # fmt: skip
def test_names_that_cannot_be(name):
    with raises_code(
        "image-name-invalid", InputError, match=r"p\.star, row 2: bad image name \(expected .*found"
    ) as error:
        parse_image_names(["1@good.mrcs", name], "p.star")
    text = str(error.value)
    assert len(text) < 400 and not set(text) & set("\0\x1b\n")


def test_images_of_odd_names_are_the_right_ones(tmp_path):
    images = stack(tmp_path / "a@b/x.mrcs", 1)
    path = star(tmp_path / "p.star", ["000003@a@b/x.mrcs", "1@a@b/x.mrcs:mrcs"])
    np.testing.assert_array_equal(images_of(path), images[[2, 0]])
    plain = read_particles(star(tmp_path / "q.star", ["3@a@b/x.mrcs", "1@a@b/x.mrcs"]))
    assert read_particles(path).uid.tolist() == plain.uid.tolist(), "the same images are the same particles"
    assert read_particles(path).table["rlnImageName"].tolist()[1] == "1@a@b/x.mrcs:mrcs", "the column stays as it is"


def test_names_too_long_for_a_file_system(tmp_path):
    path = star(tmp_path / "p.star", ["1@" + "a" * 300 + ".mrcs"])
    with raises_code("file-unreadable", InputError, match=r"row 1: image stack .*name too long"):
        check_stacks(read_particles(path), path)


@pytest.mark.parametrize("uid", ["²", "-1", "1.5", "1_0", str(2**64), "9" * 5000])
def test_uids_that_cannot_be(tmp_path, uid):
    path = star(tmp_path / "p.star", ["1@a.mrcs"])
    path.write_text(path.read_text().replace("\n\nloop_\n", "\n\nloop_\n_cryoisoUid\n").replace('"1@', f'{uid} "1@'))
    with raises_code("value-not-a-number", InputError, match="row 1: bad cryoisoUid"):
        read_particles(path)


# --- two sets of images, two names of one image


@pytest.fixture()
def projects(tmp_path):
    """Projects a and b with stacks of the same relative name and other images; a particle file in a."""
    images = {p: stack(tmp_path / p / "Extract/job005/m.mrcs", seed) for seed, p in enumerate("ab")}
    path = star(tmp_path / "a/Refine3D/job010/run_data.star", [f"{i}@Extract/job005/m.mrcs" for i in (4, 2)])
    return path, images


@pytest.mark.parametrize("here", ["a", "b", "", "a/Refine3D/job010"])
def test_a_particle_file_gets_the_images_of_its_own_project(projects, tmp_path, here, monkeypatch, caplog):
    path, images = projects
    monkeypatch.chdir(tmp_path / here)
    np.testing.assert_array_equal(images_of(path), images["a"][[3, 1]])
    both = [str(tmp_path / p / "Extract/job005/m.mrcs") for p in "ab"]
    assert all((name in caplog.text) == (here == "b") for name in both)
    assert f"{both[0]} is used, not {both[1]}" in caplog.text or here != "b"


def test_a_project_that_is_given_wins(projects, tmp_path, monkeypatch, caplog):
    path, images = projects
    monkeypatch.chdir(tmp_path / "a")
    np.testing.assert_array_equal(images_of(path, str(tmp_path / "b")), images["b"][[3, 1]])
    both = [str(tmp_path / p / "Extract/job005/m.mrcs") for p in "ab"]
    assert f"{both[1]} is used, not {both[0]}" in caplog.text


def test_a_file_inside_the_current_folder_starts_from_there(tmp_path, monkeypatch, caplog):
    """As in RELION; but other images of that name lie nearer to the file, and that is said."""
    outer, _ = stack(tmp_path / "m.mrcs", 1), stack(tmp_path / "sub/m.mrcs", 2)
    monkeypatch.chdir(tmp_path)
    path = star(tmp_path / "sub/p.star", ["2@m.mrcs"])
    np.testing.assert_array_equal(images_of(path), outer[[1]])
    assert f"{tmp_path}/m.mrcs is used, not {tmp_path}/sub/m.mrcs" in caplog.text


def test_a_link_to_the_same_images_is_no_second_set(projects, tmp_path, monkeypatch, caplog):
    path, images = projects
    (tmp_path / "c").symlink_to("a")
    monkeypatch.chdir(tmp_path / "c")
    np.testing.assert_array_equal(images_of(path), images["a"][[3, 1]])
    assert "two sets" not in caplog.text


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "folder", "spelling"])
def test_one_image_under_two_names(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    images = stack(tmp_path / "d/a.mrcs", 1)
    other = {"symlink": "b.mrcs", "hardlink": "b.mrcs", "folder": "e/a.mrcs", "spelling": "d/../d/a.mrcs"}[kind]
    if kind == "symlink":
        Path(other).symlink_to("d/a.mrcs")
    elif kind == "hardlink":
        os.link("d/a.mrcs", other)
    elif kind == "folder":
        Path("e").symlink_to("d")
    path = star(tmp_path / "p.star", ["1@d/a.mrcs", "2@d/a.mrcs", f"2@{other}"])
    with raises_code(
        "duplicate-particles",
        InputError,
        match=rf"row 3: the same image .*: 2 and 3; d/a\.mrcs and .*{other} are one file",
    ):
        check_stacks(read_particles(path), path)
    star(path, ["1@d/a.mrcs", f"2@{other}"])
    np.testing.assert_array_equal(images_of(path), images[[0, 1]])


# --- text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data_\n_a 1\0 2\n", "NUL character.*line 2"),
        ("data_\n_a 1\n" + "\0" * 4096, "NUL character.*line 3"),
        ("data_\nloop_\n_a\n" + "x" * (MAX_LINE + 1) + "\n", r"more than 1,048,576 characters.*line 4"),
        ("data_\nloop_\n" + "".join(f"_c{i}\n" for i in range(20 * MAX_COLUMNS)) + "1 " * 20_000, "at most 1,000"),
        ("".join(f"data_b{i}\n_x 1\n" for i in range(5 * MAX_BLOCKS)), "at most 10,000"),
        ("data_\nloop_\n_a\n_b\n" + "'a " * 300_000 + "\n", "expected 2 values.*found 300000"),
        ("data_\nloop_\n_a\n_b\n" + '"a ' * 300_000 + "\n", "expected 2 values.*found 300000"),
        ("data_\nloop_\n_a\n_b\n" + "'a \"b " * 150_000 + "\n", "expected 2 values.*found 300000"),
    ],
)
def test_files_that_would_take_for_ever(tmp_path, text, words):
    (tmp_path / "p.star").write_text(text)
    start = time.monotonic()
    with raises_code("star-malformed", InputError, match=words):
        read_blocks(tmp_path / "p.star")
    assert time.monotonic() - start < 5


def test_quotes_that_do_not_close_are_part_of_a_value(tmp_path):
    line = "'a b' 'c \"d e\" f' g'h 'i' \"j' k"
    (tmp_path / "p.star").write_text("data_\nloop_\n" + "".join(f"_{c}\n" for c in "abcdef") + line + "\n")
    block = read_blocks(tmp_path / "p.star")[0]
    assert [c[0] for c in block.columns.values()] == ["a b", 'c "d e" f', "g'h", "i", "\"j'", "k"]


def test_an_empty_value_is_said_to_be_nothing(tmp_path):
    path = star(tmp_path / "a.star", ["1@s.mrcs"])
    path.write_text(path.read_text().replace(" 15000 ", " '' "))
    with raises_code("value-not-a-number", InputError, match=r"_rlnDefocusU .*found nothing\)"):
        read_particles(path)


def test_two_tables_of_one_name(tmp_path):
    path = star(tmp_path / "p.star", ["1@a.mrcs"])
    optics = "data_optics\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n1 2\n"
    for text, words in (
        (path.read_text() * 2, r"two tables data_particles.*1 and 1 rows"),
        (optics * 2 + path.read_text(), "two tables data_optics"),
    ):
        path.write_text(text)
        with raises_code("star-malformed", InputError, match=words):
            read_particles(path)


@pytest.mark.parametrize("axes", [(1, 2, 3), (2, 1, 3)])
def test_relion_gets_its_own_copy_of_images_with_other_axes(tmp_path, axes):
    """RELION does not look at the order of axes; it may read the originals only where that is the usual one."""
    images = normalise(stack(tmp_path / "a.mrcs", 1))[0]
    raw = bytearray((tmp_path / "a.mrcs").read_bytes()[:1024])
    struct.pack_into("<3i", raw, 64, *axes)
    stored = images if axes == (1, 2, 3) else np.ascontiguousarray(images.transpose(0, 2, 1))
    (tmp_path / "a.mrcs").write_bytes(raw + stored.tobytes())
    path = star(tmp_path / "p.star", [f"{i}@a.mrcs" for i in (1, 2, 3, 4)])
    source = StackSource(read_particles(path), IngestSettings(invert="no"), path)
    np.testing.assert_allclose(source.read(np.arange(4)), images, atol=1e-5)
    kept, why = usable_originals(source, "auto")
    assert kept.all() == (axes == (1, 2, 3)) and ("axes" in why) == (axes != (1, 2, 3))
