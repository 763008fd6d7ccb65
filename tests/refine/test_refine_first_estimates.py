"""Estimates of noise and grey scale, refused images, and the exchange of low resolution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_helper import relative
from likelihood_helper import BOX, PIXEL_A, tensor, true_posterior

from cryoiso.core.config import RefineSection
from cryoiso.core.errors import InputError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.io.sources import ArraySource
from cryoiso.parallel.context import Context
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.filters import lowpass, power_spectrum
from cryoiso.physics.noise import noise_spectrum
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.resample import resample_map
from cryoiso.physics.simulation import SimulatedSource, make_particles, simulate
from cryoiso.refine import references
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.initial_model import grey_scale, initial_model, mean_power
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.maximise import NoiseSums, accumulate
from cryoiso.refine.schedule import ScheduleState


@pytest.mark.parametrize("kind", ["white", "coloured"])
def test_noise_variance_is_recovered(truth, kind):
    """From residuals at the true poses, shell by shell; the images' own power is far above it at low resolution."""
    source = simulate(truth, 300, snr_db=0.0, shift_sd_A=8.0, noise=kind, seed=2)
    batch = BatchReader(source, source.particles, PIXEL_A)._prepare(np.arange(300), 15)
    noise = NoiseSums.empty(1, BOX // 2 + 1)
    volume = FourierVolume.from_volume(tensor(source.volume.data))
    white = whiten(batch, np.ones((1, BOX // 2 + 1)))
    accumulator = SliceAccumulator.empty(BOX)
    accumulate(batch, white, true_posterior(source, np.arange(300)), volume, accumulator, noise)
    found = noise.spectra(np.full((1, BOX // 2 + 1), -1.0))[0]
    expected = noise_spectrum(BOX, kind)
    # the spectrum bends within a shell near the origin
    np.testing.assert_allclose(found[3:16], expected[3:16], rtol=0.06)
    np.testing.assert_allclose(found[1:3], expected[1:3], rtol=0.15)
    assert found[0] == -1 and found[16] == -1, "shells without measurements keep the previous value"
    images = power_spectrum(torch.from_numpy(source.read(np.arange(300))))
    assert float(images.mean(0)[2]) > 1.5 * expected[2]


@pytest.mark.parametrize("pixel_A", [PIXEL_A, 5.2])
def test_every_optics_group_is_modelled(truth, pixel_A):
    """Noise-free images of another pixel size, with beam tilt and distorted: at the true poses nothing is left over.

    The map's voxels become (pixel / 6 Å)^3 as heavy, so that sums over voxels stay integrals in units of the 6 Å grid.
    """
    fine = resample_map(truth.data, PIXEL_A, BOX, pixel_A) * (pixel_A / PIXEL_A) ** 3
    p = make_particles(40, BOX, pixel_A, shift_sd_A=8.0, seed=4)
    magnification = (0.97, 0.01, 0.02, 1.02)
    p = replace(p, groups=(replace(p.groups[0], beam_tilt_mrad=(80.0, -50.0), magnification=magnification),))
    source = SimulatedSource(DensityMap(fine, pixel_A), p, noise=False)
    left = {}
    for name, group in (("right", p.groups[0]), ("no tilt", replace(p.groups[0], beam_tilt_mrad=(0.0, 0.0)))):
        blind = replace(p, groups=(group,))
        batch = BatchReader(ArraySource(source.read(np.arange(40)), blind), blind, PIXEL_A)._prepare(np.arange(40), 11)
        white = whiten(batch, np.ones((1, BOX // 2 + 1)))
        noise = NoiseSums.empty(1, BOX // 2 + 1)
        posterior = true_posterior(source, np.arange(40), pixel_A)
        accumulator = SliceAccumulator.empty(BOX)
        accumulate(batch, white, posterior, FourierVolume.from_volume(tensor(truth.data)), accumulator, noise)
        left[name] = noise.power.sum() / 2**24 / float(batch.coefficients.abs().square().sum())
    assert left["right"] < 2.5e-3 < 1e-2 < left["no tilt"]


def test_noise_of_optics_groups_is_kept_apart(truth):
    particles = make_particles(200, BOX, PIXEL_A, seed=1)
    groups = (particles.groups[0], replace(particles.groups[0], number=2, name="loud"))
    particles = replace(particles, groups=groups, optics=(np.arange(200) % 2).astype(np.int32))
    images = np.random.default_rng(0).normal(size=(200, BOX, BOX)).astype(np.float32)
    images[1::2] *= 2
    batch = BatchReader(ArraySource(images, particles), particles, PIXEL_A)._prepare(np.arange(200), 15)
    noise = NoiseSums.empty(2, BOX // 2 + 1)
    noise.add(batch, batch.coefficients.abs().square())
    found = noise.spectra(np.ones((2, BOX // 2 + 1)))
    np.testing.assert_allclose(found[0, 4:16], 1, rtol=0.1)
    np.testing.assert_allclose(found[1, 4:16], 4, rtol=0.1)


def a_refinement(source, reference: DensityMap, **settings) -> Refinement:
    request = RefineRequest(source, reference, "C3", None, RefineSection(**settings), seed=1)
    return Refinement(request, Context(), "cpu", 160.0)


@pytest.mark.parametrize("snr_db, lowest", [(0.0, 0.93), (-4.0, 0.9), (-12.0, 0.65)])
def test_grey_scale_of_the_first_reference(truth, snr_db, lowest):
    """A reference on five times the scale, low-passed at 40 Å, is brought onto that of the images.

    Within a tenth where most poses can be found. It gets too small, never too large, where noise hides them: what a
    wrong pose explains is less than what there is (0.75 at -12 dB), which blurs the first iteration's posteriors.
    """
    source = simulate(truth, 400, snr_db=snr_db, shift_sd_A=5.0, seed=3)
    run = a_refinement(source, replace(source.volume, data=5 * source.volume.data))
    model = initial_model(run, 40.0)
    expected = np.asarray(lowpass(source.volume.data, PIXEL_A, 40.0)) * run.sphere
    factor = float(np.vdot(model.references[1], expected) / np.vdot(expected, expected))
    assert lowest < factor < 1.07
    assert relative(model.references[1], factor * expected) < 1e-5
    np.testing.assert_array_equal(model.references[1], model.references[2])


def test_images_of_the_wrong_sign_and_of_nothing_are_refused(truth):
    source = simulate(truth, 200, snr_db=-2.0, seed=3)
    images = source.read(np.arange(200))
    dark = a_refinement(ArraySource(-images, source.particles), source.volume)
    with pytest.raises(InputError, match="sign"):
        grey_scale(dark, source.volume.data, mean_power(dark), ScheduleState(radius_px=8))


def test_exchange_of_low_resolution():
    """Inside the radius both halves get the mean of their sums; outside each keeps its own."""
    from cryoiso.physics.fourier_sums import FourierSums

    def some() -> FourierSums:
        numerator = torch.complex(torch.randn(33, 33, 17), torch.randn(33, 33, 17))
        return FourierSums(numerator, torch.rand(33, 33, 17), 15, 2, 7)

    halves = {1: some(), 2: some()}
    before = {h: (s.numerator.clone(), s.weight.clone()) for h, s in halves.items()}
    references.exchange_low_resolution(halves, 3, Context())
    inside = halves[1].shells() <= 3
    for h in (1, 2):
        for i, now in enumerate((halves[h].numerator, halves[h].weight)):
            mean = (before[1][i] + before[2][i]) / 2
            torch.testing.assert_close(now[inside], mean[inside])
            assert torch.equal(now[~inside], before[h][i][~inside])
