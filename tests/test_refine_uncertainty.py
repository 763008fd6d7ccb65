"""A likelihood that takes into account how well each coefficient of the reference is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryoiso.core.errors import CryoisoError
from cryoiso.physics.fourier import disc
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.project import FourierVolume
from cryoiso.physics.so3 import random_rotations
from cryoiso.refine.likelihood import Whitened, local_scores, local_scores_torch, shift_factors
from cryoiso.refine.uncertainty import MARGIN, ReferenceVariance, error_variance, reference_variance

BOX, RADIUS = 32, 8
RNG = np.random.default_rng(5)


def tensor(a) -> torch.Tensor:
    return torch.as_tensor(np.asarray(a, np.float32))


@pytest.fixture(scope="module")
def scene():
    """Images with CTF and noise variance, a reference, its variance, and poses to score."""
    where = disc(BOX, RADIUS)
    n = RADIUS + MARGIN
    images, poses = 4, 10
    sigma2 = tensor(RNG.uniform(0.5, 2.0, where.size))
    ctf = tensor(RNG.uniform(-1, 1, (images, where.size)))
    x = torch.complex(*tensor(RNG.normal(size=(2, images, where.size))))
    white = Whitened(2 * x * ctf / sigma2, 2 * ctf.square() / sigma2, where, None)
    volume = FourierVolume.from_volume(tensor(phantom_map(BOX, 5.0, 15.0).data), 2, RADIUS)
    variance = ReferenceVariance(tensor(RNG.exponential(2.0, (2 * n + 1, 2 * n + 1, n + 1))))
    rotation = tensor(random_rotations(RNG, poses))
    particle = torch.as_tensor(RNG.integers(0, images, poses))
    shift = tensor(RNG.uniform(-2, 2, (poses, 2)))
    return where, sigma2, ctf, x, white, volume, variance, rotation, particle, shift


def test_scores_are_the_marginal_likelihood(scene):
    """Against log N(x; c P, sigma^2 + c^2 v) - log N(x; 0, sigma^2), the sum over Friedel pairs."""
    where, sigma2, ctf, x, white, volume, variance, rotation, particle, shift = scene
    found = local_scores(white, volume, particle, rotation, shift, 1.0, variance)[:, 4]  # the lattice's centre
    slices = volume.slices(rotation, where)
    v = variance.slices(rotation, tensor(where.ky), tensor(where.kx))
    model = ctf[particle] * slices / shift_factors(where, shift)
    total = sigma2 + ctf[particle].square() * v
    with_signal = -(x[particle] - model).abs().square() / total - total.log()
    noise_alone = -x[particle].abs().square() / sigma2 - sigma2.log()
    torch.testing.assert_close(found, (with_signal - noise_alone).sum(1), rtol=1e-4, atol=1e-2)


def test_kernel_and_twin_agree(scene):
    *_, white, volume, variance, rotation, particle, shift = scene
    for known in (None, variance):
        fast = local_scores(white, volume, particle, rotation, shift, 0.7, known)
        plain = local_scores_torch(white, volume, particle, rotation, shift, 0.7, known)
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=2e-2)


def test_no_variance_is_an_exact_reference(scene):
    *_, white, volume, variance, rotation, particle, shift = scene
    nothing = ReferenceVariance(torch.zeros_like(variance.grid))
    exact = local_scores(white, volume, particle, rotation, shift, 1.0)
    torch.testing.assert_close(local_scores(white, volume, particle, rotation, shift, 1.0, nothing), exact)


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_shares_of_known_weights(padding):
    """Even weights pass w / (w + 1/tau^2); weights that fall with |z| pass less along z, and k as -k."""
    h = padding * RADIUS + 2
    axis = torch.arange(-h, h + 1).float()
    even = torch.full((2 * h + 1, 2 * h + 1, h + 1), 3.0)
    term = torch.ones(RADIUS + 1)
    sums = FourierSums(torch.zeros_like(even, dtype=torch.complex64), even, BOX, padding, RADIUS)
    share = sums.passed_shares(term)
    assert share.shape == (2 * RADIUS + 1, 2 * RADIUS + 1, RADIUS + 1)
    np.testing.assert_allclose(share, 0.75, rtol=1e-6)
    falling = (3.0 / (1 + axis.abs() / padding))[:, None, None].expand_as(even)
    sums = FourierSums(sums.numerator, falling.contiguous(), BOX, padding, RADIUS)
    share = sums.passed_shares(term).numpy()
    np.testing.assert_allclose(share, share[::-1], rtol=1e-5)
    np.testing.assert_allclose(share[RADIUS + 4, RADIUS, 0], 3 / 5 / (3 / 5 + 1), rtol=0.05)
    assert (np.diff(share[RADIUS:, RADIUS, 3]) < 0).all()
    uneven = FourierSums(sums.numerator, torch.rand_like(even), BOX, padding, RADIUS)
    twin = uneven.passed_shares_torch(term, uneven.floor(True))
    np.testing.assert_allclose(uneven.passed_shares(term), twin, rtol=1e-5)


def test_error_of_what_was_and_was_not_measured():
    """Sums of a signal of known power and noise: the error of the filtered coefficients is what was predicted, where
    directions were measured well and where they were not at all."""
    h, tau2 = 2 * RADIUS + 2, 3.0
    shape = (2 * h + 1, 2 * h + 1, h + 1)
    weight = tensor(np.where(RNG.random(shape) < 0.5, 2.0, 1e-4))
    signal = torch.complex(*tensor(RNG.normal(size=(2, *shape)))) * np.sqrt(tau2 / 2)
    noise = torch.complex(*tensor(RNG.normal(size=(2, *shape)))) * np.sqrt(0.5)
    sums = FourierSums(weight * signal + weight.sqrt() * noise, weight, BOX, 2, RADIUS)
    term = torch.full((RADIUS + 1,), 1 / tau2)
    np.testing.assert_allclose(sums.signal_power(term)[3:], tau2, rtol=0.1)
    even = FourierSums(sums.numerator, torch.full(shape, 2.0), BOX, 2, RADIUS)
    share = 2 / (2 + 1 / tau2)
    for inside in (1.0, 0.0):  # a reference without solvent keeps little of the noise
        reference = np.full((BOX,) * 3, inside, np.float32)
        found = error_variance(even, term, reference)[RADIUS + 4, RADIUS, 2]
        power = float(even.signal_power(term)[round(np.hypot(4, 2))])
        assert found == pytest.approx(power * (1 - share) * (1 - share + inside * share), rel=1e-4)
    unseen = FourierSums(torch.zeros(shape, dtype=torch.complex64), torch.full(shape, 1e-7), BOX, 2, RADIUS)
    assert float(unseen.passed_shares(term).max()) < 1e-6


def test_a_search_sees_no_error_beyond_its_radius():
    error = np.ones((2 * RADIUS + 1, 2 * RADIUS + 1, RADIUS + 1), np.float32)
    grid = reference_variance(error, 5, "cpu").grid
    assert grid.shape == (2 * (5 + MARGIN) + 1, 2 * (5 + MARGIN) + 1, 5 + MARGIN + 1)
    assert float(grid.sum()) == 11 * 11 * 6
    wider = reference_variance(error, RADIUS + 6, "cpu").grid  # a search may go beyond what was measured before
    assert len(wider) == 2 * (RADIUS + 6 + MARGIN) + 1 and float(wider.sum()) == error.size


def test_a_grid_that_is_too_small_is_refused(scene):
    *_, white, volume, _, rotation, particle, shift = scene
    small = ReferenceVariance(torch.zeros(2 * RADIUS - 1, 2 * RADIUS - 1, RADIUS))
    with pytest.raises(CryoisoError, match="grid ends"):
        local_scores(white, volume, particle, rotation, shift, 1.0, small)
