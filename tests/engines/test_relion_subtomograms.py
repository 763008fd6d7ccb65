"""Subtomogram averages: RELION reads the particles itself, the callback is the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso, cryoiso_here
from relion_helper import job_of, refine, write_subtomograms

from cryoiso.core.errors import InputError
from cryoiso.engines.relion.files import Star
from cryoiso.io import read_particle_file
from cryoiso.io.dimensionality import kind_of_particles
from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.sources import StackSource
from cryoiso.io.star.write import write_particles
from cryoiso.io.subtomograms import SubtomogramSource
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    done = cryoiso("simulate", "phantom", folder, "--n", 2, "--box", 24, "--pixel-size", 7)
    assert done.returncode == 0, done.stderr
    (folder / "particles.star").rename(folder / "images.star")
    write_subtomograms(folder, folder / "truth_map.mrc")
    return folder


def test_they_are_told_from_images(data):
    kinds = {
        name: kind_of_particles(data / name) for name in ("particles.star", "images.star", "truth_map.mrc", "no.star")
    }
    assert kinds == {
        "particles.star": "volumes",
        "images.star": "images",
        "truth_map.mrc": "images",
        "no.star": "images",
    }


@pytest.mark.parametrize("dimensions", [True, False])
def test_volumes_are_known_without_a_ctf_volume_or_a_word_of_their_dimensions(data, tmp_path, dimensions):
    text = (data / "particles.star").read_text().replace("rlnCtfImage", "myCtf").replace("s000", str(data / "s000"))
    if not dimensions:
        text = text.replace("_rlnImageDimensionality", "_myDimensions")
    (tmp_path / "p.star").write_text(text)
    assert kind_of_particles(tmp_path / "p.star") == "volumes"


@pytest.mark.parametrize("dimensions", [True, False])
def test_images_beside_a_micrographs_ctf_are_images(data, tmp_path, dimensions):
    """CTF estimation leaves rlnCtfImage, a power spectrum, in the micrographs' file; extraction copies it."""
    found = read_particle_file(data / "images.star")
    found.table["rlnCtfImage"] = ["CtfFind/job003/m1.ctf:mrc"] * len(found)
    if not dimensions:
        del found.optics_table["rlnImageDimensionality"]
    write_particles(tmp_path / "p.star", found)
    if not dimensions:
        text = (tmp_path / "p.star").read_text()
        assert "rlnImageDimensionality" not in text
    assert kind_of_particles(tmp_path / "p.star") == "images"
    again = read_particle_file(tmp_path / "p.star", str(data))
    assert list(again.table["rlnCtfImage"]) == ["CtfFind/job003/m1.ctf:mrc"] * 2
    assert StackSource(again).read(np.arange(2)).shape == (2, 24, 24)


STACKS = """
data_general

_rlnTomoSubTomosAre2DStacks   1

data_optics

loop_
_rlnOpticsGroup #1
_rlnImagePixelSize #2
_rlnImageSize #3
_rlnImageDimensionality #4
1 2.7 64 2

data_particles

loop_
_rlnTomoName #1
_rlnTomoParticleName #2
_rlnOpticsGroup #3
_rlnImageName #4
_rlnTomoVisibleFrames #5
TS_01 TS_01/1 1 PseudoSubtomo/job010/Subtomograms/TS_01/1_stack2d.mrcs [1,1,0,1]
"""


@pytest.mark.parametrize("text", [STACKS, STACKS.replace("_rlnTomoSubTomosAre2DStacks   1", "_rlnTomoName x")])
def test_stacks_of_tilt_images_are_refused_for_what_they_are(tmp_path, text):
    (tmp_path / "p.star").write_text(text)
    assert kind_of_particles(tmp_path / "p.star") == "stacks"
    with raises_code(
        "subtomograms-unsupported",
        InputError,
        match=r"2D stacks of tilt images, which are not supported.*without 'Write output as",
    ):
        read_particle_file(tmp_path / "p.star")
    for command in ("refine", "ingest"):
        more = ["--ref", "x.mrc", "--out", tmp_path / "out"] if command == "refine" else [tmp_path / "out"]
        done = cryoiso_here(command, tmp_path / "p.star", *more)
        assert done.returncode == 65 and "2D stacks of tilt images" in done.stderr, done.stderr


def test_volumes_are_not_asked_for_a_ctf_where_images_are_wanted(data, tmp_path):
    done = cryoiso_here("ingest", data / "particles.star", tmp_path / "out")
    assert done.returncode == 65 and "[subtomograms-unsupported]" in done.stderr and "Estimate" not in done.stderr


def test_volumes_and_images_in_one_file_are_refused(data, tmp_path):
    text = (data / "particles.star").read_text()
    row = next(line for line in text.splitlines() if line.startswith("1 opticsGroup1"))
    (tmp_path / "p.star").write_text(text.replace(row, f"{row}\n2 other 300 2.7 0.1 7.0 24 2"))
    with raises_code("subtomograms-inconsistent", InputError):
        SubtomogramSource(tmp_path / "p.star", str(data))


