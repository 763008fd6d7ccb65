"""References after a round: regularised by the FSC, completed by a prior where the images measured nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cryoiso.parallel.context import Context
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.views import Views
from cryoiso.refine.reconstruct import half_sums, reconstruct_halves, reconstruct_references

BOX, PIXEL = 32, 5.0


@pytest.fixture(scope="module")
def top_views():
    """Particles that are all seen from within 30 degrees of the axis."""
    return simulate(phantom_map(BOX, PIXEL, 15.0), 300, snr_db=0.0, views=Views("preferred", 1.0, 30.0), seed=2)


def alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def references(source, prior=None):
    return reconstruct_references(source, source.particles, Context(), symmetry="C3", prior=prior)


def test_plain_maps_are_those_of_reconstruct_whatever_the_prior(top_views):
    expected = reconstruct_halves(top_views, top_views.particles, Context(), symmetry="C3")
    prior = {h: phantom_map(BOX, PIXEL, 15.0) for h in (1, 2)}
    for given in (None, prior):
        plain = references(top_views, given)[0]
        assert all(np.array_equal(plain[h].data, expected[h].data) for h in (1, 2))


def test_what_was_not_measured_comes_from_the_prior_and_the_rest_from_the_images(top_views):
    truth = top_views.volume
    other = replace(truth, data=phantom_map(BOX, PIXEL, 15.0, variant=1).data * np.float32(7.0))
    damped, complete = references(top_views)[1], references(top_views, {1: truth, 2: truth})[1]
    homologous = references(top_views, {1: other, 2: other})[1]
    assert alike(complete[1].data, truth.data) > alike(damped[1].data, truth.data) + 0.03
    ideal = alike(other.data, truth.data)
    assert alike(homologous[1].data, truth.data) > max(ideal, alike(damped[1].data, truth.data))
    # the prior's grey scale is fitted, so it does not matter
    dim = {h: replace(truth, data=truth.data / 9) for h in (1, 2)}
    again = references(top_views, dim)[1]
    assert np.allclose(again[1].data, complete[1].data, atol=1e-3 * np.abs(truth.data).max())


def test_a_half_knows_the_other_by_the_curve_only(top_views):
    prior = {1: top_views.volume, 2: phantom_map(BOX, PIXEL, 15.0, variant=1)}
    one = references(top_views, prior)[1]
    swapped = references(top_views, {1: prior[1], 2: prior[1]})[1]
    assert np.array_equal(one[1].data, swapped[1].data)
    assert not np.allclose(one[2].data, swapped[2].data)


@pytest.mark.parametrize("box", [32, 31])
def test_sums_without_images_are_completed_to_the_prior_itself(box):
    volume = torch.from_numpy(phantom_map(box, PIXEL, 15.0).data)
    source = simulate(phantom_map(box, PIXEL, 15.0), 8, snr_db=0.0)
    sums = dict(half_sums(source, source.particles, Context(), "C1", 2, "cpu", (1, 2), PIXEL))[1]
    empty = FourierSums(torch.zeros_like(sums.numerator), torch.ones_like(sums.weight), box, 2, sums.radius_px)
    made = empty.completed(volume, torch.full((box,), 1e6)).reconstruct()
    assert float((made - volume).abs().max()) < 0.02 * float(volume.abs().max())
    nothing = sums.completed(volume, torch.zeros(box))
    assert torch.equal(nothing.numerator, sums.numerator) and torch.equal(nothing.weight, sums.weight)
