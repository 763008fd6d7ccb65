"""Noise from real patches: their spectrum, their pixels, other pixel sizes, and fields made to their spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryoiso.core.errors import InputError
from cryoiso.physics.filters import power_spectrum
from cryoiso.physics.noise import colour_noise, noise_spectrum
from cryoiso.physics.nuisances.patches import PatchStack, RealNoise
from cryoiso.pipeline.commands.simulation_inputs import patch_stack

UIDS = np.arange(400, dtype=np.uint64) + 17


def stack_of(patches: np.ndarray, pixel_A: float = 2.0, way: str = "auto") -> PatchStack:
    return PatchStack(lambda numbers: patches[numbers], len(patches), patches.shape[-1], pixel_A, way)


def coloured(n: int, box: int, seed: int = 0) -> np.ndarray:
    white = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, box, box)))
    return colour_noise(white, noise_spectrum(box, "coloured")).numpy() * 3 + 40


def test_patches_of_the_images_size_are_the_patches():
    """Rotated, mirrored and rolled: the same grey values, and the same power in every shell, image by image."""
    patches = coloured(12, 32)
    noise = RealNoise(stack_of(patches), 32, 2.0, seed=1)
    assert noise.way == "patches"
    made = noise.noise(UIDS[:60]).numpy()
    scale = np.sqrt(patches.var((1, 2)).mean())
    plain = (patches - patches.mean((1, 2), keepdims=True)) / scale
    spectra, used = np.asarray(power_spectrum(plain)), set()
    for image in made:
        i = int(np.abs(np.sort(plain.reshape(12, -1), 1) - np.sort(image.ravel())).max(1).argmin())
        ratio = np.sort(image.ravel()) / np.sort(plain[i].ravel())
        np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-3, atol=1e-3)
        power = np.asarray(power_spectrum(image.astype(float)))[1:]
        np.testing.assert_allclose(power, spectra[i][1:] * np.median(ratio) ** 2, rtol=1e-3)
        used.add(i)
    assert len(used) == 12
    assert len({image.tobytes() for image in made}) == 60


def test_crops_of_larger_patches_have_their_spectrum_and_variance_one():
    patches = coloured(200, 48)
    noise = RealNoise(stack_of(patches), 32, 2.0, seed=1)
    made = noise.noise(UIDS).numpy()
    assert made.shape == (400, 32, 32) and made.dtype == np.float32
    assert made.var() == pytest.approx(1, abs=0.03) and np.abs(made.mean((1, 2))).max() < 1e-5
    expected = noise_spectrum(32, "coloured")
    np.testing.assert_allclose(np.asarray(power_spectrum(made))[:, 3:15].mean(0), expected[3:15], rtol=0.08)


def test_patches_of_smaller_pixels_are_brought_to_the_images_pixels():
    """Patches of 96 px of 2 Å for images of 24 px of 6 Å: their spectrum up to the images' Nyquist frequency."""
    patches = coloured(100, 96)
    noise = RealNoise(stack_of(patches), 24, 6.0, seed=1)
    assert noise.way == "patches"
    made = np.asarray(power_spectrum(noise.noise(UIDS).numpy())).mean(0)
    frequency = np.arange(24 // 2 + 1) / (24 * 6.0)
    theirs = np.interp(frequency, np.arange(49) / (96 * 2.0), np.asarray(power_spectrum(patches - 40)).mean(0))
    relation = made[2:11] / theirs[2:11]
    np.testing.assert_allclose(relation, relation.mean(), rtol=0.12)


@pytest.mark.parametrize("box", [32, 80])
def test_a_field_has_the_measured_spectrum(box):
    """Of patches that are too small for the images, or where a field is asked for."""
    patches = coloured(200, 48)
    noise = RealNoise(stack_of(patches, way="field" if box == 32 else "auto"), box, 2.0, seed=1)
    assert noise.way == "field"
    made = noise.noise(UIDS[:100]).numpy()
    assert made.var() == pytest.approx(1, abs=0.03)
    spectrum = np.asarray(power_spectrum(made)).mean(0)[3:-1]
    np.testing.assert_allclose(spectrum, noise_spectrum(box, "coloured")[3:-1], rtol=0.12)
    assert np.abs(np.corrcoef(made.reshape(100, -1)) - np.eye(100)).max() < 0.25


def test_noise_depends_on_seed_and_uid_alone():
    patches = coloured(30, 40)
    noise = RealNoise(stack_of(patches), 32, 2.0, seed=1)
    whole = noise.noise(UIDS[:20])
    torch.testing.assert_close(noise.noise(UIDS[[4, 2]]), whole[[4, 2]])
    assert not torch.allclose(RealNoise(stack_of(patches), 32, 2.0, seed=2).noise(UIDS[:20]), whole)


def test_what_cannot_be_is_refused():
    patches = coloured(5, 40)
    with pytest.raises(InputError, match="coarser than the images"):
        RealNoise(stack_of(patches, 4.0), 32, 2.0, 1)
    with pytest.raises(InputError, match="smaller than the images"):
        RealNoise(stack_of(patches, 2.0, "patches"), 48, 2.0, 1)
    with pytest.raises(InputError, match="too small to measure"):
        RealNoise(stack_of(patches, 0.5), 32, 2.0, 1)
    with pytest.raises(InputError, match="auto, patches, field"):
        RealNoise(stack_of(patches, way="both"), 32, 2.0, 1)
    with pytest.raises(InputError, match="constant"):
        RealNoise(stack_of(0 * patches), 32, 2.0, 1)


def test_real_background_of_beta_galactosidase(shared):
    """101 patches of ice, 384 px of 0.637 Å, for images of 48 px of 4.5 Å: their spectrum, which is not white."""
    stack = patch_stack(shared / "data/particles/betagal_real_384/background.mrcs", None, "auto", 4.5)
    assert (stack.count, stack.box_px) == (101, 384) and stack.pixel_size_A == pytest.approx(0.637, abs=1e-4)
    noise = RealNoise(stack, 48, 4.5, seed=1)
    assert noise.way == "patches"
    made = noise.noise(UIDS[:200]).numpy()
    assert made.var() == pytest.approx(1, abs=0.05)
    spectrum = np.asarray(power_spectrum(made)).mean(0)
    full = np.asarray(power_spectrum(stack.read(np.arange(101)).astype(np.float64))).mean(0)
    theirs = np.interp(np.arange(25) / (48 * 4.5), np.arange(193) / (384 * 0.637), full)
    relation = spectrum[3:22] / theirs[3:22]
    np.testing.assert_allclose(relation, relation.mean(), rtol=0.15)
    field = RealNoise(stack, 64, 4.5, seed=1)
    assert field.way == "field"
    np.testing.assert_allclose(
        np.interp(np.arange(3, 22) / 48, np.arange(33) / 64, field.spectrum),
        np.interp(np.arange(3, 22) / 48, np.arange(25) / 48, noise.spectrum), rtol=0.1,
    )  # fmt: skip
