"""Local resolution against the one that a map was made with."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from errors_helper import raises_code
from scipy import fft
from scipy.ndimage import gaussian_filter1d

from cryoiso.core.errors import InputError
from cryoiso.metrics.fsc_curve import fsc, resolution_at
from cryoiso.metrics.windowed_fsc import local_resolution

BOX, PIXEL_A = 64, 2.0


def gradient_pair(worst_A, best_A, seed=0):
    """Half-maps of one white signal with noise whose local FSC at frequency f and height z is 1/(1 + 6 (f/fc(z))^4),
    0.143 at fc; returned with 1/fc (D,), which goes from worst to best and back along z."""
    rng = np.random.default_rng(seed)
    z = np.arange(BOX)
    middle, swing = (1 / worst_A + 1 / best_A) / 2, (1 / best_A - 1 / worst_A) / 2
    cut = middle - swing * np.cos(2 * np.pi * z / BOX)
    k = np.fft.fftfreq(BOX, PIXEL_A)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + np.fft.rfftfreq(BOX, PIXEL_A) ** 2)
    signal = rng.standard_normal((BOX,) * 3)
    edges = np.linspace(0, radius.max() * 1.001, 41)
    halves = []
    for _ in (1, 2):
        noise, total = fft.rfftn(rng.standard_normal((BOX,) * 3)), signal.copy()
        for low, high in pairwise(edges):
            part = fft.irfftn(np.where((radius >= low) & (radius < high), noise, 0), s=signal.shape)
            total += (np.sqrt(6) * ((low + high) / 2 / cut) ** 2)[:, None, None] * part
        halves.append(total.astype(np.float32))
    return halves, 1 / cut


def in_window(truth_A, window_A):
    """What a window sees of that: noise adds by its power, so that (1/fc)^4 is averaged."""
    sigma_px = window_A / 2.355 / PIXEL_A
    return gaussian_filter1d(truth_A**4, sigma_px, mode="wrap") ** 0.25


@pytest.fixture(scope="module")
def gradient():
    return gradient_pair(11.0, 5.0)


@pytest.mark.parametrize("window_A", (20.0, 25.0))
def test_a_known_gradient_is_found(gradient, window_A):
    halves, truth_A = gradient
    found = local_resolution(*halves, PIXEL_A, window_A=window_A)
    expected = in_window(truth_A, window_A)
    fair = expected < 0.95 * found.coarsest_A
    error = np.log(found.resolution_A[fair] / expected[fair, None, None])
    assert abs(np.median(error)) < 0.05 and np.sqrt(np.mean(error**2)) < 0.10
    plane = np.median(found.resolution_A, axis=(1, 2))
    assert np.corrcoef(plane, truth_A)[0, 1] > 0.97
    assert found.resolution_A.max() <= found.coarsest_A * 1.001
    assert found.resolution_A.min() >= 2 * PIXEL_A * 0.999


def test_frames_and_grey_scales_do_not_matter(gradient):
    halves, _ = gradient
    plain = local_resolution(*halves, PIXEL_A).resolution_A
    scaled = local_resolution(3 * halves[0] + 7, 0.2 * halves[1] - 1, PIXEL_A).resolution_A
    assert np.allclose(scaled, plain, rtol=1e-3)
    rolled = local_resolution(*(np.roll(h, 16, 0) for h in halves), PIXEL_A).resolution_A
    difference = np.abs(np.log(np.roll(rolled, -16, 0) / plain))
    assert np.median(difference) < 0.01, "moved by whole voxels, read between others on the coarse grid"


def test_even_noise_gives_one_resolution_and_that_is_the_global_one():
    rng = np.random.default_rng(3)
    k = np.fft.fftfreq(BOX, PIXEL_A)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + np.fft.rfftfreq(BOX, PIXEL_A) ** 2)
    signal = fft.irfftn(
        fft.rfftn(rng.standard_normal((BOX,) * 3)) / np.sqrt(6 * (radius * 7.0) ** 6 + 1e-9), s=(BOX,) * 3
    )
    halves = [(signal + rng.standard_normal((BOX,) * 3)).astype(np.float32) for _ in (1, 2)]
    whole_A = resolution_at(fsc(*halves), 0.143, BOX, PIXEL_A)
    found = local_resolution(*halves, PIXEL_A, window_A=25.0)
    assert np.median(found.resolution_A) == pytest.approx(whole_A, rel=0.04)
    assert np.log(found.resolution_A).std() < 0.12
    stricter = local_resolution(*halves, PIXEL_A, window_A=25.0, threshold=0.5)
    assert (stricter.resolution_A >= found.resolution_A - 1e-5).all()


def test_noise_is_nowhere_resolved():
    rng = np.random.default_rng(5)
    found = local_resolution(*(rng.standard_normal((BOX,) * 3).astype(np.float32) for _ in (1, 2)), PIXEL_A)
    summary = found.summary()
    assert summary["share_at_coarsest"] > 0.95 and summary["percentiles_A"]["5"] > 0.9 * found.coarsest_A


def test_the_mask_chooses_what_is_summed_up(gradient):
    halves, truth_A = gradient
    mask = np.zeros((BOX,) * 3)
    mask[28:37] = 1
    inside = local_resolution(*halves, PIXEL_A).summary(mask)["percentiles_A"]["50"]
    assert inside == pytest.approx(in_window(truth_A, 25.0)[32], rel=0.06)


def test_an_impossible_window_is_refused(gradient):
    for window_A in (3.0, 100.0):
        with raises_code("option-out-of-range", InputError):
            local_resolution(*gradient[0], PIXEL_A, window_A=window_A)
