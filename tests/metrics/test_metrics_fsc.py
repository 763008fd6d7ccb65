"""Laws of the FSC, values against an independent few-liner, against 3DFSC's and RELION's files."""

from __future__ import annotations

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.metrics.fsc_curve import (
    curve_area,
    fsc,
    fsc_corrected,
    non_increasing,
    randomise_phases,
    resolution_at,
    shell_correlation,
    shell_frequencies,
    smooth_resolution_at,
)
from cryoiso.metrics.mapmodel import best_slide, compare_maps, cone_fsc, correlation, to_frame


def full_fsc(a, b, select=None):
    """Independent: the full complex transform, one shell at a time."""
    n = len(a)
    fa, fb = np.fft.fftn(a), np.fft.fftn(b)
    kz, ky, kx = np.meshgrid(*(np.fft.fftfreq(m, 1 / m) for m in fa.shape), indexing="ij")
    radius = np.sqrt(kx**2 + ky**2 + kz**2)
    use = np.ones(fa.shape, bool) if select is None else select(kx, ky, kz, radius)
    curve = []
    for shell in range(n // 2 + 1):
        s = (np.round(radius) == shell) & use
        power = np.sqrt((abs(fa[s]) ** 2).sum() * (abs(fb[s]) ** 2).sum())
        curve.append((fa[s] * fb[s].conj()).real.sum() / power if power > 0 else 0.0)
    return np.array(curve)


def noise(box, seed=0):
    return np.random.default_rng(seed).standard_normal((box, box, box))


@pytest.fixture(scope="module")
def halves(reference_numbers):
    mrcfile = pytest.importorskip("mrcfile")
    folder = reference_numbers / "halfmaps"
    names = {1: "half1_64_3A", 2: "half2_64_3A"}
    maps = {
        (kind, h): mrcfile.read(folder / f"ha6wxb_{kind}_{name}.mrc.gz").astype(np.float64)
        for kind in ("iso", "top10eps10")
        for h, name in names.items()
    }
    return {**maps, "mask": mrcfile.read(folder / "ha6wxb_softmask_64_3A.mrc.gz").astype(np.float64)}


@pytest.mark.parametrize("box", [24, 25])
def test_fsc_of_a_map_with_itself_is_one_and_changes_sign_with_it(box):
    a = noise(box)
    np.testing.assert_allclose(fsc(a, a), 1, atol=1e-12)
    np.testing.assert_allclose(fsc(a, -3 * a)[1:], -1, atol=1e-12)


@pytest.mark.parametrize("box", [24, 25])
def test_fsc_ignores_scale_and_common_shift(box):
    a, b = noise(box), noise(box) + noise(box, 1)
    expected = fsc(a, b)
    np.testing.assert_allclose(fsc(5 * a, 0.1 * b), expected, atol=1e-12)
    moved = [np.roll(v, (3, -2, 7), (0, 1, 2)) for v in (a, b)]
    np.testing.assert_allclose(fsc(*moved), expected, atol=1e-12)
    np.testing.assert_allclose(fsc(b, a), expected, atol=1e-12)


@pytest.mark.parametrize("box", [24, 25])
def test_fsc_equals_the_full_transform(box):
    a, b = noise(box), noise(box) + noise(box, 1)
    np.testing.assert_allclose(fsc(a, b)[1:], full_fsc(a, b)[1:], atol=1e-12)
    np.testing.assert_allclose(fsc(a.astype(np.float32), b.astype(np.float32)), fsc(a, b), atol=1e-5)


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize("belt", [False, True])
def test_cone_and_belt_equal_the_full_transform(box, belt):
    a, b = noise(box), noise(box) + noise(box, 1)
    axis = np.array([1.0, -2.0, 0.5]) / np.linalg.norm([1.0, -2.0, 0.5])

    def inside(kx, ky, kz, radius):
        cosine = abs(kx * axis[0] + ky * axis[1] + kz * axis[2]) / np.maximum(radius, 1e-9)
        return cosine < np.sin(np.radians(25)) if belt else cosine > np.cos(np.radians(25))

    got = cone_fsc(a, b, None, tuple(axis), 25, belt)
    # the planes at Nyquist of an even box stand for both signs, which a tilted cone tells apart
    last = box // 2 if box % 2 == 0 else None
    np.testing.assert_allclose(got[1:last], full_fsc(a, b, inside)[1:last], atol=1e-12)


def test_independent_noise_has_zero_fsc_with_the_spread_of_its_shell():
    box = 32
    curves = np.array([fsc(noise(box, 2 * s), noise(box, 2 * s + 1)) for s in range(60)])[:, 1:]
    k = np.fft.fftfreq(box, 1 / box)
    radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)
    independent = np.bincount(np.rint(radius).astype(int).ravel())[1 : box // 2 + 1] / 2
    assert np.abs(curves.mean(0) * np.sqrt(60 * 2 * independent)).max() < 4
    ratio = curves.std(0)[2:] * np.sqrt(2 * independent[2:])  # a complex pair gives one real and one imaginary number
    assert 0.9 < ratio.mean() < 1.1


@pytest.mark.parametrize("kind", ["iso", "top10eps10"])
@pytest.mark.parametrize("masked", [False, True])
def test_against_3dfsc_global_curve(halves, reference_numbers, kind, masked):
    """3DFSC pads lines by two zeros and counts three quarters of the plane x = 0; with that, its very numbers."""
    mask = halves["mask"] if masked else np.ones((64, 64, 64))
    a, b = halves[kind, 1] * mask, halves[kind, 2] * mask
    name = f"{kind}_masked_globalFSC.csv" if masked else f"{kind}_globalFSC.csv"
    reference = np.loadtxt(reference_numbers / "3dfsc_nysbc" / name, delimiter=",")

    def as_3dfsc(kz, ky, kx, radius):
        skipped = (kx == 0) & (ky < 0) & (kz < 0) & (ky > -32) & (kz > -32)
        return np.where(kx == 0, 1.0, 0.5) * ~skipped * (kx < 32)

    fa, fb = (np.fft.rfftn(np.pad(v, ((0, 0), (0, 0), (0, 2))))[..., :33] for v in (a, b))
    np.testing.assert_allclose(shell_correlation(fa, fb, 64, as_3dfsc)[1:], reference[1:, 2], atol=1e-9)
    np.testing.assert_allclose(fsc(a, b)[1:], full_fsc(a, b)[1:], atol=1e-10)
    assert np.abs(fsc(a, b)[1:] - reference[1:, 2]).max() < 0.08


def test_resolution_against_3dfsc(halves):
    a, b = halves["iso", 1], halves["iso", 2]
    assert resolution_at(fsc(a, b), 0.143, 64, 3.0) == pytest.approx(7.43, abs=0.15)
    assert resolution_at(fsc(a, b), 0.5, 64, 3.0) == pytest.approx(10.63, abs=0.15)
    masked = resolution_at(fsc(a, b, halves["mask"]), 0.5, 64, 3.0)
    assert masked == pytest.approx(6.53, abs=0.1)


def test_resolution_of_relions_curve(shared):
    folder = shared / "data/poses/betagal_empiar10204_refine3d_it016"
    lines = (folder / "run_it016_half1_model.star").read_text().split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("_rlnSpectralOrientabilityContribution"))
    rows = [line.split() for line in lines[start + 1 :]]
    curve = np.array([float(r[4]) for r in rows[: next(i for i, r in enumerate(rows) if not r)]])
    assert len(curve) == 129
    assert 2.85 <= resolution_at(curve, 0.143, 256, 1.2448) <= 2.87
    assert resolution_at(curve, 0.5, 256, 1.2448) == pytest.approx(3.32, abs=0.01)


