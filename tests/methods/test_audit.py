"""Controls: what is changed, and what is measured of it, on arrays with a known answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from analytic_helper import some_gaussians
from errors_helper import raises_code

from cryoiso.core.types import DensityMap, OpticsGroup, Particles
from cryoiso.methods.audit import agreement, likeness, omega, regions
from cryoiso.methods.audit.agreement import independence, shared
from cryoiso.methods.audit.blocks import block_numbers, bootstrap, summed
from cryoiso.methods.audit.frame import in_frame_of
from cryoiso.methods.audit.likeness import Band
from cryoiso.methods.audit.null_images import Background, gaussian
from cryoiso.physics.filters import lowpass, power_spectrum
from cryoiso.physics.fit import apply_fit
from cryoiso.physics.fit_result import Placement
from cryoiso.physics.so3 import random_rotations, rotvec_to_matrix
from cryoiso.physics.symmetry import point_group

BOX, PIXEL_A = 32, 4.0
C3 = point_group("C3")


def smooth_noise(seed: int, resolution_A: float = 12.0) -> np.ndarray:
    white = np.random.default_rng(seed).standard_normal((BOX, BOX, BOX))
    return np.asarray(lowpass(white, PIXEL_A, resolution_A), np.float64)


def ball(radius_px: float) -> np.ndarray:
    axis = np.arange(BOX) - BOX // 2
    return axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2 <= radius_px**2


def particles(n: int, *kinds: str) -> Particles:
    """Particles of as many optics groups as kinds of images, in turn."""
    group = OpticsGroup(1, "", PIXEL_A, BOX, 300, 2.7, 0.1)
    groups = tuple(replace(group, number=i, ctf_premultiplied=kind != "") for i, kind in enumerate(kinds, 1))
    ones = np.ones(n)
    return Particles(
        np.arange(n, dtype=np.uint64), np.arange(n, dtype=np.int32) % len(kinds), groups, np.array(["s"] * n),
        np.arange(n), 12000 * ones, 12000 * ones, 0 * ones, 0 * ones, 0 * ones, ones,
    )  # fmt: skip


# --- what is changed


def test_noise_has_the_spectrum_of_its_optics_group_and_empty_shells_stay_empty():
    spectra = np.stack([np.linspace(3, 1, BOX // 2 + 1), np.full(BOX // 2 + 1, 0.5)])
    spectra[1, 10:] = np.inf
    some = particles(400, "", "")
    images = gaussian(some, np.arange(400), spectra, BOX, 1)
    one, two = (power_spectrum(images[group::2]).mean(0) for group in (0, 1))
    # 200 images of 12 or more coefficients a shell; between the last full shell and the first empty one it falls
    np.testing.assert_allclose(one[2:15], spectra[0, 2:15], rtol=0.12)
    np.testing.assert_allclose(two[2:9], spectra[1, 2:9], rtol=0.12)
    assert (two[11:16] < 1e-3).all()


def test_an_image_of_noise_depends_on_its_particle_alone():
    some, spectra = particles(6, ""), np.ones((1, BOX // 2 + 1))
    whole = gaussian(some, np.arange(6), spectra, BOX, 1)
    np.testing.assert_array_equal(gaussian(some, np.array([4, 1]), spectra, BOX, 1), whole[[4, 1]])
    assert abs(np.corrcoef(whole[0].ravel(), whole[1].ravel())[0, 1]) < 0.15  # four errors are 0.125
    assert not np.allclose(gaussian(some, np.arange(6), spectra, BOX, 1, "leak"), whole)


def test_premultiplied_noise_is_empty_where_the_ctf_is():
    from cryoiso.physics.ctf_applied import microscope_ctf

    some = particles(1, "premultiplied")
    image = gaussian(some, np.array([0]), np.ones((1, BOX // 2 + 1)), BOX, 1)[0]
    ctf = np.abs(microscope_ctf(some, np.array([0]), BOX)[0].numpy())
    power = np.abs(np.fft.rfft2(image)) ** 2
    assert power[ctf < 0.1].mean() < 0.02 * power[ctf > 0.7].mean()


def test_background_patches_are_cut_resampled_and_refused_if_small():
    patches = np.random.default_rng(0).standard_normal((3, 80, 80)).astype(np.float32)
    made = Background(patches, 2.0, BOX, PIXEL_A)
    images = made.images(particles(5, ""), np.arange(5), 1)
    assert images.shape == (5, BOX, BOX)
    np.testing.assert_allclose(images.std((1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(images.mean((1, 2)), 0, atol=1e-5)
    with raises_code("box-mismatch"):
        Background(patches, 1.0, BOX, PIXEL_A)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_regions_have_their_share_of_the_mass_and_the_symmetry_and_are_compact(share):
    density = np.where(ball(10), 1.0, 0.0) * (1 + 0.3 * np.arange(BOX)[:, None, None] / BOX)
    found = regions.regions(density, ball(10), C3, 2, share)
    for region in found:
        assert density[region].sum() / density.sum() == pytest.approx(share, abs=0.01)
        points = np.argwhere(region)[:, ::-1] - BOX // 2
        turned = np.rint(points @ C3[1].T).astype(int) + BOX // 2
        assert region[turned[:, 2], turned[:, 1], turned[:, 0]].mean() > 0.8  # but for rounding to voxels
        third = points[np.linalg.norm(points - points[0], axis=1) < 9]
        assert np.linalg.norm(third - third.mean(0), axis=1).max() < 11
    assert (found[0] & found[1]).sum() < 0.5 * found[0].sum()
    left = regions.without(density, found[0], PIXEL_A)
    assert left[found[0]].sum() < 0.1 * density[found[0]].sum()


def test_blobs_are_beside_the_particle_and_as_many_as_the_symmetry_says():
    from scipy.ndimage import label

    places = regions.blob_places(ball(6), C3, PIXEL_A, 5, 1)
    assert len(places) == 6
    made = [regions.blob_at(place, BOX, C3, PIXEL_A) for place in places]
    for one in made:
        assert label(one > 0.5)[1] == 3 and one[ball(6)].max() < 0.5
    assert all((made[0] * other).sum() < 0.2 * (made[0] ** 2).sum() for other in made[1:])


def test_a_decoy_has_the_spectrum_of_the_reference_and_nothing_else_of_it():
    reference = smooth_noise(1) * ball(9)
    decoy = regions.other_fold(reference, ball(9), 1, PIXEL_A)
    # the factor is interpolated between shells, which are few coefficients at the centre
    np.testing.assert_allclose(power_spectrum(decoy, 3)[3:12], power_spectrum(reference, 3)[3:12], rtol=0.15)
    assert abs(np.corrcoef(decoy.ravel(), reference.ravel())[0, 1]) < 0.2
    one, two = (regions.noise_reference(reference, 1, half) for half in (1, 2))
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.1


# --- what is measured


def test_omega_is_the_share_that_is_lost_whatever_grey_scale_and_solvent():
    part, rest = ball(11) & ~ball(8), ball(8)
    solvent = ~ball(13)
    full = np.where(ball(11), 1.0, 0.0)
    for lost in (0.0, 0.25, 1.0):
        omitted = 3.7 * (full - lost * part) + 0.6
        found = omega.omega(full, omitted, part, rest, solvent, 3, orbits=C3)
        assert found.value == pytest.approx(lost, abs=1e-6)
        assert found.low - 1e-6 <= lost <= found.high + 1e-6


def test_what_a_poorer_reference_costs_everywhere_is_no_share_of_the_reference():
    inside, one, two = ball(11), ball(11).copy(), ball(11).copy()
    z = np.indices((BOX,) * 3)[0] - BOX // 2
    one &= z > 5
    two &= z < -5
    rest, full = inside & ~one & ~two, np.where(inside, 1.0, 0.0)
    noise = [0.02 * smooth_noise(s) / smooth_noise(s).std() for s in range(2)]
    for owed in (0.0, 0.3):
        # both lose a tenth at both ends, and each what it owes to the reference
        poorer = full - 0.1 * (one | two)
        first, second = poorer - owed * one + noise[0], poorer - owed * two + noise[1]
        pair = [
            omega.matched(full, first, [second], one, rest, ~ball(13), 3, orbits=C3),
            omega.matched(full, second, [first], two, rest, ~ball(13), 3, orbits=C3),
        ]
        assert pair[0].omega.value == pytest.approx(0.1 + owed, abs=0.02)
        assert pair[0].floor.value == pytest.approx(0.1, abs=0.02)
        found = omega.pooled(pair)
        assert found.value == pytest.approx(owed, abs=0.01) and found.low <= owed + 0.01 and found.high >= owed - 0.01
    # one repetition that is better than the other moves the two regions apart, not their mean
    worse = full - 0.2 * (one | two)
    apart = [
        omega.matched(full, worse, [full], one, rest, ~ball(13), 3),
        omega.matched(full, full, [worse], two, rest, ~ball(13), 3),
    ]
    assert apart[0].net.value > 0.15 and apart[1].net.value < -0.15
    assert abs(omega.pooled(apart).value) < 0.02
    alone = omega.matched(full, worse, [], one, rest, ~ball(13), 3)
    assert alone.omega.value == pytest.approx(0.2, abs=1e-6) and np.isnan(alone.net.value)


def test_of_added_density_its_share_is_found_with_the_error_of_the_noise_beside_it():
    reference = np.where(ball(6), 1.0, 0.0)
    added, *elsewhere = (regions.blob_at(p, BOX, C3, PIXEL_A) for p in regions.blob_places(ball(6), C3, PIXEL_A, 30, 1))
    noise = 0.1 * smooth_noise(3) / smooth_noise(3).std()
    exact = omega.share_left(2.0 * (reference + 0.3 * added), 0.5 * reference, added, elsewhere, ball(6), reference)
    assert exact.value == pytest.approx(0.3, abs=0.01)
    noisy = omega.share_left(reference + 0.3 * added + noise, reference, added, elsewhere, ball(6), reference)
    assert noisy.low < 0.3 < noisy.high and 0.005 < noisy.error < 0.1
    few = omega.share_left(reference, reference, added, elsewhere[:3], ball(6), reference)
    assert np.isnan(few.error)


def test_the_omitted_part_is_where_the_templates_differ():
    full, omitted = np.where(ball(8), 1.0, 0.0), np.where(ball(6), 1.0, 0.0)
    np.testing.assert_array_equal(omega.differing(full, omitted), ball(8) & ~ball(6))


def test_correlations_of_independent_maps_are_zero_within_their_errors():
    inside, band = ball(12), Band(2, 10)
    found = [likeness.correlation(smooth_noise(s), smooth_noise(100 + s), inside, band, s) for s in range(12)]
    z = np.array([e.value / e.error for e in found])
    assert np.abs(z).max() < 4 and 0.4 < z.std() < 2.2
    same = likeness.correlation(smooth_noise(1), 3 * smooth_noise(1) + 2, inside, band)
    assert same.value == pytest.approx(1, abs=1e-9)
    empty = likeness.correlation(np.zeros((BOX,) * 3), smooth_noise(1), inside, band)
    assert empty.value == 0


def test_a_band_begins_where_the_initial_reference_has_ended():
    band = Band.beyond(30.0, 10.0, BOX, PIXEL_A)
    low = np.asarray(lowpass(np.random.default_rng(0).standard_normal((BOX,) * 3), PIXEL_A, 30.0), np.float64)
    left = likeness.filtered(low, Band(band.first + 1, band.last))
    assert (left**2).sum() < 1e-6 * (low**2).sum()
    assert not Band.beyond(30.0, 28.0, BOX, PIXEL_A).usable


def test_the_difference_of_likenesses_is_found_with_its_sign():
    inside, reference = ball(12), smooth_noise(1)
    near, far = reference + 0.3 * smooth_noise(2), smooth_noise(3)
    band = Band(2, 10)
    up, down = (likeness.difference(*pair, reference, inside, band) for pair in ((near, far), (far, near)))
    assert up.low > 0.5 and down.value == pytest.approx(-up.value, abs=1e-9)


def test_independent_half_maps_stay_in_the_band_and_a_common_part_leaves_it():
    rng = np.random.default_rng(5)
    totals, largest = [], []
    for _ in range(10):
        one, two = (rng.standard_normal((BOX,) * 3) for _ in range(2))
        found = independence(one, two, 1, 15)
        totals.append(found.z)
        largest.append(found.z.max() > found.limit)
    assert np.concatenate(totals).std() == pytest.approx(1, abs=0.2)
    assert sum(largest) <= 1
    leaky = independence(one, two + 0.2 * one, 1, 15)
    assert leaky.z.max() > leaky.limit and leaky.total > 3


def test_symmetry_repeats_coefficients_and_widens_the_band():
    from cryoiso.pipeline.inputs.standard_frame import symmetrised

    z = []
    for seed in range(6):
        pair = [smooth_noise(seed + 50 * half, 8.0) * ball(15) for half in (1, 2)]
        even = [symmetrised(DensityMap(v.astype(np.float32), PIXEL_A), "C3").data.astype(float) for v in pair]
        z.append(independence(*even, 3, 12).z)
    assert np.concatenate(z).std() == pytest.approx(1, abs=0.25)  # in a ball, not in the whole box


def test_poses_that_differ_by_the_symmetry_are_shared():
    rotation = random_rotations(np.random.default_rng(0), 30)
    moved = rotation @ np.swapaxes(C3[1][None], 1, 2)
    other = moved.copy()
    other[:6] = other[:6] @ rotvec_to_matrix(np.radians([[30.0, 0, 0]]))
    share, error, degrees = shared(rotation, other, C3, 10.0)
    assert share == pytest.approx(0.8) and 0.05 < error < 0.1
    np.testing.assert_allclose(np.sort(degrees)[:24], 0, atol=1e-4)


def test_another_frame_is_no_movement_of_poses():
    rotation = random_rotations(np.random.default_rng(0), 60)
    for symmetry, axis in (("C3", [0, 0, 25.0]), ("C1", [10.0, 20.0, -5.0])):
        frame = rotvec_to_matrix(np.radians([axis]))[0]
        moved = rotation @ frame
        moved[:12] = random_rotations(np.random.default_rng(1), 12)
        operations = point_group(symmetry)
        share, _, _ = shared(agreement.in_frame_of(moved, rotation, operations), rotation, operations, 10.0)
        assert share >= 0.79, symmetry
        assert shared(moved, rotation, operations, 10.0)[0] < 0.5
    fixed = point_group("D3")
    np.testing.assert_array_equal(agreement.in_frame_of(rotation, rotation[::-1], fixed), rotation)


def test_a_map_that_slid_along_its_axis_comes_back():
    density = DensityMap(some_gaussians(BOX, 30, 2.0).volume(BOX).astype(np.float32), PIXEL_A)
    even = sum(apply_fit(density, Placement(r, np.zeros(3), 1.0)).data for r in C3)
    spin = rotvec_to_matrix(np.radians([[0, 0, 3.0]]))[0]
    moved = apply_fit(DensityMap(even, PIXEL_A), Placement(spin, np.array([0, 0, 2.0]), 1.0)).data
    found = in_frame_of(moved, even, PIXEL_A, 12.0, "C3")
    before, after = (np.linalg.norm(v - even) / np.linalg.norm(even) for v in (moved, found))
    assert before > 0.1 and after < 0.03
    np.testing.assert_array_equal(in_frame_of(moved, even, PIXEL_A, 12.0, "D3"), moved)


def test_blocks_of_symmetry_mates_are_one_and_the_bootstrap_knows_the_error_of_a_mean():
    where = ball(8)
    numbers = block_numbers(where, 4, C3)
    assert len(np.unique(numbers)) < 0.55 * len(np.unique(block_numbers(where, 4)))
    values = np.random.default_rng(1).standard_normal(400)
    found = bootstrap(summed(np.arange(400), values, np.ones(400)), lambda t: t[..., 0] / t[..., 1], 1, "mean")
    assert found.error == pytest.approx(values.std() / 20, rel=0.15)
    few = bootstrap(np.ones((3, 2)), lambda t: t[..., 0] / t[..., 1], 1, "few")
    assert few.value == 1 and np.isnan(few.error)
