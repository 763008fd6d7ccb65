"""The likelihood: scores and terms of the maximisation by hand, in plain torch and in kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from likelihood_helper import BOX, GRID, PIXEL_A, tensor, the_batch, true_posterior

from cryoiso.physics import gpu_kernels
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.contrast_transfer import ctf_for
from cryoiso.physics.fourier import fourier_disc
from cryoiso.physics.projection import FourierVolume, project
from cryoiso.physics.simulation import simulate
from cryoiso.physics.so3 import random_rotations
from cryoiso.refine import maximise
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.likelihood import (
    ReferenceSlices,
    _local_scores_numba,
    as_real,
    global_scores,
    lattice,
    local_scores,
    local_scores_torch,
    near_scores,
    near_scores_torch,
    shift_factors,
    whiten,
)
from cryoiso.refine.maximise import NoiseSums, accumulate
from cryoiso.refine.schedule import FIRST_THRESHOLD, disc_of_shifts
from cryoiso.refine.search import Posterior

RNG = np.random.default_rng(6)


def likelihood_by_hand(source, batch, volume: FourierVolume, row: int, rotation, shift_px, sigma2: float) -> float:
    """log p(x | pose) - log p(x | 0) of white noise, by summing squares over the pixels of band-limited images."""
    image = source.read(batch.rows[[row]])[0].astype(float)
    model = np.fft.rfft2(np.fft.ifftshift(real_projection(volume, rotation)))
    ky, kx = np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX)[None]
    model = model * np.exp(-2j * np.pi * (kx * shift_px[0] + ky * shift_px[1]))
    model = model * ctf_for(source.particles, batch.rows[[row]], BOX, dtype=torch.float64)[0].numpy()
    inside = np.zeros(model.size, bool)
    inside[batch.disc.flat] = True
    on_axis = batch.disc.flat[(batch.disc.kx == 0)]
    columns = BOX // 2 + 1
    inside[(BOX - on_axis // columns) % BOX * columns] = True  # the Friedel mates in the kx = 0 column
    inside = inside.reshape(model.shape)
    x, m = (np.fft.irfft2(np.where(inside, v, 0), s=(BOX, BOX)) for v in (np.fft.rfft2(np.fft.ifftshift(image)), model))
    return float((x**2).sum() - ((x - m) ** 2).sum()) / (2 * sigma2)


def real_projection(volume: FourierVolume, rotation) -> np.ndarray:
    return project(volume.of, tensor(rotation)[None])[0].double().numpy()


@pytest.fixture(scope="module")
def reference(truth) -> FourierVolume:
    """The truth as Fourier volume, which remembers the map it was made of."""
    data = tensor(truth.data) * 1.3
    volume = FourierVolume.from_volume(data)
    object.__setattr__(volume, "of", data)
    return volume


def test_global_scores_are_the_gaussian_likelihood(source, reference):
    """Equal to -|x - C P S|^2 / (2 sigma^2) up to the image's own constant, for every view and shift."""
    sigma2 = 1.7
    batch = the_batch(source, 3)
    white = whiten(batch, np.full((1, BOX // 2 + 1), sigma2))
    views = random_rotations(RNG, 5)
    shifts = tensor([[0, 0], [2.5, -1.0], [-0.3, 4.0]])
    log_prior = tensor([0.0, -0.5, -2.0])
    slices = ReferenceSlices.of(reference, tensor(views), batch.disc, None)
    scores = global_scores(white, slices, shifts, log_prior)
    assert scores.shape == (3, 3, 5)
    for i in range(3):
        for s in range(3):
            for j in range(5):
                by_hand = likelihood_by_hand(source, batch, reference, i, views[j], shifts[s].numpy(), sigma2)
                assert float(scores[i, s, j] - log_prior[s]) == pytest.approx(by_hand, abs=2e-3 + 1e-4 * abs(by_hand))


def test_a_smaller_radius_is_a_prefix(source, reference):
    batch = the_batch(source)
    sigma2 = np.linspace(1, 2, BOX // 2 + 1)[None]
    small = fourier_disc(BOX, 7)
    cut = whiten(batch, sigma2).cut(small.size, small)
    direct = whiten(the_batch(source, radius=7), sigma2)
    np.testing.assert_array_equal(cut.data.numpy(), direct.data.numpy())
    np.testing.assert_array_equal(cut.weight.numpy(), direct.weight.numpy())


@pytest.mark.parametrize("radius", [15, 6])
@pytest.mark.parametrize("magnified_by", [None, 0.85])
def test_local_scores_kernel_twin_and_global_scores_agree(source, reference, radius, magnified_by):
    pixel_A = PIXEL_A if magnified_by is None else PIXEL_A * magnified_by
    batch = the_batch(source, pixel_A=pixel_A, radius=radius if magnified_by is None else radius * 0.85)
    assert (batch.magnification is None) == (magnified_by is None)
    white = whiten(batch, RNG.uniform(0.5, 2, (1, BOX // 2 + 1)))
    rows = torch.as_tensor(np.sort(RNG.integers(0, 12, 50)))
    rotation, shift, spacing = tensor(random_rotations(RNG, 50)), tensor(RNG.normal(0, 3, (50, 2))), 0.75
    fast = _local_scores_numba(white, reference, rows, with_m(rotation, batch), shift, spacing)
    plain = local_scores_torch(white, reference, rows, with_m(rotation, batch), shift, spacing)
    assert fast.shape == plain.shape == (50, 9)
    scale = float(plain.abs().max())
    assert float((fast - plain).abs().max()) < 2e-5 * scale
    blocks = local_scores_torch(white, reference, rows, with_m(rotation, batch), shift, spacing, block=white.disc.size)
    assert float((blocks - plain).abs().max()) < 1e-5 * scale
    assert float((local_scores(white, reference, rows, rotation, shift, spacing) - fast).abs().max()) < 1e-5 * scale
    for r in (0, 23, 49):
        slices = ReferenceSlices.of(reference, rotation[r : r + 1], batch.disc, batch.magnification)
        places = shift[r] + lattice(spacing)
        whole = global_scores(white, slices, places, torch.zeros(9))[rows[r], :, 0]
        assert float((whole - fast[r]).abs().max()) < 3e-5 * scale


def with_m(rotation, batch):
    from cryoiso.refine.likelihood import with_magnification

    return with_magnification(rotation, batch.magnification)


@pytest.mark.parametrize("magnified_by", [None, 0.85])
@pytest.mark.parametrize("shifts", ["disc", "odd"])
def test_scores_near_given_poses_agree_with_plain_torch(source, reference, magnified_by, shifts):
    """Forty views of each image, more than are scored at once; shifts on a lattice, and elsewhere."""
    pixel_A = PIXEL_A if magnified_by is None else PIXEL_A * magnified_by
    batch = the_batch(source, 3, pixel_A=pixel_A, radius=12)
    white = whiten(batch, RNG.uniform(0.5, 2, (1, BOX // 2 + 1)))
    rotations = tensor(random_rotations(RNG, 120)).reshape(3, 40, 3, 3)
    shift = disc_of_shifts(2.9, 0.7) if shifts == "disc" else tensor(RNG.normal(0, 2, (5, 2)))
    prior = tensor(RNG.normal(size=len(shift)))
    fast = near_scores(white, reference, rotations, shift, prior)
    plain = near_scores_torch(white, reference, rotations, shift, prior)
    assert fast.shape == plain.shape == (3, len(shift), 40)
    assert float((fast - plain).abs().max()) < 2e-5 * float(plain.abs().max())


def test_views_are_scored_alike_whatever_their_company(source, reference):
    """Same bits for a view alone and among forty of its particle, more than are scored at once."""
    white = whiten(the_batch(source, 2), np.ones((1, BOX // 2 + 1)))
    rows = torch.tensor([0] * 40 + [1] * 3)
    rotation, shift = tensor(random_rotations(RNG, 43)), tensor(RNG.normal(0, 3, (43, 2))).round()
    together = local_scores(white, reference, rows, rotation, shift, 0.5)
    for r in (0, 31, 32, 39, 42):
        part = slice(r, r + 1)
        alone = local_scores(white, reference, rows[part], rotation[part], shift[part], 0.5)
        np.testing.assert_array_equal(alone[0], together[r])
    assert local_scores(white, reference, rows[:0], rotation[:0], shift[:0], 0.5).shape == (0, 9)


@pytest.mark.parametrize("magnified_by", [None, 0.85])
def test_terms_of_the_maximisation_agree_with_plain_torch(source, reference, magnified_by):
    """Several views an image, none of image 5: kernels and torch differ by rounding alone."""
    pixel_A = PIXEL_A if magnified_by is None else PIXEL_A * magnified_by
    batch = the_batch(source, pixel_A=pixel_A, radius=15 if magnified_by is None else 12)
    rows = torch.as_tensor(np.sort(RNG.choice([i for i in range(12) if i != 5], 30)))
    n, one = len(rows), torch.ones(12)
    rotation, shift, weight = tensor(random_rotations(RNG, n)), tensor(RNG.normal(0, 3, (n, 2))), tensor(RNG.random(n))
    posterior = Posterior(rows, rotation, shift, weight, rotation, shift, one, one, one, one, one)
    inner = FourierVolume.from_volume(reference.of, 2, 9)
    for fast, plain in zip(
        maximise.model_terms(batch, posterior, inner), maximise.model_terms_torch(batch, posterior, inner), strict=True
    ):
        assert fast.shape == plain.shape and fast.shape[1] < batch.disc.size
        assert float((fast - plain).abs().max()) < 1e-5 * float(plain.abs().max())
        assert not fast[5].any() and float(plain.abs().max()) > 0
    white = whiten(batch, np.ones((1, BOX // 2 + 1)))
    data, weights = maximise.weighed(batch.disc, white, rows, shift, weight)
    expected = white.data[rows] * shift_factors(batch.disc, shift) * weight[:, None]
    assert float((data - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    np.testing.assert_array_equal(weights, white.weight[rows] * weight[:, None])


def test_back_projection_in_parts_has_the_same_bits(source, reference, monkeypatch):
    batch = the_batch(source)
    white = whiten(batch, np.ones((1, BOX // 2 + 1)))
    grids = []
    for most in (maximise.COEFFICIENTS_AT_ONCE, 1):
        monkeypatch.setattr(maximise, "COEFFICIENTS_AT_ONCE", most)
        accumulator = SliceAccumulator.empty(BOX)
        accumulate(batch, white, true_posterior(source, np.arange(12)), reference, accumulator, NoiseSums.empty(1, 17))
        grids.append(accumulator.grid.numpy())
    np.testing.assert_array_equal(*grids)
    assert grids[0].any()


def test_the_lattice_runs_over_y_slowly():
    np.testing.assert_allclose(lattice(0.5)[[0, 1, 3]], [[-0.5, -0.5], [0, -0.5], [-0.5, 0]])


def as_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 bits of mantissa that tensor cores multiply."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("snr_db", [-13.0, 5.0])
def test_rounding_of_tensor_cores_is_far_below_the_threshold_of_candidates(truth, snr_db):
    source = simulate(truth, 12, snr_db=snr_db, shift_sd_A=4.0, seed=7)
    white = whiten(the_batch(source), np.ones((1, BOX // 2 + 1)))
    slices = ReferenceSlices.of(FourierVolume.from_volume(tensor(truth.data)), GRID[:500], white.disc, None)
    shifts, even = tensor([[0, 0], [1, 0], [0, 1]]), torch.zeros(3)
    exact = global_scores(white, slices, shifts, even)
    moved = as_tf32(as_real(white.data[:, None] * shift_factors(white.disc, shifts)).flatten(0, 1))
    cross, power = moved @ as_tf32(slices.real), as_tf32(white.weight) @ as_tf32(slices.power)
    rounded = cross.reshape(exact.shape) - 0.5 * power[:, None]
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).abs().max()) < 0.1 * FIRST_THRESHOLD


def test_images_read_ahead_make_the_same_batches(source, monkeypatch):
    """As on a GPU, where a thread reads the next images: the same coefficients in the same order, kept or not."""
    rows = [np.arange(i, i + 12) for i in (0, 12, 24, 36)]
    plain = list(BatchReader(source, source.particles, PIXEL_A, memory_bytes=0).in_order(rows, 12))
    reader = BatchReader(source, source.particles, PIXEL_A, "meta", memory_bytes=2 * plain[0].coefficients.numel() * 12)
    monkeypatch.setattr(reader, "_prepare", lambda *a: BatchReader(source, source.particles, PIXEL_A)._prepare(*a))
    for _ in range(2):
        ahead = list(reader.in_order(rows, 12))
        assert len(ahead) == len(plain)
        for mine, expected in zip(ahead, plain, strict=True):
            np.testing.assert_array_equal(mine.rows, expected.rows)
            assert torch.equal(mine.coefficients, expected.coefficients)
    assert len(reader._kept) == 2


@pytest.mark.gpu
def test_scores_on_a_gpu_agree(source, reference):
    batch = the_batch(source)
    white = whiten(batch, np.ones((1, BOX // 2 + 1)))
    there = replace(white, data=white.data.cuda(), weight=white.weight.cuda())
    volume = FourierVolume(reference.grid.cuda(), BOX, 2, reference.radius_px)
    rows = torch.arange(12).repeat_interleave(8)
    rotation, shift = tensor(random_rotations(RNG, 96)), tensor(RNG.normal(0, 3, (12, 2))).repeat_interleave(8, 0)
    here = local_scores(white, reference, rows, rotation, shift, 0.5)
    on_gpu = (rows.cuda(), rotation.cuda(), shift.cuda(), 0.5)
    assert gpu_kernels.kernels_for("score_local", volume.grid) is not None
    for found in (
        *(local_scores(there, volume, *on_gpu, together=n) for n in (1, 8)), local_scores_torch(there, volume, *on_gpu)
    ):  # fmt: skip
        assert float((here - found.cpu()).abs().max()) < 1e-4 * float(here.abs().max())
