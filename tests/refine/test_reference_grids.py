"""References on another grid than the particles': density and centre stay."""

from __future__ import annotations

import numpy as np
import pytest

from cryoiso.core.types import DensityMap
from cryoiso.physics.resample import resample_map
from cryoiso.pipeline.inputs.reference import measure_diameter


def _blob(box: int, pixel: float, centre_A=(0.0, 0.0, 0.0), sigma_A: float = 12.0) -> np.ndarray:
    axes = [(np.arange(box) - box // 2) * pixel - c for c in centre_A]
    return np.exp(-sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) / (2 * sigma_A**2)).astype(np.float32)


@pytest.mark.parametrize("box_in, pixel_in", [(32, 4.0), (33, 4.0), (48, 2.7), (24, 5.0)])
@pytest.mark.parametrize("box_out, pixel_out", [(32, 4.0), (31, 4.5), (40, 3.0)])
def test_resampling_keeps_density_and_centre(box_in, pixel_in, box_out, pixel_out):
    """A Gaussian sampled on one grid and interpolated onto another is the Gaussian sampled there."""
    centre = (10.0, -6.0, 3.0)
    found = resample_map(_blob(box_in, pixel_in, centre), pixel_in, box_out, pixel_out)
    expected = _blob(box_out, pixel_out, centre)
    inside = np.abs(np.indices([box_out] * 3) - box_out // 2).max(0) * pixel_out < box_in * pixel_in / 2 - 8
    assert np.abs(found - expected)[inside].max() < 5e-3 and found.dtype == np.float32


def test_resampling_onto_the_same_grid_changes_nothing():
    noise = np.random.default_rng(0).standard_normal((15, 15, 15)).astype(np.float32)
    assert np.allclose(resample_map(noise, 3.0, 15, 3.0), noise, atol=1e-5)
    noise = np.random.default_rng(0).standard_normal((16, 16, 16)).astype(np.float32)
    assert np.allclose(resample_map(noise, 3.0, 16, 3.0), noise, atol=1e-5)


def test_coarser_grid_holds_no_alias():
    """A wave beyond the new Nyquist limit vanishes instead of folding back."""
    box = 48
    wave = np.cos(2 * np.pi * 20 * (np.arange(box) - box // 2) / box)[None, None, :] * np.ones((box, box, 1))
    assert np.abs(resample_map(wave, 1.0, 24, 2.0)).max() < 1e-5


def test_diameter_is_measured_about_the_box_centre():
    box, pixel = 64, 3.0
    r = np.sqrt(((np.indices((box,) * 3) - box // 2) ** 2).sum(0)) * pixel
    ball = DensityMap((r < 45).astype(np.float32), pixel)
    assert measure_diameter(ball, margin_A=0) == pytest.approx(90, abs=8)
    shifted = DensityMap(np.roll(ball.data, 10, axis=0), pixel)
    assert measure_diameter(shifted, margin_A=0) == pytest.approx(2 * (45 + 30), abs=12)