def test_relion_is_told_that_they_are_volumes_and_nothing_of_the_old_alignment(data, tmp_path):
    text = (data / "truth.star").read_text().replace("_rlnImageDimensionality", "_myDimensions")
    text = text.replace("myColumn", "rlnNormCorrection").replace("rlnMicrographName", "rlnAngleTiltPrior")
    (tmp_path / "p.star").write_text(text)
    source = SubtomogramSource(tmp_path / "p.star", str(data))
    source.write(tmp_path / "in.star", source.particles, with_poses=True)
    written = Star.read(tmp_path / "in.star")
    assert written.column("optics", "rlnImageDimensionality") == ["3"]
    assert written.column("particles", "rlnImageName")[0] == str(data / "s000.mrc")
    assert not written.has("particles", "rlnNormCorrection") and not written.has("particles", "rlnAngleTiltPrior")
    assert written.has("particles", "rlnAngleTilt") and written.column("particles", "rlnRandomSubset")[:2] == ["1", "2"]


def test_relion_gets_every_column_and_absolute_paths(data, tmp_path):
    source = SubtomogramSource(data / "truth.star")
    assert source.box_px == 24 and source.dimensions == 3 and len(source.particles) == 16
    source.write(tmp_path / "in.star", source.particles, with_poses=False)
    written, given = Star.read(tmp_path / "in.star"), Star.read(data / "truth.star")
    assert written.column("particles", "myColumn") == given.column("particles", "myColumn")
    assert written.column("particles", "rlnCtfImage") == [str(data / "ctf.mrc")] * 16
    assert not written.has("particles", "rlnAngleRot")
    for axis in "XYZ":  # known offsets are the centre of search and prior
        offsets = given.column("particles", f"rlnOrigin{axis}Angst")
        assert written.column("particles", f"rlnOrigin{axis}Angst") == offsets
        assert written.column("particles", f"rlnOrigin{axis}PriorAngst") == offsets
    assert written.column("optics", "rlnImageDimensionality") == ["3"]
    assert not written.has("optics", "rlnCtfDataAreCtfPremultiplied")
    text = (data / "truth.star").read_text()
    header = "_rlnImageDimensionality #"
    assert text.count(header) == 1
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(header))
    row = next(i for i in range(at, len(lines)) if lines[i] and not lines[i].startswith(("_", "#")))
    lines[row] += " 1"
    last = max(i for i in range(at, row) if lines[i].startswith("_"))
    lines.insert(last + 1, "_rlnCtfDataAreCtfPremultiplied #99")
    (data / "flagged.star").write_text("\n".join(lines) + "\n")
    flagged = SubtomogramSource(data / "flagged.star")
    assert [g.ctf_applied for g in flagged.particles.groups] == ["premultiplied"]
    flagged.write(tmp_path / "flagged.star", flagged.particles, with_poses=False)
    assert Star.read(tmp_path / "flagged.star").column("optics", "rlnCtfDataAreCtfPremultiplied") == ["1"]
    source.write(tmp_path / "local.star", source.particles, with_poses=True)
    assert Star.read(tmp_path / "local.star").has("particles", "rlnAngleRot")
    with raises_code("subtomograms-unsupported", InputError):
        source.read(np.arange(2))


def test_missing_and_misshapen_volumes_are_named(data, tmp_path):
    text = (data / "particles.star").read_text()
    for name in ("ctf.mrc", *(f"s{i:03d}.mrc" for i in range(16))):
        (tmp_path / name).symlink_to(data / name)
    (tmp_path / "p.star").write_text(text.replace("s003.mrc", "lost.mrc"))
    with raises_code("file-not-found", InputError, match=r"p\.star, row 4: no such file: .*lost\.mrc"):
        SubtomogramSource(tmp_path / "p.star")
    write_map(tmp_path / "flat.mrc", np.zeros((2, 24, 24)), 7.0)
    (tmp_path / "p.star").write_text(text.replace("s000.mrc", "flat.mrc"))
    with raises_code("subtomograms-inconsistent", InputError):
        SubtomogramSource(tmp_path / "p.star")


def test_the_native_engine_says_that_it_cannot(data, tmp_path):
    done = cryoiso_here("refine", data / "particles.star", "--ref", data / "truth_map.mrc", "--out", tmp_path / "out")
    assert done.returncode == 2 and "--engine relion" in done.stderr


@pytest.mark.relion
@pytest.mark.mpi
def test_relion_refines_them_and_the_callback_has_its_grey_scale(data, tmp_path):
    """Without the callback RELION reconstructs by itself; relion_external_reconstruct would be wrong by the box."""
    job = job_of(data)
    job["refine"] |= {"max_iterations": 1, "padding": 2}
    refine(2, job, tmp_path / "served", "leave")
    refine(1, job, tmp_path / "plain", "plain")
    radius = np.sqrt(((np.indices((24,) * 3) - 12) ** 2).sum(0))
    theirs = read_map(tmp_path / "plain" / "relion" / "run_it001_half1_class001.mrc", 7.0).data[radius < 8]
    with np.load(tmp_path / "served" / "correction" / "state1.npz") as state:
        ours = state["reference1"][radius < 8]
    assert np.corrcoef(ours, theirs)[0, 1] > 0.99
    assert (ours * theirs).sum() / (theirs**2).sum() == pytest.approx(1.0, abs=0.02)
    given, found = (read_particle_file(f, "", ("pose",)) for f in
                    (data / "truth.star", tmp_path / "served" / "particles.star"))  # fmt: skip
    assert list(found.table["myColumn"]) == list(given.table["myColumn"])  # RELION writes them in another order
    assert "rlnOriginZAngst" in found.table and np.array_equal(found.half, given.half)
    error = angular_distance_deg(found.rotation, given.rotation, point_group("C3"))
    assert np.median(error) < 25  # a search in steps of 15 degrees, two iterations
    record = json.loads((tmp_path / "served" / "refine.json").read_text())
    assert record["particles"] == 16 and record["iterations"][0]["correction"]["ranks"] == 2
