"""Every command that takes a symmetry refuses a map or mask that does not have it, before anything is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pipeline_helper import cryoiso_here, write_job

from cryoiso.core.errors import EXIT_INPUT
from cryoiso.io.mrc import read_map, write_map
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.resample import place_map
from cryoiso.physics.so3 import rotvec_to_matrix

BOX, PIXEL = 28, 6.0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small set with poses; the right map, one with its axis 25 degrees from z, a mask 18 Å off the axis."""
    folder = tmp_path_factory.mktemp("set")
    words = ("--n", 12, "--box", BOX, "--pixel-size", PIXEL, "--with-poses", "--halves", "--snr-db", 0)
    made = cryoiso_here("simulate", "phantom", folder, *words)
    assert made.returncode == 0, made.stderr
    right = phantom_map(BOX, PIXEL, 15.0).data
    tilt = rotvec_to_matrix(np.radians([25.0, 0, 0]))[0]
    write_map(folder / "right.mrc", right, PIXEL)
    write_map(folder / "tilted.mrc", place_map(right, PIXEL, tilt, np.zeros(3)), PIXEL)
    shifted = place_map(right, PIXEL, np.eye(3), np.array([18.0, 0, 0]))
    write_map(folder / "mask.mrc", (shifted > 0.3 * shifted.max()).astype(np.float32), PIXEL)
    return folder


DOORS = {
    "refine": ("refine", "--ref", "tilted.mrc"),
    "local refine": ("refine", "--ref", "tilted.mrc", "--local", 5),
    "realign": ("realign", "--ref", "tilted.mrc"),
    "micelle": ("micelle", "--ref", "tilted.mrc"),
    "auxiliary train": ("auxiliary train", "--ref", "tilted.mrc"),
}
MASKS = {name: (DOORS[name][0], "--ref", "right.mrc", "--mask", "mask.mrc") for name in ("refine", "micelle")}


@pytest.mark.parametrize("name", DOORS)
def test_a_tilted_reference(files, tmp_path, name):
    command, *words = DOORS[name]
    done = _run(files, tmp_path / "out", command, words)
    assert done.returncode == EXIT_INPUT, done.stdout + done.stderr
    assert "tilted.mrc: the reference has the symmetry C3, but not in the standard frame" in done.stderr
    assert "25." in done.stderr and "--standard-frame" in done.stderr
    assert not list((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_off_the_axis(files, tmp_path, name):
    command, *words = MASKS[name]
    done = _run(files, tmp_path / "out", command, words)
    assert done.returncode == EXIT_INPUT, done.stdout + done.stderr
    assert "mask.mrc: the mask does not have the symmetry C3 in the standard frame" in done.stderr


def _run(files, out, command, words):
    words = [files / w if str(w).endswith(".mrc") else w for w in words]
    return cryoiso_here(*command.split(), files / "particles.star", "--out", out, "--symmetry", "C3", *words)


UNKNOWN = {
    "ctf-refine": ("--ref", "right.mrc", "--resolution", 15, "--out", "out"),
    "convert": ("out", "--to", "cryodrgn"),
    "reconstruct": ("--out", "out"),
}


@pytest.mark.parametrize("command", UNKNOWN)
def test_a_point_group_that_does_not_exist(files, tmp_path, command):
    words = [files / w if str(w).endswith(".mrc") else tmp_path / w if w == "out" else w for w in UNKNOWN[command]]
    done = cryoiso_here(command, files / "particles.star", *words, "--symmetry", "C-3")
    assert done.returncode == EXIT_INPUT and "found 'C-3'" in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workflow", ["refine", "auxiliary", "realign"])
def test_a_run(files, tmp_path, workflow):
    job = write_job(files, f"{workflow}.toml", reference_file="tilted.mrc", run_workflow=workflow)
    done = cryoiso_here("run", job, "--out", tmp_path / "run")
    assert done.returncode == EXIT_INPUT and "but not in the standard frame" in done.stderr, done.stderr
    job = write_job(
        files, f"{workflow}.toml", reference_file="right.mrc", run_workflow=workflow, sample_mask="mask.mrc"
    )
    done = cryoiso_here("run", job, "--out", tmp_path / "run2")
    assert done.returncode == EXIT_INPUT and "the mask does not have the symmetry C3" in done.stderr, done.stderr
    job = write_job(
        files, f"{workflow}.toml", reference_file="right.mrc", reference_fit="tilted.mrc", run_workflow=workflow
    )
    done = cryoiso_here("run", job, "--out", tmp_path / "run3")
    assert done.returncode == EXIT_INPUT and "tilted.mrc: the map to fit into has the symmetry C3" in done.stderr


def test_half_maps_are_measured_with_a_note(files, tmp_path):
    noise = np.random.default_rng(0).standard_normal((2, BOX, BOX, BOX)).astype(np.float32)
    data = read_map(files / "tilted.mrc").data
    for number in (1, 2):
        write_map(tmp_path / f"half{number}.mrc", data + 0.1 * data.std() * noise[number - 1], PIXEL)
    halves = (tmp_path / "half1.mrc", tmp_path / "half2.mrc")
    done = cryoiso_here("diagnose", *halves, "--symmetry", "C3", "--out", tmp_path / "numbers.json")
    assert done.returncode == 0, done.stderr
    notes = " ".join(json.loads((tmp_path / "numbers.json").read_text())["notes"])
    assert "the mean of half1.mrc and half2.mrc does not have the symmetry C3" in notes
