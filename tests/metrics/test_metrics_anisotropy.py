"""Directional numbers: what they must be for simple maps, and what other programs made of the same half-maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import chi2

from cryoiso.metrics.anisotropy import (
    ConicalFSC,
    Occupancy,
    cone_curves,
    conical_fsc,
    fourier_shell_occupancy,
    phase_cosine,
    resolved_region,
    sphericity,
)
from cryoiso.metrics.directional_fsc import fsc3d
from cryoiso.metrics.expected import Surrogate, relative_sampling
from cryoiso.metrics.fsc_curve import fsc, resolution_at, shell_correlation, transform
from cryoiso.metrics.sampling import fibonacci_half_sphere
from cryoiso.physics.views import Views, sample_rotations


def halves(box: int, missing_deg: float = 0.0, noise: float = 0.1, seed: int = 0) -> list[np.ndarray]:
    """Signal and noise of flat spectra, without signal in a double cone about z."""
    rng = np.random.default_rng(seed)
    k = np.fft.fftfreq(box) * box
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)
    keep = np.abs(k[:, None, None]) <= np.cos(np.radians(missing_deg)) * radius
    signal = np.fft.ifftn(np.fft.fftn(rng.standard_normal((box,) * 3)) * (keep if missing_deg else 1)).real
    return [(signal + noise * rng.standard_normal((box,) * 3)).astype(np.float32) for _ in range(2)]


def cones(pair: list[np.ndarray], mask=None, pixel_size_A: float = 2.0) -> ConicalFSC:
    return conical_fsc(*(transform(h, mask) for h in pair), len(pair[0]), pixel_size_A)


@pytest.mark.parametrize("box", [32, 33])
def test_cones_are_the_rays_of_the_3dfsc(box):
    a, b = halves(box)
    axes = np.array([[1.0, 0, 0], [0, 0, 1], [0.6, 0, 0.8], [0, -1, 0]])
    curves = cone_curves(transform(a), transform(b), box, axes, 20.0)
    volume, centre = fsc3d(a, b), box // 2
    for shell in (5, 10):
        for axis, curve in zip(axes, curves, strict=True):
            z, y, x = np.rint(shell * axis[::-1]).astype(int) + centre
            assert volume[z, y, x] == pytest.approx(curve[shell], abs=1e-6)
    whole = cone_curves(transform(a), transform(b), box, axes, 90.0)
    np.testing.assert_allclose(whole[0, 1 : box // 2], fsc(a, b)[1 : box // 2], atol=1e-9)
    assert np.isnan(cone_curves(transform(a), transform(b), box, np.array([[0.577, 0.577, 0.577]]), 20.0)[0, 1])


def test_isotropic_signal_gives_flat_curves():
    found = cones(halves(48))
    inner = found.curves[:, 12:24]
    expected = 1 / 1.01
    assert np.abs(inner - expected).max() < 0.01 and abs(inner.mean() - expected) < 0.001
    assert found.cfar > 0.9 and found.evenness > 0.95
    assert np.all(found.resolutions_A() == pytest.approx(4.0))


def test_a_missing_cone_is_found_where_it_is():
    found = cones(halves(48, missing_deg=30))
    tilt = np.degrees(np.arccos(found.axes[:, 2]))
    high = found.curves[:, 12:24]
    assert np.abs(high[tilt < 9]).mean() < 0.15 and high[tilt > 51].min() > 0.85
    assert found.cfar < 0.1
    resolution = found.resolutions_A()
    assert resolution[tilt < 9].min() > 12 and np.all(resolution[tilt > 51] == pytest.approx(4.0))


def test_area_stops_at_the_first_crossing():
    curve = np.array([[1, 0.9, 0.8, 0.1, 0.9, 0.9], [1, np.nan, 0.5, 0.5, 0.5, 0.2]])
    found = ConicalFSC(np.eye(3)[:2], curve, 10, 1.0)
    np.testing.assert_allclose(found.areas, [0.9 + 0.8 * 4, 0.5 * (4 + 9 + 16) + 0.2 * 25])
    assert found.cfar == pytest.approx(4.1 / 19.5)
    assert np.isnan(ConicalFSC(np.eye(3)[:1], np.array([[1, 0.0, 0.9]]), 4, 1.0).cfar)


def test_bingham_statistic_does_not_depend_on_the_frame():
    """The occupied half of the sphere about any axis: tr(T T), not the sum of squared diagonal elements."""
    box = 40
    for axis in (np.array([0, 0, 1.0]), np.array([1.0, 1, 1]) / 3**0.5):
        k = np.fft.fftfreq(box) * box
        along = np.abs(k[:, None, None] * axis[2] + k[None, :, None] * axis[1] + k * axis[0])
        radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)
        rng = np.random.default_rng(0)
        signal, *noise = (np.fft.fftn(rng.standard_normal((box,) * 3)) for _ in range(3))
        a, b = (np.fft.ifftn(np.where(along < 0.5 * radius, signal, n)).real for n in noise)
        found = fourier_shell_occupancy(transform(a), transform(b), box)
        occupied = fibonacci_half_sphere(321)
        occupied = occupied[np.abs(occupied @ axis) < 0.62]  # half the cone's width further than the signal
        tensor = occupied.T @ occupied / len(occupied)
        statistic = 15 * len(occupied) * (np.trace(tensor @ tensor) - 1 / 3)
        assert found.occupancy[8:18] == pytest.approx(len(occupied) / 321, abs=0.12)
        assert np.all(found.bingham_p[8:18] < 1e-6) and chi2.sf(statistic, 5) < 1e-6
    even = fourier_shell_occupancy(*(transform(h) for h in halves(40)), 40)
    assert np.all(even.occupancy[5:] == 1) and np.nanmin(even.bingham_p[5:]) > 0.99
    assert even.resolution_A(0.5, 40, 2.0) is None
    drop = Occupancy(np.array([1, 1, 1, 0.5, 0]), np.zeros(5))
    assert drop.resolution_A(0.75, 8, 2.0) == pytest.approx(16 / 2.5)


def test_sphericity_of_known_bodies():
    z, y, x = np.mgrid[:64, :64, :64] - 32
    assert sphericity(z**2 + y**2 + x**2 <= 24**2) == pytest.approx(1, abs=0.005)
    assert sphericity(z**2 + y**2 + x**2 <= 12**2) == pytest.approx(1, abs=0.01)
    a, c = 24.0, 12.0  # an oblate spheroid: its area is known
    e = np.sqrt(1 - (c / a) ** 2)
    area = 2 * np.pi * a**2 * (1 + (1 - e**2) / e * np.arctanh(e))
    exact = np.pi ** (1 / 3) * (6 * 4 / 3 * np.pi * a**2 * c) ** (2 / 3) / area
    assert sphericity((x**2 + y**2) / a**2 + z**2 / c**2 <= 1) == pytest.approx(exact, abs=0.01)
    assert np.isnan(sphericity(np.zeros((8, 8, 8), bool)))


def test_resolved_region_is_connected_to_the_origin():
    volume = np.zeros((33,) * 3, np.float32)
    volume[16, 16, 16:26] = 0.6
    volume[16, 16, 21] = 0.4  # cuts the rest off
    volume[10, 10, 10] = 0.9
    region = resolved_region(volume, 1.0)
    assert region[16, 16, 16:21].all() and region.sum() == 5
    assert resolved_region(volume, 10.0).sum() == 19 + 3  # 330 / 200: the 19 voxels nearer than 1.65 count


def test_expected_maps_have_the_fsc_and_follow_the_views():
    box, rng = 40, np.random.default_rng(0)
    z, y, x = np.mgrid[:box, :box, :box] - box // 2
    mask = np.clip(12 - np.sqrt(z**2 + y**2 + x**2), 0, 1).astype(np.float32)
    curve = 1 / (1 + np.exp((np.arange(21) - 12) / 2))
    half = rng.standard_normal((box,) * 3).astype(np.float32)
    surrogate = Surrogate(half, curve, mask)
    even = surrogate.pair()
    np.testing.assert_allclose(shell_correlation(*even, box)[3:18], curve[3:18], atol=0.1)
    poses = sample_rotations(Views("preferred", fraction=0.97), np.arange(1000, dtype=np.uint64), 1)
    uneven = surrogate.pair(relative_sampling(poses, "C1", box))
    np.testing.assert_allclose(shell_correlation(*uneven, box)[3:18], curve[3:18], atol=0.1)
    flat, steep = (conical_fsc(*p, box, 2.0) for p in (even, uneven))
    assert steep.evenness < 0.5 * flat.evenness
    along = steep.axes[:, 2]
    assert steep.areas[along > 0.9].mean() < 0.5 * steep.areas[along < 0.2].mean()
    np.testing.assert_array_equal(even[0], Surrogate(half, curve, mask).pair()[0])


@pytest.fixture(scope="module")
def reference(reference_numbers):
    mrcfile = pytest.importorskip("mrcfile")
    folder = reference_numbers / "halfmaps"

    def read(name: str):
        kind, _, masked = name.partition("_")
        mask = mrcfile.read(folder / "ha6wxb_softmask_64_3A.mrc.gz") if masked else None
        return [mrcfile.read(folder / f"ha6wxb_{kind}_half{i}_64_3A.mrc.gz") for i in (1, 2)], mask

    return read


NAMES = ("iso", "iso_masked", "top10eps10", "top10eps10_masked")


@pytest.mark.parametrize("name", NAMES)
def test_occupancy_against_vilax(reference_numbers, reference, name):
    """Its directions are another even set, and it writes the frequency of shell i as (i + 1) / D."""
    pair, mask = reference(name)
    found = fourier_shell_occupancy(*(transform(h, mask) for h in pair), 64)
    expected = json.loads((reference_numbers / "fso_vilax/expected_fso.json").read_text())[name]
    theirs = np.array(expected["fso"])
    assert np.abs(found.occupancy[3 : len(theirs)] - theirs[3:]).max() < 0.03
    table = {"iso": (7.98, 7.20), "top10eps10": (14.60, 10.96, 7.31)}.get(name, ())
    for level, resolution_A in zip((0.9, 0.5, 0.1), table, strict=False):
        mine = found.resolution_A(level, 64, 3.0)
        assert 192 / (192 / mine + 1) == pytest.approx(resolution_A, abs=0.06)


@pytest.mark.parametrize("name", ["iso", "top10eps10", "top10eps10_masked"])
def test_sphericity_of_the_published_programs_volumes(reference_numbers, name):
    mrcfile = pytest.importorskip("mrcfile")
    volume = mrcfile.read(reference_numbers / f"3dfsc_nysbc/{name}_3DFSC.mrc.gz")
    expected = json.loads((reference_numbers / "3dfsc_nysbc/expected_3dfsc.json").read_text())[name]
    assert sphericity(resolved_region(volume, 3.0)) == pytest.approx(expected["sphericity_at_0p5"], abs=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_half_maps(reference_numbers, reference, name):
    """Own 3DFSC, whose transform is not padded: the table's numbers to the size of what the padding changes."""
    pair, mask = reference(name)
    expected = json.loads((reference_numbers / "3dfsc_nysbc/expected_3dfsc.json").read_text())[name]
    assert sphericity(resolved_region(fsc3d(*pair, mask), 3.0)) == pytest.approx(
        expected["sphericity_at_0p5"], abs=0.02
    )
    found = cones(pair, mask, 3.0)
    resolution = found.resolutions_A()
    span = expected["histogram_dir_res_A"]
    if mask is not None:
        assert resolution.min() == pytest.approx(span["min"], abs=0.3)
        assert resolution.max() == pytest.approx(span["max"], abs=0.4)
        anisotropic = name.startswith("top")
        assert (found.cfar < 0.5) == anisotropic
        if anisotropic:
            assert found.axes[resolution.argmax(), 2] > 0.9  # top views: z is bad
        else:
            assert np.median(resolution) == pytest.approx(span["median"], abs=0.3)
    globally = resolution_at(shell_correlation(*(transform(h, mask) for h in pair), 64), 0.143, 64, 3.0)
    assert resolution.min() <= globally <= resolution.max()


@pytest.mark.parametrize("name", ["iso_masked", "top10eps10", "top10eps10_masked"])
def test_phase_cosine_against_spisonet(reference_numbers, reference, name):
    """Its neighbours lie within a chord, ours within the angle: the same to a few hundredths where shells are large."""
    mrcfile = pytest.importorskip("mrcfile")
    pair, mask = reference(name)
    expected = mrcfile.read(reference_numbers / f"fsc3d_spisonet/{name}_FSC3D_10deg.mrc.gz")
    found = phase_cosine(*pair, mask)
    k = np.arange(64) - 32
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)).astype(int)
    last = max(s for s in range(1, 32) if np.mean(expected[shell == s] != 0) > 0.9)
    there = (shell >= 16) & (shell <= last)
    assert np.sqrt(((found - expected)[there] ** 2).mean()) < 0.03
    assert np.corrcoef(found[there], expected[there])[0, 1] > 0.98
    ratio = fsc3d(*pair, mask, cone_deg=10.0)
    assert np.abs(ratio - expected)[there].mean() > 3 * np.abs(found - expected)[there].mean()  # another quantity
