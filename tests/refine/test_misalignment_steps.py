"""The steps between a half-map and the next reference: laws that hold for any map, in odd and even boxes."""

from __future__ import annotations

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.methods.misalignment.steps import (
    fsc_weight,
    keep_low_resolution,
    lowpass_at,
    match_scale,
    shell_amplitude,
    whiten,
)
from cryoiso.metrics.fsc_curve import shell_correlation, transform
from cryoiso.physics.filters import apply_radial, lowpass
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.phantom import phantom_map

PIXEL_A = 6.0
BOXES = (32, 33)


def noise(box: int, uid: int = 0) -> np.ndarray:
    return generator(1, "test", uid).standard_normal((box,) * 3, np.float32)


def particle(box: int) -> np.ndarray:
    """A phantom with a steep spectrum and a little noise."""
    phantom = phantom_map(box, PIXEL_A, 16.0).data
    return (phantom + 0.05 * phantom.std() * noise(box)).astype(np.float32)


def phase_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of every shell from 1 to Nyquist: 1 where one is the other times positive numbers that change little."""
    return shell_correlation(transform(a), transform(b), len(a))[1:]


def apply_centred(volume: np.ndarray, centred: np.ndarray) -> np.ndarray:
    spectrum = np.fft.fftn(volume) * np.fft.ifftshift(centred)
    return np.fft.ifftn(spectrum).real.astype(np.float32)


def cone(box: int, half_angle_deg: float) -> np.ndarray:
    """1 within an angle of the plane z = 0 in Fourier space, centred: what top views measure."""
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    r = np.maximum(np.sqrt(z**2.0 + y**2 + x**2), 1e-9)
    seen = np.abs(z) / r <= np.sin(np.radians(half_angle_deg))
    seen[box // 2, box // 2, box // 2] = True
    if box % 2 == 0:  # Nyquist planes of an even box have no mate
        seen[0], seen[:, 0], seen[:, :, 0] = False, False, False
    return seen.astype(np.float32)


@pytest.mark.parametrize("box", BOXES)
class TestKeepLowResolution:
    crossover_A = 30.0

    def shell(self, box: int) -> float:
        return box * PIXEL_A / self.crossover_A

    def test_low_from_the_reference_high_from_the_map(self, box):
        volume, initial = particle(box), lowpass(noise(box, 7), PIXEL_A, 18.0)
        made = keep_low_resolution(volume, initial, PIXEL_A, self.crossover_A)
        low, high = int(self.shell(box) - 2), int(np.ceil(self.shell(box) + 2))
        assert phase_correlation(made, initial)[: low - 1].min() > 0.99
        shells = shell_amplitude(made - volume)
        assert shells[high + 1 :].max() < 1e-5 * shell_amplitude(volume).max()
        # factors are interpolated between shells, and the spectrum is steep
        np.testing.assert_allclose(shell_amplitude(made)[1:low], shell_amplitude(volume)[1:low], rtol=0.1)

    def test_its_own_low_resolution_changes_nothing(self, box):
        volume = particle(box)
        made = keep_low_resolution(volume, -3.0 * volume, PIXEL_A, self.crossover_A)
        assert np.abs(made - volume).max() > 0.1 * volume.max()  # the sign of a reference counts
        made = keep_low_resolution(volume, 17.0 * volume, PIXEL_A, self.crossover_A)
        np.testing.assert_allclose(made, volume, atol=2e-5 * np.abs(volume).max())

    def test_grey_scales(self, box):
        """The reference's does not matter, the map's goes through."""
        volume, initial = particle(box), phantom_map(box, PIXEL_A, 40.0).data
        made = keep_low_resolution(volume, initial, PIXEL_A, self.crossover_A)
        other = keep_low_resolution(5 * volume, 1e-4 * initial, PIXEL_A, self.crossover_A)
        np.testing.assert_allclose(other, 5 * made, atol=1e-4 * np.abs(made).max())

    def test_amplitudes_are_compared_inside_the_mask(self, box):
        """Noise in the solvent does not make the reference louder."""
        ball = np.asarray(sphere_mask(box, box / 5, 3.0))
        initial = particle(box) * ball
        noisy = initial + 0.5 * np.abs(initial).max() * noise(box, 3) * (1 - ball)
        made = keep_low_resolution(noisy, initial, PIXEL_A, self.crossover_A, mask=ball)
        low = slice(1, int(self.shell(box) - 2))
        ratio = shell_amplitude(made)[low] / shell_amplitude(initial)[low]
        assert np.all(np.abs(ratio - 1) < 0.1)
        loud = shell_amplitude(keep_low_resolution(noisy, initial, PIXEL_A, self.crossover_A))[low]
        assert (loud / shell_amplitude(initial)[low]).max() > 1.2


@pytest.mark.parametrize("box", BOXES)
class TestWhiten:
    def test_flat_between_the_two_resolutions(self, box):
        volume = particle(box)
        made = whiten(volume, PIXEL_A, 32.0, 14.0)
        first, last = round(box * PIXEL_A / 32.0), round(box * PIXEL_A / 14.0)
        before, after = shell_amplitude(volume), shell_amplitude(made)
        assert before[last] < 0.5 * before[first]
        np.testing.assert_allclose(after[first : last + 1], before[first], rtol=0.06)
        np.testing.assert_allclose(after[: first - 1], before[: first - 1], rtol=1e-4)
        np.testing.assert_allclose(after[last + 2 :] / before[last + 2 :], before[first] / before[last], rtol=0.02)

    def test_phases_stay(self, box):
        volume = particle(box)
        assert phase_correlation(whiten(volume, PIXEL_A, 32.0, 14.0), volume).min() > 0.97

    def test_any_grey_scale(self, box):
        volume = particle(box)
        made = whiten(volume, PIXEL_A, 32.0, 14.0)
        for factor in (1e-7, -1.0, 1e6):
            again = whiten((factor * volume).astype(np.float32), PIXEL_A, 32.0, 14.0)
            np.testing.assert_allclose(again / factor, made, atol=1e-5 * np.abs(made).max())

    def test_nothing_to_flatten(self, box):
        volume = particle(box)
        np.testing.assert_array_equal(whiten(volume, PIXEL_A, 20.0, 28.0), volume)
        np.testing.assert_array_equal(whiten(0 * volume, PIXEL_A, 32.0, 14.0), 0 * volume)

    def test_spectra_are_measured_inside_the_mask(self, box):
        ball = np.asarray(sphere_mask(box, box / 4, 3.0))
        clean = particle(box)
        dirty = clean + 0.5 * clean.std() * noise(box, 5) * (1 - ball)
        one, other = (whiten(v.astype(np.float32), PIXEL_A, 32.0, 14.0, mask=ball) for v in (clean, dirty))
        np.testing.assert_allclose(shell_amplitude(one, ball), shell_amplitude(other, ball), rtol=0.1)


@pytest.mark.parametrize("box", BOXES)
def test_fsc_weighting_multiplies_the_shells(box):
    volume = noise(box)
    curve = np.exp(-np.linspace(0, 2, box // 2 + 1))
    amplitude = shell_amplitude(fsc_weight(volume, curve)) / shell_amplitude(volume)
    np.testing.assert_allclose(amplitude, curve, rtol=0.04)  # interpolated between shells
    spoilt = curve.copy()
    spoilt[5], spoilt[-2:] = np.nan, -0.2
    made = fsc_weight(volume, spoilt)
    assert np.isfinite(made).all() and shell_amplitude(made)[-1] < 1e-6
    np.testing.assert_allclose(fsc_weight(volume, np.full(box // 2 + 1, 7.0)), volume, atol=1e-5)


@pytest.mark.parametrize("box", BOXES)
def test_lowpass_leaves_the_map_alone_beyond_nyquist(box):
    volume = noise(box)
    np.testing.assert_array_equal(lowpass_at(volume, PIXEL_A, 12.0), volume)
    assert shell_amplitude(lowpass_at(volume, PIXEL_A, 24.0))[-2] < 1e-6


@pytest.mark.parametrize("box", BOXES)
class TestMatchScale:
    def curve(self, box: int) -> np.ndarray:
        return 0.3 + 2 * np.exp(-np.linspace(0, 2, box // 2 + 1))

    def test_a_radial_filter_is_undone(self, box):
        volume = particle(box)
        made, factor = match_scale(apply_radial(volume, self.curve(box)), volume)
        np.testing.assert_allclose(factor, 1 / self.curve(box), rtol=0.03)
        np.testing.assert_allclose(made, volume, atol=0.02 * np.abs(volume).max())

    def test_measured_directions_decide(self, box):
        """What was put into the missing cone, and how loud, changes nothing."""
        volume, seen = particle(box), cone(box, 50)
        measured = apply_centred(volume, seen)
        filled = apply_radial(measured + 40 * apply_centred(noise(box, 2) * volume.std(), 1 - seen), self.curve(box))
        _, factor = match_scale(filled, measured, seen)
        np.testing.assert_allclose(factor[1:-1], 1 / self.curve(box)[1:-1], rtol=0.04)
        _, everywhere = match_scale(filled, measured)
        assert (everywhere[1:] < 0.5 * factor[1:]).any()

    def test_never_louder_than_what_was_measured(self, box):
        volume, other = particle(box), particle(box)[::-1, :, ::-1].copy()
        _, factor = match_scale(other + noise(box), volume)
        assert (factor >= 0).all()
        inside = slice(1, box // 2)
        assert (factor[inside] * shell_amplitude(other + noise(box))[inside]
                <= shell_amplitude(volume)[inside] * (1 + 1e-6)).all()  # fmt: skip
        _, flipped = match_scale(-volume, volume)
        np.testing.assert_array_equal(flipped, 0)
        _, empty = match_scale(0 * volume, volume)
        np.testing.assert_array_equal(empty, 0)

    def test_least_squares(self, box):
        """No other factor of a shell comes nearer to the original, inside the mask."""
        ball = np.asarray(sphere_mask(box, box / 4, 2.0))
        volume = particle(box) * ball
        corrected = volume + 0.5 * volume.std() * noise(box, 9)
        made, factor = match_scale(corrected, volume, mask=ball, by_shell=False)
        assert np.ptp(factor) == 0
        f, x0 = ((v * ball).astype(np.float64) for v in (corrected, volume))
        assert factor[0] == pytest.approx(np.vdot(f, x0) / np.vdot(f, f), rel=1e-6)
        best = np.square((made - volume) * ball).sum()
        for other in (0.98, 1.02):
            assert np.square((other * made - volume) * ball).sum() > best

    def test_solvent_noise_does_not_weaken_the_particle(self, box):
        ball = np.asarray(sphere_mask(box, box / 5, 2.0))
        volume = particle(box) * ball
        noisy = volume + 2 * volume.std() * noise(box, 4) * (1 - ball)
        _, inside = match_scale(noisy, volume, mask=ball, by_shell=False)
        _, everywhere = match_scale(noisy, volume, by_shell=False)
        assert inside[0] > 0.97 and everywhere[0] < 0.6

    def test_other_grids_are_refused(self, box):
        with raises_code("arrays-do-not-fit", InputError, match="different grids"):
            match_scale(noise(box), noise(box + 1))
        with raises_code("arrays-do-not-fit", InputError, match="different grids"):
            keep_low_resolution(noise(box), noise(box + 1), PIXEL_A, 30.0)


def test_inputs_stay_as_they_are():
    volume, initial = particle(32), noise(32)
    kept = volume.copy(), initial.copy()
    keep_low_resolution(volume, initial, PIXEL_A, 30.0)
    whiten(volume, PIXEL_A, 32.0, 14.0)
    fsc_weight(volume, np.linspace(1, 0, 17))
    lowpass_at(volume, PIXEL_A, 10.0)
    match_scale(volume, initial, cone(32, 40))
    np.testing.assert_array_equal(volume, kept[0])
    np.testing.assert_array_equal(initial, kept[1])
