"""cryoSPARC files: poses, shifts, CTF and halves against what other converters made of the same files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from cs_helper import save, table
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.io import conventions, read_particle_file
from cryoiso.io.cs import read_cs
from cryoiso.io.star.read import read_particles, write_particles

J24 = "data/poses/cryosparc_P12_J24/cryosparc_P12_J24_001_particles.cs"


def test_poses_are_the_expected_ones(shared):
    p = read_cs(shared / J24)
    with open(shared / "data/poses/cryosparc_P12_J24/expected_pose.cs.pkl", "rb") as stream:
        rotation, shift = pickle.load(stream)
    assert np.abs(p.rotation - rotation).max() < 1e-4
    assert np.abs(p.shift_A / 2.95 / 180 - shift).max() < 1e-6, "cryoDRGN keeps shifts as fractions of the box"
    np.testing.assert_allclose(
        p.rotation @ p.rotation.transpose(0, 2, 1), np.broadcast_to(np.eye(3), p.rotation.shape), atol=1e-12
    )


def test_ctf_is_the_expected_one(shared):
    p = read_cs(shared / J24)
    with open(shared / "data/poses/cryosparc_P12_J24/expected_ctf2.pkl", "rb") as stream:
        expected = pickle.load(stream)
    g = p.group_values
    ours = [g("box_px"), g("pixel_size_A"), p.defocus_u_A, p.defocus_v_A, p.defocus_angle_deg, g("voltage_kV")]
    ours += [g("spherical_aberration_mm"), g("amplitude_contrast"), p.phase_shift_deg]
    np.testing.assert_allclose(np.stack(ours, 1), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dialect", ["30", "31"])
def test_cs_and_star_of_the_same_particles_agree(shared, dialect):
    cs = read_cs(shared / J24)
    star = read_particles(shared / f"data/reference/pyem_csparc2star/P12_J24.relion{dialect}.star")
    assert np.abs(cs.rotation - star.rotation).max() < 1e-5
    assert np.abs(cs.shift_A - star.shift_A).max() < 1e-4
    np.testing.assert_array_equal(cs.half, star.half)
    np.testing.assert_array_equal(cs.index, star.index)
    np.testing.assert_allclose(cs.defocus_u_A, star.defocus_u_A, atol=1e-2)
    np.testing.assert_allclose(cs.defocus_angle_deg, star.defocus_angle_deg, atol=1e-4)
    assert cs.stack.tolist() == star.stack.tolist()
    for name in ("pixel_size_A", "voltage_kV", "spherical_aberration_mm", "amplitude_contrast"):
        np.testing.assert_allclose(cs.group_values(name), star.group_values(name), rtol=1e-9)


def test_cs_and_star_of_the_7_real_images_agree(shared):
    folder = shared / "data/particles/empiar_10076_7"
    cs, star = read_particle_file(folder / "empiar_10076_7.cs"), read_particle_file(folder / "empiar_10076_7.star")
    np.testing.assert_allclose(cs.defocus_u_A, star.defocus_u_A, atol=1e-2)
    np.testing.assert_allclose(cs.defocus_v_A, star.defocus_v_A, atol=1e-2)
    np.testing.assert_allclose(cs.defocus_angle_deg, star.defocus_angle_deg, atol=1e-4)
    np.testing.assert_allclose(cs.group_values("pixel_size_A"), star.group_values("pixel_size_A"), rtol=1e-6)
    assert cs.groups[0].box_px == 320 and (cs.results["cryoisoSign"] == -1).all()
    assert cs.rotation is None and cs.half is None


def test_uids_poses_and_sign_survive_the_way_through_star(shared, tmp_path):
    cs = read_cs(shared / J24)
    write_particles(tmp_path / "out.star", cs)
    star = read_particles(tmp_path / "out.star")
    np.testing.assert_array_equal(star.uid, np.load(shared / J24)["uid"])
    assert np.abs(star.rotation - cs.rotation).max() < 1e-7
    assert np.abs(star.shift_A - cs.shift_A).max() < 1e-6
    assert set(star.table["cryoisoSign"]) == {"-1"}


def test_only_2d_alignments_and_a_project_prefix(shared):
    p = read_cs(shared / "data/poses/cryosparc_J2_particles_exported.cs")
    assert p.rotation is None and p.shift_A is None and p.half is None
    assert p.stack[0].endswith("J1/imported/000090334788266266069_18jam15b_0345_ali_DW.mrcs") and ">" not in p.stack[0]
    with raises_code("cs-field-missing", InputError, match="alignments3D/pose"):
        read_cs(shared / "data/poses/cryosparc_J2_particles_exported.cs", require=("image", "pose"))


def test_rotation_vectors_round_trip():
    rng = np.random.default_rng(1)
    axis = rng.normal(size=(100, 3))
    vector = axis / np.linalg.norm(axis, axis=1, keepdims=True) * rng.uniform(0, np.pi, (100, 1))
    vector[0] = 0
    vector[1] = [1e-9, 0, 0]
    np.testing.assert_allclose(conventions.matrix_to_rotvec(conventions.rotvec_to_matrix(vector)), vector, atol=1e-7)


def test_interleaved_exposure_groups_keep_their_rows(tmp_path):
    p = read_cs(save(tmp_path / "a.cs", table()))
    assert [g.name for g in p.groups] == ["exp_group_5", "exp_group_2"]
    np.testing.assert_array_equal(p.group_values("pixel_size_A"), [1.5, 3.0, 1.5, 3.0])
    np.testing.assert_array_equal(p.group_values("spherical_aberration_mm"), [2.7, 2.0, 2.7, 2.0])


def test_fields_of_a_passthrough_file_are_joined_by_uid(tmp_path):
    whole = table()
    names = [n for n in whole.dtype.names if n.startswith("ctf") or n == "uid"]
    other = save(tmp_path / "P1_J2_passthrough_particles.cs", whole[names][::-1])
    main = save(tmp_path / "J2_particles.cs", whole[[n for n in whole.dtype.names if not n.startswith("ctf")]])
    for p in (read_cs(main), read_cs(main, passthrough=[other])):
        np.testing.assert_allclose(p.defocus_u_A, np.linspace(1e4, 2e4, 4), rtol=1e-6)
    with raises_code("passthrough-mismatch", InputError, match="row 1: this particle is not in"):
        read_cs(main, passthrough=[save(tmp_path / "few.cs", whole[names][1:])])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (table(**{"ctf/df2_A": None}), ["ctf/df2_A", "missing"]),
        (table(uid=np.array([1, 2, 1, 3], "u8")), ["row 3", "1 and 3"]),
        (table(**{"ctf/df1_A": np.array([1, np.nan, 1, 1], "f4")}), ["row 2", "ctf/df1_A"]),
        (np.zeros(3), ["structured array"]),
        (table(2)[:0], ["no particles"]),
    ],
)
def test_bad_cs_files_are_named(tmp_path, array, words):
    path = save(tmp_path / "bad.cs", array)
    with pytest.raises(InputError) as caught:
        read_cs(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_cs_file_that_is_something_else(tmp_path):
    (tmp_path / "text.cs").write_text("hello")
    with raises_code("cs-malformed", InputError, match="not a cryoSPARC"):
        read_cs(tmp_path / "text.cs")
    save(tmp_path / "object.cs", np.array([{"a": 1}], dtype=object))
    with raises_code("cs-malformed", InputError, match="not a cryoSPARC"):
        read_cs(tmp_path / "object.cs")
