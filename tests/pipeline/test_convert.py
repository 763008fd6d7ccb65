"""Conversion of particle files: nothing is lost, and what changes on the way comes through."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cs_helper import save, table
from errors_helper import raises_code

from cryoiso.core.config import parse_job
from cryoiso.core.errors import InputError, UsageError
from cryoiso.io import conventions
from cryoiso.io.cs import read_cs
from cryoiso.io.star.read import read_particles
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks
from cryoiso.io.star.write import write_particles
from cryoiso.physics.so3 import random_rotations
from cryoiso.pipeline.commands.convert import Conversion, convert_files, identity_of_file
from cryoiso.pipeline.stages.report import _write_cs

AGAIN, CARRY = Conversion(overwrite=True), Conversion(overwrite=True, unconverted="carry")
REAL = (
    "particles/aspire_sample17/sample_particles_relion30.star",
    "particles/aspire_sample17/sample_particles_relion31.star",
    "particles/cryodrgn_et_ribosome/sta_testing.star",
    "particles/drgnai_M_ribosome/M_particles_sub10.star",
    "particles/empiar_10076_7/empiar_10076_7.cs",
    "particles/empiar_10076_7/empiar_10076_7.star",
    "particles/relion31_5/relion31.star",
    "poses/betagal_emd2984_452/test.star",
    "poses/betagal_empiar10204_refine3d_it016/run_it016_data.star",
    "poses/cryolike_106/relion_style_particles.star",
    "poses/cryosparc_J2_particles_exported.cs",
    "poses/cryosparc_P12_J24/cryosparc_P12_J24_001_particles.cs",
    "poses/emtestdata_class2d/run_it025_data.star",
    "poses/pfcrt/FinalRefinement-OriginalParticles-PfCRT.star",
    "poses/relion31_6opticsgroups.star",
    "poses/relion5_sample.star",
    "poses/t20s_empiar10025/particles.star",
    "reference/pyem_csparc2star/P12_J24.relion30.star",
    "reference/relion_project_aspire/rln_proj_65_centered.star",
)


def cs_rows(n: int = 6, **fields: np.ndarray) -> np.ndarray:
    """Two exposure groups of different pixel sizes and boxes, poses, half-sets, and fields that nobody knows."""
    rng = np.random.default_rng(3)
    rotation = random_rotations(rng, n)
    mine = {
        "blob/shape": np.array([[64, 64], [32, 32]] * (n // 2), "u4"),
        "blob/sign": np.full(n, -1, "f4"),
        "ctf/tilt_A": np.array([[3000.0, -1500.0], [0, 0]] * (n // 2), "f4"),
        "ctf/anisomag": np.array([[0.004, -0.003, 0.002, -0.005], [0, 0, 0, 0]] * (n // 2), "f4"),
        "ctf/cross_corr_ctffind4": np.array([np.nan, 0.2] * (n // 2), "f4"),
        "alignments3D/pose": conventions.matrix_to_rotvec(rotation).astype("f4"),
        "alignments3D/shift": rng.normal(size=(n, 2)).astype("f4"),
        "alignments3D/psize_A": np.array([1.5, 3.0] * (n // 2), "f4"),
        "alignments3D/split": np.array([0, 1, 1] * (n // 3), "u4"),
        "alignments3D/error": rng.normal(size=n).astype("f4"),
        "alignments3D/alpha": rng.normal(size=n).astype("f4"),
        "alignments3D/class": np.arange(n).astype("u4") % 3,
        "location/micrograph_path": np.array([b">J1/m1.mrc", b">J1/m2.mrc"] * (n // 2)),
        "nobody/knows": np.array([b"x y", b""] * (n // 2)),
    }
    return table(n, **{**mine, **fields})


@pytest.fixture
def cs(tmp_path):
    return save(tmp_path / "in.cs", cs_rows())


@pytest.mark.parametrize("name", REAL)
def test_real_files_come_back_as_they_were(shared_data, tmp_path, name):
    """Column by column and bit by bit; poses within 1e-6 and the same identity in the other format."""
    source = shared_data / name
    there = tmp_path / ("there.cs" if source.suffix == ".star" else "there.star")
    back = tmp_path / f"back{source.suffix}"
    convert_files(source, there, CARRY)
    assert convert_files(there, back, CARRY)["changed"] == {}
    if source.suffix == ".cs":
        was, now = np.load(source), np.load(back)
        assert now.dtype == was.dtype and now.tobytes() == was.tobytes()
        one, two = read_cs(source, require=()), read_particles(there, "", ())
    else:
        assert read_blocks(back) == read_blocks(source)
        one, two = read_particles(source, "", ()), read_cs(there, require=())
    if one.rotation is not None:
        assert np.abs(one.rotation - two.rotation).max() < 1e-6
        assert np.abs(one.shift_A - two.shift_A).max() < 1e-6 + 1.2e-7 * np.abs(one.shift_A).max()
    assert identity_of_file(source) == identity_of_file(there) == identity_of_file(back)


def test_mixed_groups_beam_tilt_and_magnification_reach_relions_columns(cs, tmp_path):
    convert_files(cs, tmp_path / "a.star", AGAIN)
    p = read_particles(tmp_path / "a.star", "", ("image", "ctf", "pose"))
    first, second = p.groups
    assert (first.box_px, second.box_px, first.pixel_size_A, second.pixel_size_A) == (64, 32, 1.5, 3.0)
    np.testing.assert_allclose(first.beam_tilt_mrad, 1e3 * np.arcsin(np.array([3000, -1500]) / 2.7e7), rtol=1e-6)
    assert second.beam_tilt_mrad == (0, 0)
    np.testing.assert_allclose(first.magnification, [1.004, -0.003, 0.002, 0.995], atol=1e-8)
    assert p.half.tolist() == [1, 2, 2] * 2
    assert p.table["rlnMicrographName"].tolist() == ["J1/m1.mrc", "J1/m2.mrc"] * 3
    assert p.table["rlnClassNumber"].tolist() == ["1", "2", "3"] * 2
    np.testing.assert_array_equal(p.uid, np.load(cs)["uid"])
    convert_files(tmp_path / "a.star", tmp_path / "b.cs", Conversion(carried="none"))
    fresh, was = np.load(tmp_path / "b.cs"), np.load(cs)
    for field in ("ctf/tilt_A", "ctf/anisomag", "ctf/df1_A", "alignments3D/pose", "alignments3D/shift", "blob/shape"):
        np.testing.assert_allclose(fresh[field], was[field], rtol=1e-6, atol=6e-7, err_msg=field)
    assert [*fresh["ctf/exp_group_id"]] == [*was["ctf/exp_group_id"]] and (fresh["blob/sign"] == -1).all()


def test_an_edited_star_file_changes_what_was_edited_and_nothing_else(cs, tmp_path):
    """Half of the particles, in another order, with new poses of two of them and another defocus of one."""
    convert_files(cs, tmp_path / "a.star", AGAIN)
    blocks = read_blocks(tmp_path / "a.star")
    rows, columns = [4, 0, 3], blocks[-1].columns
    cut = {name: [values[row] for row in rows] for name, values in columns.items()}
    cut["rlnAngleRot"][0] = cut["rlnAngleRot"][2] = "12.5"
    cut["rlnDefocusU"][1] = "23456.5"
    write_blocks(tmp_path / "run_data.star", [*blocks[:-1], StarBlock("particles", True, cut)])
    how = Conversion(carried=str(tmp_path / "a.carried.npz"))
    changed = convert_files(tmp_path / "run_data.star", tmp_path / "b.cs", how)["changed"]
    assert changed == {"rotation": 2, "defocus U": 1}
    was, now = np.load(cs)[rows], np.load(tmp_path / "b.cs")
    known = [n for n in was.dtype.names if n not in ("alignments3D/pose", "ctf/df1_A") and "alignments3D/" not in n]
    for field in known:
        assert now[field].tobytes() == was[field].tobytes(), field
    assert (now["alignments3D/pose"][1] == was["alignments3D/pose"][1]).all()
    wanted = read_particles(tmp_path / "run_data.star", "", ()).rotation
    assert np.abs(conventions.rotvec_to_matrix(now["alignments3D/pose"]) - wanted).max() < 1e-6
    assert now["ctf/df1_A"][1] == np.float32(23456.5)
    assert (now["alignments3D/error"] == 0).all() and (now["alignments3D/alpha"] == 1).all()


def test_new_poses_of_cryosparc_come_into_relions_columns(shared_data, tmp_path):
    source = shared_data / "poses/relion31_6opticsgroups.star"
    convert_files(source, tmp_path / "a.cs", CARRY)
    array = np.load(tmp_path / "a.cs").copy()[::2]
    array["alignments3D/pose"] = conventions.matrix_to_rotvec(random_rotations(np.random.default_rng(1), len(array)))
    array["ctf/tilt_A"] = [2000, 1000]
    save(tmp_path / "J9.cs", array)
    how = Conversion(carried=str(tmp_path / "a.carried.star"), unconverted="carry")
    changed = convert_files(tmp_path / "J9.cs", tmp_path / "b.star", how)["changed"]
    assert changed.keys() == {"rotation", "beam tilt"}
    was, now = read_particles(source, "", ()), read_particles(tmp_path / "b.star", "", ())
    assert np.abs(now.rotation - conventions.rotvec_to_matrix(array["alignments3D/pose"])).max() < 1e-6
    kept = set(was.table.columns) - {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOpticsGroup"}
    for name in kept & set(now.table.columns):
        assert now.table[name].tolist() == was.table[name].tolist()[::2], name
    assert {"rlnMicrographName", "rlnCoordinateX", "rlnDefocusU"} <= set(now.table.columns)
    assert "rlnMaxValueProbDistribution" not in now.table.columns, "that of the old poses"
    before = np.array([g.odd_zernike for g in was.groups])[was.optics[::2]]
    np.testing.assert_array_equal(np.array([g.odd_zernike for g in now.groups])[now.optics], before)
    for group in now.groups:
        wanted = 1e3 * np.arcsin(np.array([2000, 1000]) / (1e7 * group.spherical_aberration_mm))
        np.testing.assert_allclose(group.beam_tilt_mrad, wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["S", "U"])
def test_new_and_longer_names_of_images_fit(tmp_path, kind):
    """Particles that were extracted again under longer names, of a file with names as bytes or as text."""
    rows = cs_rows(**{"blob/path": np.array([">J1/a.mrc", ">J1/b.mrc"] * 3).astype(kind)})
    convert_files(save(tmp_path / "in.cs", rows), tmp_path / "a.star", AGAIN)
    blocks = read_blocks(tmp_path / "a.star")
    blocks[-1].columns["rlnImageName"][2] = "000009@Extract/job042/a_much_longer_name.mrcs"
    write_blocks(tmp_path / "a.star", blocks)
    assert convert_files(tmp_path / "a.star", tmp_path / "b.cs", AGAIN)["changed"] == {"image": 1}
    found = np.load(tmp_path / "b.cs")
    names = [path if kind == "U" else path.decode() for path in found["blob/path"].tolist()]
    assert names[2] == "Extract/job042/a_much_longer_name.mrcs" and found["blob/idx"][2] == 8
    assert names[:2] == [">J1/a.mrc", ">J1/b.mrc"] and found["blob/path"].dtype.kind == kind


def test_odd_dihedral_groups_keep_their_axes_both_ways(cs, tmp_path):
    """cryoSPARC's D7 has its two-fold axis on y; forgetting --symmetry on the way back does not matter."""
    convert_files(cs, tmp_path / "a.star", Conversion(symmetry="D7"))
    star, was = read_particles(tmp_path / "a.star", "", ()), read_cs(cs)
    assert np.abs(star.rotation - conventions.from_cryosparc_frame(was.rotation, "D7")).max() < 1e-6
    assert np.abs(star.rotation - was.rotation).max() > 0.1
    convert_files(tmp_path / "a.star", tmp_path / "b.cs", AGAIN)
    assert np.load(tmp_path / "b.cs").tobytes() == np.load(cs).tobytes()
    convert_files(tmp_path / "a.star", tmp_path / "c.cs", Conversion(symmetry="D7", carried="none"))
    again = conventions.rotvec_to_matrix(np.load(tmp_path / "c.cs")["alignments3D/pose"])
    assert np.abs(again - was.rotation).max() < 1e-6
    with raises_code("options-conflict", UsageError, match="D7"):
        convert_files(tmp_path / "a.star", tmp_path / "d.cs", Conversion(symmetry="D3"))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("ctf/trefoil_A", np.full((6, 2), 100, "f4")),
        ("ctf/tetra_A", np.full((6, 4), 100, "f4")),
        ("ctf/shift_A", np.full((6, 2), 0.1, "f4")),
        ("ctf/cs_mm", np.full(6, 1e-5, "f4")),
    ],
)
def test_terms_without_a_public_unit_are_refused_or_carried(tmp_path, field, values):
    source = save(tmp_path / "in.cs", cs_rows(**{field: values}))
    with raises_code("not-convertible", InputError, match="tilt_A" if field == "ctf/cs_mm" else field):
        convert_files(source, tmp_path / "a.star", AGAIN)
    assert not list(tmp_path.glob("a.*")), "nothing half-written"
    convert_files(source, tmp_path / "a.star", CARRY)
    convert_files(tmp_path / "a.star", tmp_path / "b.cs", AGAIN)
    assert np.load(tmp_path / "b.cs").tobytes() == np.load(source).tobytes()


