"""Q-scores: closed cases, invariances, another program's numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cryoiso.metrics.qscore import POINTS, _even_directions, _spread, q_scores

VOXEL_A = 0.3


def gaussians(positions_A, sigma_A, box_px=48, heights=None):
    """Sum of Gaussians on a fine grid, array (z, y, x)."""
    at = np.arange(box_px) * VOXEL_A
    total = np.zeros((box_px,) * 3)
    for p, height in zip(positions_A, np.ones(len(positions_A)) if heights is None else heights):
        x, y, z = (np.exp(-0.5 * ((at - c) / sigma_A) ** 2) for c in p)
        total += height * z[:, None, None] * y[:, None] * x
    return total


@pytest.mark.parametrize("sigma_A", (0.4, 0.6, 1.0))
def test_an_atom_of_the_reference_width_scores_one(sigma_A):
    centre = np.array([[7.05, 7.2, 6.9]])
    density = gaussians(centre, 0.6)
    score = float(q_scores(density, centre, (VOXEL_A,) * 3, sigma_A=sigma_A)[0])
    radius = np.concatenate([np.zeros(1), np.arange(1, 21) * 0.1])
    expected = np.corrcoef(np.exp(-0.5 * (radius / 0.6) ** 2), np.exp(-0.5 * (radius / sigma_A) ** 2))[0, 1]
    assert score == pytest.approx(expected, abs=0.004), "every sphere, the centre among them, counts alike"


def test_scale_offset_and_frame_do_not_matter_and_a_hole_scores_minus_one():
    centre = np.array([[7.05, 7.2, 6.9]])
    noisy = gaussians(centre, 0.8) + 0.05 * np.random.default_rng(1).standard_normal((48,) * 3)
    score = q_scores(noisy, centre, (VOXEL_A,) * 3)
    assert q_scores(250 * noisy - 3, centre, (VOXEL_A,) * 3) == pytest.approx(score, abs=1e-5)
    moved = q_scores(noisy, centre + np.array([5.0, -3, 100]), (VOXEL_A,) * 3, (5.0, -3.0, 100.0))
    assert moved == pytest.approx(score, abs=1e-6)
    assert q_scores(-noisy, centre, (VOXEL_A,) * 3) == pytest.approx(-score, abs=1e-5)
    turned = q_scores(noisy.transpose(2, 1, 0), centre[:, ::-1], (VOXEL_A,) * 3)
    assert turned == pytest.approx(score, abs=0.03), "other points on the spheres, the same atom"


def test_noise_scores_nothing_and_a_constant_or_a_place_outside_has_no_score():
    rng = np.random.default_rng(2)
    places = rng.uniform(3, 11, (200, 3))
    scores = q_scores(rng.standard_normal((48,) * 3), places, (VOXEL_A,) * 3)
    assert abs(scores.mean()) < 0.05
    assert np.isnan(q_scores(np.full((20,) * 3, 3.7), np.array([[3.0, 3, 3]]), (VOXEL_A,) * 3)).all()
    edge = np.array([[-0.1, 3, 3], [3, 14.2, 3], [3, 3, 3]])
    assert np.isnan(q_scores(rng.standard_normal((48,) * 3), edge, (VOXEL_A,) * 3)).tolist() == [True, True, False]


def test_density_of_a_neighbour_is_not_counted():
    """An atom beside one of three times its height: without the neighbour's points it still is a peak."""
    pair = np.array([[6.6, 7.2, 7.2], [8.1, 7.2, 7.2]])
    density = gaussians(pair, 0.5, heights=(1.0, 3.0))
    alone = q_scores(density, pair[:1], (VOXEL_A,) * 3)
    both = q_scores(density, pair, (VOXEL_A,) * 3)
    assert both[0] > alone[0] + 0.02


def test_points_are_taken_evenly_and_only_where_clear():
    clear = np.zeros((2, 16), bool)
    clear[0, :8], clear[1] = True, True
    chosen = _spread(clear)
    assert chosen[0].tolist() == list(range(8)) and chosen[1].tolist() == list(range(0, 16, 2))
    assert np.allclose(np.linalg.norm(_even_directions(POINTS), axis=1), 1)


def synthetic_case():
    """A chain of 60 atoms 1.5 Å apart with widths that grow along it, in weak noise, on a coarse grid."""
    rng = np.random.default_rng(11)
    steps = rng.normal(size=(60, 3))
    steps *= 1.5 / np.linalg.norm(steps, axis=1)[:, None]
    places = np.cumsum(steps, 0)
    places += 14.0 - (places.min(0) + places.max(0)) / 2
    at = np.arange(28) * 1.0
    density = 0.05 * rng.standard_normal((28,) * 3)
    for p, width in zip(places, np.linspace(0.5, 1.6, 60)):
        x, y, z = (np.exp(-0.5 * ((at - c) / width) ** 2) for c in p)
        density += z[:, None, None] * y[:, None] * x
    return density.astype(np.float32), places


def test_scores_are_those_of_jqscore(reference_numbers):
    """Numbers of jqscore 0.2.0 on this map, recorded; the points on the spheres are others, so scores differ a little
    atom by atom and not in the mean."""
    recorded = json.loads((reference_numbers / "qscore" / "jqscore.json").read_text())
    density, places = synthetic_case()
    for name, theirs in recorded["scores"].items():
        ours = q_scores(density, places, (1.0,) * 3, sigma_A=float(name))
        difference = ours - np.array(theirs)
        assert abs(difference.mean()) < 0.02 and difference.std() < 0.05, name
        assert np.corrcoef(ours, theirs)[0, 1] > 0.93


def test_real_maps_against_jqscore_itself(shared_data):
    jqscore = pytest.importorskip("jqscore.jqscore", reason="LOUD: no jqscore")
    from cryoiso.io.mrc import read_raw_map

    folder = shared_data / "maps"
    atoms = [a for a in jqscore.read_pdb(str(folder / "emd_2566_chain9_3j6b.pdb")) if a.element != "H"]
    raw, header = read_raw_map(folder / "emd_2566_chain9_1.34A.mrc")
    data, origin, voxel = jqscore.read_mrc(str(folder / "emd_2566_chain9_1.34A.mrc"))
    theirs = jqscore.compute_qscores(atoms, data, origin, voxel, sigma=0.6, mapq_compat=False).atom_qscores
    ours = q_scores(raw, np.array([(a.x, a.y, a.z) for a in atoms]), header.voxel_A, header.origin_A)
    both = np.isfinite(ours) & np.isfinite(theirs)
    assert both.mean() > 0.99 and abs(np.mean(ours[both] - theirs[both])) < 0.02
    assert np.corrcoef(ours[both], theirs[both])[0, 1] > 0.94
