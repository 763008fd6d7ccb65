"""CTF refinement: simulated errors are found with the accuracy that the Fisher information allows, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ctf_refine_helper import WrongSet, rms

from cryoiso.core.errors import InputError, UsageError
from cryoiso.core.types import DensityMap, OpticsGroup
from cryoiso.methods.ctf_refinement.astigmatism import astigmatism_of, with_change
from cryoiso.methods.ctf_refinement.beam_tilt import AberrationFit, PhaseSums, fit_aberrations, with_aberrations
from cryoiso.methods.ctf_refinement.defocus import grid_A, posterior_modes, prior_width_A
from cryoiso.methods.ctf_refinement.defocus_curves import block_curves, quarter_turned
from cryoiso.methods.ctf_refinement.image_model import measured_model
from cryoiso.methods.ctf_refinement.image_pass import ImagePass
from cryoiso.methods.ctf_refinement.reference import COARSEST_A, from_half_maps, from_map
from cryoiso.methods.ctf_refinement.settings import CtfRefinementSettings
from cryoiso.methods.ctf_refinement.tilt_plane import fit_plane, unshrunken
from cryoiso.parallel.context import Context
from cryoiso.physics.contrast_transfer import beam_tilt_phase, ctf_for
from cryoiso.physics.nuisances.settings import Micrographs, Nuisances, Optics
from cryoiso.physics.phantom import phantom_map
from cryoiso.refine.reconstruct import reconstruct_halves

N = 300
GROUP = OpticsGroup(1, "g", 1.9, 80, 300.0, 2.7, 0.1)


@pytest.fixture(scope="module")
def volume() -> DensityMap:
    made = phantom_map(80, 1.9, 4.0)
    return DensityMap(made.data * np.float32(2.5), 1.9)


@pytest.fixture(scope="module")
def scattered(volume) -> WrongSet:
    return WrongSet(volume, N, Nuisances(micrographs=Micrographs(3, defocus_error_sd_A=300.0)))


# --- defocus of particles


def test_errors_fall_as_the_fisher_information_predicts(scattered):
    found = scattered.refined()
    before, after = rms(scattered.error_A(scattered.given)), rms(scattered.error_A(found.particles))
    predicted = np.sqrt(np.mean(1 / (found.fisher + 1 / before**2)))
    assert before / after > 2.5
    assert after == pytest.approx(predicted, rel=0.3)
    assert rms(found.error_A) == pytest.approx(predicted, rel=0.1)
    assert found.prior_sd_A == pytest.approx(before, rel=0.15)
    assert found.at_limit.sum() == 0 and found.gain.sum() > 3 * N
    np.testing.assert_allclose(found.change_A, scattered.error_A(found.particles) - scattered.error_A(scattered.given))


def test_nothing_is_found_where_nothing_is_wrong(scattered):
    found = scattered.refined(scattered.true)
    assert rms(found.change_A) < 0.3 * np.median(found.fisher**-0.5)
    wide = scattered.refined(scattered.true, prior_sd_A=300.0)
    assert abs(wide.change_A.mean()) < 4 * wide.change_A.std() / math.sqrt(N), "no bias"
    assert rms(wide.change_A) == pytest.approx(np.sqrt(np.mean(wide.error_A**2)), rel=0.3)


def test_references_of_random_phases_find_nothing(scattered):
    control = scattered.refined(control_particles=N).facts["control"]
    assert control["particles"] == N
    assert abs(control["mean_change_A"]) <= 4 * control["mean_error_A"] + 1e-9
    assert control["rms_change_A"] < 60
    assert max(abs(v) for v in control["grey_scale"].values()) < 0.05 * scattered.refined().facts["grey_scale"]["half1"]


def test_curves_are_log_likelihoods_computed_coefficient_by_coefficient(scattered):
    """Radial sums against -|x - a c P|^2 / sigma^2 with the CTF of every defocus."""
    reference = scattered.reference()
    images = ImagePass(
        scattered.source, scattered.given, reference.volumes(), reference.radius_px, 1.9, Context()
    )  # fmt: skip
    model = measured_model(images)
    grid = grid_A(1000.0, 0.0196876, reference.resolution_A)
    turned = quarter_turned(scattered.given)
    blocks = []
    images.each("", lambda block: blocks.append(block) if not blocks else None)
    block = blocks[0]
    numbers = block_curves(block, model, turned, grid)
    fy, fx = block.frequencies()
    used = torch.hypot(fy, fx) >= 1 / COARSEST_A
    sigma2 = torch.as_tensor(model.sigma2[block.batch.group][:, block.batch.disc.shell])
    direct = []
    for change in grid:
        p = scattered.given
        p = replace(p, defocus_u_A=p.defocus_u_A + change, defocus_v_A=p.defocus_v_A + change)
        c = ctf_for(p, block.batch.rows, freq_invA=block.batch.disc.frequencies(1.9))
        off = (block.data - model.scale[block.half] * c * block.slices).abs().square().double()
        direct.append(-(off / sigma2)[:, used].sum(1).numpy())
    curve = np.stack(direct, 1) - direct[len(grid) // 2][:, None]
    np.testing.assert_allclose(numbers[:, :-1], curve, atol=0.01 * np.abs(curve).max())


def test_prior_width_and_modes_of_gaussian_curves():
    """Parabolic likelihoods of known width, for which mode and prior are known in closed form."""
    rng = np.random.default_rng(1)
    grid = grid_A(2000.0, 0.0197, 4.0)
    information, width = 1 / 120.0**2, 250.0
    best = rng.normal(0, math.hypot(width, 120.0), 4000)
    curves = -0.5 * information * (grid - best[:, None]) ** 2
    assert prior_width_A(curves, grid) == pytest.approx(width, rel=0.04)
    modes = posterior_modes(curves, grid, width)
    np.testing.assert_allclose(modes.change_A, best * information / (information + width**-2), atol=1e-6)
    nothing = -0.5 * information * (grid - rng.normal(0, 120.0, (4000, 1))) ** 2
    assert prior_width_A(nothing, grid) < 25
    beyond = posterior_modes(1e-3 * grid[None, :], grid, 1e9)
    assert beyond.at_limit.all() and beyond.change_A[0] == pytest.approx(2000.0)


def test_half_maps_refine_the_particles_they_were_made_of(scattered):
    maps = reconstruct_halves(scattered.source, scattered.given, symmetry="C3")
    mask = np.ones_like(scattered.volume.data)
    reference = from_half_maps(maps[1], maps[2], mask)
    assert reference.resolution_A < 8
    found = scattered.refined(reference=reference)
    before, after = rms(scattered.error_A(scattered.given)), rms(scattered.error_A(found.particles))
    assert after < 0.75 * before
    finer = from_half_maps(maps[1], maps[2], mask, 2.0)
    assert finer.resolution_A == reference.resolution_A, "never beyond what half-maps support"


def test_one_map_is_used_to_two_pixels_at_the_finest(scattered):
    volume = scattered.volume
    finest_A = 2 * volume.pixel_size_A
    reference, beyond = (from_map(volume, resolution, None) for resolution in (finest_A, 0.3 * finest_A))
    assert beyond.resolution_A == finest_A, "what is reported is what was used"
    assert np.array_equal(beyond.maps[1].data, reference.maps[1].data) and beyond.radius_px == reference.radius_px


def test_each_half_set_is_compared_with_its_own_map_alone(scattered):
    plain = scattered.reference()
    other = scattered.reference().with_random_phases(1)
    mixed = replace(plain, maps={1: plain.maps[1], 2: other.maps[2]})
    with pytest.raises(InputError, match="half-set 2 do not correlate"):
        scattered.refined(reference=mixed)
    one = scattered.refined(prior_sd_A=300.0)
    rotated = DensityMap(np.ascontiguousarray(0.9 * plain.maps[2].data), 1.9)
    two = scattered.refined(prior_sd_A=300.0, reference=replace(plain, maps={1: plain.maps[1], 2: rotated}))
    mine = scattered.given.half == 1
    np.testing.assert_allclose(one.change_A[mine], two.change_A[mine], atol=1.0)


@pytest.mark.parametrize("kind", ["flipped", "premultiplied"])
def test_images_that_the_ctf_was_applied_to_are_refused(scattered, kind):
    with pytest.raises(InputError, match=kind):
        scattered.refined(scattered.given.with_ctf_applied(kind))


def test_settings_are_checked():
    for wrong in ({"particles": False}, {"range_A": 0.0}, {"prior_sd_A": -1.0}, {"prior_sd_A": 5000.0}):
        with pytest.raises(UsageError):
            CtfRefinementSettings(**wrong)


# --- micrographs and tilt planes


def test_micrographs_shifts_and_astigmatism_are_found(volume):
    wrong = WrongSet(volume, N, Nuisances(micrographs=Micrographs(3, defocus=True)))
    rng = np.random.default_rng(4)
    error = np.column_stack([rng.normal(0, 300, 3), rng.normal(0, 150, (3, 2))])
    given = with_change(wrong.given, error[wrong.micrograph])
    found = wrong.refined(given, particles=False, micrographs="astigmatism")
    left = astigmatism_of(found.particles) - astigmatism_of(wrong.true)
    assert np.abs(left[:, 0]).max() < 60 and np.abs(left[:, 1:]).max() < 60
    facts = found.facts["micrograph_fit"]
    assert max(facts["error_A"]) < 20 and max(facts["astigmatism_error_A"]) < 20
    shift = wrong.refined(given, particles=False, micrographs="defocus")
    assert np.abs(astigmatism_of(shift.particles)[:, 0] - astigmatism_of(wrong.true)[:, 0]).max() < 60
    np.testing.assert_array_equal(shift.particles.defocus_angle_deg, given.defocus_angle_deg)


def test_defocus_and_astigmatism_are_one_transformation(scattered):
    change = np.random.default_rng(1).normal(0, 200, (N, 3))
    moved = with_change(scattered.true, change)
    np.testing.assert_allclose(astigmatism_of(moved) - astigmatism_of(scattered.true), change, atol=1e-8)
    assert (moved.defocus_u_A >= moved.defocus_v_A).all()


def test_tilt_planes_of_micrographs(volume):
    tilted = WrongSet(volume, 400, Nuisances(micrographs=Micrographs(2, defocus=True, stage_tilt_deg=25.0)))
    found = tilted.refined()
    free = unshrunken(found.own_change_A, found.fisher, found.prior_sd_A)
    for m in range(2):
        here = tilted.micrograph == m
        place = np.stack([tilted.columns[f"rlnCoordinate{a}"] for a in "XY"], 1)[here] * 1.9
        plane = fit_plane(place, (astigmatism_of(tilted.given)[:, 0] + free)[here], found.fisher[here])
        true = fit_plane(place, astigmatism_of(tilted.true)[here, 0], np.ones(here.sum()))
        assert true.tilt_deg == pytest.approx(25.0, abs=1e-3)
        assert plane.tilt_deg == pytest.approx(25.0, abs=1.0)
        assert np.abs(np.subtract(plane.slope, true.slope)).max() < 5 * max(plane.slope_error)


def test_a_plane_needs_particles_that_span_it():
    place = np.column_stack([np.arange(30.0), 2 * np.arange(30.0)])
    assert fit_plane(place, np.arange(30.0), np.ones(30)) is None
    assert fit_plane(place[:5], np.arange(5.0), np.ones(5)) is None


# --- beam tilt


@pytest.fixture(scope="module")
def tilted_beam(volume) -> WrongSet:
    return WrongSet(volume, N, Nuisances(micrographs=Micrographs(2), optics=Optics(2, (1.5, -1.0), 0.5)))


def test_beam_tilt_is_found_with_the_sign_of_the_simulation(tilted_beam):
    found = tilted_beam.refined(particles=False, beam_tilt="tilt")
    for index, group in enumerate(found.particles.groups):
        true, fit = tilted_beam.true.groups[index], found.facts["optics_groups"][str(group.number)][-1]
        off = np.subtract(group.beam_tilt_mrad, true.beam_tilt_mrad)
        assert fit["significant"] and max(fit["tilt_error_mrad"]) < 0.1
        assert np.abs(off).max() < 5 * max(fit["tilt_error_mrad"])
    again = tilted_beam.refined(
        replace(tilted_beam.given, groups=found.particles.groups), particles=False, beam_tilt="tilt"
    )
    assert again.particles.groups == found.particles.groups, "nothing is left"


def test_no_beam_tilt_is_found_without_one(scattered):
    found = scattered.refined(scattered.true, particles=False, beam_tilt="trefoil")
    assert found.particles.groups == scattered.true.groups
    assert not found.facts["optics_groups"]["1"][0]["significant"]


def test_phases_of_tilt_trefoil_and_shift_are_separated():
    """A fit of noise-free phases, some beyond half a turn, and what becomes of it in the group."""
    group = replace(GROUP, odd_zernike=(0.1, 0.2, 5.0, 8.0, -6.0, 4.0), beam_tilt_mrad=(0.3, -0.2))
    fit = AberrationFit((3.0, -2.0), (4.0, 3.0), (0.1, 0.1), (30.0, -20.0), (0.1, 0.1), 0.0, True)
    target = with_aberrations(group, fit)
    assert target.odd_zernike[3:5] == (0.0, 0.0)
    fy, fx = np.meshgrid(np.linspace(-0.25, 0.25, 61), np.linspace(0.004, 0.25, 31), indexing="ij")
    fy, fx = (f[np.hypot(fy, fx) < 0.25] for f in (fy, fx))
    frequencies = torch.as_tensor(fy), torch.as_tensor(fx)
    ratio = (beam_tilt_phase(*frequencies, target) * beam_tilt_phase(*frequencies, group).conj()).numpy()
    assert np.abs(np.unwrap(np.angle(ratio))).max() > np.pi
    found = fit_aberrations(PhaseSums(100 * ratio, np.full(len(fy), 100.0), fy, fx), group, trefoil=True)
    np.testing.assert_allclose(found.tilt_mrad, fit.tilt_mrad, atol=1e-4)
    np.testing.assert_allclose(found.trefoil_rad_A3, fit.trefoil_rad_A3, atol=1e-2)
    np.testing.assert_allclose(found.shift_rad_A, fit.shift_rad_A, atol=1e-3)
    assert found.significant


def test_beam_tilt_needs_spherical_aberration(scattered):
    flat = replace(
        scattered.given, groups=tuple(replace(g, spherical_aberration_mm=0.0) for g in scattered.given.groups)
    )
    with pytest.raises(InputError, match="spherical aberration"):
        scattered.refined(flat, beam_tilt="tilt")