def test_relions_aberrations_and_flags_are_refused(shared_data, tmp_path):
    source = shared_data / "poses/betagal_empiar10204_refine3d_it016/run_it016_data.star"
    with raises_code("not-convertible", InputError, match="rlnOddZernike"):
        convert_files(source, tmp_path / "a.cs", AGAIN)
    with raises_code("subtomograms-unsupported", InputError):
        convert_files(shared_data / "poses/sta_relion4/relion_4.0.star", tmp_path / "a.cs", AGAIN)


def test_a_number_that_is_none_is_refused_where_it_is_used(tmp_path):
    """Where it is not used it is carried (``cs_rows`` has one)."""
    rows = cs_rows()
    rows["alignments3D/pose"][2, 1] = np.nan
    source = save(tmp_path / "in.cs", rows)
    with raises_code("value-not-a-number", InputError, match="row 3"):
        convert_files(source, tmp_path / "a.star", AGAIN)


def test_a_side_table_of_other_particles(cs, tmp_path):
    convert_files(cs, tmp_path / "a.star", AGAIN)
    other = save(tmp_path / "other.cs", cs_rows(uid=np.arange(90, 96, dtype="u8")))
    convert_files(other, tmp_path / "b.star", AGAIN)
    for wrong in (tmp_path / "b.carried.npz", cs):
        with raises_code("side-table-mismatch", InputError):
            convert_files(tmp_path / "a.star", tmp_path / "c.cs", Conversion(carried=str(wrong)))
    with raises_code("file-exists", UsageError):
        convert_files(cs, tmp_path / "a.star", Conversion())
    with raises_code("file-exists", UsageError):
        convert_files(cs, tmp_path / "in.cs", AGAIN)