def test_resolution_rules():
    assert resolution_at(np.array([1, 0.1, 0.9, 0.9, 0.9]), 0.143, 8, 2.0) == 16.0
    assert resolution_at(np.ones(5), 0.143, 8, 2.0) == 4.0
    half_way = resolution_at(np.array([1, 1, 0.6, 0.4, 0.0]), 0.5, 8, 2.0)
    assert half_way == pytest.approx(16 / 2.5)
    first_crossing = resolution_at(np.array([1, 1, 0.4, 0.9, 0.9]), 0.5, 8, 2.0)
    assert 8.0 < first_crossing < 16.0
    assert resolution_at(np.array([1, 1, 1, np.nan, 1]), 0.5, 8, 2.0) > 4.0
    np.testing.assert_allclose(shell_frequencies(8, 2.0), [0, 1 / 16, 2 / 16, 3 / 16, 4 / 16])


@pytest.mark.parametrize("box", [24, 25])
def test_randomised_phases_keep_amplitudes_and_reality(box):
    a = noise(box)
    b = randomise_phases(a, 5, seed=3)
    assert b.dtype == a.dtype and np.isrealobj(b)
    np.testing.assert_allclose(abs(np.fft.fftn(b)), abs(np.fft.fftn(a)), atol=1e-9)
    curve = full_fsc(a, b)
    np.testing.assert_allclose(curve[1:5], 1, atol=1e-12)
    assert np.abs(curve[6:]).max() < 0.3
    np.testing.assert_array_equal(b, randomise_phases(a, 5, seed=3))
    assert np.abs(fsc(b, randomise_phases(a, 5, seed=3, uid=1))[6:]).max() < 0.3


