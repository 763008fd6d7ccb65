"""Images without a particle and scales of the images, estimated together: neither may spoil the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from likelihood_helper import true_posterior
from test_junk import with_noise
from test_refine_engine import BOX, DIAMETER_A, PIXEL_A, in_memory, request_for
from test_refine_intensity import uneven

from cryoiso.engines.native import NativeEngine
from cryoiso.parallel.context import Context
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import simulate
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.intensity import ImageTerms, Intensity, two_levels
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.junk import JUNK_COLUMN, JunkJudge
from cryoiso.refine.likelihood import score_and_norm, whiten
from cryoiso.refine.maximise import NoiseSums, accumulate

N, RADIUS = 40, 12
SPECTRA = np.ones((1, BOX // 2 + 1))


@pytest.fixture(scope="module")
def source():
    return in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), N, snr_db=-5.0, seed=3))


def sums_of(source, weight: torch.Tensor, intensity: Intensity, mode: str):
    """Sums of back-projection and noise of images whose posteriors are multiplied by ``weight``, and their terms."""
    batch = intensity.of(BatchReader(source, source.particles, PIXEL_A)._prepare(np.arange(N), RADIUS))
    posterior = replace(true_posterior(source, np.arange(N)), weight=weight)
    volume = FourierVolume.from_volume(torch.as_tensor(source.truth.data), 2, RADIUS)
    grid, noise, images = (
        SliceAccumulator.empty(BOX, RADIUS, 2),
        NoiseSums.empty(1, BOX // 2 + 1),
        ImageTerms(mode, SPECTRA),
    )
    accumulate(batch, whiten(batch, SPECTRA), posterior, volume, grid, noise, images=images)
    return grid, noise, images


def test_scales_of_one_change_no_bit(source):
    """With all scales 1 the weighted sums are those of junk alone, whether scales are estimated or not."""
    weight = torch.linspace(0, 1, N)
    alone, noise, _ = sums_of(source, weight, Intensity.ones(N), "none")
    both, same_noise, images = sums_of(source, weight, Intensity.ones(N), "particle")
    assert torch.equal(alone.grid, both.grid) and alone.bound == both.bound
    np.testing.assert_array_equal(noise.power, same_noise.power)
    np.testing.assert_allclose(images._found[0][1][:, 4], weight, rtol=1e-6)


def test_sums_are_weighted_by_both(source):
    """Probability p and scale a: the numerator has p a, the weight p a^2; an image with p = 0 leaves nothing."""
    one = Intensity(np.full(N, 2.0), np.ones(N))
    whole, part = (sums_of(source, torch.full((N,), p), one, "none")[0] for p in (1.0, 0.25))
    plain = sums_of(source, torch.ones(N), Intensity.ones(N), "none")[0]
    each = [one.finish() for one in (whole, part, plain)]
    for name, factor in (("numerator", 2.0), ("weight", 4.0)):
        a, b, c = (getattr(one, name) for one in each)
        scale = c.abs().max()
        assert (a - factor * c).abs().max() < 1e-5 * factor * scale
        assert (b - 0.25 * a).abs().max() < 1e-5 * factor * scale
    nothing, noise, images = sums_of(source, torch.zeros(N), one, "particle")
    assert not nothing.grid.any() and noise.power.any()
    assert not images._found[0][1][:, [0, 1, 4]].any()


def test_junk_is_judged_alike_on_any_grey_scale(source):
    """Scales twice as large with a reference half as strong: the same facts, bit for bit. And an image whose own scale
    is far below its micrograph's is judged with that of the micrograph."""
    run = Refinement(request_for(source, None), Context(), "cpu", DIAMETER_A)
    batch = BatchReader(source, source.particles, PIXEL_A)._prepare(np.arange(N), RADIUS)
    posterior = true_posterior(source, np.arange(N))
    pose = posterior.best_rotation, posterior.best_shift_px

    def facts(factor: float, intensity: Intensity) -> np.ndarray:
        map_ = (source.truth.data / factor).astype(np.float32)
        volume = FourierVolume.from_volume(torch.as_tensor(map_), 2, RADIUS)
        judge = JunkJudge.of(map_, PIXEL_A, volume, run.cones, None, None)
        white = whiten(intensity.of(batch), SPECTRA)
        score, norm = score_and_norm(white, volume, *pose)
        return judge.facts(white, score, norm, np.zeros(N), pose[1], intensity.expectation(np.arange(N)))

    two = facts(2.0, Intensity(np.full(N, 2.0), np.ones(N)))
    equal = facts(1.0, Intensity.ones(N))
    np.testing.assert_array_equal(two, equal)
    low = facts(1.0, Intensity(np.full(N, 0.25), np.ones(N), np.ones(N), np.full(N, 0.1)))
    np.testing.assert_allclose(low[:, [0, 1, 3]], equal[:, [0, 1, 3]], rtol=1e-4, atol=1e-3)
    assert (low[:, 4] == 0.1).all()


def test_images_without_a_particle_do_not_count_for_the_variances():
    """A fifth of the images measure nothing, as their probability says: the spread is that of the others."""
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(30), 40)
    error, shown = rng.uniform(0.1, 0.3, 1200), np.where(np.arange(1200) % 5 == 0, 1e-4, 1.0)
    true = 1 + rng.normal(0, 0.2, 30)[group] + rng.normal(0, 0.15, 1200)
    values = np.where(shown > 0.5, true, 0.0) + error * rng.normal(size=1200)
    mean, within, each = two_levels(values, shown / error**2, group, shown)
    assert within == pytest.approx(0.15**2, rel=0.25)
    real = shown > 0.5
    alone = two_levels(values[real], error[real] ** -2, group[real], np.ones(real.sum()))
    np.testing.assert_allclose(each[real], alone[2], atol=2e-3)
    np.testing.assert_allclose(mean[real], alone[0], atol=2e-3)
    assert np.abs(each - mean)[~real].max() < 0.01, "an image without a particle has its micrograph's scale"
    doubtful = np.where(real, 1.0, 0.1)  # that it shows none is hardly ever certain
    mean, _, each = two_levels(values, doubtful / error**2, group, doubtful)
    assert np.abs(each - mean)[~real].max() < 0.15


def test_a_refinement_with_both_finds_noise_and_scales(tmp_path):
    clean, scale, _ = uneven(240, snr_db=-5.0)
    mixed, noise = with_noise(clean, 0.25)
    mixed.particles = clean.particles
    request = request_for(mixed, tmp_path, junk=True, scale="particle", max_iterations=3)
    found = NativeEngine().refine(request, Context()).particles
    junk = found.results[JUNK_COLUMN] > 0.5
    assert junk[noise].mean() > 0.95 and junk[~noise].mean() < 0.03
    assert np.corrcoef(found.signal_scale[~noise], scale[~noise])[0, 1] > 0.9
    sure = noise & (found.results[JUNK_COLUMN] > 0.95)
    assert sure.sum() > 40
    assert found.signal_scale[sure].min() > 0.4, "noise has the scale of its micrograph, not one of zero"