def test_fields_of_passthrough_files_go_along(tmp_path):
    whole = cs_rows()
    ctf = [name for name in whole.dtype.names if name.startswith(("ctf", "location", "nobody")) or name == "uid"]
    rest = [name for name in whole.dtype.names if name not in ctf or name == "uid"]
    extra, main = save(tmp_path / "extra.cs", whole[ctf][::-1]), save(tmp_path / "main.cs", whole[rest])
    convert_files(main, tmp_path / "a.star", Conversion(passthrough=[str(extra)]))
    convert_files(tmp_path / "a.star", tmp_path / "b.cs", AGAIN)
    now = np.load(tmp_path / "b.cs")
    assert set(now.dtype.names) == set(whole.dtype.names)
    for name in whole.dtype.names:
        assert now[name].tobytes() == whole[name].tobytes(), name


def test_cryosparcs_own_package_reads_both_formats(cs, tmp_path):
    dataset = pytest.importorskip("cryosparc.dataset")
    convert_files(cs, tmp_path / "a.star", AGAIN)
    for csdat in (False, True):
        convert_files(tmp_path / "a.star", tmp_path / "b.cs", Conversion(csdat=csdat, overwrite=True))
        found, was = dataset.Dataset.load(str(tmp_path / "b.cs")), np.load(cs)
        assert set(found.fields()) == set(was.dtype.names)
        for name in was.dtype.names:
            values = was[name].astype(str) if was[name].dtype.kind == "S" else was[name]
            np.testing.assert_array_equal(found[name].astype(values.dtype), values, err_msg=name)
        assert identity_of_file(tmp_path / "b.cs") == identity_of_file(cs)
    convert_files(tmp_path / "b.cs", tmp_path / "numpy.cs", AGAIN)
    assert set(np.load(tmp_path / "numpy.cs").dtype.names) == set(was.dtype.names)


