"""Statistics of generated images: known distributions, independent formulas, and that blocks add up."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.metrics import imagestats
from cryoiso.metrics.imagestats import compare_images, histograms, image_statistics, image_sums, kl_divergence
from cryoiso.physics.noise import colour_noise, noise_spectrum
from cryoiso.physics.simulation import image_to_background_db

BOX, PIXEL_A, RADIUS_PX = 64, 3.0, 20.0


def white(n: int, seed: int, box_px: int = BOX) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, box_px, box_px), np.float32)


def coloured(n: int, seed: int) -> np.ndarray:
    import torch

    return colour_noise(torch.from_numpy(white(n, seed)), noise_spectrum(BOX, "coloured")).numpy()


@pytest.fixture(scope="module")
def alike():
    return compare_images(white(200, 1), white(200, 2), PIXEL_A, RADIUS_PX)


def test_histogram_is_numpys_with_the_ends_clipped():
    images = 2 * white(3, 0).astype(np.float64)
    images[0, 0, :3] = (4.0, -4.0, 100.0)
    expected = [np.histogram(np.clip(x, -4, 4), bins=1024, range=(-4, 4))[0] for x in images]
    np.testing.assert_array_equal(histograms(images), expected)
    assert histograms(images[:0]).shape == (0, 1024)


def test_divergence_of_two_gaussians_is_the_formula():
    """KL(N(0, s) || N(m, t)) = ln(t/s) + (s^2 + m^2) / 2t^2 - 1/2, and the two directions differ."""
    rng = np.random.default_rng(3)
    s, m, t = 0.8, 0.3, 1.0
    p, q = (histograms(rng.normal(mean, sd, (1, 1500, 1500)))[0] for mean, sd in ((0, s), (m, t)))
    forth, back = kl_divergence(p, q), kl_divergence(q, p)
    assert forth == pytest.approx(np.log(t / s) + (s**2 + m**2) / (2 * t**2) - 0.5, rel=0.01)
    assert back == pytest.approx(np.log(s / t) + (t**2 + m**2) / (2 * s**2) - 0.5, rel=0.02)
    assert kl_divergence(p, p) == 0
    assert np.isfinite(kl_divergence(p, np.zeros(1024)))  # empty bins


def test_two_draws_of_white_noise_are_alike(alike):
    assert alike["kl_nats"] == pytest.approx(alike["kl_real_nats"], rel=0.02) and alike["kl_nats"] > 0.05
    assert alike["kl_pooled_nats"] < 0.003
    assert alike["n_real"] == alike["n_generated"] == alike["pairs"] == 200 and alike["left_out"] == [0, 0]
    assert alike["snr_real_dB"] == pytest.approx(0, abs=0.05)
    ratio, sd = np.array(alike["log_ratio"][1:]), np.array(alike["log_ratio_sd"][1:])
    assert np.mean((ratio / sd) ** 2) == pytest.approx(1, abs=0.9)  # the stated error is the error
    assert abs(alike["finer"]["largest"]) < 0.1
    np.testing.assert_allclose(alike["power_real"][3:], 1, atol=0.1)
    assert sum(alike["histogram"]["real"]) == pytest.approx(1)
    assert len(alike["histogram"]["edges"]) == len(alike["histogram"]["real"]) + 1


def test_a_spectrum_that_is_too_smooth_is_found():
    """White against coloured noise of one variance: one-point numbers see nothing, spectra see everything."""
    result = compare_images(white(100, 4), coloured(100, 5), PIXEL_A, RADIUS_PX)
    assert result["kl_pooled_nats"] < 0.01
    expected = np.log(noise_spectrum(BOX, "coloured"))
    np.testing.assert_allclose(result["log_ratio"][2:-1], expected[2:-1], atol=0.12)
    assert result["log_ratio"][0] is None
    fine, coarse = result["finer"], result["coarser"]
    first = int(BOX * PIXEL_A / 20) + 1  # the first shell beyond 20 Å
    assert fine["largest"] == result["log_ratio"][first] and fine["at_A"] == pytest.approx(BOX * PIXEL_A / first)
    assert coarse["largest"] == max(result["log_ratio"][1:first]) and coarse["at_A"] >= 20
    end = compare_images(white(100, 4), coloured(100, 5), PIXEL_A, RADIUS_PX, beyond_A=6.5)["finer"]
    assert end["largest"] == pytest.approx(expected[-1], abs=0.05)  # signed: too little of the finest
    assert 0 < fine["rms"] < abs(fine["largest"])
    assert [b["to_A"] for b in result["bands"]] == [40, 20, 10, 5, 0][: len(result["bands"])]
    assert result["bands"][0]["log_ratio"] > 0 > result["bands"][-1]["log_ratio"]


def test_a_scale_shows_in_every_number():
    result = compare_images(white(50, 6), 1.2 * white(50, 7), PIXEL_A, RADIUS_PX)
    np.testing.assert_allclose([b["log_ratio"] for b in result["bands"]], 2 * np.log(1.2), atol=0.05)
    assert result["kl_pooled_nats"] > 0.02 and result["kl_nats"] > result["kl_real_nats"] + 0.02


def test_signal_to_noise_is_the_number_of_simulate():
    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    images = white(40, 8) + 2 * np.exp(-(x**2 + y**2) / 100).astype(np.float32)
    result = compare_images(images, white(60, 9), PIXEL_A, RADIUS_PX)
    assert result["snr_real_dB"] == pytest.approx(image_to_background_db(images, RADIUS_PX), abs=1e-9)
    assert result["snr_real_dB"] > 0.5 > result["snr_generated_dB"]


@pytest.mark.parametrize("box_px", [31, 32])
def test_blocks_add_up_to_the_whole(monkeypatch, box_px):
    real, generated = white(26, 10, box_px), 0.9 * white(30, 11, box_px)
    whole = image_sums(real, generated, 10.0)
    monkeypatch.setattr(imagestats, "BLOCK_PIXELS", 5 * box_px**2)  # blocks inside, of 4 images
    np.testing.assert_allclose(image_sums(real, generated, 10.0), whole, rtol=1e-9)
    cuts = (0, 6, 20, 30)  # as three ranks would
    parts = [image_sums(real[a:b], generated[a:b], 10.0) for a, b in pairwise(cuts)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-9)
    result = image_statistics(sum(parts), box_px, PIXEL_A)
    assert (result["n_real"], result["n_generated"], result["pairs"]) == (26, 30, 26)


def test_bad_images_are_left_out_and_counted():
    real, generated = white(10, 12), white(10, 13)
    spoilt = generated.copy()
    spoilt[3, 5, 5], spoilt[7] = np.nan, 0.5
    result = compare_images(real, spoilt, PIXEL_A, RADIUS_PX)
    assert result["left_out"] == [0, 2] and result["n_generated"] == 8 and result["pairs"] == 8
    good = np.delete(generated, [3, 7], axis=0)
    clean = compare_images(real, good, PIXEL_A, RADIUS_PX)
    assert result["log_ratio"] == pytest.approx(clean["log_ratio"], nan_ok=True)


@pytest.mark.parametrize("counts", [(0, 0), (4, 0), (0, 4), (1, 1)])
def test_too_few_images_give_nulls_that_json_holds(counts):
    result = compare_images(white(counts[0], 1), white(counts[1], 2), PIXEL_A, RADIUS_PX)
    json.dumps(result, allow_nan=False)
    assert (result["n_real"], result["n_generated"]) == counts
    if min(counts) == 0:
        assert result["kl_nats"] is None and result["finer"]["largest"] is None


def test_wrong_shapes_are_refused():
    with raises_code("arrays-do-not-fit", InputError, match="cannot be compared"):
        image_sums(white(2, 1, 32), white(2, 1, 34), 10.0)
    with raises_code("arrays-do-not-fit", InputError, match="sums of images of this box"):
        image_statistics(np.zeros(7), BOX, PIXEL_A)
