"""Micelle recovery: the operator against explicit projections, the solution against known truth."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from micelle_helper import BELT, BOX, PIXEL_A, TRPV1_BELT, correlation_at_20, held, recover, trimer, trimers

from cryoiso.core.config import RefineSection
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap, Particles
from cryoiso.engines.native import NativeEngine
from cryoiso.io.models import model_to_map
from cryoiso.io.sources import ArraySource
from cryoiso.methods.micelle import normal_equations, solve
from cryoiso.methods.micelle.image_sums import MicelleSums, SumPass
from cryoiso.methods.micelle.normal_equations import NormalEquations, SolutionGrid, Unknowns, inner
from cryoiso.methods.micelle.protein import filtered, protein_mask
from cryoiso.methods.micelle.recover import MicelleSettings, recover_micelle_halves
from cryoiso.metrics.pose_error import pose_errors
from cryoiso.parallel.context import Context
from cryoiso.physics.contrast_transfer import ctf_for
from cryoiso.physics.detergent_belt import belt_map, in_detergent
from cryoiso.physics.filters import lowpass
from cryoiso.physics.fourier import fourier_disc, fourier_to_images, shift_phases
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.projection import FourierVolume, scatter_to_half_plane
from cryoiso.physics.simulation import SimulatedSource, make_particles, simulate
from cryoiso.physics.so3 import rotvec_to_matrix
from cryoiso.physics.symmetry import point_group
from cryoiso.physics.views import Views
from cryoiso.pipeline.stages.micelle import composite_reference
from cryoiso.refine.batches import BatchReader

RNG = np.random.default_rng(4)


# --- the operator


def blob(box: int, pixel_A: float, finest_A: float, seed: int) -> np.ndarray:
    """A random volume with details down to ``finest_A`` in a sphere that the box holds."""
    rng = np.random.default_rng(seed)
    sphere = np.asarray(sphere_mask(box, box / 2 - 4, 3.0), np.float32)
    return lowpass(rng.standard_normal((box,) * 3).astype(np.float32) * sphere, pixel_A, finest_A) * sphere


def image_pass(particles: Particles, images: np.ndarray, grid: SolutionGrid, symmetry: str) -> SumPass:
    reader = BatchReader(ArraySource(images, particles), particles, grid.pixel_size_A, with_dc=True, memory_bytes=0)
    return SumPass(reader, point_group(symmetry), grid.radius_px, grid.padding, Context())


@pytest.mark.parametrize(
    "box, symmetry, finest_A",
    [(32, "C1", 12.0), (31, "C1", 12.0), (32, "C4", 12.0), (40, "C1", 30.0), (41, "C4", 30.0)],
)
def test_the_convolution_is_the_sum_of_projections_and_back_projections(box, symmetry, finest_A):
    """w.T v against sum_i (c P_i w).(c P_i v), slice by slice, from a grid padded by 6; also on a coarser grid."""
    particles = make_particles(60, box, PIXEL_A, seed=2)
    particles = replace(particles, half=np.ones(60, np.int8))
    grid = SolutionGrid.of(box, PIXEL_A, finest_A)
    assert (grid.size_px < box) == (finest_A == 30.0)
    images = np.zeros((60, box, box), np.float32)
    run = image_pass(particles, images, grid, symmetry)
    sums, whole = run.run({1: MicelleSums(), 2: MicelleSums()})
    zero = np.zeros((grid.size_px,) * 3, np.float32)
    made = NormalEquations(run.finished(sums[1], "cpu"), grid, zero, zero, 0.0)
    disc = fourier_disc(box, grid.radius_px, with_dc=True)
    poses = np.concatenate([particles.rotation @ s for s in point_group(symmetry)])
    ctf = ctf_for(particles, np.arange(60), freq_invA=disc.frequencies(PIXEL_A)).repeat(len(poses) // 60, 1)
    v, w = (blob(box, PIXEL_A, 1.2 * finest_A, seed) for seed in (1, 2))

    def views(volume: np.ndarray) -> torch.Tensor:
        transform = FourierVolume.from_volume(torch.from_numpy(volume), 6)
        return transform.slices(torch.from_numpy(poses.astype(np.float32)), disc) * ctf

    seen = {"v": views(v), "w": views(w)}
    coarse = {"v": torch.from_numpy(grid.coarse(v)), "w": torch.from_numpy(grid.coarse(w))}
    norm = {k: float((x.abs() ** 2).double().sum()) * 60 / len(poses) for k, x in seen.items()}
    assert whole
    for a, b in (("v", "v"), ("w", "v"), ("w", "w")):
        explicit = float((seen[a].conj() * seen[b]).real.double().sum()) * 60 / len(poses)
        assert abs(inner(coarse[a], made.convolve(coarse[b])) - explicit) < 5e-3 * np.sqrt(norm[a] * norm[b])


def test_back_projected_images_are_the_convolved_volume():
    """J^T x of noise-free images of V is T V: data and weight are on one scale."""
    v = blob(BOX, PIXEL_A, 18.0, 1)
    particles = make_particles(80, BOX, PIXEL_A, seed=2, shift_sd_A=5.0)
    particles = replace(particles, half=np.ones(80, np.int8))
    images = SimulatedSource(DensityMap(v, PIXEL_A), particles, noise=False).read(np.arange(80))
    grid = SolutionGrid.of(BOX, PIXEL_A, 2 * PIXEL_A)
    run = image_pass(particles, images, grid, "C1")
    sums, _ = run.run({1: MicelleSums(), 2: MicelleSums()})
    outside = np.asarray(sphere_mask(BOX, BOX / 2 - 5), np.float32)
    made = NormalEquations(run.finished(sums[1], "cpu"), grid, v, outside, 0.0)
    expected = made.outside * made.convolve(torch.from_numpy(v))
    assert float((made.outside * made.data - expected).norm() / expected.norm()) < 0.03
    assert made.zero().grey == pytest.approx(1.0, abs=0.005)
    assert sums[1].mean_power == pytest.approx(made.homologue_power / sums[1].count.sum(), rel=0.005)


def test_the_normal_equations_are_symmetric_and_positive():
    source, _ = trimers(60)
    made = equations_of(source)[1]
    made.set_prior(1.0, 0.5)
    a, b = (Unknowns(float(RNG.normal()), torch.from_numpy(blob(made.size, PIXEL_A, 14.0, s))) for s in (5, 6))
    assert a.dot(made.apply(b)) == pytest.approx(b.dot(made.apply(a)), rel=1e-4)
    assert a.dot(made.precondition(b)) == pytest.approx(b.dot(made.precondition(a)), rel=1e-4)
    for z in (a, b):
        assert z.dot(made.apply(z)) > 0 and z.dot(made.precondition(z)) > 0


def equations_of(source: ArraySource, lowpass_A: float = 20.0) -> dict[int, NormalEquations]:
    mask = protein_mask(trimer())
    grid = SolutionGrid.of(BOX, PIXEL_A, 12.0)
    run = image_pass(source.particles, source.read(np.arange(len(source.particles))), grid, "C3")
    sums, _ = run.run({1: MicelleSums(), 2: MicelleSums()})
    arguments = grid, grid.coarse(mask.data * trimer().data), grid.outside(mask.data, None), lowpass_A
    return {h: NormalEquations(run.finished(s, "cpu"), *arguments) for h, s in sums.items()}


# --- the solver


def test_conjugate_gradients_solve_the_equations():
    """The true residual, not the recurrence's, falls; the objective falls in every iteration."""
    made = equations_of(trimers()[0])[1]
    made.set_prior(1.0, 0.3)
    state = solve.start(made)
    for _ in range(40):
        state = solve.step(made, state)
    left = made.rhs.plus(-1.0, made.apply(state.z))
    assert np.sqrt(left.dot(left) / made.rhs.dot(made.rhs)) < 1e-4
    objective = [record["objective"] for record in state.history]
    assert all(b <= a + 1e-6 * abs(a) for a, b in pairwise(objective))
    assert state.history[0]["residual"] == 1.0 and state.relative_residual < 1e-3
    assert [record["iteration"] for record in state.history] == list(range(41))


