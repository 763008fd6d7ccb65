"""The width of the signal in images: right where it is clear, and nothing where it is not."""

from __future__ import annotations

import mrcfile
import numpy as np
import pytest

from cryoiso.metrics.image_extent import FEWEST_IMAGES, RadialVariance

BOX, PIXEL_A = 64, 4.0


def discs(n: int, diameter_A: float, snr: float, seed: int = 1, box: int = BOX) -> np.ndarray:
    """Discs of random structure in white noise."""
    rng = np.random.default_rng(seed)
    axis = (np.arange(box) - box // 2) * PIXEL_A
    inside = np.hypot(axis[:, None], axis[None]) < diameter_A / 2
    k = np.hypot(np.fft.fftfreq(box, PIXEL_A)[:, None], np.fft.rfftfreq(box, PIXEL_A)[None])
    smooth = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(n, box, box))) * np.exp(-((40 * k) ** 2)), s=(box, box))
    signal = smooth / smooth.std() * inside
    return (np.sqrt(snr) * signal + rng.normal(size=signal.shape)).astype(np.float32)


def extent_of(images: np.ndarray, pixel_A: float = PIXEL_A):
    found = RadialVariance(images.shape[-1], pixel_A)
    found.add(images)
    return found.extent()


@pytest.mark.parametrize("diameter_A", [80.0, 120.0, 160.0])
def test_the_width_of_discs(diameter_A):
    found = extent_of(discs(200, diameter_A, 0.3))
    assert found.reason == "" and found.diameter_A == pytest.approx(diameter_A, abs=12)
    assert found.spread_A < 5 and found.particle_A[0] < found.diameter_A < found.particle_A[1]


def test_scale_and_offset_of_the_images_do_not_matter_nor_does_their_sign():
    images = discs(100, 120.0, 0.3)
    first = extent_of(images)
    assert extent_of(7 - 40 * images).diameter_A == pytest.approx(first.diameter_A, rel=1e-4)
    assert extent_of(images, 2.0).diameter_A is not None


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (discs(FEWEST_IMAGES - 1, 120.0, 0.5), "too few"), (discs(200, 120.0, 0.0), "standard errors"),
        (discs(200, 600.0, 0.5), ""), (np.zeros((60, BOX, BOX), np.float32), "too few"),
    ],
)  # fmt: skip
def test_no_diameter_without_evidence(images, reason):
    """Few images, pure noise, a particle wider than the box, empty images."""
    found = extent_of(images)
    assert found.diameter_A is None and found.particle_A is None and reason in found.reason and found.reason
    assert found.facts()["signal_diameter_A"] is None


def test_real_particles_and_real_ice(shared_data):
    """Beta-galactosidase is 193 Å wide with its margin."""
    folder = shared_data / "particles/betagal_real_384"
    particles, ice = (
        extent_of(mrcfile.read(folder / f"{name}.mrcs").astype(np.float32), 0.637)
        for name in ("particles", "background")
    )
    assert particles.reason == "" and particles.diameter_A == pytest.approx(142, abs=10)
    assert particles.particle_A[0] < 193 < particles.particle_A[1]
    assert ice.diameter_A is None and ice.z < 3
