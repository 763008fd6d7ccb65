"""Subtomogram averages: RELION reads the particles itself, the callback is the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pipeline_helper import cryoiso, cryoiso_here
from relion_helper import job_of, refine, write_subtomograms

from cryoiso.core.errors import InputError
from cryoiso.engines.relion.files import Star
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.subtomograms import SubtomogramSource, is_subtomograms
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
    assert is_subtomograms(data / "particles.star") and not is_subtomograms(data / "images.star")
    without = (data / "particles.star").read_text().replace("rlnCtfImage", "myCtf")
    (data / "without.star").write_text(without)
    assert is_subtomograms(data / "without.star")
    assert not is_subtomograms(data / "truth_map.mrc") and not is_subtomograms(data / "nothing.star")


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
    with pytest.raises(InputError, match="only RELION refines"):
        source.read(np.arange(2))


def test_missing_and_misshapen_volumes_are_named(data, tmp_path):
    text = (data / "particles.star").read_text()
    for name in ("ctf.mrc", *(f"s{i:03d}.mrc" for i in range(16))):
        (tmp_path / name).symlink_to(data / name)
    (tmp_path / "p.star").write_text(text.replace("s003.mrc", "lost.mrc"))
    with pytest.raises(InputError, match=r"p\.star, row 4: no such file: .*lost\.mrc"):
        SubtomogramSource(tmp_path / "p.star")
    write_map(tmp_path / "flat.mrc", np.zeros((2, 24, 24)), 7.0)
    (tmp_path / "p.star").write_text(text.replace("s000.mrc", "flat.mrc"))
    with pytest.raises(InputError, match="cubes of one size"):
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