def exact_images(volume: np.ndarray, particles: Particles) -> np.ndarray:
    """Noise-free images by slices through a grid padded by 6, whose interpolation error is below 0.3 %."""
    disc = fourier_disc(len(volume), (len(volume) - 1) // 2, with_dc=True)
    rotation, shift_A = particles.require_poses()
    slices = FourierVolume.from_volume(torch.from_numpy(volume), 6).slices(torch.from_numpy(np.float32(rotation)), disc)
    ctf = ctf_for(particles, np.arange(len(particles)), freq_invA=disc.frequencies(PIXEL_A))
    phases = shift_phases(*disc.frequencies(1.0), torch.from_numpy(-shift_A / PIXEL_A))
    return fourier_to_images(scatter_to_half_plane(slices * ctf * phases.to(slices.dtype), disc), len(volume)).numpy()


@pytest.mark.parametrize("padding, worst", [(2, 0.08), (3, 0.03), (4, 0.02)])
def test_what_the_model_can_say_comes_back_from_noise_free_images(monkeypatch, padding, worst):
    """V = g M h + (1 - M) L u with known g and u: both come back, but for the sums' interpolation: 7, 2.7, 1.8 %."""
    plain = SolutionGrid.of
    monkeypatch.setattr(SolutionGrid, "of", lambda *a: replace(plain(*a), padding=padding))
    mask, grid = protein_mask(trimer()), SolutionGrid.of(BOX, PIXEL_A, 12.0)
    smooth = lowpass(blob(BOX, PIXEL_A, 20.0, 9), PIXEL_A, 25.0)
    truth = grid.outside(mask.data, None) * smooth * (0.5 * trimer().data.std() / smooth.std())
    particles = make_particles(400, BOX, PIXEL_A, shift_sd_A=5.0, seed=3)
    images = exact_images((2.5 * mask.data * trimer().data + truth).astype(np.float32), particles)
    found = recover(ArraySource(images, particles), symmetry="C1", prior_sd=100.0, max_iterations=20, tolerance=1e-6)
    for result in found.halves.values():
        assert result.grey_scale == pytest.approx(2.5, rel=0.003)
        assert np.linalg.norm(result.micelle - truth) < worst * np.linalg.norm(truth)


def test_a_micelle_comes_back_from_noisy_images():
    source, detergent = trimers()
    mask = protein_mask(trimer())
    found = recover(source)
    for result in found.halves.values():
        assert correlation_at_20(result.micelle, detergent, mask.data, PIXEL_A) > 0.9
        assert result.converged and result.history[-1]["residual"] <= 1e-3
        assert result.noise_variance == pytest.approx(1.0, rel=0.25)
    grey = [r.grey_scale for r in found.halves.values()]
    assert grey[0] != grey[1] and grey[0] == pytest.approx(grey[1], rel=0.1)


def test_the_micelle_stays_out_of_the_protein():
    source, _ = trimers()
    mask = protein_mask(trimer())
    for result in recover(source).halves.values():
        assert np.abs(result.micelle[mask.data == 1]).max() == 0
        assert np.abs(result.micelle).max() > 0
        composite = composite_reference(result, trimer(), mask)
        inside = mask.data == 1
        np.testing.assert_allclose(composite[inside], result.grey_scale * trimer().data[inside], rtol=1e-5)


def test_without_a_micelle_there_is_nearly_none():
    """Images of the masked protein alone: outside, 2 % of a detergent's density is found, or the noise's."""
    mask = protein_mask(trimer())
    bare = DensityMap(mask.data * trimer().data, PIXEL_A)
    noisy = held(simulate(bare, 240, snr_db=-8.0, shift_sd_A=5.0, seed=3))
    clean = ArraySource(exact_images(bare.data.astype(np.float32), noisy.particles), noisy.particles)
    detergent = np.linalg.norm(in_detergent(trimer(), BELT)[1].data * (1 - mask.data))
    for result in recover(clean, symmetry="C1").halves.values():
        assert result.grey_scale == pytest.approx(1.0, abs=0.002)
        assert np.linalg.norm(result.micelle) < 0.02 * detergent
    for result in recover(noisy).halves.values():
        assert np.linalg.norm(result.micelle) < 0.4 * result.grey_scale * detergent


def test_scale_of_the_homologue_does_not_matter():
    source, _ = trimers()
    one = recover(source)
    other = recover(source, DensityMap(7.5 * trimer().data, PIXEL_A))
    for half in (1, 2):
        assert other.halves[half].grey_scale == pytest.approx(one.halves[half].grey_scale / 7.5, rel=1e-3)
        difference = other.halves[half].micelle - one.halves[half].micelle
        assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(one.halves[half].micelle)


def test_the_prior_holds_where_nothing_was_measured():
    """Top views only: without a prior the unmeasured directions fill with noise."""
    full, detergent = in_detergent(trimer(), BELT)
    views = Views("preferred", 1.0, 25.0, 10.0, 1)
    source = held(simulate(full, 60, snr_db=-14.0, seed=5, views=views))
    truth = detergent.data * (source.truth.data.std() / full.data.std())
    kept, free = (recover(source, prior_sd=p, tolerance=1e-4, max_iterations=80) for p in (1.0, 0.0))
    for half in (1, 2):
        error = [np.linalg.norm(r.halves[half].micelle - truth) for r in (kept, free)]
        assert error[0] < 0.7 * error[1]


def test_the_halves_know_nothing_of_each_other():
    """Other images in half 2 leave half 1 as it is, to the bit."""
    source, _ = trimers()
    images = source.read(np.arange(len(source.particles)))
    second = source.particles.half == 2
    images[second] = images[second][::-1] * 2
    other = recover(ArraySource(images, source.particles))
    one = recover(source)
    assert np.array_equal(one.halves[1].micelle, other.halves[1].micelle)
    assert not np.array_equal(one.halves[2].micelle, other.halves[2].micelle)


# --- TRPV1


@pytest.fixture(scope="module")
def trpv1(shared) -> DensityMap:
    return model_to_map(shared / "data" / "models" / "7l2i.cif.gz", 48, 4.0, 8.0, align_symmetry_axis="C4")


def test_the_belt_lies_outside_the_protein(trpv1):
    whole, detergent = in_detergent(trpv1, TRPV1_BELT)
    np.testing.assert_allclose(whole.data, trpv1.data + detergent.data, atol=1e-6)
    solid = filtered(trpv1) > 0.8 * filtered(trpv1).max()
    alone = belt_map(TRPV1_BELT, 48, 4.0).data
    assert np.abs(detergent.data[solid]).max() < 0.2 * detergent.data.max()
    assert alone.max() == pytest.approx(TRPV1_BELT.shell_density, rel=0.15)


def test_the_micelle_of_trpv1_comes_back_at_20_A(trpv1):
    """400 images of -12 dB whose poses are wrong by 3 degrees and 1 Å: correlation with the truth 0.97."""
    whole, detergent = in_detergent(trpv1, TRPV1_BELT)
    source = held(simulate(whole, 400, snr_db=-12.0, shift_sd_A=4.0, seed=5))
    turn = rotvec_to_matrix(RNG.normal(0, np.radians(3 / np.sqrt(3)), (400, 3)))
    shift = source.particles.shift_A + RNG.normal(0, 1.0, (400, 2))
    source.particles = source.particles.with_poses(turn @ source.particles.rotation, shift)
    mask = protein_mask(trpv1)
    found = recover(source, trpv1, symmetry="C4")
    for result in found.halves.values():
        for truth in (detergent.data, (1 - mask.data) * whole.data):
            assert correlation_at_20(result.micelle, truth, mask.data, 4.0) > 0.9


def test_the_next_refinement_finds_better_poses(trpv1, tmp_path):
    """One iteration of the engine from the homologue and from the composite made with poses wrong by 5 degrees."""
    whole, _ = in_detergent(trpv1, TRPV1_BELT)
    source = held(simulate(whole, 240, snr_db=-13.0, shift_sd_A=4.0, seed=5))
    true = source.particles.rotation
    turn = rotvec_to_matrix(np.random.default_rng(2).normal(0, np.radians(5 / np.sqrt(3)), (240, 3)))
    rough = ArraySource(source.read(np.arange(240)), source.particles.with_poses(turn @ true, source.particles.shift_A))
    found, mask = recover(rough, trpv1, symmetry="C4"), protein_mask(trpv1)
    data = np.mean([composite_reference(found.halves[h], trpv1, mask) for h in (1, 2)], axis=0, dtype=np.float32)
    error = {}
    for name, reference in (("homologue", trpv1), ("composite", DensityMap(data, 4.0))):
        (tmp_path / name).mkdir()
        blind = ArraySource(
            source.read(np.arange(240)), replace(source.particles, rotation=None, shift_A=None)
        )  # fmt: skip
        section = RefineSection(max_iterations=1)
        request = RefineRequest(blind, reference, "C4", tmp_path / name, section, seed=1, diameter_A=160.0)
        after = NativeEngine().refine(request, Context()).particles
        error[name] = pose_errors(after.rotation, true, "C4", align="axis")
    assert error["composite"].median_deg < 0.75 * error["homologue"].median_deg
    assert error["composite"].fraction_over(20) < 0.75 * error["homologue"].fraction_over(20)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_micelle():
    source, _ = trimers()
    here = recover(source)
    there = recover_micelle_halves(
        source, source.particles, trimer(), protein_mask(trimer()), Context(), MicelleSettings("C3"), device="cuda"
    )  # fmt: skip
    for half in (1, 2):
        difference = here.halves[half].micelle - there.halves[half].micelle
        assert np.linalg.norm(difference) < 1e-2 * np.linalg.norm(here.halves[half].micelle)


def test_the_coarse_grid_holds_the_box():
    grid = SolutionGrid.of(256, 1.0, 10.0)
    assert grid.size_px * grid.voxel_A == pytest.approx(256.0) and 2 * grid.voxel_A < 10.0 / 1.4
    volume = blob(64, 2.0, 16.0, 3)
    grid = SolutionGrid.of(64, 2.0, 10.0)
    back = grid.fine(grid.coarse(volume))
    assert grid.size_px < 64 and np.linalg.norm(back - volume) < 0.02 * np.linalg.norm(volume)
    assert normal_equations.OVERSAMPLING * grid.radius_px <= grid.size_px / 2