def test_correction_removes_what_a_tight_mask_adds():
    """Two independent noises behind one hard mask correlate by the mask alone: the corrected curve is about zero."""
    box, rng = 48, np.random.default_rng(0)
    z, y, x = np.mgrid[:box, :box, :box] - box // 2
    signal = 40 * np.exp(-(x**2 + y**2 + z**2) / 2 / 6.0**2)
    mask = (x**2 + y**2 + z**2 < 5**2).astype(float)
    a, b = (signal + rng.standard_normal(signal.shape) for _ in range(2))
    result = fsc_corrected(a, b, mask, seed=1)
    start = result["randomise_from_shell"]
    assert 2 < start < 10 and result["unmasked"][start] < 0.8 <= result["unmasked"][start - 1]
    np.testing.assert_array_equal(result["corrected"][: start + 2], result["masked"][: start + 2])
    beyond = slice(start + 2, None)
    expected = (result["masked"][beyond] - result["randomised"][beyond]) / (1 - result["randomised"][beyond])
    np.testing.assert_allclose(result["corrected"][beyond], expected, atol=1e-9)
    assert abs(result["corrected"][beyond].mean()) < 0.2 < result["masked"][beyond].mean() + 0.2


def test_correction_without_mask_or_without_noise_changes_nothing():
    a = noise(16)
    for mask in (None, np.ones_like(a)):
        result = fsc_corrected(a, a, mask)
        np.testing.assert_allclose(result["corrected"], 1)
        assert result["randomise_from_shell"] is None


def test_shapes_are_checked():
    with raises_code("arrays-do-not-fit", InputError, match="another shape"):
        fsc(noise(8), noise(9))
    with raises_code("map-not-cubic", InputError):
        fsc(noise(8)[:4], noise(8)[:4])
    with raises_code("arrays-do-not-fit", InputError, match="mask"):
        fsc(noise(8), noise(8), noise(6))


