"""`cryoiso simulate` with nuisances: what is in its files, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cryoiso.cli.help import PanelledCommand
from cryoiso.cli.simulate_cmd import simulate as simulate_command
from cryoiso.core.errors import CryoisoError, InputError, UsageError
from cryoiso.io import read_particle_file
from cryoiso.io.stack import StackReader

GRID = ("--box", 40, "--pixel-size", 4.5)


def command(*arguments: object) -> str:
    """Runs the command in this process; its errors come out as they are."""
    app = typer.Typer(rich_markup_mode=None)
    app.command(cls=PanelledCommand)(simulate_command)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


ALL = (
    "--neighbours", 0.4, "--ice", 200, 800, "--scale-sd", 0.1, "--micrograph-scale-sd", 0.2, "--bfactor", 0, 100,
    "--defocus-per-micrograph", "--stage-tilt", 20, "--height-sd", 100, "--defocus-error-sd", 300,
    "--micrograph-defocus-error-sd", 200, "--micrographs", 6, "--optics-groups", 3, "--beam-tilt", 0.5, -0.2,
    "--beam-tilt-sd", 0.3, "--grid", "36x5.4", "--junk", "broken=0.1", "--junk", "empty=0.1", "--junk", "pair=0.1",
    "--junk", "other=0.1", "--noise", "coloured", "--seed", 5,
)  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    out = tmp_path_factory.mktemp("all") / "set"
    command("phantom", out, "--n", 120, *GRID, *ALL)
    return out


def test_a_set_with_everything_reads_back(everything):
    given, truth = (read_particle_file(everything / f"{name}.star") for name in ("particles", "truth"))
    assert given.rotation is None and given.half is None and len(given) == len(truth) == 120
    np.testing.assert_array_equal(given.uid, truth.uid)
    assert [(g.box_px, g.pixel_size_A) for g in given.groups] == [(40, 4.5), (36, 5.4), (40, 4.5)]
    assert all(g.beam_tilt_mrad == (0.0, 0.0) for g in given.groups)
    assert all(abs(g.beam_tilt_mrad[0]) > 0 for g in truth.groups)
    assert truth.ctf_scale.std() > 0.1 and (given.ctf_scale == 1).all()
    assert truth.ctf_bfactor_A2.max() > 10 and not given.ctf_bfactor_A2.any()
    assert np.std(given.defocus_u_A - truth.defocus_u_A) > 200
    table = truth.table
    error = table["cryoisoDefocusError"].astype(float)
    np.testing.assert_allclose(given.defocus_u_A - truth.defocus_u_A, error, atol=1e-4)
    assert set(table["cryoisoKind"]) == {"particle", "broken", "empty", "pair", "other"}
    assert not any(name.startswith("cryoiso") and name != "cryoisoUid" for name in given.table.columns)
    assert given.table["rlnMicrographName"].nunique() == 6
    with StackReader() as reader:
        for stack in set(truth.stack):
            rows = np.flatnonzero(truth.stack == stack)
            box = reader.read(stack, truth.index[rows]).shape[1]
            assert {truth.groups[g].box_px for g in truth.optics[rows]} == {box}
            np.testing.assert_array_equal(truth.index[rows], np.arange(len(rows)))


def test_the_parameters_are_recorded(everything):
    facts = json.loads((everything / "simulation.json").read_text())
    assert facts["nuisances"]["neighbours"] == {"density": 0.4, "distance": 1.2, "diameter_A": None}
    assert facts["nuisances"]["junk"]["shares"]["pair"] == 0.1
    assert facts["settings"]["stage_tilt"] == 20 and len(facts["micrographs"]) == 6
    truth = read_particle_file(everything / "truth.star").table
    kinds = truth["cryoisoKind"].value_counts().to_dict()
    assert facts["measured"]["kinds"] == kinds
    thickness = {m["name"]: m["ice_thickness_A"] for m in facts["micrographs"]}
    found = truth["cryoisoIceThickness"].astype(float)
    np.testing.assert_allclose([thickness[name] for name in truth["rlnMicrographName"]], found, rtol=1e-6)
    text = (everything / "copies.star").read_text()
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    assert len(rows) == truth["cryoisoCopies"].astype(int).sum()
    assert sum(row[1] == "pair" for row in rows) == kinds["pair"]


def test_the_same_seed_gives_the_same_files(everything, tmp_path):
    command("phantom", tmp_path / "set", "--n", 120, *GRID, *ALL)
    for file in sorted(everything.iterdir()):
        if file.name != "simulation.json":
            assert file.read_bytes() == (tmp_path / "set" / file.name).read_bytes(), file.name


def test_overwriting_takes_out_what_the_new_set_lacks(tmp_path):
    out = tmp_path / "set"
    command("phantom", out, "--n", 8, *GRID, "--grid", "36x5.4", "--neighbours", 1, "--micrographs", 4)
    assert (out / "copies.star").exists() and (out / "particles_2.mrcs").exists()
    command("phantom", out, "--n", 8, *GRID, "--overwrite")
    names = {"particles.mrcs", "truth_map.mrc", "truth.star", "particles.star", "simulation.json"}
    assert {f.name for f in out.iterdir()} == names
    facts = json.loads((out / "simulation.json").read_text())
    assert "nuisances" not in facts and "neighbours" not in facts["settings"] and "ice" not in facts["settings"]


def test_known_ctfs_stand_in_the_particle_file(tmp_path):
    command("phantom", tmp_path, "--n", 12, *GRID, "--stage-tilt", 30, "--scale-sd", 0.2, "--known", "--phase-flipped")
    given, truth = (read_particle_file(tmp_path / f"{name}.star") for name in ("particles", "truth"))
    np.testing.assert_array_equal(given.defocus_u_A, truth.defocus_u_A)
    np.testing.assert_array_equal(given.ctf_scale, truth.ctf_scale)
    assert given.ctf_scale.std() > 0.05 and given.groups[0].phase_flipped


def test_views_and_ctfs_of_real_sets(shared, tmp_path):
    t20s = shared / "data/poses/t20s_empiar10025/particles.star"
    command("phantom", tmp_path / "t20s", "--n", 200, *GRID, "--views-from", t20s, "--ctf-from", t20s,
            "--micrographs-from-ctf")  # fmt: skip
    truth = read_particle_file(tmp_path / "t20s/truth.star")
    given = read_particle_file(t20s, require=("ctf", "pose"))
    assert set(truth.table["rlnMicrographName"]) <= set(given.table["rlnMicrographName"])
    side = np.abs(np.degrees(np.arccos(truth.rotation[:, 2, 2])) - 90) < 12
    assert side.mean() == pytest.approx(1013 / 1500, abs=0.1)
    archive = shared / "data/poses/real_large/empiar_10076_20k.npz"
    command("phantom", tmp_path / "large", "--n", 200, *GRID, "--views-from", archive, "--ctf-from", archive)
    truth = read_particle_file(tmp_path / "large/truth.star")
    with np.load(archive) as arrays:
        rows = [int(np.abs(arrays["ctf"][:, 2] - d).argmin()) for d in truth.defocus_u_A[:20]]
        np.testing.assert_allclose(truth.defocus_u_A[:20], arrays["ctf"][rows, 2], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (("--junk", "dust=0.1"), InputError, "broken, empty, pair, other"),
        (("--junk", "pair=half"), UsageError, "KIND=SHARE"),
        (("--junk", "pair"), UsageError, "KEY=VALUE"),
        (("--junk", "pair=0.7", "--junk", "empty=0.7"), InputError, "exceed the whole"),
        (("--junk-other", "a.mrc"), UsageError, "needs --junk other=SHARE"),
        (("--junk", "other=0.5", "--junk-other", "nothing.mrc"), InputError, "no such file"),
        (("--ice", 500, 300), InputError, "MIN <= MAX"),
        (("--bfactor", 50, 30), InputError, "MIN <= MAX"),
        (("--grid", "64"), UsageError, "as in 64x3.0"),
        (("--grid", "10x4.5"), InputError, "does not fit"),
        (("--micrographs-from-ctf",), UsageError, "needs --ctf-from"),
        (("--noise-from", "nothing.mrcs"), InputError, "no such file"),
        (("--noise-from", "nothing.mrcs", "--noise", "none"), UsageError, "exclude each other"),
        (("--views-from", "nothing.npz"), InputError, "no such file"),
        (("--views-from", "nothing.txt"), InputError, "unknown kind"),
        (("--scale-sd", 0.1, "--ctf-premultiplied"), UsageError, "--known"),
        (("--neighbours", 1, "--noise", "pink"), InputError, "unknown noise"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, options, error, text):
    with pytest.raises(error, match=text) as caught:
        command("phantom", tmp_path, "--n", 5, *GRID, *options)
    assert isinstance(caught.value, CryoisoError) and caught.value.exit_code == (2 if error is UsageError else 65)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_of_poses_is_checked(tmp_path):
    from cryoiso.io.pose_archive import read_pose_archive

    path = tmp_path / "poses.npz"
    for arrays, text in (
        ({"rotation": np.ones((4, 3, 3))}, "not all of 'rotation'"),
        ({"rotation": np.ones((4, 9))}, "wrong array 'rotation'"),
        ({"other": np.ones(3)}, "wrong array 'rotation'"),
        ({"rotation": np.full((4, 3, 3), np.nan)}, "no numbers"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=text):
            read_pose_archive(path)
    path.write_text("no archive")
    with pytest.raises(InputError, match="not a readable archive"):
        read_pose_archive(path)
    np.savez(path, rotation=np.eye(3)[None])
    with pytest.raises(InputError, match="wrong array 'ctf'"):
        read_pose_archive(path, ("ctf",))


def test_the_help_has_a_section_for_each_nuisance():
    text = command("--help")
    for group in ("Neighbours:", "Ice, scale and B-factor:", "Micrographs and defocus:", "Optics groups:", "Junk:",
                  "Real noise:", "Options:"):  # fmt: skip
        assert f"\n{group}\n" in text, group
    assert text.index("Neighbours:") < text.index("--neighbour-distance") < text.index("Ice, scale and B-factor:")
