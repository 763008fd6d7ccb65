"""Sampling of Fourier space by views: published definitions, analytic anchors, symmetry."""

from __future__ import annotations

import json

import numpy as np
import pytest
from errors_helper import raises_code
from scipy.spatial.transform import Rotation

from cryoiso.core.errors import InputError
from cryoiso.metrics.expected import relative_sampling
from cryoiso.metrics.sampling import (
    MOST_VIEWS,
    even_rotations,
    fibonacci_half_sphere,
    fourier_sampling,
    view_efficiency,
)
from cryoiso.physics.so3 import rotation_with_view
from cryoiso.physics.symmetry import point_group
from cryoiso.physics.views import Views, sample_rotations


def side_views(n: int) -> np.ndarray:
    azimuth = 2 * np.pi * (np.arange(n) + 0.5) / n
    return rotation_with_view(np.stack([np.cos(azimuth), np.sin(azimuth), 0 * azimuth], 1))


def test_anchors():
    even, side = fourier_sampling(even_rotations(10_000)), fourier_sampling(side_views(9999), radius_px=50)
    assert even.scf_star == pytest.approx(1, abs=0.02) and even.empty_fraction == 0 and even.views == 10_000
    assert side.scf == pytest.approx(8 / np.pi**2, abs=0.01)
    cone = sample_rotations(Views("missing-cone", cone_deg=40), np.arange(10_000, dtype=np.uint64), 1)
    top = fourier_sampling(cone)
    expected = 1 - np.cos(np.radians(40))
    assert top.empty_fraction == pytest.approx(expected, abs=0.01)
    ratio = top.empty_fraction / (1 - top.empty_fraction)
    assert top.scf_star == pytest.approx(top.scf / (1 + ratio * top.counts.mean() * top.scf / 2))
    fewer = fourier_sampling(cone[:2000])
    assert fewer.scf_star > 2 * top.scf_star  # with a gap it falls with the number of views


def test_points_are_even():
    points = fibonacci_half_sphere(500)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    both = np.concatenate([points, -points])
    np.testing.assert_allclose(both.T @ both / len(both), np.eye(3) / 3, atol=0.003)


def test_symmetry_is_that_of_the_mates():
    """D2 turns a view about x too: tilt and azimuth change together."""
    rng = np.random.default_rng(0)
    few = Rotation.random(60, random_state=rng).as_matrix()
    expanded = np.concatenate([few @ s for s in point_group("D2")])
    by_name, by_hand = fourier_sampling(few, "D2"), fourier_sampling(expanded, "C1")
    np.testing.assert_array_equal(by_name.counts, by_hand.counts)
    assert by_name.views == 60
    assert view_efficiency(few, "D2") == pytest.approx(view_efficiency(expanded), abs=1e-9)


def test_large_sets_are_drawn_from_the_same_way_every_time():
    poses = even_rotations(MOST_VIEWS + 500)
    first, again = fourier_sampling(poses), fourier_sampling(poses)
    assert first.views == MOST_VIEWS
    np.testing.assert_array_equal(first.counts, again.counts)
    with raises_code("poses-missing", InputError):
        fourier_sampling(poses[:0])


def test_efficiency_orders_distributions():
    uids = np.arange(2000, dtype=np.uint64)
    values = [
        view_efficiency(sample_rotations(views, uids, 2))
        for views in (Views("uniform"), Views("preferred", fraction=0.5), Views("preferred", fraction=0.98))
    ]
    assert values[0] > 0.97 and values[0] > values[1] + 0.1 > values[2] + 0.3
    assert view_efficiency(side_views(500)) == pytest.approx(0.71, abs=0.02)


def test_relative_sampling_of_side_views():
    """Views around the equator all measure z; along the equator each direction is measured by the views across it."""
    box = 32
    sampled = relative_sampling(side_views(2000), "C1", box)
    assert sampled.shape == (32, 32, 17) and sampled[0, 0, 0] == 1
    assert sampled[10, 0, 0] > 5 * sampled[0, 0, 10]
    np.testing.assert_allclose(sampled[0, 0, 10], sampled[0, 10, 0], rtol=0.1)
    top = relative_sampling(np.tile(np.eye(3), (20, 1, 1)), "C1", box)
    assert top[12, 0, 0] == 0 and top[0, 0, 12] > 5 and top[0, 5, 5] > 3


@pytest.mark.parametrize("radius_px", [50, 20])
@pytest.mark.parametrize("views", ["ours", "all"])
def test_against_independent_counts(reference_numbers, request, views, radius_px):
    """SCF and SCF* of synthetic and real pose files, as an independent implementation gives them."""
    ours = views == "ours"
    folder = reference_numbers / "scf" if ours else request.getfixturevalue("shared_data") / "reference/scf"
    known = json.loads((folder / "expected_scf.json").read_text())
    done = 0
    for key, numbers in known.items():
        name, symmetry, radius = key.split("|")
        path = folder / "angles" / (f"{name}.par.gz" if ours else f"{name}.par")
        if not path.exists() or radius != f"FR{radius_px}":
            continue
        psi, tilt, rot = np.loadtxt(path).T
        angles = np.column_stack([rot, tilt, psi])
        poses = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().transpose(0, 2, 1)
        found = fourier_sampling(poses, symmetry, radius_px=radius_px)
        assert found.views == numbers["n_views"]
        assert found.scf == pytest.approx(numbers["correct"]["SCF"], abs=1e-9), key
        assert found.scf_star == pytest.approx(numbers["correct"]["SCFstar"], abs=1e-9), key
        assert found.empty_fraction == numbers["correct"]["fraction_zeros"]
        done += 1
    assert done >= {"ours": {50: 4, 20: 1}, "all": {50: 20, 20: 3}}[views][radius_px]
