"""What a STAR file that is written with new poses says of the old alignment: nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cryoiso.engines.relion.images import write_input
from cryoiso.io.star.read import read_particles
from cryoiso.io.star.text import read_blocks
from cryoiso.io.star.write import write_particles
from cryoiso.physics.so3 import euler_to_matrix

STALE = {
    "rlnAngleRotPrior": "11", "rlnAngleTiltPrior": "22", "rlnAnglePsiPrior": "33", "rlnOriginXPriorAngst": "4",
    "rlnOriginYPriorAngst": "5", "rlnOriginXPrior": "1", "rlnAnglePsiFlipRatio": "0.5", "rlnNormCorrection": "0.9",
    "rlnNrOfSignificantSamples": "7", "rlnLogLikeliContribution": "123", "rlnMaxValueProbDistribution": "0.4",
    "rlnGroupNumber": "17", "rlnClassNumber": "3", "rlnOriginZAngst": "2", "cryoisoPoseEntropy": "1.5",
    "cryoisoScale": "1.2", "cryoisoNoiseLevel": "0.8",
}  # fmt: skip
KEPT = {
    "rlnGroupName": "group_017", "rlnMicrographName": "m1.mrc", "rlnCoordinateX": "100.5", "rlnHelicalTubeID": "2",
    "rlnAutopickFigureOfMerit": "0.7", "rlnCtfMaxResolution": "4.2", "myOwn": "x", "rlnBeamTiltClass": "1",
    "cryoisoSign": "1",
}  # fmt: skip
POSE = {"rlnAngleRot": "10", "rlnAngleTilt": "20", "rlnAnglePsi": "30", "rlnOriginXAngst": "1", "rlnOriginYAngst": "2"}
CTF = {"rlnDefocusU": "15000", "rlnDefocusV": "14000", "rlnDefocusAngle": "10", "rlnOpticsGroup": "1"}


@pytest.fixture
def old(tmp_path):
    """Particles of a multi-body refinement; three rows."""
    columns = {"rlnImageName": "", **CTF, **POSE, **STALE, **KEPT}
    rows = [" ".join([f"{i}@s.mrcs", *list(columns.values())[1:]]) for i in (1, 2, 3)]
    head = "\n".join(f"_{name} #{i}" for i, name in enumerate(columns, 1))
    body = "data_images_body_1\n\nloop_\n_rlnAngleRot #1\n_rlnAngleTilt #2\n_rlnAnglePsi #3\n1 2 3\n1 2 3\n1 2 3\n"
    (tmp_path / "old.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnVoltage #2\n_rlnSphericalAberration #3\n"
        "_rlnAmplitudeContrast #4\n_rlnImagePixelSize #5\n_rlnImageSize #6\n_rlnMtfFileName #7\n"
        "1 300 2.7 0.1 1.5 64 k3.star\n\n"
        f"data_particles\n\nloop_\n{head}\n" + "\n".join(rows) + f"\n\n{body}"
    )
    return read_particles(tmp_path / "old.star")


def written(tmp_path, particles):
    write_particles(tmp_path / "new.star", particles)
    return {block.name: block.columns for block in read_blocks(tmp_path / "new.star")}


def test_new_poses_leave_nothing_of_the_old_alignment(old, tmp_path):
    rotation = euler_to_matrix(*np.array([[40.0, 41, 42], [50, 51, 52], [60, 61, 62]]).T)
    fits = {"rlnLogLikeliContribution": np.array([1.0, 2, 3]), "rlnMaxValueProbDistribution": np.full(3, 0.25)}
    found = written(tmp_path, old.with_poses(rotation, np.full((3, 2), 7.5)).with_results(**fits))
    table = found["particles"]
    assert set(STALE) & set(table) == set(fits)
    assert table["rlnLogLikeliContribution"] == ["1", "2", "3"] and table["rlnMaxValueProbDistribution"] == ["0.25"] * 3
    assert {name: table[name][2] for name in KEPT} == KEPT and table["rlnDefocusU"] == ["15000"] * 3
    assert [float(v) for v in table["rlnAngleRot"]] == pytest.approx([40, 50, 60])
    assert table["rlnOriginXAngst"] == ["7.500000"] * 3
    assert "images_body_1" not in found and found["optics"]["rlnMtfFileName"] == ["k3.star"]
    again = read_particles(tmp_path / "new.star")
    np.testing.assert_allclose(again.rotation, rotation, atol=1e-7)


@pytest.mark.parametrize("change", ["one rotation", "one shift"])
def test_one_new_pose_is_enough(old, tmp_path, change):
    rotation, shift = old.rotation.copy(), old.shift_A.copy()
    if change == "one rotation":
        rotation[1] = np.eye(3)
    else:
        shift[1] += 0.5
    table = written(tmp_path, old.with_poses(rotation, shift))["particles"]
    assert not set(STALE) & set(table) and table["rlnAngleRot"][0] == "10"


def test_the_same_poses_keep_every_column_and_table(old, tmp_path):
    found = written(tmp_path, old)
    assert {name: found["particles"][name][0] for name in {**STALE, **KEPT, **POSE}} == {**STALE, **KEPT, **POSE}
    assert "images_body_1" in found


def test_offsets_in_pixels_are_the_same_poses(tmp_path):
    """Of RELION 3.0: its columns get other names and units, and describe what they did."""
    columns = {"rlnImageName": "1@s.mrcs", "rlnVoltage": "300", "rlnSphericalAberration": "2.7",
               "rlnAmplitudeContrast": "0.1", "rlnMagnification": "50000", "rlnDetectorPixelSize": "5", **CTF,
               "rlnAngleRot": "10", "rlnAngleTilt": "20", "rlnAnglePsi": "30", "rlnOriginX": "3", "rlnOriginY": "-2",
               "rlnNormCorrection": "0.9", "rlnClassNumber": "2"}  # fmt: skip
    head = "\n".join(f"_{name} #{i}" for i, name in enumerate(columns, 1))
    (tmp_path / "old.star").write_text(f"data_\n\nloop_\n{head}\n{' '.join(columns.values())}\n")
    particles = read_particles(tmp_path / "old.star")
    table = written(tmp_path, particles)["particles"]
    assert table["rlnOriginXAngst"] == ["3.000000"] and "rlnOriginX" not in table
    assert table["rlnNormCorrection"] == ["0.9"] and table["rlnClassNumber"] == ["2"]
    moved = written(tmp_path, particles.with_poses(np.eye(3)[None], particles.shift_A))["particles"]
    assert "rlnNormCorrection" not in moved and "rlnClassNumber" not in moved


def test_poses_that_were_taken_away_are_not_written(old, tmp_path):
    table = written(tmp_path, replace(old, rotation=None, shift_A=None))["particles"]
    assert not {*STALE, *POSE} & set(table) and table["myOwn"] == ["x"] * 3
    table = written(tmp_path, replace(old, rotation=None))["particles"]
    assert "rlnAngleRot" not in table and table["rlnOriginXAngst"] == ["1.000000"] * 3


def test_relion_is_given_what_it_needs_and_nothing_old(old, tmp_path):
    """Absolute image names, half-sets, a table of optics groups with all that decides the CTF, offsets as prior."""
    groups = (replace(old.groups[0], ctf_premultiplied=True, beam_tilt_mrad=(0.3, -0.2), odd_zernike=(0.0, 1.5)),)
    given = replace(old, groups=groups, half=np.array([1, 2, 2], np.int8))
    names = [f"{i:06d}@/data/s.mrcs" for i in (1, 2, 3)]
    write_input(tmp_path / "in.star", given, names, with_poses=False)
    found = {block.name: block.columns for block in read_blocks(tmp_path / "in.star")}
    optics, table = found["optics"], found["particles"]
    assert table["rlnImageName"] == names and table["rlnRandomSubset"] == ["1", "2", "2"]
    assert table["rlnMicrographName"] == ["m1.mrc"] * 3 and table["rlnOriginXPriorAngst"] == ["1"] * 3
    assert (
        not (set(STALE) - {"rlnOriginXPriorAngst", "rlnOriginYPriorAngst"}) & set(table) and "rlnAngleRot" not in table
    )
    assert (optics["rlnImageDimensionality"], optics["rlnImageSize"], optics["rlnImagePixelSize"]) == (
        ["2"],
        ["64"],
        ["1.5"],
    )
    assert optics["rlnCtfDataAreCtfPremultiplied"] == ["1"] and optics["rlnBeamTiltX"] == ["0.3"]
    assert optics["rlnOddZernike"] == ["[0,1.5]"] and "images_body_1" not in found


def test_priors_in_a_subtomograms_own_frame_stay(old, tmp_path):
    """They say how a particle was picked (on a membrane, a filament), relative to rlnTomoSubtomogramRot, Tilt, Psi."""
    for name in ("Rot", "Tilt", "Psi"):
        old.table[f"rlnTomoSubtomogram{name}"] = ["5", "6", "7"]
    table = written(tmp_path, old.with_poses(np.tile(np.eye(3), (3, 1, 1)), old.shift_A))["particles"]
    assert table["rlnAngleTiltPrior"] == ["22"] * 3 and "rlnOriginXPriorAngst" not in table
    assert "rlnNormCorrection" not in table


def test_columns_of_another_length_are_not_cut_to_fit(old, tmp_path):
    with pytest.raises(ValueError, match=r"other lengths than 3: .*rlnLogLikeliContribution"):
        written(tmp_path, old.with_results(rlnLogLikeliContribution=np.ones(2)))
    assert not (tmp_path / "new.star").exists()
