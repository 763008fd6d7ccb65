"""STAR files: nothing is lost, rows stay in place, both dialects mean the same, and bad files are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from star_helper import ROWS, star

from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles
from cryoiso.io import conventions, read_particle_file
from cryoiso.io.star import text_column
from cryoiso.io.star.columns import Columns
from cryoiso.io.star.read import read_particles, write_particles
from cryoiso.io.star.text import read_blocks

PARTICLE_STARS = [
    "particles/aspire_sample17/sample_particles_relion30.star",
    "particles/aspire_sample17/sample_particles_relion31.star",
    "particles/aspire_sample17/sample_relion_symmetry_group_D4.star",
    "particles/cryodrgn_et_ribosome/sta_testing.star",
    "particles/cryodrgn_toy/toy_projections.star",
    "particles/drgnai_M_ribosome/M_particles_sub10.star",
    "particles/empiar_10076_7/empiar_10076_7.star",
    "particles/relion31_5/relion31.star",
    "particles/relion31_5/relion31.v2.star",
    "poses/betagal_emd2984_452/test.star",
    "poses/betagal_empiar10204_refine3d_it016/run_it016_data.star",
    "poses/cryolike_106/relion_style_particles.star",
    "poses/emtestdata_class2d/run_it025_data.star",
    "poses/pfcrt/FinalRefinement-OriginalParticles-PfCRT.star",
    "poses/relion31_6opticsgroups.star",
    "poses/relion5_sample.star",
    "poses/sta_hiv_relion5/R5_tutorial_run_data.star",
    "poses/sta_relion4/relion_4.0.star",
    "poses/sta_relion51_pentamers/run_it025_data.star",
    "reference/pyem_csparc2star/P12_J24.relion30.star",
    "reference/pyem_csparc2star/P12_J24.relion31.star",
    "reference/relion_project_aspire/rln_proj_65_shifted.star",
]


@pytest.mark.parametrize("name", PARTICLE_STARS)
def test_particles_written_and_read_back_lose_nothing(shared, tmp_path, name):
    source = read_particles(shared / "data" / name, require=())
    write_particles(tmp_path / "out.star", source)
    back = read_particles(tmp_path / "out.star", require=())
    old = source.optics_table is None
    moved = (
        {"rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnBeamTiltX", "rlnBeamTiltY"}
        if old
        else set()
    )
    moved |= {"rlnOriginX", "rlnOriginY"}
    kept = [c for c in source.table.columns if c not in moved]
    assert [c for c in back.table.columns if c in kept] == kept, "the order of the columns"
    for column in kept:
        assert list(back.table[column]) == list(source.table[column]), column
    if not old:
        for column in source.optics_table.columns:
            assert list(back.optics_table[column]) == list(source.optics_table[column]), column
    assert_same_particles(back, source)
    others = [b.name for b in read_blocks(shared / "data" / name) if b.name not in ("optics", "particles")]
    if len(others) and others[0] == "general":
        assert read_blocks(tmp_path / "out.star")[0].name == "general"


def assert_same_particles(a: Particles, b: Particles) -> None:
    for name in ("uid", "optics", "half", "index", "defocus_u_A", "defocus_v_A", "ctf_scale", "ctf_bfactor_A2"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    if a.rotation is not None:
        assert np.abs(a.rotation - b.rotation).max() < 1e-7
        assert np.abs(a.shift_A - b.shift_A).max() < 1e-6
    for ga, gb in zip(a.groups, b.groups, strict=True):
        if np.isfinite(ga.pixel_size_A):
            assert replace(ga, name="", number=0) == replace(gb, name="", number=0)


def test_both_dialects_of_one_set_give_the_same_numbers(shared):
    folder = shared / "data/reference/pyem_csparc2star"
    new, old = (read_particles(folder / f"P12_J24.relion{v}.star") for v in ("31", "30"))
    assert_rows_agree(new, old)
    assert new.groups[0].pixel_size_A == pytest.approx(old.groups[0].pixel_size_A, abs=1e-9)
    assert np.abs(new.shift_A - old.shift_A).max() < 64 * 2**-23, "pixels in one, Å in the other, made in float32"


def test_both_dialects_of_the_17_real_images(shared):
    folder = shared / "data/particles/aspire_sample17"
    old, new = (read_particles(folder / f"sample_particles_relion{v}.star") for v in ("30", "31"))
    rows = np.delete(np.arange(17), 14)  # the files themselves hold other angles in row 15
    assert_rows_agree(new.take(rows), old.take(rows))
    assert len(new.groups) == len(old.groups) == 2
    for name in ("voltage_kV", "spherical_aberration_mm", "amplitude_contrast", "box_px"):
        np.testing.assert_array_equal(new.group_values(name), old.group_values(name), err_msg=name)


def assert_rows_agree(a: Particles, b: Particles) -> None:
    for name in ("defocus_u_A", "defocus_v_A", "defocus_angle_deg", "phase_shift_deg", "index", "half"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert np.abs(a.rotation - b.rotation).max() < 1e-6


def test_the_order_of_the_blocks_does_not_matter(shared):
    folder = shared / "data/particles/relion31_5"
    a, b = read_particles(folder / "relion31.star"), read_particles(folder / "relion31.v2.star")
    assert_same_particles(a, b)
    assert a.groups == b.groups


def test_aberrations_of_real_optics_groups(shared):
    p = read_particles(shared / "data/poses/relion31_6opticsgroups.star")
    assert len(p.groups) == 6 and [g.number for g in p.groups] == [1, 2, 3, 4, 5, 6]
    g = p.groups[1]
    assert g.beam_tilt_mrad == (0.003119, 0.358234)
    assert g.magnification == (0.993895, 0.010413, 0.008515, pytest.approx(1.0, abs=0.05))
    assert g.odd_zernike[:2] == (0.344534641293, 0.211712272982) and len(g.even_zernike) == 9
    names = p.table["rlnOpticsGroup"].astype(int).to_numpy()
    np.testing.assert_array_equal(names, np.array([g.number for g in p.groups])[p.optics])


def test_interleaved_optics_groups_with_two_pixel_sizes_keep_their_rows(tmp_path):
    p = read_particles(star(tmp_path))
    assert [Path(s).name for s in p.stack] == ["a.mrcs", "b.mrcs", "a.mrcs", "b.mrcs"]
    np.testing.assert_array_equal(p.index, [0, 0, 1, 1])
    np.testing.assert_array_equal(p.group_values("pixel_size_A"), [1.25, 2.5, 1.25, 2.5])
    np.testing.assert_array_equal(p.defocus_u_A, [10000.1, 11000.2, 12000.3, 13000.4])
    write_particles(tmp_path / "out.star", p.take(np.array([3, 0, 1])))
    q = read_particles(tmp_path / "out.star")
    np.testing.assert_array_equal(q.group_values("voltage_kV"), [200, 300, 200])
    np.testing.assert_array_equal(q.uid, p.uid[[3, 0, 1]])
    assert list(q.table["rlnMyOwnColumn"]) == ["two words", "00017", "1e3"]


def test_relion_30_with_interleaved_microscopes(tmp_path):
    head = "data_\nloop_\n" + "".join(
        f"_rln{c}\n"
        for c in [
            "ImageName",
            "DefocusU",
            "DefocusV",
            "DefocusAngle",
            "Voltage",
            "SphericalAberration",
            "AmplitudeContrast",
            "Magnification",
            "DetectorPixelSize",
            "OriginX",
            "OriginY",
            "AngleRot",
            "AngleTilt",
            "AnglePsi",
        ]
    )
    rows = [
        f"{i}@s.mrcs 1e4 1e4 0 {v} 2.7 0.1 {m} 5 2 -4 0 0 0"
        for i, v, m in ((1, 300, 25000), (2, 200, 50000), (3, 300, 25000))
    ]
    p = read_particles(star(tmp_path, "", rows, head))
    np.testing.assert_allclose(p.group_values("pixel_size_A"), [2, 1, 2])
    np.testing.assert_allclose(p.shift_A, [[4, -8], [2, -4], [4, -8]])
    write_particles(tmp_path / "out.star", p)
    q = read_particles(tmp_path / "out.star")
    assert_same_particles(q, p)
    assert "rlnOriginX" not in q.table and q.optics_table is not None


def test_a_table_takes_its_text_and_an_offset_per_value(tmp_path):
    rows = [f"{i:06d}@stack.mrcs 10000 9000 30 7 x 10 20 30 0 0 1" for i in range(1, 5001)]
    table = read_particles(star(tmp_path, rows=rows)).table
    text = sum(len(value) for row in rows for value in row.split())
    assert table.memory_usage(deep=True, index=False).sum() <= text + 8 * (len(rows) + 1) * len(table.columns)


NUMBERS = [
    *("1", "007", "+1.5", "-0.000000", ".5", "5.", "1e3", "1E-3", "1e400", "4e-324", "0.1", "2.2250738585072011e-308"),
    *(
        "179769313486231580793728971405303415079934132710037826936173778980444968292764750946649017977587207096330.5",
        "inf",
    ),
    *(
        "9007199254740993",
        "123456.789012345678901234567890",
        "-nan",
        "NaN",
        "infinity",
        "None",
        "1_000",
        "0x1f",
        "1d5",
        "é",
    ),
    *("١", "1e", "--1", "nan(1)", "1,5", "1;"),
]


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_are_those_of_python(tmp_path, value):
    path = star(tmp_path, rows=[row.replace("00017", value) for row in ROWS[:2]])
    got = Columns(read_particles(path).table, path).number("rlnMyOwnColumn", finite=False)
    try:
        expected = float("nan") if "_" in value or not value.isascii() else float(value)
    except ValueError:
        expected = float("nan")
    np.testing.assert_array_equal(got, [expected, 1e3])
    assert np.signbit(got[0]) == np.signbit(expected) or np.isnan(expected)


def test_poses_alone_are_enough_for_who_asks_for_no_more(tmp_path):
    path = tmp_path / "poses.star"
    path.write_text("data_\nloop_\n_rlnAngleRot\n_rlnAngleTilt\n_rlnAnglePsi\n1 2 3\n4 5 6\n")
    p = read_particles(path, require=("pose",))
    assert len(set(p.uid.tolist())) == 2 and (p.shift_A == 0).all()
    with raises_code("star-column-missing", InputError, match="_rlnImageName"):
        read_particles(path)


def test_uid_follows_the_image_not_its_spelling(tmp_path):
    padded = read_particles(star(tmp_path))
    plain = read_particles(star(tmp_path, rows=[r.lstrip("0") for r in ROWS]))
    np.testing.assert_array_equal(padded.uid, plain.uid)
    assert len(set(padded.uid.tolist())) == 4


def test_relative_stacks_are_found_from_the_project_and_upwards(tmp_path, monkeypatch):
    job = tmp_path / "project/Refine3D/job007"
    job.mkdir(parents=True)
    (tmp_path / "project/a.mrcs").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.mrcs").touch()
    path = star(job)
    monkeypatch.chdir(tmp_path)
    names = [str(Path(s).resolve()) for s in read_particles(path).stack]
    assert names[0] == str(tmp_path / "project/a.mrcs") and names[1] == str(tmp_path / "b.mrcs"), (
        "found nowhere: as in cwd"
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(read_particles(path).stack[0]).resolve() == tmp_path / "project/a.mrcs", "the file's own project"
    assert read_particles(path, project=str(tmp_path / "project")).stack[0] == str(tmp_path / "project/a.mrcs")


def test_two_level_angles_stand_upright_on_a_real_virus(shared):
    """Only the right order of the two rotations makes the particles' z axes normal to the surface they lie on."""
    from scipy.spatial import cKDTree

    p = read_particles(shared / "data/poses/sta_hiv_relion5/R5_tutorial_run_data.star", require=("pose",))
    c = Columns(p.table, "")
    place = np.stack([c.number(f"rlnCenteredCoordinate{a}Angst") for a in "XYZ"], 1)
    outer = conventions.euler_to_matrix(*(c.number(f"rlnTomoSubtomogram{a}") for a in ("Rot", "Tilt", "Psi")))
    inner = conventions.split_two_level(outer, p.rotation)
    off = {}
    for name, rotation in {"right": p.rotation, "swapped": inner @ outer}.items():
        axis = rotation[:, :, 2]
        slopes = []
        for tomogram in sorted(set(c.text("rlnTomoName"))):
            rows = np.flatnonzero(np.array(c.text("rlnTomoName")) == tomogram)
            near = cKDTree(place[rows]).query(place[rows], 5)[1][:, 1:]
            step = place[rows][near] - place[rows][:, None]
            step /= np.linalg.norm(step, axis=2, keepdims=True) + 1e-9
            slopes.append(np.abs((step * axis[rows][:, None]).sum(2)).mean())
        off[name] = np.mean(slopes)
    assert off["right"] < 0.15 < 0.35 < off["swapped"]