def test_top_views_are_good_across_and_bad_along_the_axis(reference_numbers, halves):
    mrcfile = pytest.importorskip("mrcfile")
    truth = mrcfile.read(reference_numbers / "halfmaps/ha6wxb_truth_64_3A.mrc.gz")
    numbers = {
        kind: compare_maps((halves[kind, 1] + halves[kind, 2]) / 2, truth, 3.0, halves["mask"])
        for kind in ("iso", "top10eps10")
    }
    assert numbers["top10eps10"]["axial_A"] > numbers["top10eps10"]["equatorial_A"] + 1
    assert numbers["top10eps10"]["axial_A"] > numbers["iso"]["axial_A"] + 1
    assert numbers["iso"]["correlation"] > numbers["top10eps10"]["correlation"] > 0.5


def test_one_noisy_shell_does_not_move_the_resolution():
    smooth = np.clip(1.1 - np.arange(25) / 20, 0, 1)  # crosses 0.5 at shell 12
    box, pixel = 48, 4.0
    assert smooth_resolution_at(smooth, 0.5, box, pixel) == pytest.approx(box * pixel / 12, rel=1e-9)
    assert resolution_at(smooth, 0.5, box, pixel) == pytest.approx(box * pixel / 12, rel=1e-9)
    dip, spike = smooth.copy(), smooth.copy()
    dip[5], spike[17] = 0.45, 0.7
    assert resolution_at(dip, 0.5, box, pixel) > 2 * box * pixel / 12
    for curve in (dip, spike):
        assert smooth_resolution_at(curve, 0.5, box, pixel) == pytest.approx(box * pixel / 12, rel=0.02)
    assert curve_area(smooth) - curve_area(dip) == pytest.approx((smooth[5] - 0.45) / 24, rel=1e-9)
    low = np.concatenate([[1.0], np.full(24, 0.2)])
    low[10] = 0.9  # a shell of luck is no resolution
    assert smooth_resolution_at(low, 0.5, box, pixel) == box * pixel
    with_gap = smooth.copy()
    with_gap[20:] = np.nan
    assert smooth_resolution_at(with_gap, 0.5, box, pixel) == pytest.approx(box * pixel / 12, rel=1e-9)


def test_the_non_increasing_fit_is_the_least_squares_one():
    from scipy.optimize import nnls

    n = 9
    curve = np.random.default_rng(2).normal(0, 1, n) - 0.3 * np.arange(n)
    fit = non_increasing(curve)
    assert (np.diff(fit) <= 1e-12).all()
    steps = np.triu(np.ones((n, n)))  # non-increasing = sum of steps down, the last of either sign
    other, distance = nnls(np.column_stack([steps, -np.ones(n)]), curve)
    np.testing.assert_allclose(fit, steps @ other[:n] - other[n], atol=1e-9)
    assert np.linalg.norm(fit - curve) == pytest.approx(distance, rel=1e-9)


def test_frame_change_moves_a_point_where_it_says():
    from scipy.ndimage import center_of_mass, gaussian_filter
    from scipy.spatial.transform import Rotation

    box, point = 40, np.array([6.0, -4.0, 3.0])
    rotation = Rotation.from_euler("zyz", [20, 50, -70], degrees=True).as_matrix()
    shift_A = np.array([2.0, -3.0, 5.0])
    volume = np.zeros((box,) * 3, np.float32)
    volume[tuple((point[::-1] + box // 2).astype(int))] = 1
    volume = gaussian_filter(volume, 1.5)
    moved = to_frame(volume, rotation, shift_A, 2.0)
    found = np.array(center_of_mass(np.maximum(moved, 0)))[::-1] - box // 2
    np.testing.assert_allclose(rotation @ found + shift_A / 2.0, point, atol=0.02)
    back = to_frame(moved, rotation.T, -rotation.T @ shift_A, 2.0)
    assert correlation(back, volume) > 0.9999


def test_slide_finds_a_shift():
    volume = noise(16)
    moved = np.roll(volume, (2, -3, 1), (0, 1, 2))
    np.testing.assert_array_equal(best_slide(moved, volume), [1, -3, 2])
    np.testing.assert_array_equal(best_slide(np.roll(volume, -4, 0), volume, (0, 0, 1)), [0, 0, -4])
