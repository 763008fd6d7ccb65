"""Pose errors recover a known change of frame, modulo symmetry, while most particles are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from errors_helper import raises_code
from scipy.spatial.transform import Rotation

from cryoiso.core.errors import InputError
from cryoiso.metrics.orientation import ViewGrid, view_distribution
from cryoiso.metrics.pose_error import pose_errors
from cryoiso.physics.symmetry import point_group


def make(symmetry, frame, n=2500, wrong=0.6, sigma_deg=2.0, seed=0):
    """True poses, estimates in another frame with symmetry mates and gross errors, and which are wrong."""
    rng = np.random.default_rng(seed)
    ops = point_group(symmetry)
    true = Rotation.random(n, random_state=seed).as_matrix()
    jitter = Rotation.from_rotvec(np.radians(sigma_deg) * rng.standard_normal((n, 3))).as_matrix()
    estimated = jitter @ true @ ops[rng.integers(0, len(ops), n)] @ frame.T
    bad = rng.random(n) < wrong
    estimated[bad] = Rotation.random(int(bad.sum()), random_state=seed + 1).as_matrix()
    return estimated, true, bad


def brute_errors(estimated, true, ops):
    traces = np.einsum("nij,gjk,nik->ng", estimated, ops, true).max(1)
    return np.degrees(np.arccos(np.clip((traces - 1) / 2, -1, 1)))


@pytest.mark.parametrize("symmetry", ["C1", "C3", "D2", "O"])
def test_frame_is_recovered_with_most_particles_wrong(symmetry):
    frame = Rotation.from_euler("zyz", [33, 58, -120], degrees=True).as_matrix()
    estimated, true, bad = make(symmetry, frame)
    result = pose_errors(estimated, true, symmetry)
    ops = point_group(symmetry)
    off = [Rotation.from_matrix(frame.T @ result.frame_rotation @ s).magnitude() for s in ops]
    assert np.degrees(min(off)) < 0.4
    np.testing.assert_allclose(result.errors_deg, brute_errors(estimated @ result.frame_rotation, true, ops), atol=1e-4)
    assert np.median(result.errors_deg[~bad]) == pytest.approx(2 * 1.538, rel=0.1)  # median of a chi with 3 degrees
    assert 0.5 < result.fraction_over(10) < 0.6 + 0.02


@pytest.mark.parametrize("turned_over", [False, True])
def test_axis_mode_only_spins(turned_over):
    frame = Rotation.from_euler("z", 41, degrees=True).as_matrix()
    if turned_over:
        frame = frame @ np.diag([1.0, -1.0, -1.0])
    estimated, true, bad = make("C3", frame)
    result = pose_errors(estimated, true, "C3", align="axis")
    assert abs(result.frame_rotation[2, 2]) == pytest.approx(1, abs=1e-12)
    assert np.median(result.errors_deg[~bad]) < 3.5
    tilted = make("C3", Rotation.from_euler("y", 90, degrees=True).as_matrix())
    assert np.median(pose_errors(tilted[0], tilted[1], "C3", align="axis").errors_deg[~tilted[2]]) > 20


def test_without_alignment_the_frame_counts():
    frame = Rotation.from_euler("x", 15, degrees=True).as_matrix()
    estimated, true, _ = make("C1", frame, wrong=0, sigma_deg=0)
    np.testing.assert_allclose(pose_errors(estimated, true, "C1", align=False).errors_deg, 15, atol=1e-5)
    np.testing.assert_allclose(pose_errors(estimated, true, "C1").errors_deg, 0, atol=1e-4)


@pytest.mark.parametrize("symmetry", ["C1", "C3", "D2"])
def test_displaced_frame_shifts_origins(symmetry):
    """The law is checked on points: both descriptions put every point of the particle at one place of the image."""
    rng = np.random.default_rng(5)
    frame = Rotation.from_euler("zyz", [10, 35, 80], degrees=True).as_matrix()
    estimated, true, bad = make(symmetry, frame, sigma_deg=0)
    d = {"C1": np.array([4.0, -6.0, 9.0]), "C3": frame @ [0, 0, 11.0], "D2": np.zeros(3)}[symmetry]
    origin_true = rng.normal(0, 5, (len(true), 2))
    x = np.array([20.0, 30.0, -10.0])
    origin_estimated = origin_true + (estimated @ d)[:, :2]
    good = np.flatnonzero(~bad)
    if symmetry == "C1":
        seen = (true[good] @ x)[:, :2] - origin_true[good]
        np.testing.assert_allclose((estimated[good] @ (frame @ x + d))[:, :2] - origin_estimated[good], seen, atol=1e-9)
    origin_estimated[bad] = rng.normal(0, 8, (int(bad.sum()), 2))
    origin_estimated[good] += rng.normal(0, 0.5, (len(good), 2))
    result = pose_errors(estimated, true, symmetry, shift_estimated_A=origin_estimated, shift_true_A=origin_true)
    np.testing.assert_allclose(result.frame_shift_A, d, atol=0.15)
    assert np.median(result.shift_errors_A[~bad]) == pytest.approx(0.5 * 1.177, rel=0.12)  # median of a Rayleigh


def test_swing_and_twist_are_told_apart():
    true = Rotation.random(200, random_state=1).as_matrix()
    inplane = Rotation.from_euler("z", 25, degrees=True).as_matrix() @ true
    result = pose_errors(inplane, true, "C1", align=False)
    np.testing.assert_allclose(result.inplane_errors_deg, 25, atol=1e-6)
    np.testing.assert_allclose(result.direction_errors_deg, 0, atol=1e-5)
    tilted = Rotation.from_euler("y", 25, degrees=True).as_matrix() @ true
    result = pose_errors(tilted, true, "C1", align=False)
    np.testing.assert_allclose(result.direction_errors_deg, 25, atol=1e-6)
    cosine = np.einsum("ni,ni->n", tilted[:, 2], true[:, 2])
    np.testing.assert_allclose(result.direction_errors_deg, np.degrees(np.arccos(cosine)), atol=1e-6)


def test_top_and_side_views_are_counted_apart():
    tilt = np.repeat([5.0, 170.0, 90.0, 80.0], 50)
    true = Rotation.from_euler("ZYZ", np.column_stack([np.arange(200.0), tilt, np.arange(200.0)]), degrees=True)
    true = true.as_matrix().transpose(0, 2, 1)
    estimated = true.copy()
    estimated[:10] = Rotation.from_euler("y", 85, degrees=True).as_matrix() @ true[:10]
    views = pose_errors(estimated, true, "C1", align=False).by_view()
    assert (views["top_n"], views["side_n"]) == (100, 100)
    assert views["top_to_side"] == 0.1 and views["top_over_20"] == 0.1 and views["side_to_top"] == 0
    assert views["top_fraction_true"] == 0.5 and views["top_fraction_estimated"] == 0.45
    assert views["side_median_deg"] < 1e-5


def test_the_wrong_hand_shows():
    frame = np.eye(3)
    estimated, true, _ = make("C1", frame, wrong=0)
    mirrored = np.diag([-1.0, -1.0, 1.0]) @ true
    assert pose_errors(estimated, true, "C1").mirrored_median_deg > 60
    result = pose_errors(mirrored, true, "C1")
    assert result.median_deg > 60 and result.mirrored_median_deg < 1e-3


def test_result_does_not_depend_on_chance_and_can_be_written_down():
    import json

    estimated, true, _ = make("C3", np.eye(3), n=300)
    zeros = np.zeros((300, 2))
    first, second = (pose_errors(estimated, true, "C3", shift_estimated_A=zeros, shift_true_A=zeros) for _ in range(2))
    np.testing.assert_array_equal(first.errors_deg, second.errors_deg)
    assert json.loads(json.dumps(first.summary()))["n"] == 300


def test_same_definitions_as_the_benchmark_script(shared, monkeypatch):
    """Errors and kinds of views as the script defines them that scored RELION on the same sets, on their true poses."""
    monkeypatch.syspath_prepend(str(shared / "relion_bench"))
    common = pytest.importorskip("common")
    table = common.table(str(shared / "relion_bench/sets/f1_pref/truth.star"))
    angles = [np.array(table[f"rlnAngle{name}"], float) for name in ("Rot", "Tilt", "Psi")]
    true = common.euler(*angles)
    rng = np.random.default_rng(2)
    estimated = common.euler(*(a + rng.normal(0, 25, len(a)) for a in angles)) @ common.euler(14.0, 0, 0).T
    result = pose_errors(estimated, true, "C3", align="axis")
    theirs = common.ang_err(estimated @ result.frame_rotation, true, "C3")
    np.testing.assert_allclose(result.errors_deg, theirs, atol=1e-4)
    spins = [
        np.mean(np.minimum(common.ang_err(estimated @ common.euler(x, 0, 0), true, "C3"), 60)) for x in range(-60, 60)
    ]
    assert np.mean(np.minimum(theirs, 60)) < min(spins) + 0.3  # no spin on the script's kind of grid is much better
    polar = np.degrees(np.arccos(np.clip(true[:, 2, 2], -1, 1)))
    top = np.minimum(polar, 180 - polar) < 36
    moved = np.degrees(np.arccos(np.clip(estimated[:, 2, 2], -1, 1)))
    views = result.by_view()
    assert views["top_n"] == top.sum()
    assert views["top_to_side"] == np.mean(np.minimum(moved, 180 - moved)[top] >= 36)
    assert views["side_to_top"] == np.mean(np.minimum(moved, 180 - moved)[~top] < 36)
    assert views["side_over_20"] == pytest.approx(np.mean(theirs[~top] > 20))


def test_bad_input_is_named():
    with raises_code("arrays-do-not-fit", InputError, match="do not fit"):
        pose_errors(np.zeros((3, 3, 3)), np.zeros((4, 3, 3)))
    with raises_code("choice-unknown", InputError):
        pose_errors(np.eye(3)[None], np.eye(3)[None], align="sideways")


def test_cells_have_one_area_and_every_direction_a_cell():
    grid = ViewGrid.with_step(9)
    directions = np.random.default_rng(0).standard_normal((200_000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    counts = np.bincount(grid.index(directions), minlength=len(grid))
    assert len(counts) == len(grid)
    assert abs((counts - counts.mean()).std() / np.sqrt(counts.mean()) - 1) < 0.1  # Poisson, so areas are equal
    cell = grid.borders()[grid.index(directions)]
    azimuth = np.degrees(np.arctan2(directions[:, 1], directions[:, 0])) % 360
    inside = (azimuth >= cell[:, 0]) & (azimuth <= cell[:, 1]) & (directions[:, 2] >= cell[:, 2])
    assert (inside & (directions[:, 2] <= cell[:, 3])).all()
    poles = grid.index(np.array([[0, 0, 1.0], [0, 0, -1.0]]))
    assert poles[0] < grid.cells[0] and poles[1] >= len(grid) - grid.cells[-1]


@pytest.mark.parametrize("symmetry", ["C1", "C3", "O"])
def test_view_entropy_is_one_for_even_views_and_small_for_one_cone(symmetry):
    even = Rotation.random(3000, random_state=0).as_matrix()
    numbers = view_distribution(even, symmetry).summary()
    assert numbers["entropy"] > 0.995
    assert numbers["top_fraction"] == pytest.approx(1 - np.cos(np.radians(36)), abs=0.02)
    one = Rotation.from_euler("zyz", np.random.default_rng(0).normal(0, 4, (3000, 3)), degrees=True).as_matrix()
    assert view_distribution(one, symmetry).entropy < 0.6


def test_views_are_expanded_by_symmetry():
    rotation = Rotation.random(500, random_state=2).as_matrix()
    ops = point_group("C3")
    turned = rotation @ ops[1]
    np.testing.assert_allclose(view_distribution(rotation, "C3").counts, view_distribution(turned, "C3").counts)
    assert view_distribution(rotation, "C3").counts.sum() == pytest.approx(500)
