"""The likelihood, the search, the noise and grey-scale estimates, and the decisions between iterations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_helper import relative

from cryoiso.core.config import RefineSection
from cryoiso.core.errors import InputError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.io.sources import ArraySource
from cryoiso.parallel.context import Context
from cryoiso.physics import gpu_kernels
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.contrast_transfer import ctf_for
from cryoiso.physics.filters import lowpass, power_spectrum
from cryoiso.physics.fourier import fourier_disc
from cryoiso.physics.noise import noise_spectrum
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume, project
from cryoiso.physics.resample import resample_map
from cryoiso.physics.simulation import SimulatedSource, make_particles, simulate
from cryoiso.physics.so3 import angular_distance_deg, random_rotations, rotvec_to_matrix
from cryoiso.physics.symmetry import point_group
from cryoiso.refine import maximise, references
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.initial_model import grey_scale, initial_model, mean_power
from cryoiso.refine.iterate import Refinement
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
from cryoiso.refine.schedule import (
    FIRST_THRESHOLD,
    ScheduleState,
    disc_of_shifts,
    global_grid,
    search_plan,
)
from cryoiso.refine.search import Level, Posterior, Searcher, SearchPlan, summarise

BOX, PIXEL_A = 32, 6.0
RNG = np.random.default_rng(6)
GRID = global_grid(2, "C3")


def tensor(a) -> torch.Tensor:
    return torch.as_tensor(np.asarray(a, np.float32))


@pytest.fixture(scope="module")
def truth() -> DensityMap:
    return phantom_map(BOX, PIXEL_A, 14.0)


@pytest.fixture(scope="module")
def source(truth) -> SimulatedSource:
    return simulate(truth, 60, snr_db=0.0, shift_sd_A=8.0, seed=7)


def the_batch(source, n: int = 12, radius: int = 15, pixel_A: float = PIXEL_A):
    return BatchReader(source, source.particles, pixel_A)._prepare(np.arange(n), radius)


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


# --- the likelihood


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
    posterior = Posterior(rows, rotation, shift, weight, rotation, shift, one, one, one, one)
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


# --- the search


def a_plan(radius: int = 15) -> SearchPlan:
    settings = RefineSection(healpix_order=2, finest_step_deg=1.0)
    return search_plan(ScheduleState(radius_px=radius, shift_sd_px=2.0), settings, GRID, BOX, PIXEL_A, 140.0)


def test_the_search_finds_poses(truth):
    """100 images of -3 dB against the truth: a median of 3 degrees, where a pixel is 5 degrees at the edge."""
    source = simulate(truth, 100, snr_db=-3.0, shift_sd_A=6.0, seed=5)
    batch = the_batch(source, 100)
    volume = FourierVolume.from_volume(tensor(source.volume.data))
    posterior = Searcher(a_plan(), volume).search(batch, whiten(batch, np.ones((1, BOX // 2 + 1))))
    errors = angular_distance_deg(posterior.best_rotation.numpy(), source.particles.rotation, point_group("C3"))
    assert np.median(errors) < 3.5 and np.mean(errors > 10) < 0.05
    moved = posterior.best_shift_px.numpy() + source.particles.shift_A / PIXEL_A
    assert np.median(np.hypot(*moved.T)) < 0.15
    check_posterior(posterior, 100)


def check_posterior(posterior: Posterior, n: int) -> None:
    total = torch.zeros(n).index_add_(0, posterior.particle, posterior.weight)
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (posterior.weight > 0).all() and (posterior.particle.diff() >= 0).all()
    assert (
        (posterior.entropy >= 0).all() and (posterior.max_weight > 0).all() and (posterior.max_weight <= 1.0001).all()
    )
    for r in (posterior.rotation, posterior.best_rotation):
        identity = r @ r.transpose(1, 2)
        assert float((identity - torch.eye(3)).abs().max()) < 1e-4 and float((torch.det(r) - 1).abs().max()) < 1e-4


def test_noisier_images_have_wider_posteriors(truth):
    entropy, probability = [], []
    for snr_db in (0.0, -6.0, -12.0):
        source = simulate(truth, 40, snr_db=snr_db, seed=5)
        batch = the_batch(source, 40)
        white = whiten(batch, np.ones((1, BOX // 2 + 1)))
        posterior = Searcher(a_plan(), FourierVolume.from_volume(tensor(source.volume.data))).search(batch, white)
        check_posterior(posterior, 40)
        entropy.append(float(posterior.entropy.mean()))
        probability.append(float(posterior.max_weight.mean()))
    assert entropy[0] < entropy[1] < entropy[2] and probability[0] > probability[1] > probability[2]


def test_blocks_of_the_search_change_nothing(source, reference):
    batch = the_batch(source)
    white = whiten(batch, np.ones((1, BOX // 2 + 1)))
    whole = Searcher(a_plan(10), reference).search(batch, white)
    parts = Searcher(a_plan(10), reference, block=1).search(batch, white)
    np.testing.assert_allclose(whole.best_rotation, parts.best_rotation, atol=1e-4)
    np.testing.assert_allclose(whole.log_evidence, parts.log_evidence, rtol=1e-5)


def test_summary_of_samples():
    """Evidence, entropy and means of a posterior that is known: two views of 3:1, each with one shift."""
    axis = rotvec_to_matrix(np.radians([[0, 0, 0], [0, 0, 4], [90, 0, 0]]))
    rotation = tensor(axis)[None]
    score = torch.full((1, 3, 9), -torch.inf)
    score[0, 0, 4], score[0, 1, 4], score[0, 2, 4] = np.log(3.0), 0.0, -50.0
    shift = torch.zeros(1, 3, 9, 2)
    shift[0, 1, 4] = torch.tensor([1.0, -2.0])
    found = summarise(rotation, shift, score, Level(8.0, 1.0, 10, 8, 10.0))
    assert float(found.log_evidence[0]) == pytest.approx(np.log(4), abs=1e-6)
    assert float(found.entropy[0]) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), abs=1e-6)
    np.testing.assert_allclose(found.weight, [0.75, 0.25], atol=1e-6)
    assert float(found.max_weight[0]) == pytest.approx(0.75)
    # the mean of the leading mode lies a quarter of the way between both, and the far sample has no say
    expected = rotvec_to_matrix(np.radians([[0, 0, 1.0]]))
    assert angular_distance_deg(found.best_rotation.double().numpy(), expected)[0] < 0.01
    np.testing.assert_allclose(found.best_shift_px[0], [0.25, -0.5], atol=1e-6)
    # views 1 and 3 degrees from it, with weights 3:1
    assert float(found.spread_deg[0]) == pytest.approx(np.sqrt(0.75 * 1 + 0.25 * 9), abs=0.01)


# --- noise and grey scale


def true_posterior(source, rows: np.ndarray, pixel_A: float = PIXEL_A) -> Posterior:
    n = len(rows)
    rotation, shift = tensor(source.particles.rotation[rows]), tensor(-source.particles.shift_A[rows] / pixel_A)
    one = torch.ones(n)
    return Posterior(torch.arange(n), rotation, shift, one, rotation, shift, one, one, one, torch.zeros(n))


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


# --- from sums to references


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
