"""Particle files outside of the project folder that their names of images start from."""

from __future__ import annotations

import json
import logging
import os
import shutil

import numpy as np
import pytest

from cryoiso.core.errors import InputError
from cryoiso.io import read_particle_file
from cryoiso.io.imageprep import IngestSettings
from cryoiso.io.ingest import ingest
from cryoiso.io.mrc import write_stack
from cryoiso.io.project_folder import project_of
from cryoiso.io.sources import StackSource
from cryoiso.io.star.write import write_particles

STAR = """data_optics
loop_
_rlnOpticsGroup
_rlnVoltage
_rlnSphericalAberration
_rlnAmplitudeContrast
_rlnImagePixelSize
1 300 2.7 0.1 3.0

data_particles
loop_
_rlnImageName
_rlnOpticsGroup
_rlnDefocusU
_rlnDefocusV
_rlnDefocusAngle
_rlnAngleRot
_rlnAngleTilt
_rlnAnglePsi
"""
PLAIN = IngestSettings(invert="no")


@pytest.fixture
def project(tmp_path):
    """A project whose particle file lies at its top, and its images below."""
    folder = tmp_path / "project"
    (folder / "Extract").mkdir(parents=True)
    with write_stack(folder / "Extract/a.mrcs", 16, 3.0) as stack:
        stack.append(np.random.default_rng(1).normal(size=(4, 16, 16)).astype(np.float32))
    rows = "".join(f"{i + 1}@Extract/a.mrcs 1 10000 10000 0 {10 * i} 40 0\n" for i in range(4))
    (folder / "particles.star").write_text(STAR + rows)
    return folder


@pytest.mark.parametrize(("shards", "poses"), [("out/shards", "out"), ("run/01_ingest", "run/result")])
def test_poses_beside_their_shards_are_read_from_anywhere(project, tmp_path, monkeypatch, caplog, shards, poses):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / poses).mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    ingest("../project/particles.star", shards, PLAIN)
    assert json.loads((elsewhere / shards / "index.json").read_text())["project"] == str(project)
    caplog.set_level(logging.INFO, "cryoiso")
    write_particles(f"{poses}/particles.star", read_particle_file("../project/particles.star"))
    assert "--project" not in caplog.text

    monkeypatch.chdir("/")
    particles = read_particle_file(elsewhere / poses / "particles.star")
    assert set(particles.stack) == {str(project / "Extract/a.mrcs")}
    assert StackSource(particles, PLAIN).read(np.arange(4)).shape == (4, 16, 16)
    assert f"its images are found from {project}" in caplog.text


def test_without_shards_writing_says_which_project_is_needed_and_reading_how_to_give_it(
    project, tmp_path, monkeypatch, caplog
):
    out = tmp_path / "out"
    out.mkdir()
    caplog.set_level(logging.INFO, "cryoiso")
    write_particles(out / "particles.star", read_particle_file(project / "particles.star"))
    assert f"give --project {project}" in caplog.text
    with pytest.raises(InputError, match=r"Extract/a\.mrcs: no such file.*--project \(particles\.project") as caught:
        StackSource(read_particle_file(out / "particles.star"), PLAIN, out / "particles.star")
    assert caught.value.code == "file-not-found"
    StackSource(read_particle_file(out / "particles.star", str(project)), PLAIN)


def test_nothing_is_said_of_files_inside_of_the_project(project, caplog):
    caplog.set_level(logging.INFO, "cryoiso")
    (project / "Refine3D").mkdir()
    write_particles(project / "Refine3D/particles.star", read_particle_file(project / "particles.star"))
    assert "--project" not in caplog.text
    assert os.path.exists(read_particle_file(project / "Refine3D/particles.star").stack[0])


def test_a_record_that_is_no_record_is_passed_over(project, tmp_path):
    shards = tmp_path / "out/shards"
    shards.mkdir(parents=True)
    shutil.copy(project / "particles.star", tmp_path / "out")
    for text in ("", "[]", '{"project": 7}', '{"project": "project"}', '{"project": "/nowhere"}'):
        (shards / "index.json").write_text(text)
        assert not os.path.exists(read_particle_file(tmp_path / "out/particles.star").stack[0])


@pytest.mark.parametrize(
    ("name", "path", "folder"),
    [("a/b.mrcs", "/p/a/b.mrcs", "/p"), ("./a//b.mrcs", "/p/a/b.mrcs", "/p"), ("b.mrcs", "/b.mrcs", "/"),
     ("/p/b.mrcs", "/p/b.mrcs", ""), ("b.mrcs", "/p/other.mrcs", ""), ("", "", "")],
)  # fmt: skip
def test_the_project_follows_from_a_name_and_its_path(name, path, folder):
    assert project_of(name, path) == folder
