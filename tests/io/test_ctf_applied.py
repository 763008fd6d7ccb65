"""Phase-flipped and premultiplied images give the maps, poses and noise spectra of the same images untouched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ctf_applied_helper import KINDS, of_kind, with_flags

from cryoiso.core.config import RefineSection
from cryoiso.core.protocols import RefineRequest
from cryoiso.engines.native import NativeEngine
from cryoiso.io.mrc import read_map
from cryoiso.io.sources import ArraySource
from cryoiso.methods.micelle.protein import protein_mask
from cryoiso.methods.micelle.recover import MicelleSettings, recover_micelle_halves
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.physics.contrast_transfer import ctf_for
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import make_particles, simulate
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.maximise import NoiseSums
from cryoiso.refine.reconstruct import reconstruct_halves

BOX, PIXEL_A = 32, 6.0


@pytest.fixture(scope="module")
def truth():
    return phantom_map(BOX, PIXEL_A, 14.0)


@pytest.fixture(scope="module")
def plain(truth):
    """(source, images) as the microscope gave them: -3 dB, coloured noise."""
    source = simulate(truth, 240, snr_db=-3.0, shift_sd_A=6.0, noise="coloured", seed=5)
    images = source.read(np.arange(240))
    return ArraySource(images, source.particles), images


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_flipped_images_have_the_absolute_value_of_the_ctf():
    particles = make_particles(5, BOX, PIXEL_A, seed=3)
    c = ctf_for(particles, None, BOX)
    assert float(c.min()) < -0.9
    assert torch.equal(ctf_for(with_flags(particles, "flipped"), None, BOX), c.abs())
    for kind in ("premultiplied", "both flags"):
        assert torch.equal(ctf_for(with_flags(particles, kind), None, BOX), c)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_equal_those_of_untouched_images(plain, kind):
    source, images = plain
    expected = reconstruct_halves(source, source.particles, Context(), symmetry="C3")
    changed = of_kind(images, source.particles, kind)
    found = reconstruct_halves(changed, changed.particles, Context(), symmetry="C3")
    for half in (1, 2):
        assert relative(found[half].data, expected[half].data) < 2e-6
    # and they are wrong where nobody says what was done to the images
    blind = reconstruct_halves(changed, source.particles, Context(), symmetry="C3")
    assert relative(blind[1].data, expected[1].data) > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_equals_that_of_untouched_images(plain, kind):
    source, images = plain
    changed = of_kind(images, source.particles, kind)
    sigma2 = np.linspace(0.5, 2, BOX // 2 + 1)[None]
    expected = whiten(BatchReader(source, source.particles, PIXEL_A).read(np.arange(90), 15), sigma2)
    batch = BatchReader(changed, changed.particles, PIXEL_A).read(np.arange(90), 15)
    found = whiten(batch, np.repeat(sigma2, len(changed.particles.groups), 0))
    assert relative(found.data.numpy(), expected.data.numpy()) < 2e-6
    assert relative(found.weight.numpy(), expected.weight.numpy()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_noise_spectra(plain, kind):
    """Flipped: the same sums. Premultiplied: sum |y - c^2 P|^2 / sum c^2, here against the untouched residuals."""
    source, images = plain
    changed = of_kind(images, source.particles, kind)
    rows = np.arange(120)
    before = BatchReader(source, source.particles, PIXEL_A).read(rows, 15)
    batch = BatchReader(changed, changed.particles, PIXEL_A).read(rows, 15)
    model = 0.3 * before.coefficients.roll(1, 0) * before.ctf.abs()  # any model will do

    def spectra(b, residual):
        noise = NoiseSums.empty(len(changed.particles.groups), BOX // 2 + 1)
        noise.add(b, residual)
        return noise.spectra(np.full((len(changed.particles.groups), BOX // 2 + 1), -1.0))

    found = spectra(batch, (batch.coefficients - model * torch.sign(batch.ctf * before.ctf)).abs().square())
    residual = (before.coefficients - model).abs().square().numpy().astype(np.float64)
    c2 = before.ctf.square().numpy().astype(np.float64)
    for g, group in enumerate(changed.particles.groups):
        mine = changed.particles.optics[rows] == g
        for shell in range(1, 16):
            inside = before.disc.shell == shell
            weight = c2[mine][:, inside] if group.ctf_premultiplied else np.ones_like(c2[mine][:, inside])
            wanted = (weight * residual[mine][:, inside]).sum() / weight.sum()
            np.testing.assert_allclose(found[g, shell], wanted, rtol=1e-5)
        assert found[g, 0] == -1 and found[g, 16] == -1


def test_the_noise_of_premultiplied_images_is_that_of_the_microscope(truth):
    """Pure noise of variance 1, multiplied by c: 1 in every shell, also where the CTF is small."""
    particles = make_particles(600, BOX, PIXEL_A, seed=8)
    images = np.random.default_rng(2).normal(size=(600, BOX, BOX)).astype(np.float32)
    changed = of_kind(images, particles, "premultiplied")
    batch = BatchReader(changed, changed.particles, PIXEL_A).read(np.arange(600), 15)
    noise = NoiseSums.empty(1, BOX // 2 + 1)
    noise.add(batch, batch.coefficients.abs().square())
    np.testing.assert_allclose(noise.spectra(np.ones((1, BOX // 2 + 1)))[0, 1:16], 1, rtol=0.08)
    # what was cut out of a larger premultiplied image leaks into the zeros of the CTF; it does not blow up
    large = make_particles(200, 2 * BOX, PIXEL_A, seed=8)
    pixels = np.random.default_rng(3).normal(size=(200, 2 * BOX, 2 * BOX)).astype(np.float32)
    cut = np.ascontiguousarray(of_kind(pixels, large, "premultiplied").read(np.arange(200))[:, 16:48, 16:48])
    small = with_flags(make_particles(200, BOX, PIXEL_A, seed=8), "premultiplied")
    batch = BatchReader(ArraySource(cut, small), small, PIXEL_A).read(np.arange(200), 15)
    noise = NoiseSums.empty(1, BOX // 2 + 1)
    noise.add(batch, batch.coefficients.abs().square())
    np.testing.assert_allclose(noise.spectra(np.ones((1, BOX // 2 + 1)))[0, 6:16], 1, rtol=0.1)


def refined(given: ArraySource, reference, folder):
    """Poses, and the half-maps by number, of two iterations from a reference at 30 Å."""
    blind = ArraySource(given.read(np.arange(240)), replace(given.particles, rotation=None, shift_A=None))
    settings = RefineSection(max_iterations=2)
    request = RefineRequest(
        source=blind, reference=reference, symmetry="C3", folder=folder, settings=settings, seed=1, diameter_A=150.0,
        lowpass_A=30.0,
    )  # fmt: skip
    result = NativeEngine().refine(request, Context())
    return result.particles.rotation, {half: read_map(result.half_maps[half]).data for half in (1, 2)}


@pytest.fixture(scope="module")
def refined_untouched(plain, truth, tmp_path_factory):
    return refined(plain[0], truth, tmp_path_factory.mktemp("untouched"))


@pytest.mark.parametrize("kind", ["flipped", "premultiplied", "mixed"])
def test_a_refinement_finds_the_same_poses_and_maps(truth, plain, refined_untouched, kind, tmp_path):
    source, images = plain
    rotation, maps = refined_untouched
    found, found_maps = refined(of_kind(images, source.particles, kind), truth, tmp_path)
    c3 = point_group("C3")
    assert np.median(angular_distance_deg(rotation, source.particles.rotation, c3)) < 4
    apart = angular_distance_deg(found, rotation, c3)
    assert np.median(apart) < 0.6 and (apart > 5).mean() < 0.03
    for half in (1, 2):
        assert fsc(found_maps[half], maps[half])[1:10].min() > 0.995
        to_truth = [fsc(m[half], truth.data)[1:10] for m in (found_maps, maps)]
        np.testing.assert_allclose(*to_truth, atol=0.02)


@pytest.mark.parametrize("kind", ["flipped", "premultiplied"])
def test_the_micelle_is_the_same(truth, plain, kind):
    source, images = plain
    mask = protein_mask(truth, None, "truth")
    settings = MicelleSettings("C3", lowpass_A=20.0, max_iterations=4, prior_sd=0.0)  # least squares alone
    given = of_kind(images, source.particles, kind)
    one, two = (recover_micelle_halves(s, s.particles, truth, mask, Context(), settings) for s in (source, given))
    for half in (1, 2):
        assert two.halves[half].grey_scale == pytest.approx(one.halves[half].grey_scale, rel=1e-5)
        assert two.halves[half].noise_variance == pytest.approx(one.halves[half].noise_variance, rel=0.05)
        assert relative(two.halves[half].micelle, one.halves[half].micelle) < 1e-4