def test_beam_tilt_and_magnification_are_used_from_cs_files(cs):
    p = read_cs(cs)
    assert p.groups[0].beam_tilt_mrad[0] > 0 and p.groups[0].magnification[0] == pytest.approx(1.004)
    assert p.groups[1].beam_tilt_mrad == (0, 0) and p.groups[1].magnification == (1, 0, 0, 1)


def test_the_result_for_cryosparc_is_its_own_file_with_new_poses(cs, tmp_path):
    """Every field of the .cs input, rows and uids as in result/particles.star, poses in cryoSPARC's frame of D7."""
    particles = read_cs(cs).take(np.array([3, 1, 5]))
    rotation = random_rotations(np.random.default_rng(5), 3)
    write_particles(tmp_path / "particles.star", particles.with_poses(rotation, np.full((3, 2), 1.5)))
    job = parse_job({"particles": {"file": str(cs)}, "reference": {"file": "-"}, "sample": {"symmetry": "D7"}})
    _write_cs(SimpleNamespace(job=job, folder=SimpleNamespace(result=tmp_path)))
    was, now = np.load(cs)[[3, 1, 5]], np.load(tmp_path / "particles.cs")
    assert set(was.dtype.names) <= set(now.dtype.names)
    for field in (n for n in was.dtype.names if not n.startswith("alignments3D") or n.endswith("split")):
        assert now[field].tobytes() == was[field].tobytes(), field
    found = conventions.rotvec_to_matrix(now["alignments3D/pose"])
    assert np.abs(conventions.from_cryosparc_frame(found, "D7") - rotation).max() < 1e-6
    np.testing.assert_allclose(now["alignments3D/shift"], 1.5 / now["alignments3D/psize_A"][:, None].repeat(2, 1))
