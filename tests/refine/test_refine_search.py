"""The search: poses found, posteriors, and the summary of samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from likelihood_helper import BOX, GRID, PIXEL_A, tensor, the_batch

from cryoiso.core.config import RefineSection
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import simulate
from cryoiso.physics.so3 import angular_distance_deg, random_rotations, rotvec_to_matrix
from cryoiso.physics.symmetry import point_group
from cryoiso.refine.junk import log_evidence
from cryoiso.refine.likelihood import score_and_norm, whiten
from cryoiso.refine.schedule import ScheduleState, search_plan
from cryoiso.refine.search import Level, Posterior, Searcher, SearchPlan, summarise


@pytest.fixture(scope="module")
def reference(truth) -> FourierVolume:
    """The truth as Fourier volume, which remembers the map it was made of."""
    data = tensor(truth.data) * 1.3
    volume = FourierVolume.from_volume(data)
    object.__setattr__(volume, "of", data)
    return volume


def a_plan(radius: int = 15) -> SearchPlan:
    settings = RefineSection(healpix_order=2, finest_step_deg=1.0)
    return search_plan(ScheduleState(radius_px=radius, shift_sd_px=2.0), settings, GRID, BOX, PIXEL_A, 140.0)


def test_the_search_finds_poses(truth):
    """100 images of -3 dB against the truth: a median of 3 degrees, where a pixel is 5 degrees at the edge."""
    source = simulate(truth, 100, snr_db=-3.0, shift_sd_A=6.0, seed=5)
    batch = the_batch(source, 100)
    volume = FourierVolume.from_volume(tensor(source.volume.data))
    posterior = Searcher(a_plan(), volume).search(batch, whiten(batch, np.ones((1, BOX // 2 + 1))))
    errors = angular_distance_deg(posterior.best_rotation.numpy(), source.particles.rotation, point_group("C3"))
    assert np.median(errors) < 3.5 and np.mean(errors > 10) < 0.05
    moved = posterior.best_shift_px.numpy() + source.particles.shift_A / PIXEL_A
    assert np.median(np.hypot(*moved.T)) < 0.15
    check_posterior(posterior, 100)


def check_posterior(posterior: Posterior, n: int) -> None:
    total = torch.zeros(n).index_add_(0, posterior.particle, posterior.weight)
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (posterior.weight > 0).all() and (posterior.particle.diff() >= 0).all()
    assert (
        (posterior.entropy >= 0).all() and (posterior.max_weight > 0).all() and (posterior.max_weight <= 1.0001).all()
    )
    for r in (posterior.rotation, posterior.best_rotation):
        identity = r @ r.transpose(1, 2)
        assert float((identity - torch.eye(3)).abs().max()) < 1e-4 and float((torch.det(r) - 1).abs().max()) < 1e-4


def test_noisier_images_have_wider_posteriors(truth):
    entropy, probability = [], []
    for snr_db in (0.0, -6.0, -12.0):
        source = simulate(truth, 40, snr_db=snr_db, seed=5)
        batch = the_batch(source, 40)
        white = whiten(batch, np.ones((1, BOX // 2 + 1)))
        posterior = Searcher(a_plan(), FourierVolume.from_volume(tensor(source.volume.data))).search(batch, white)
        check_posterior(posterior, 40)
        entropy.append(float(posterior.entropy.mean()))
        probability.append(float(posterior.max_weight.mean()))
    assert entropy[0] < entropy[1] < entropy[2] and probability[0] > probability[1] > probability[2]


def test_blocks_of_the_search_change_nothing(source, reference):
    batch = the_batch(source)
    white = whiten(batch, np.ones((1, BOX // 2 + 1)))
    whole = Searcher(a_plan(10), reference).search(batch, white)
    parts = Searcher(a_plan(10), reference, block=1).search(batch, white)
    np.testing.assert_allclose(whole.best_rotation, parts.best_rotation, atol=1e-4)
    np.testing.assert_allclose(whole.log_evidence, parts.log_evidence, rtol=1e-5)


@pytest.mark.parametrize("snr_db", [-14.0, -40.0])
def test_evidence_of_weak_images_is_the_mean_over_all_poses(truth, snr_db):
    """12 images with little signal or none, against the mean likelihood of 40,000 random poses: to 1 in the mean (0.4
    and 0.6), since most views are known by the first grid alone. The samples of the search alone miss 3 or more."""
    plan, poses, rng = a_plan(6), 40000, np.random.default_rng(2)
    source = simulate(truth, 12, snr_db=snr_db, shift_sd_A=6.0, seed=5)
    volume = FourierVolume.from_volume(0.6 * tensor(simulate(truth, 2, snr_db=-14.0, seed=5).volume.data), 2, 6)
    white = whiten(the_batch(source), np.ones((1, BOX // 2 + 1))).within(6)
    rotation, shift = tensor(random_rotations(rng, poses)), tensor(rng.normal(0, plan.shift_sd_px, (poses, 2)))
    each = (replace(white, data=white.data[i : i + 1], weight=white.weight[i : i + 1]) for i in range(12))
    scores = torch.stack([score_and_norm(image, volume, rotation, shift)[0] for image in each])
    expected = scores.double().logsumexp(1).numpy() - np.log(poses)
    found = Searcher(plan, volume, complete=True).search(the_batch(source), white)
    refined = found.log_evidence.numpy() - plan.log_cells(len(plan.levels))
    assert float(np.abs(log_evidence(found, plan) - expected).mean()) < 1
    assert float((expected - refined).mean()) > 3


def test_summary_of_samples():
    """Evidence, entropy and means of a posterior that is known: two views of 3:1, each with one shift."""
    axis = rotvec_to_matrix(np.radians([[0, 0, 0], [0, 0, 4], [90, 0, 0]]))
    rotation = tensor(axis)[None]
    score = torch.full((1, 3, 9), -torch.inf)
    score[0, 0, 4], score[0, 1, 4], score[0, 2, 4] = np.log(3.0), 0.0, -50.0
    shift = torch.zeros(1, 3, 9, 2)
    shift[0, 1, 4] = torch.tensor([1.0, -2.0])
    found = summarise(rotation, shift, score, Level(8.0, 1.0, 10, 8, 10.0), torch.tensor([-3.0]))
    assert float(found.left_out[0]) == -3
    assert float(found.log_evidence[0]) == pytest.approx(np.log(4), abs=1e-6)
    assert float(found.entropy[0]) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), abs=1e-6)
    np.testing.assert_allclose(found.weight, [0.75, 0.25], atol=1e-6)
    assert float(found.max_weight[0]) == pytest.approx(0.75)
    # the mean of the leading mode lies a quarter of the way between both, and the far sample has no say
    expected = rotvec_to_matrix(np.radians([[0, 0, 1.0]]))
    assert angular_distance_deg(found.best_rotation.double().numpy(), expected)[0] < 0.01
    np.testing.assert_allclose(found.best_shift_px[0], [0.25, -0.5], atol=1e-6)
    # views 1 and 3 degrees from it, with weights 3:1
    assert float(found.spread_deg[0]) == pytest.approx(np.sqrt(0.75 * 1 + 0.25 * 9), abs=0.01)
