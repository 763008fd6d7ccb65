"""The 3DFSC against plain sums, against the published program's own numbers, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.metrics.directional_fsc import Sphere, _shares, fsc3d, fsc3d_of_transforms
from cryoiso.metrics.fsc_curve import fsc, transform


def shells(box: int) -> np.ndarray:
    k = np.arange(box) - box // 2
    return np.rint(np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)).astype(int)


def pair(box: int, seed: int = 0) -> list[np.ndarray]:
    """Two maps that agree well along x and y and badly along z, with white noise."""
    rng = np.random.default_rng(seed)
    k = np.fft.fftfreq(box)
    signal = np.fft.fftn(rng.standard_normal((box,) * 3))
    signal *= np.exp(-((k[:, None, None] / 0.15) ** 2) - (k[None, :, None] / 0.5) ** 2 - (k / 0.5) ** 2)
    smooth = 2 * np.fft.ifftn(signal).real
    return [(smooth + rng.standard_normal((box,) * 3)).astype(np.float32) for _ in range(2)]


def by_definition(a: np.ndarray, b: np.ndarray, voxel: np.ndarray, cone_deg: float) -> float:
    """The plain sum over the full transform for one coefficient, given by its index from the origin as (z, y, x)."""
    box = len(a)
    k = np.stack(np.meshgrid(*3 * [np.fft.fftfreq(box, 1 / box)], indexing="ij"), -1)
    length = np.sqrt((k**2).sum(-1))
    cosine = np.abs(k @ voxel) / np.maximum(length * np.linalg.norm(voxel), 1e-9)
    inside = (np.rint(length) == np.rint(np.linalg.norm(voxel))) & (cosine >= np.cos(np.radians(cone_deg)) - 1e-12)
    inside &= 2 * np.abs(k).max(-1) < box
    fa, fb = np.fft.fftn(a.astype(float))[inside], np.fft.fftn(b.astype(float))[inside]
    return float((fa * fb.conj()).real.sum() / np.sqrt((abs(fa) ** 2).sum() * (abs(fb) ** 2).sum()))


@pytest.mark.parametrize("box", [20, 21])
@pytest.mark.parametrize("cone_deg", [20.0, 40.0])
def test_low_shells_are_the_plain_sums(box, cone_deg):
    a, b = pair(box)
    volume = fsc3d(a, b, cone_deg=cone_deg)
    for voxel in ([0, 0, 5], [3, 0, 0], [-4, 2, 1], [1, -6, 3], [0, -7, -7], [0, 0, -10], [-5, -8, 2]):
        here = volume[tuple(np.array(voxel) + box // 2)]
        assert here == pytest.approx(by_definition(a, b, np.array(voxel), cone_deg), abs=1e-6), voxel


@pytest.mark.parametrize("box", [88, 89])
def test_high_shells_are_near_the_plain_sums(box):
    """Beyond the exact shells the error is 0.003 or so (rms), a tenth of what one standard deviation of noise is."""
    a, b = pair(box)
    quick, plain = fsc3d(a, b), fsc3d(a, b, exact_shell=box)
    shell = shells(box)
    error = quick - plain
    assert np.all(error[shell <= 32] == 0)
    high = (shell > 32) & (shell <= box // 2)
    assert np.sqrt((error[high] ** 2).mean()) < 0.005
    assert np.abs(error[high]).max() < 0.03
    assert plain[high].std() > 0.1  # what had to be followed


@pytest.mark.parametrize("box", [24, 25, 72, 75])
def test_symmetry_and_what_lies_outside(box):
    a, b = pair(box)
    volume = fsc3d(a, b, max_shell=box // 2 - 2)
    shell = shells(box)
    assert volume.dtype == np.float32 and volume[(box // 2,) * 3] == 1
    assert np.all(volume[shell > box // 2 - 2] == 0)
    inner = volume[1:, 1:, 1:] if box % 2 == 0 else volume
    np.testing.assert_array_equal(inner, inner[::-1, ::-1, ::-1])
    assert np.all(fsc3d(a, b)[(shell > 0) & (shell <= box // 2)] != 0)


@pytest.mark.parametrize("box", [41, 80])
def test_a_cone_of_ninety_degrees_is_the_fsc(box):
    a, b = pair(box)
    volume, curve, shell = fsc3d(a, b, cone_deg=90), fsc(a, b), shells(box)
    for s in (1, 5, 18, 36):
        if s < box // 2:
            np.testing.assert_allclose(volume[shell == s], curve[s], atol=2e-6)


def test_identical_maps_agree_everywhere():
    a = pair(70)[0]
    inside = shells(70) <= 35
    np.testing.assert_allclose(fsc3d(a, a)[inside], 1, atol=1e-5)
    np.testing.assert_allclose(fsc3d(a, -2 * a)[inside & (shells(70) > 0)], -1, atol=1e-5)


@pytest.mark.parametrize("exact_shell", [0, 99])
def test_a_missing_cone_is_seen_where_it_is(exact_shell):
    """Noise in a cone of 40 degrees about z, the same density elsewhere: 0 well inside, 1 well outside."""
    box, rng = 64, np.random.default_rng(1)
    k = np.fft.fftfreq(box) * box
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)
    tilt = np.degrees(np.arccos(np.abs(k[:, None, None]) / np.maximum(radius, 1e-9)))
    signal = np.fft.fftn(rng.standard_normal((box,) * 3))
    halves = []
    for _ in range(2):
        noise = np.fft.fftn(rng.standard_normal((box,) * 3))
        halves.append(np.fft.ifftn(np.where(tilt < 40, noise, signal)).real)
    volume = np.fft.ifftshift(fsc3d(*halves, exact_shell=exact_shell))
    there = (radius > 12) & (radius < 31)
    assert np.abs(volume[there & (tilt < 18)]).max() < 0.35 and np.abs(volume[there & (tilt < 18)].mean()) < 0.05
    assert volume[there & (tilt > 62)].min() > 0.999
    empty = [np.fft.ifftn(np.where(tilt < 40, 0, np.fft.fftn(h))).real for h in halves]
    zeroed = np.fft.ifftshift(fsc3d(*empty, exact_shell=exact_shell))
    assert np.all(zeroed[there & (tilt < 18)] == 0) and zeroed[there & (tilt > 62)].min() > 0.999


def test_cells_share_themselves_out():
    """Every cell lies in the cones of so many nodes as a cone has of the half sphere; its azimuth does not matter."""
    sphere = Sphere(1.5)
    shares = np.fft.irfft(_shares(sphere, 20.0), sphere.columns, axis=0)
    assert shares.min() > -1e-12 and shares.max() < 1 + 1e-12
    tilt = np.linspace(0, np.pi / 2, sphere.rings)
    area = np.sin(tilt)
    area[-1] /= 2
    cone = 1 - np.cos(np.radians(20))
    np.testing.assert_allclose((shares.sum(0) * area[:, None]).sum(0) / (sphere.columns * area.sum()), cone, rtol=0.02)


def test_mask_and_shapes():
    a, b = pair(24)
    mask = np.random.default_rng(0).random(a.shape).astype(np.float32)
    before = a.copy()
    np.testing.assert_array_equal(fsc3d(a, b, mask), fsc3d(a * mask, b * mask))
    np.testing.assert_array_equal(a, before)
    with raises_code("arrays-do-not-fit", InputError, match="another shape"):
        fsc3d(a, b[:20, :20, :20])
    with raises_code("option-out-of-range", InputError, match="half angle"):
        fsc3d(a, b, cone_deg=0)


@pytest.mark.parametrize("name", ["iso", "top10eps10", "top10eps10_masked"])
def test_against_the_published_program(reference_numbers, name):
    """Its transform has lines padded by two zeros; of such transforms, its very numbers, and near them without."""
    mrcfile = pytest.importorskip("mrcfile")
    kind, _, masked = name.partition("_")
    folder = reference_numbers / "halfmaps"
    mask = mrcfile.read(folder / "ha6wxb_softmask_64_3A.mrc.gz") if masked else 1.0
    halves = [mrcfile.read(folder / f"ha6wxb_{kind}_half{i}_64_3A.mrc.gz").astype(float) * mask for i in (1, 2)]
    expected = np.zeros((64,) * 3)
    expected[1:, 1:, 1:] = mrcfile.read(reference_numbers / f"3dfsc_nysbc/{name}_3DFSC.mrc.gz")
    shell = shells(64)
    filled = np.isin(shell, [s for s in range(1, 32) if np.mean(expected[shell == s] != 0) > 0.5])
    assert len(np.unique(shell[filled])) >= 21
    padded = [np.fft.rfftn(np.pad(h, ((0, 0), (0, 0), (0, 2))))[..., :33] for h in halves]
    assert np.abs(fsc3d_of_transforms(*padded, 64) - expected)[filled].max() < 1e-7
    clean = fsc3d(*halves)
    assert np.abs(clean - expected)[filled].mean() < 0.06
    assert np.corrcoef(clean[filled], expected[filled])[0, 1] > 0.97
    assert np.array_equal(clean, fsc3d_of_transforms(*(transform(h) for h in halves), 64))