def test_two_level_poses_are_written_back_into_the_inner_angles(shared, tmp_path):
    p = read_particles(shared / "data/poses/sta_hiv_relion5/R5_tutorial_run_data.star", require=("pose",)).take(
        slice(0, 50)
    )
    turn = conventions.euler_to_matrix(11, 22, 33)[0]
    write_particles(tmp_path / "out.star", p.with_poses(p.rotation @ turn, p.shift_A))
    q = read_particles(tmp_path / "out.star", require=("pose",))
    assert np.abs(q.rotation - p.rotation @ turn).max() < 1e-7
    assert list(q.table["rlnTomoSubtomogramRot"]) == list(p.table["rlnTomoSubtomogramRot"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.replace("_rlnDefocusV\n", "_other\n"), ["_rlnDefocusV", "missing"]),
        (lambda s: s.replace("9100", "9l00"), ["row 2", "_rlnDefocusV", "9l00"]),
        (lambda s: s.replace("9200", "nan"), ["row 3", "_rlnDefocusV"]),
        (lambda s: s.replace(" 31 3 ", " 31 9 "), ["row 2", "optics group", "[3, 7]", "found 9"]),
        (lambda s: s.replace("000002@a", "000001@a"), ["row 3", "same image", "1 and 3"]),
        (lambda s: s.replace(" 1.5 -2.5 1\n", " 1.5 -2.5\n"), ["row 1", "12 values", "11"]),
        (lambda s: s.replace("000001@b", "zero@b"), ["row 2", "image name"]),
        (lambda s: s.replace("000001@b", "0@b"), ["row 2", "image name"]),
        (lambda s: s.replace("_rlnImagePixelSize", "_x"), ["no pixel size"]),
        (lambda s: s.replace("3 coarse", "7 coarse"), ["defined twice"]),
        (lambda s: s.replace("_particles", "_").replace("_rlnImageName", "_a").replace("AngleRot", "_b"), ["no table"]),
        (lambda s: "hello", ["not a STAR file"]),
        (lambda s: s[: s.index("000001@a")], ["empty"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("slab", [2, text_column.SLAB])
def test_bad_files_are_named_with_row_and_column(tmp_path, monkeypatch, change, words, slab):
    monkeypatch.setattr(text_column, "SLAB", slab)
    path = star(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError) as caught:
        read_particles(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_and_an_unknown_kind(tmp_path):
    with raises_code("file-not-found", InputError, match=r"nowhere\.star: no such file"):
        read_particle_file(tmp_path / "nowhere.star")
    with raises_code("particle-file-unknown-kind", InputError):
        read_particle_file(tmp_path / "particles.txt")
