"""The Wiener-weighted map of both half-sets: its numbers, what it gains on uneven views, and the same bits on ranks."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpi_helper import run_mpi

from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import power_spectrum
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.views import Views
from cryoiso.refine.full_map import end_of, joined, reconstruct_full
from cryoiso.refine.reconstruct import half_sums, reconstruct_halves

BOX, PIXEL = 32, 5.0


def particles(n: int, snr_db: float, views: Views, seed: int = 2):
    return simulate(phantom_map(BOX, PIXEL, 12.0), n, snr_db=snr_db, views=views, seed=seed)


def ball(_=None) -> np.ndarray:
    return sphere_mask(BOX, 11.0, 3.0).numpy()


def full(source, comm=None, **more):
    return reconstruct_full(source, source.particles, comm or Context(), ball, symmetry="C3", **more)


@pytest.fixture(scope="module")
def top_views():
    return particles(400, -6.0, Views("preferred", 0.97, 30.0))


def test_uneven_views_do_not_drown_the_weighted_map(top_views):
    """The plain mean is full of the noise of directions that few images saw; half-maps stay as they were."""
    made, truth = full(top_views), top_views.volume.data
    plain = reconstruct_halves(top_views, top_views.particles, Context(), symmetry="C3")
    assert all(np.array_equal(made.halves[h].data, plain[h].data) for h in (1, 2))
    mean = (plain[1].data + plain[2].data) / 2
    likeness = [float(np.corrcoef((m * ball()).ravel(), (truth * ball()).ravel())[0, 1])
                for m in (mean, made.weighted.data)]  # fmt: skip
    assert likeness[1] > likeness[0] + 0.05 and likeness[1] > 0.9
    curves = [fsc(m, truth, ball())[1 : end_of(made.fsc) + 1].mean() for m in (mean, made.weighted.data)]
    assert curves[1] > curves[0] + 0.1


def test_even_views_are_weighted_by_what_the_half_maps_agree_on():
    """Where all directions were measured alike the filter of the whole set is 2 R / (1 + R)."""
    made = full(particles(1000, -16.0, Views("uniform")))
    mean = (made.halves[1].data + made.halves[2].data) / 2
    shells = np.arange(3, min(end_of(made.fsc), 13))
    ratio = np.sqrt(power_spectrum(made.weighted.data, dims=3) / power_spectrum(mean, dims=3))[shells]
    expected = (2 * made.fsc / (1 + made.fsc))[shells]
    assert expected.min() < 0.8  # there is something to weigh
    np.testing.assert_allclose(ratio, expected, atol=0.06)


def test_nothing_is_left_where_the_half_maps_do_not_correlate():
    noise = particles(300, -40.0, Views("uniform"))
    made = full(noise)
    last = end_of(made.fsc)
    assert last < BOX // 2
    power = power_spectrum(made.weighted.data, dims=3)
    assert power[last + 1 :].max() < 1e-9 * power_spectrum(made.halves[1].data, dims=3).max()
    assert end_of(np.array([1.0, 0.9, 0.1, 0.0, 0.4])) == 2 and end_of(np.ones(5)) == 4


def test_joined_sums_are_those_of_all_particles(top_views):
    """As if all particles were of one half, so a direction that only one half saw keeps its full weight."""
    half = dict(half_sums(top_views, top_views.particles, Context(), "C3", 2, "cpu", (1, 2), PIXEL))
    one = replace(top_views.particles, half=np.ones(len(top_views.particles), np.int8))
    whole = dict(half_sums(top_views, one, Context(), "C3", 2, "cpu", (1,), PIXEL))[1]
    both = joined(half, Context())
    assert isinstance(both, FourierSums) and both.numerator.shape == whole.numerator.shape
    assert torch.allclose(both.weight, whole.weight, rtol=1e-4, atol=1e-4 * float(whole.weight.max()))
    scale = float(whole.numerator.abs().max())
    assert float((both.numerator - whole.numerator).abs().max()) < 1e-4 * scale


SCRIPT = """
import sys
sys.path.insert(0, "tests/refine")
import test_refine_full_map as t
from cryoiso.parallel.context import get_context
comm = get_context()
made = t.full(t.particles(120, -4.0, t.Views("preferred", 0.9, 30.0)), comm)
if comm.rank == 0:
    print(comm.size, t.digest(made))
else:
    assert made.weighted is None
"""


def digest(made) -> str:
    maps = [made.weighted.data, made.halves[1].data, made.halves[2].data, made.fsc]
    return hashlib.sha256(b"".join(np.ascontiguousarray(m).tobytes() for m in maps)).hexdigest()


@pytest.mark.mpi
def test_the_same_bits_on_any_number_of_ranks():
    alone = digest(full(particles(120, -4.0, Views("preferred", 0.9, 30.0))))
    for ranks in (2, 4):
        assert run_mpi(ranks, SCRIPT).stdout.split() == [str(ranks), alone]
