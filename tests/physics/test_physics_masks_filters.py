"""Filters, masks and noise spectra: laws of Fourier space, odd and even boxes, and a real particle's mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.physics import filters, masks, noise

BOXES = [32, 33]


def white(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("dims", [2, 3])
def test_shells_and_weights_count_the_whole_transform(box, dims):
    k = np.fft.fftfreq(box) * box
    r = np.sqrt(sum(a**2 for a in np.meshgrid(*[k] * dims)))
    full = np.bincount(np.rint(r).astype(int).ravel())
    shells = filters.shell_index(box, dims)
    weights = filters.friedel_weights(box).expand(shells.shape)
    half = np.bincount(shells.numpy().ravel(), weights.numpy().ravel())
    np.testing.assert_array_equal(half, full)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("dims", [2, 3])
def test_power_spectrum_obeys_parseval_and_averages_all_coefficients(box, dims):
    x = white((box,) * dims)
    spectrum = filters.power_spectrum(x, dims)
    full = np.abs(np.fft.fftn(x, norm="ortho")) ** 2
    k = np.fft.fftfreq(box) * box
    shell = np.rint(np.sqrt(sum(a**2 for a in np.meshgrid(*[k] * dims, indexing="ij")))).astype(int)
    expected = np.bincount(shell.ravel(), full.ravel()) / np.bincount(shell.ravel())
    np.testing.assert_allclose(spectrum, expected[: box // 2 + 1], rtol=1e-4)


@pytest.mark.parametrize("box", BOXES)
def test_filters_keep_waves_below_and_remove_waves_above(box):
    pixel = 2.0
    x = np.arange(box) - box // 2
    wave = {k: np.broadcast_to(np.cos(2 * np.pi * k * x / box), (box,) * 3).astype(np.float32) for k in (3, 12)}
    both = wave[3] + wave[12] + 1
    resolution = box * pixel / 7
    low = filters.lowpass(both, pixel, resolution)
    np.testing.assert_allclose(low, wave[3] + 1, atol=1e-5)
    np.testing.assert_allclose(filters.highpass(both, pixel, resolution), wave[12], atol=1e-5)
    sharp = filters.apply_bfactor(wave[12], pixel, 50.0)
    np.testing.assert_allclose(sharp, wave[12] * np.exp(-50 / 4 * (12 / (box * pixel)) ** 2), atol=1e-5)
    curve = np.arange(box // 2 + 1.0)
    np.testing.assert_allclose(filters.apply_radial(both, curve), 3 * wave[3] + 12 * wave[12], atol=1e-4)


def test_lowpass_is_one_half_at_its_resolution():
    assert filters.lowpass_curve(64, 1.5, 64 * 1.5 / 10)[10] == pytest.approx(0.5)
    curve = filters.lowpass_curve(64, 1.5, 64 * 1.5 / 10, edge_shells=4)
    assert curve[8] == 1 and curve[12] == 0


def test_filters_do_not_move_the_map():
    """A point stays where it is, odd or even, and filtering commutes with a shift."""
    for box in BOXES:
        point = np.zeros((box,) * 3, np.float32)
        point[5, 20, box // 2] = 1
        out = filters.lowpass(point, 1.0, 6.0)
        assert np.unravel_index(out.argmax(), out.shape) == (5, 20, box // 2)
        moved = filters.lowpass(np.roll(point, 3, 1), 1.0, 6.0)
        np.testing.assert_allclose(moved, np.roll(out, 3, 1), atol=1e-7)


def test_kinds_and_dtypes_come_back_and_inputs_stay():
    x = white((8, 8, 8))
    kept = x.copy()
    out = filters.lowpass(x, 1.0, 4.0)
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    tensor = torch.from_numpy(x).double()
    assert filters.lowpass(tensor, 1.0, 4.0).dtype == torch.float64
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("box", BOXES)
def test_sphere_and_circle(box):
    hard = masks.sphere_mask(box, 10)
    assert float(hard.sum()) == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.02)
    soft = masks.sphere_mask(box, 8, 4)
    c = box // 2
    np.testing.assert_allclose(soft[c, c, c : c + 14], [1] * 9 + [0.8535534, 0.5, 0.1464466, 0, 0], atol=1e-6)
    assert torch.equal(masks.circle_mask(box, 8, 4), soft[c])
    # centred on D//2: mirrored about it the mask is itself
    inner = soft[1:, 1:, 1:] if box % 2 == 0 else soft
    assert torch.equal(inner, inner.flip(0, 1, 2))


@pytest.mark.parametrize("box", [48, 49])
def test_mask_of_a_map_encloses_a_ball_in_noise(box):
    c = box // 2
    z, y, x = np.meshgrid(*[np.arange(box) - c] * 3, indexing="ij")
    ball = (((z - 3) ** 2 + y**2 + x**2) < 9**2).astype(np.float32)
    speck = ((z + 14) ** 2 + (y - 8) ** 2 + x**2 < 2.5**2).astype(np.float32)
    noisy = ball + speck + 0.3 * white((box,) * 3)
    mask = masks.soft_mask_from_map(noisy, 2.0, lowpass_A=10, extend_A=4, soft_A=8)
    assert mask.dtype == np.float32 and mask.min() >= 0 and mask.max() <= 1
    assert mask[ball > 0].min() == 1
    assert mask[speck > 0].max() < 0.05  # specks go
    distance = np.sqrt((z - 3) ** 2 + y**2 + x**2)
    assert mask[distance > 9 + 2 + 4 + 2].max() == 0  # extent plus edge plus a pixel or two of blur
    assert 0.3 < mask[np.abs(distance - 13) < 0.5].mean() < 0.9
    assert masks.mask_diameter_A(mask, 2.0) == pytest.approx(2 * 2 * (3 + 9 + 2 + 2), abs=8)


def test_mask_with_a_threshold_out_of_reach_says_so():
    with raises_code("mask-empty", InputError):
        masks.soft_mask_from_map(white((24, 24, 24)), 2.0, threshold=100.0)


def test_mask_of_a_real_protein(reference_numbers):
    """Half-maps of haemagglutinin, one with preferred orientation: the mask holds the truth."""
    import mrcfile

    folder = reference_numbers / "halfmaps"
    truth, theirs = (mrcfile.read(folder / f"ha6wxb_{n}_64_3A.mrc.gz") for n in ("truth", "softmask"))
    for name in ("iso_half1", "top10eps10_half2"):
        mask = masks.soft_mask_from_map(mrcfile.read(folder / f"ha6wxb_{name}_64_3A.mrc.gz"), 3.0)
        assert (truth**2 * mask).sum() > 0.99 * (truth**2).sum()
        assert mask.mean() < 0.12
        assert np.sum(mask * theirs) / np.sqrt(np.sum(mask**2) * np.sum(theirs**2)) > 0.88


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("kind", ["white", "coloured", "table"])
def test_noise_has_its_spectrum_and_variance_one(box, kind):
    spectrum = noise.noise_spectrum(box, kind, table=[4, 2, 1, 1, 0.5])
    made = noise.colour_noise(torch.from_numpy(white((600, box, box))), spectrum)
    assert float(made.var()) == pytest.approx(1, abs=0.01)
    ratio = filters.power_spectrum(made).mean(0).numpy() / spectrum
    np.testing.assert_allclose(ratio[2:], 1, atol=0.06)  # shells average the curve over one shell's width
    if kind != "white":
        assert spectrum[1] > 3 * spectrum[-1]


@pytest.mark.parametrize("box", BOXES)
def test_background_spectrum_does_not_see_the_particle(box):
    radius = 0.3 * box
    spectrum = noise.noise_spectrum(box, "coloured")
    images = noise.colour_noise(torch.from_numpy(white((600, box, box))), spectrum)
    images = images + 30 * masks.circle_mask(box, 0.2 * box, 2) + 5
    measured = noise.background_spectrum(images, radius, 3.0).numpy()
    np.testing.assert_allclose(measured[3:] / spectrum[3:], 1, atol=0.12)
    flat = noise.background_spectrum(torch.from_numpy(white((600, box, box))), radius, 3.0).numpy()
    np.testing.assert_allclose(flat[3:], 1, atol=0.05)


def test_background_is_normalised():
    images = 3 * white((5, 32, 32)) + np.arange(5, dtype=np.float32)[:, None, None]
    images[:, 16, 16] = 1e4
    out = noise.normalise_background(images, 10)
    mean, sd = noise.background_statistics(out, 10)
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(sd, 1, atol=1e-6)
    assert np.all(noise.normalise_background(np.full((1, 16, 16), 7, np.float32), 5) == 0)
    with raises_code("option-out-of-range", InputError, match="no background"):
        noise.normalise_background(images, 40)


def test_bad_noise():
    with raises_code("choice-unknown", InputError):
        noise.noise_spectrum(32, "pink")
    with pytest.raises(InputError, match="negative"):
        noise.noise_spectrum(32, "table", table=[1, -1])
