"""Capping the particles of every viewing direction: what holds of any set, and the files that come out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pipeline_helper import cryoiso_here
from scipy.spatial.transform import Rotation

from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE, InputError
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io import read_particle_file
from cryoiso.io.conventions import matrix_to_euler, matrix_to_rotvec
from cryoiso.io.star.text import StarBlock, read_blocks, write_blocks
from cryoiso.methods.rebalance import cap_for, facts, rebalance
from cryoiso.metrics.view_cones import ViewCones, ranks
from cryoiso.physics.symmetry import point_group
from cryoiso.physics.views import Views, sample_rotations

N = 4000


def particles(rotation: np.ndarray, half: np.ndarray | None = None) -> Particles:
    n = len(rotation)
    zeros = np.zeros(n)
    return Particles(
        uid=np.arange(1, n + 1, dtype=np.uint64), optics=np.zeros(n, np.int32),
        groups=(OpticsGroup(1, "g", 1.0, 64, 300, 2.7, 0.1),), stack=np.full(n, "a.mrcs"), index=np.arange(n),
        defocus_u_A=zeros, defocus_v_A=zeros, defocus_angle_deg=zeros, phase_shift_deg=zeros, ctf_bfactor_A2=zeros,
        ctf_scale=zeros + 1, rotation=rotation, shift_A=np.zeros((n, 2)), half=half,
    )  # fmt: skip


def top_heavy(n: int = N, seed: int = 1) -> np.ndarray:
    return sample_rotations(Views("preferred", fraction=0.95), np.arange(n, dtype=np.uint64), seed)


def halves(n: int = N) -> np.ndarray:
    return (1 + np.arange(n) % 2).astype(np.int8)


QUALITY = np.random.default_rng(5).random(N)


@pytest.mark.parametrize("symmetry", ["C1", "C3", "D7", "O", "I"])
def test_cones_are_alike_and_take_symmetry_mates_as_one(symmetry):
    cones = ViewCones.with_step(10, symmetry)
    rng = np.random.default_rng(2)
    views = rng.standard_normal((40_000, 3))
    views /= np.linalg.norm(views, axis=1)[:, None]
    index = cones.index(views)
    for operation in point_group(symmetry):
        assert (cones.index(views @ operation) == index).mean() > 0.9999  # but for rounding at a border
    share = np.bincount(index, minlength=len(cones)) * len(cones) / len(views)
    assert share.min() > 0.65 and share.max() < 1.35, "no slivers at the asymmetric unit"
    mates = np.einsum("gij,nj->ngi", point_group(symmetry), cones.axes[index])
    nearest = np.degrees(np.arccos(np.clip(np.einsum("ngi,ni->ng", mates, views).max(1), -1, 1)))
    assert nearest.max() < 10, "no view lies far from its cone's axis"


@pytest.mark.parametrize("symmetry", ["C1", "C3", "D2", "O"])
@pytest.mark.parametrize("cap", [1, 7, 40])
def test_the_cap_holds_and_no_cone_below_it_loses_any(symmetry, cap):
    chosen = rebalance(particles(top_heavy(), halves()), symmetry, cap=cap, quality=QUALITY)
    before, after = chosen.counts(), chosen.counts(chosen.keep)
    np.testing.assert_array_equal(after, np.minimum(before, cap))
    assert before.max() > cap


def test_half_sets_stay_balanced():
    half = halves()
    chosen = rebalance(particles(top_heavy(), half), "C1", cap=9, quality=QUALITY)
    one, two = (chosen.counts(chosen.keep & (half == h)) for h in (1, 2))
    many = np.minimum(*(chosen.counts(half == h) for h in (1, 2))) >= 5
    assert many.any() and np.abs(one - two)[many].max() == 1, "9 are 4 and 5"
    assert abs(int((one - two)[many].sum())) <= 1, "the odd particle goes to either in turn"
    lone = np.where(np.arange(N) < N - 30, 1, 2).astype(np.int8)
    chosen = rebalance(particles(top_heavy(), lone), "C1", cap=9, quality=QUALITY)
    np.testing.assert_array_equal(chosen.counts(chosen.keep), np.minimum(chosen.counts(), 9))


def test_the_best_of_each_cone_and_half_are_kept():
    half = halves()
    chosen = rebalance(particles(top_heavy(), half), "C1", cap=10, quality=QUALITY)
    for cone in np.flatnonzero(chosen.counts() > 10):
        for h in (1, 2):
            here = (chosen.cone == cone) & (half == h)
            kept, lost = QUALITY[here & chosen.keep], QUALITY[here & ~chosen.keep]
            assert not len(lost) or kept.min() >= lost.max()


def test_a_rare_view_is_never_lost_however_bad():
    """A cut on quality over the whole set would lose just these."""
    rotation = np.concatenate([top_heavy(), sample_rotations(Views(pole_tilt_deg=90), np.arange(3), 7)])
    rotation[-3:] = Rotation.from_euler("zyz", [[10, 100, 0], [90, 120, 0], [200, 150, 0]], degrees=True).as_matrix()
    rotation[-3:] = rotation[-3:].transpose(0, 2, 1)
    quality = np.concatenate([QUALITY + 1, [-1, -2, -3]])
    for symmetry in ("C1", "C3"):
        chosen = rebalance(particles(rotation), symmetry, keep=0.1, quality=quality)
        assert chosen.counts()[chosen.cone[-3:]].max() <= chosen.cap and chosen.keep[-3:].all()
        assert chosen.keep.mean() < 0.2


def test_symmetry_mates_are_one_view():
    rotation = top_heavy()
    mates = point_group("D3")[np.random.default_rng(3).integers(0, 6, N)]
    first = rebalance(particles(rotation, halves()), "D3", cap=12, quality=QUALITY)
    second = rebalance(particles(rotation @ mates, halves()), "D3", cap=12, quality=QUALITY)
    np.testing.assert_array_equal(first.keep, second.keep)
    assert (rebalance(particles(rotation @ mates, halves()), "C1", cap=12, quality=QUALITY).keep != first.keep).any()


def test_another_frame_of_reference_gives_the_same_but_for_the_cones_borders():
    rotation = top_heavy(20_000)
    frames = Rotation.random(4, random_state=1).as_matrix()
    quality = np.random.default_rng(5).random(20_000)
    chosen = [rebalance(particles(rotation @ f, halves(20_000)), "C1", keep=0.3, quality=quality) for f in frames]
    numbers = [facts(c, particles(rotation @ f)) for c, f in zip(chosen, frames)]
    assert np.ptp([c.cap for c in chosen]) <= 0.25 * np.mean([c.cap for c in chosen])
    assert np.ptp([n["after"]["sampling"]["scf"] for n in numbers]) < 0.05
    assert min((chosen[0].keep == c.keep).mean() for c in chosen[1:]) > 0.85


def test_the_draw_depends_on_seed_and_identity_alone():
    given = particles(top_heavy(), halves())
    first = rebalance(given, "C1", keep=0.3, seed=4)
    order = np.random.default_rng(1).permutation(N)
    shuffled = rebalance(given.take(order), "C1", keep=0.3, seed=4)
    np.testing.assert_array_equal(first.keep[order], shuffled.keep)
    np.testing.assert_array_equal(first.keep, rebalance(given, "C1", keep=0.3, seed=4).keep)
    other = rebalance(given, "C1", keep=0.3, seed=5)
    assert (other.keep != first.keep).any() and other.cap == first.cap


def test_sampling_becomes_more_even_and_views_less_peaked():
    given = particles(top_heavy(20_000))
    numbers = facts(rebalance(given, "C3", keep=0.3, seed=4), given)
    assert numbers["after"]["sampling"]["scf"] > 1.5 * numbers["before"]["sampling"]["scf"]
    assert numbers["after"]["views"]["peak_over_mean"] < 0.6 * numbers["before"]["views"]["peak_over_mean"]
    assert sum(c["before"] for c in numbers["cones"]) == numbers["particles"] == 20_000
    assert sum(c["after"] for c in numbers["cones"]) == numbers["kept"] == 20_000 - numbers["discarded"]


@pytest.mark.parametrize("keep", [0.001, 0.25, 0.7, 1.0])
def test_the_cap_is_the_smallest_that_keeps_enough(keep):
    counts = np.random.default_rng(6).integers(0, 300, 200)
    cap = cap_for(counts, keep)
    assert np.minimum(counts, cap).sum() >= keep * counts.sum()
    assert cap == 1 or np.minimum(counts, cap - 1).sum() < keep * counts.sum()


def test_ranks_put_the_highest_first_and_break_ties_by_key():
    group, quality = np.array([1, 0, 1, 1, 0]), np.array([2.0, 5, 3, 3, 9])
    np.testing.assert_array_equal(ranks(group, quality, np.array([0, 0, 7, 6, 0])), [2, 1, 1, 0, 0])


@pytest.mark.parametrize("wrong", [{}, {"cap": 3, "keep": 0.5}, {"cap": 0}, {"keep": 0.0}, {"keep": 1.5}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(InputError):
        rebalance(particles(top_heavy(10)), "C1", **wrong)
    with pytest.raises(InputError):
        ViewCones.with_step(0.1)


# files


@pytest.fixture(scope="module")
def star(tmp_path_factory) -> Path:
    """RELION 3.0 rows, with columns and tables that this program does not know."""
    path = tmp_path_factory.mktemp("star") / "in.star"
    rot, tilt, psi = matrix_to_euler(top_heavy(400)).T
    body = {"rlnAngleRot": [f"{i}.50" for i in range(400)]}
    columns = {
        "rlnImageName": [f"{i + 1:06d}@Extract/a.mrcs" for i in range(400)],
        "rlnAngleRot": [f"{a:.7f}" for a in rot], "rlnAngleTilt": [f"{a:.7f}" for a in tilt],
        "rlnAnglePsi": [f"{a:.7f}" for a in psi], "rlnRandomSubset": [str(1 + i % 2) for i in range(400)],
        "rlnMaxValueProbDistribution": [f"{q:.6f}" for q in QUALITY[:400]], "rlnCtfMaxResolution": ["3.250"] * 400,
        "labOwnColumn": [f"x{i:03d}" for i in range(400)],
    }  # fmt: skip
    write_blocks(path, [
        StarBlock("general", False, {"labNote": ["kept whole"]}), StarBlock("particles", True, columns),
        StarBlock("images_body_1", True, body),
    ])  # fmt: skip
    return path


def test_star_rows_are_divided_and_otherwise_untouched(star, tmp_path):
    done = cryoiso_here("rebalance", star, "--keep", "0.4", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    source = {b.name: b for b in read_blocks(star)}
    parts = [{b.name: b for b in read_blocks(tmp_path / "o" / f"particles_{k}.star")} for k in ("kept", "discarded")]
    numbers = json.loads((tmp_path / "o" / "rebalance.json").read_text())
    assert [len(p["particles"]) for p in parts] == [numbers["kept"], numbers["discarded"]]
    assert numbers["quality"] == "rlnMaxValueProbDistribution" and numbers["halves"]["before"] == [200, 200]
    rows = [name for p in parts for name in p["particles"].columns["rlnImageName"]]
    order = [source["particles"].columns["rlnImageName"].index(name) for name in rows]
    assert sorted(order) == list(range(400))
    for block in ("particles", "images_body_1"):
        for name, values in source[block].columns.items():
            assert [v for p in parts for v in p[block].columns[name]] == [values[i] for i in order]
    assert all(p["general"].columns == source["general"].columns for p in parts)
    assert (tmp_path / "o" / "views.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_discarded_leaves_no_file_of_an_earlier_call(star, tmp_path):
    assert cryoiso_here("rebalance", star, "--cap", "2", "--quality", "random", "--out", tmp_path).returncode == 0
    assert (tmp_path / "particles_discarded.star").is_file()
    assert cryoiso_here("rebalance", star, "--keep", "1", "--out", tmp_path, "--overwrite").returncode == 0
    assert not (tmp_path / "particles_discarded.star").exists()
    assert len(read_particle_file(tmp_path / "particles_kept.star", "", ("pose",))) == 400


def cs_file(path: Path, rotation: np.ndarray, with_pose: bool = True) -> np.ndarray:
    kinds: list = [("uid", "<u8"), ("lab/own", "<f4", (2,))]
    if with_pose:
        kinds += [("alignments3D/pose", "<f4", (3,)), ("alignments3D/shift", "<f4", (2,)),
                  ("alignments3D/split", "<u4"), ("alignments3D/error", "<f4")]  # fmt: skip
    rows = np.zeros(len(rotation), kinds)
    rows["uid"] = np.arange(len(rotation)) + 2**60
    rows["lab/own"] = np.random.default_rng(1).random((len(rotation), 2))
    if with_pose:
        rows["alignments3D/pose"], rows["alignments3D/split"] = matrix_to_rotvec(rotation), np.arange(len(rows)) % 2
        rows["alignments3D/error"] = QUALITY[: len(rows)]
    with open(path, "wb") as stream:
        np.save(stream, rows)
    return rows


def test_cs_rows_are_divided_and_otherwise_untouched(tmp_path):
    rows = cs_file(tmp_path / "in.cs", top_heavy(300))
    done = cryoiso_here("rebalance", tmp_path / "in.cs", "--cap", "3", "--out", tmp_path, "--quality",
                        "alignments3D/error", "--better", "lower")  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept, lost = (np.load(tmp_path / f"particles_{k}.cs") for k in ("kept", "discarded"))
    assert kept.dtype == rows.dtype == lost.dtype and len(kept) + len(lost) == 300
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, lost]), order="uid"), rows)
    assert np.median(kept["alignments3D/error"]) < np.median(lost["alignments3D/error"])


def test_poses_and_quality_of_a_cs_file_may_come_from_a_passthrough_file(tmp_path):
    cs_file(tmp_path / "in.cs", top_heavy(300), with_pose=False)
    cs_file(tmp_path / "more.cs", top_heavy(300))
    words = ["--cap", "3", "--out", tmp_path / "o", "--quality", "alignments3D/error", "--better", "lower"]
    done = cryoiso_here("rebalance", tmp_path / "in.cs", "--passthrough", tmp_path / "more.cs", *words)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "o" / "particles_kept.cs").dtype.names == ("uid", "lab/own")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], EXIT_USAGE, "--cap and --keep"),
        (["--cap", "3", "--keep", "0.5"], EXIT_USAGE, "--cap and --keep"),
        (["--cap", "3", "--quality", "rlnCtfMaxResolution"], EXIT_USAGE, "--better"),
        (["--cap", "3", "--quality", "rlnNoSuch", "--better", "lower"], EXIT_INPUT, "_rlnNoSuch"),
        (["--cap", "3", "--quality", "labOwnColumn", "--better", "lower"], EXIT_INPUT, "row 1: bad value"),
        (["--cap", "3", "--symmetry", "X9"], EXIT_INPUT, "point group"),
    ],
)
def test_errors_say_what_is_wrong_and_write_nothing(star, tmp_path, words, code, said):
    done = cryoiso_here("rebalance", star, *words, "--out", tmp_path / "o")
    assert done.returncode == code and said in done.stderr, done.stderr
    assert not (tmp_path / "o").exists()


def test_no_known_quality_and_an_input_in_the_way(star, tmp_path):
    cs_file(tmp_path / "particles_kept.cs", top_heavy(20))
    done = cryoiso_here("rebalance", tmp_path / "particles_kept.cs", "--cap", "3", "--out", tmp_path / "o")
    assert done.returncode == EXIT_USAGE and "--quality random" in done.stderr
    words = ["--cap", "3", "--out", tmp_path, "--quality", "random", "--overwrite"]
    done = cryoiso_here("rebalance", tmp_path / "particles_kept.cs", *words)
    assert done.returncode == EXIT_USAGE and "overwrite" in done.stderr
