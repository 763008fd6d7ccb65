"""Losses against torch.distributions and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cryoiso.nets.hvae_parts import HvaeOutput
from cryoiso.nets.losses import gaussian_kl, negative_elbo


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_is_that_of_torch_distributions():
    mu_q, log_q, mu_p, log_p = (numbers(7, 11, seed=s) for s in range(4))
    expected = kl_divergence(Normal(mu_q, log_q.exp()), Normal(mu_p, log_p.exp()))
    torch.testing.assert_close(gaussian_kl(mu_q, log_q, mu_p, log_p), expected)


def test_kl_vanishes_where_both_are_the_same_and_nowhere_else():
    mu, log_sigma = numbers(1000, seed=1), numbers(1000, seed=2)
    assert float(gaussian_kl(mu, log_sigma, mu, log_sigma).abs().max()) < 1e-12
    assert float(gaussian_kl(mu + 0.05, log_sigma, mu, log_sigma).min()) > 0
    assert float(gaussian_kl(mu, log_sigma + 0.05, mu, log_sigma).min()) > 0
    assert float(gaussian_kl(mu, log_sigma - 0.05, mu, log_sigma).min()) > 0


def test_kl_gradient():
    arguments = tuple(numbers(5, seed=s).requires_grad_() for s in range(4))
    assert torch.autograd.gradcheck(gaussian_kl, arguments)


@pytest.mark.parametrize("sd", [0.1, 0.7])
def test_negative_elbo_is_likelihood_and_kl_a_pixel(sd):
    images, mean, kl = numbers(4, 1, 9, 9), numbers(4, 1, 9, 9, seed=1), numbers(4, 3, seed=2).exp()
    terms = negative_elbo(HvaeOutput(mean, kl), images, sd, 0.25)
    likelihood = Normal(mean, sd).log_prob(images).mean()
    assert float(terms.reconstruction) == pytest.approx(-float(likelihood), rel=1e-5)
    torch.testing.assert_close(terms.kl_per_layer, (kl.mean(0) / 81).float())
    expected = float(terms.reconstruction) + 0.25 * float(kl.sum(1).mean()) / 81
    assert float(terms.loss) == pytest.approx(expected, rel=1e-5)
    assert float(terms.mean_square_error) == pytest.approx(float((images - mean).square().mean()), rel=1e-5)


def test_bound_of_a_linear_gaussian_model_is_its_entropy():
    """x = z + e with z ~ N(0, 1 - s^2), e ~ N(0, s^2): with the exact posterior the bound is the entropy of N(0, 1)."""
    sd, n = 0.3, 200_000
    x = numbers(n, 1, 1, 1)
    prior, share = math.sqrt(1 - sd**2), 1 - sd**2
    mu, log_q = share * x, torch.tensor(math.log(sd * prior))
    kl = gaussian_kl(mu, log_q, torch.zeros(()), torch.tensor(math.log(prior)))
    mean = mu + sd * prior * numbers(n, 1, 1, 1, seed=9)
    terms = negative_elbo(HvaeOutput(mean, kl.reshape(n, 1)), x, sd, 1.0)
    assert float(terms.loss) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.01)
