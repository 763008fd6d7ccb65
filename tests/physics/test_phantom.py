"""The built-in test protein: its shape, its symmetry, its relatives, and the density made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.physics import phantom
from cryoiso.physics.projection import project
from cryoiso.physics.so3 import euler_to_matrix
from cryoiso.physics.symmetry import point_group


def shell_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """FSC, written out here on the whole transform."""
    n = len(a)
    fa, fb = np.fft.fftn(a), np.fft.fftn(b)
    k = np.fft.fftfreq(n) * n
    r = np.rint(np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k**2)).astype(int).ravel()
    sums = [np.bincount(r, x.ravel()) for x in ((fa * fb.conj()).real, abs(fa) ** 2, abs(fb) ** 2)]
    return (sums[0] / np.sqrt(sums[1] * sums[2]))[: n // 2]


@pytest.mark.parametrize("seed", [1, 2, 7])
def test_size_and_symmetry(seed):
    coords, weights, sigma = phantom.trimer(seed)
    assert coords.shape == (len(weights), 3) and sigma.shape == weights.shape
    assert 1300 < len(weights) < 2000 and np.all(weights > 0)
    extent = coords.max(0) - coords.min(0)
    assert 125 < extent[2] < 145
    assert 36 < extent[0] < 54 and 36 < extent[1] < 54
    # C3: every rotated atom is an atom
    turned = coords @ point_group("C3")[1].T
    third = len(coords) // 3
    np.testing.assert_allclose(turned[:third], coords[third : 2 * third], atol=1e-9)
    # a head and a thinner stem
    radius = np.hypot(coords[:, 0], coords[:, 1])
    head, stem = (np.sqrt(np.mean(radius[m] ** 2)) for m in ((coords[:, 2] > 20), (coords[:, 2] < 0)))
    assert head > stem + 0.5


def test_seeds_repeat_and_differ():
    a, again, other = phantom.trimer(1), phantom.trimer(1), phantom.trimer(2)
    np.testing.assert_array_equal(a.coords_A, again.coords_A)
    n = min(len(a.weights), len(other.weights)) // 3
    assert np.linalg.norm(a.coords_A[:n] - other.coords_A[:n], axis=1).mean() > 1


def test_chain_is_connected_and_helices_are_right_handed():
    coords = phantom.trimer(1).coords_A
    backbone = coords[: len(coords) // 6]
    step = np.linalg.norm(np.diff(backbone, axis=0), axis=1)
    assert 3.0 < np.median(step) < 4.2 and step.max() < 9
    # the last element is the long central helix: torsion angles between successive residues are about +50 degrees
    b1, b2, b3 = (np.diff(backbone[-40:], axis=0)[i : 37 + i] for i in range(3))
    n1, n2 = np.cross(b1, b2), np.cross(b2, b3)
    torsion = np.arctan2((np.cross(n1, n2) * b2).sum(1) / np.linalg.norm(b2, axis=1), (n1 * n2).sum(1))
    assert np.degrees(np.median(torsion)) == pytest.approx(50, abs=8)


def test_both_ends_and_mirror_images_differ():
    """Upside down (about x) or mirrored, the phantom does not fit itself at any turn about its axis."""
    density = phantom.phantom_map(40, 4.5, 12.0).data
    upright = _best_turn(density, density)
    flipped = _best_turn(density, _about_x(density))
    mirrored = _best_turn(density, np.roll(density[:, ::-1, :], 1, 1))
    assert upright > 0.98 and flipped < 0.8 and mirrored < 0.93


def _about_x(volume: np.ndarray) -> np.ndarray:
    return np.roll(volume[::-1, ::-1], (1, 1), (0, 1))


def _best_turn(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.ndimage import rotate

    turned = [rotate(b, angle, axes=(1, 2), reshape=False, order=1) for angle in range(0, 120, 8)]
    return max(np.corrcoef(a.ravel(), t.ravel())[0, 1] for t in turned)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("variant", [1, 2])
def test_homologue_shares_the_fold_and_not_the_detail(seed, variant):
    box, pixel = 72, 2.4
    a = phantom.phantom_map(box, pixel, 5.5, seed=seed).data
    b = phantom.phantom_map(box, pixel, 5.5, seed=seed, variant=variant).data
    fsc = shell_correlation(a, b)
    crossing = box * pixel / np.argmax(fsc < 0.5)
    assert 8 < crossing < 18
    assert fsc[box * pixel / 40 > np.arange(len(fsc))].min() > 0.85  # coarser than 40 Å they are one
    assert np.abs(fsc[28:]).mean() < 0.35


def test_homologue_is_symmetric_too():
    coords = phantom.homologue(1).coords_A
    third = len(coords) // 3
    np.testing.assert_allclose(coords[:third] @ point_group("C3")[2].T, coords[2 * third :], atol=1e-9)


@pytest.mark.parametrize("box", [40, 41])
def test_density_is_the_sum_of_its_gaussians(box):
    pixel, resolution = 1.5, 8.0
    coords = np.array([[0.0, 0, 0], [4.2, -7.1, 10.0]])
    weights, sigma = np.array([2.0, 5.0]), np.array([1.6, 2.0])
    made = phantom.pseudo_atoms_to_map(coords, weights, sigma, box, pixel, resolution)
    axis = (np.arange(box) - box // 2) * pixel
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    expected = np.zeros((box,) * 3)
    for (cx, cy, cz), w, s in zip(coords, weights, sigma):
        v = s**2 + (0.225 * resolution) ** 2
        r2 = (x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2
        expected += w * np.exp(-r2 / (2 * v)) / (2 * np.pi * v) ** 1.5
    assert made.data.dtype == np.float32 and made.pixel_size_A == pixel
    np.testing.assert_allclose(made.data, expected, atol=2e-4 * expected.max())
    assert made.data.sum() * pixel**3 == pytest.approx(7, rel=1e-5)


def test_symmetric_copies_project_to_the_same_image():
    density = torch.from_numpy(phantom.phantom_map(48, 4.0, 10.0).data)
    pose = euler_to_matrix(37.0, 71.0, 12.0)
    images = project(density, torch.from_numpy((pose @ point_group("C3")).astype(np.float32)))
    scale = float(images.std())
    assert float((images[1:] - images[0]).abs().max()) < 0.02 * scale
    wrong = project(density, torch.from_numpy((pose @ point_group("C4")[1]).astype(np.float32)))
    assert float((wrong[0] - images[0]).abs().max()) > 0.5 * scale


def test_a_box_too_small_says_how_large():
    with raises_code("model-exceeds-box", InputError, match=r"does not fit into the box.*at least"):
        phantom.phantom_map(32, 3.0, 6.0)
