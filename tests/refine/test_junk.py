"""Images without a particle: evidence, cones, and what becomes of rare views."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_classes import request_for, two_states
from test_refine_engine import BOX, PIXEL_A, contents, in_memory
from test_refine_engine import request_for as refine_request

from cryoiso.core.config import parse_job
from cryoiso.core.errors import UsageError
from cryoiso.engines.classify import classify
from cryoiso.engines.native import NativeEngine
from cryoiso.io.sources import ArraySource
from cryoiso.metrics.view_cones import ViewCones, cone_facts
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.so3 import random_rotations
from cryoiso.physics.symmetry import point_group
from cryoiso.physics.views import Views
from cryoiso.pipeline.stages.engines import require_engine
from cryoiso.refine.junk import CONE_DEG, JunkPrior, advantage, learned, spherical_mean, too_much_junk


def facts_of(cross, norm) -> np.ndarray:
    """Facts of images at given poses, with nothing as junk."""
    cross, norm = np.broadcast_arrays(np.asarray(cross, float), norm)
    return np.column_stack([cross, norm, *np.zeros((3, *cross.shape))])


def drawn(rng, n: int, norm: float, amplitude: float) -> np.ndarray:
    """Facts of images whose particle is ``amplitude`` times the reference: x of mean a n and variance n."""
    return facts_of(rng.normal(amplitude * norm, np.sqrt(norm), n), norm)


# --- cones


@pytest.mark.parametrize("symmetry", ["C1", "C3", "D2", "O", "I"])
def test_symmetry_mates_are_in_one_cone(symmetry):
    cones = ViewCones.with_step(CONE_DEG, symmetry)
    rotation = random_rotations(np.random.default_rng(1), 400)
    found = cones.index(rotation[:, 2])
    for operation in point_group(symmetry):
        np.testing.assert_array_equal(cones.index((rotation @ operation)[:, 2]), found)
    assert len(np.unique(found)) == len(cones)


def test_cone_facts_add_up():
    cones, rng = ViewCones.with_step(CONE_DEG, "C3"), np.random.default_rng(2)
    weight = rng.random((300, 2))
    rows = cone_facts(cones, cones.index(random_rotations(rng, 300)[:, 2]), ["1", "2"], weight)
    assert sum(row["particles"] for row in rows) == 300
    assert sum(row["2"] for row in rows) == pytest.approx(weight[:, 1].sum(), abs=0.02)


# --- evidence


def test_the_advantage_is_a_log_likelihood_ratio():
    """Of a particle a times the reference against nothing: log N(x; a P) - log N(x; 0)."""
    rng = np.random.default_rng(3)
    view, noise = rng.normal(size=200), rng.normal(size=200)
    image = 0.6 * view + noise
    facts = facts_of(image @ view, view @ view)
    for a in (0.3, 1.0):
        expected = 0.5 * (np.square(image).sum() - np.square(image - a * view).sum())
        assert advantage(facts, a)[0] == pytest.approx(expected)


def test_noise_among_particles_is_found():
    rng = np.random.default_rng(4)
    facts = np.concatenate([drawn(rng, 70, 60.0, 1.0), drawn(rng, 30, 60.0, 0.0)])
    prior = learned(facts, np.zeros(100, int), 2)
    assert prior.share[0] == pytest.approx(0.3, abs=0.05) and prior.amplitude[0] > 0.85
    particle = prior.particle_probability(facts, np.zeros(100, int))
    assert (particle[:70] > 0.5).mean() > 0.97 and (particle[70:] < 0.5).mean() > 0.97
    assert prior.share[1] < 0.06 and prior.amplitude[1] == 1  # a cone that nothing was seen of


def test_a_poor_reference_costs_no_rare_view():
    """A cone that the reference knows to a fifth: all evidence is against its particles, one measure for all cones
    would call them junk, and its own does not."""
    rng = np.random.default_rng(5)
    facts = np.concatenate([drawn(rng, 200, 60.0, 1.0), drawn(rng, 20, 60.0, 0.2)])
    cone = np.repeat([0, 1], [200, 20])
    assert (advantage(facts[200:], 1.0) < -5).mean() > 0.8
    everywhere = learned(facts, np.zeros(220, int), 1).particle_probability(facts, np.zeros(220, int))
    within = learned(facts, cone, 2).particle_probability(facts, cone)
    assert (everywhere[200:] < 0.5).mean() > 0.6
    assert (within < 0.5).sum() == 0


def test_no_prior_favours_junk():
    """A cone full of noise: nothing there says what a particle looks like, so nothing is called junk for company."""
    rng = np.random.default_rng(6)
    facts = drawn(rng, 40, 60.0, 0.0)
    prior = learned(facts, np.zeros(40, int), 1)
    assert prior.share[0] <= 0.5
    some = np.concatenate([facts, drawn(rng, 5, 60.0, 1.0)])
    particle = learned(some, np.zeros(45, int), 1).particle_probability(some, np.zeros(45, int))
    assert particle[-5:].min() > 0.99 and (particle[:-5] < 0.5).mean() > 0.95


def test_differing_scales_are_averaged_over():
    """Against the numerical integral of the likelihood over a normal distribution of scales."""
    rng, spread = np.random.default_rng(7), 0.15
    facts = np.concatenate([drawn(rng, 20, 30.0, 1.0), drawn(rng, 20, 30.0, 0.0)])
    equal = advantage(facts, 0.8)
    facts[:, -1] = spread
    scale = 1 + np.sqrt(spread) * np.linspace(-8, 8, 4001)
    density = np.exp(-np.square(scale - 1) / (2 * spread)) / np.sqrt(2 * np.pi * spread)
    likelihood = np.exp(0.8 * scale * facts[:, :1] - np.square(0.8 * scale) * facts[:, 1:2] / 2)
    expected = np.log((likelihood * density).sum(1) * (scale[1] - scale[0]))
    np.testing.assert_allclose(advantage(facts, 0.8), expected, rtol=1e-6)
    assert np.abs(equal - expected).min() > 0.01


@pytest.mark.parametrize(("share", "expected"), [(0.01, 0.99), (0.05, 0.95), (0.1, 0.9), (0.5, 0.9)])
def test_even_evidence_leaves_the_prior_of_ten_percent_at_most(share, expected):
    prior = JunkPrior(np.array([share]), np.ones(1))
    assert prior.particle_probability(facts_of([0.0], 0.0), np.zeros(1, int))[0] == pytest.approx(expected)


def test_the_spherical_mean_is_the_mean_of_rotated_maps():
    volume = phantom_map(BOX, PIXEL_A, 14.0).data
    ball = spherical_mean(volume, PIXEL_A, 2.1 * PIXEL_A)
    assert ball.sum() == pytest.approx(volume.sum(), rel=0.02)
    for axes in ((0, 1), (1, 2)):
        rotated = np.rot90(ball[1:, 1:, 1:], axes=axes)
        np.testing.assert_allclose(rotated, ball[1:, 1:, 1:], atol=1e-5 * np.abs(ball).max() + 1e-6)


# --- sets


def with_noise(source, share: float, seed: int = 7) -> tuple[ArraySource, np.ndarray]:
    n = len(source.particles)
    rng = np.random.default_rng(seed)
    noise = rng.random(n) < share
    images = source.read(np.arange(n)).copy()
    images[noise] = rng.normal(size=(int(noise.sum()), *images.shape[1:]))
    made = ArraySource(images, source.particles)
    made.truth = getattr(source, "truth", None)
    return made, noise


def test_noise_is_a_class_of_its_own(tmp_path):
    source, noise = with_noise(two_states(), 0.3)
    model = classify(request_for(source, tmp_path, junk=True), Context())
    junk = model.assigned(True) == 3
    assert junk[noise].mean() > 0.97 and junk[~noise].mean() < 0.01
    assert accuracy_of_rest(model.assigned(True), noise) > 0.93


def accuracy_of_rest(assigned: np.ndarray, noise: np.ndarray) -> float:
    state = two_states().state[~noise]
    return max(float((assigned[~noise] == 1 + (state ^ swap)).mean()) for swap in (0, 1))


def test_a_clean_set_with_few_rare_views_loses_none(tmp_path):
    views = Views("preferred", fraction=0.97)
    source = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 300, snr_db=-8.0, views=views, shift_sd_A=4.0, seed=2))
    model = classify(request_for(source, tmp_path, symmetry="C3", classes=1, junk=True), Context())
    assert (model.assigned(True) == 2).sum() == 0
    assert model.particle.mean() > 0.97


def refine_with_junk(source, folder: Path, **settings):
    folder.mkdir(exist_ok=True)
    return NativeEngine().refine(refine_request(source, folder, junk=True, **settings), Context())


def test_a_refinement_finds_noise(tmp_path):
    clean = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 200, snr_db=-5.0, shift_sd_A=4.0, seed=3))
    source, noise = with_noise(clean, 0.25)
    result = refine_with_junk(source, tmp_path / "a", max_iterations=3)
    junk = result.particles.results["cryoisoJunkProbability"] > 0.5
    assert junk[noise].mean() > 0.85 and junk[~noise].mean() < 0.03
    # resumed after its second iteration: the same bits
    refine_with_junk(source, tmp_path / "b", max_iterations=2)
    request = refine_request(source, tmp_path / "b", junk=True, max_iterations=3)
    NativeEngine().refine(replace(request, resume=True), Context())
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert one["refine.json"] == two["refine.json"] and one["half1.mrc"] == two["half1.mrc"]


def test_junk_switched_off_changes_nothing(tmp_path):
    source = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 80, snr_db=-3.0, seed=3))
    result = NativeEngine().refine(refine_request(source, tmp_path, max_iterations=1), Context())
    assert "cryoisoJunkProbability" not in result.particles.results
    assert '"junk"' not in (tmp_path / "refine.json").read_text()


def test_more_junk_than_sets_have_is_a_warning():
    assert "330 of 700 images" in too_much_junk({"count": 330}, 700)
    assert too_much_junk({"count": 140}, 700) == ""


def test_only_the_native_engine_looks_for_junk():
    job = parse_job({
        "particles": {"file": "a.star"}, "reference": {"file": "b.mrc"}, "refine": {"engine": "relion", "junk": True},
    })  # fmt: skip
    with pytest.raises(UsageError, match=r"refine\.junk"):
        require_engine(job)
