"""Rotations and their grids, against scipy's rotations and the geometry of the sphere."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryoiso.physics import so3
from cryoiso.physics.symmetry import in_asymmetric_unit, point_group


def random_euler(n: int) -> np.ndarray:
    return np.random.default_rng(3).uniform([-180, 0, -180], [180, 180, 180], (n, 3))


def test_euler_matrices_are_the_transposed_intrinsic_zyz_rotations():
    euler = random_euler(500)
    ours = so3.euler_to_matrix(*euler.T)
    scipys = Rotation.from_euler("ZYZ", euler, degrees=True).as_matrix().transpose(0, 2, 1)
    np.testing.assert_allclose(ours, scipys, atol=1e-14)


def test_euler_angles_come_back():
    euler = random_euler(500)
    np.testing.assert_allclose(so3.matrix_to_euler(so3.euler_to_matrix(*euler.T)), euler, atol=1e-9)


@pytest.mark.parametrize("tilt", [0.0, 180.0])
def test_euler_angles_at_the_poles_describe_the_same_rotation(tilt):
    rotation = so3.euler_to_matrix([10, -70, 179], tilt, [30, 100, -5])
    euler = so3.matrix_to_euler(rotation)
    assert np.all(euler[:, 0] == 0)
    np.testing.assert_allclose(so3.euler_to_matrix(*euler.T), rotation, atol=1e-12)


def test_view_direction_is_what_the_projection_looks_along():
    direction = so3.view_direction(so3.euler_to_matrix(30, 40, 77))[0]
    tilt, rot = np.radians(40), np.radians(30)
    np.testing.assert_allclose(direction, [np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)])
    np.testing.assert_allclose(so3.view_direction(so3.rotation_with_view(direction, 12.0))[0], direction, atol=1e-15)


def test_rotation_vectors_match_scipy_down_to_tiny_angles():
    v = np.random.default_rng(0).normal(size=(200, 3)) * np.repeat([1e-9, 1e-3, 0.3, 3.0], 50)[:, None]
    np.testing.assert_allclose(so3.rotvec_to_matrix(v), Rotation.from_rotvec(v).as_matrix(), atol=1e-14)


def test_angular_distance_matches_scipy_and_resolves_tiny_angles():
    rng = np.random.default_rng(1)
    a, b = so3.random_rotations(rng, 300), so3.random_rotations(rng, 300)
    expected = np.degrees((Rotation.from_matrix(a).inv() * Rotation.from_matrix(b)).magnitude())
    np.testing.assert_allclose(so3.angular_distance_deg(a, b), expected, atol=1e-6)
    near = so3.rotvec_to_matrix(np.radians([[0, 1e-6, 0]])) @ a[:1]
    assert so3.angular_distance_deg(a[:1], near)[0] == pytest.approx(1e-6, rel=1e-6)


def test_symmetric_poses_have_no_distance():
    ops = point_group("D3")
    rng = np.random.default_rng(1)
    a = so3.random_rotations(rng, 100)
    b = a @ ops[rng.integers(6, size=100)]
    assert so3.angular_distance_deg(a, b).max() > 60
    assert so3.angular_distance_deg(a, b, ops).max() < 1e-6


def test_random_rotations_are_rotations_and_uniform():
    r = so3.random_rotations(np.random.default_rng(5), 20000)
    np.testing.assert_allclose(r @ r.transpose(0, 2, 1), np.broadcast_to(np.eye(3), r.shape), atol=1e-12)
    assert np.all(np.linalg.det(r) > 0)
    # Haar measure: the angle has density (1 - cos a) / pi, every matrix element variance 1/3
    np.testing.assert_allclose(r.var(0), 1 / 3, atol=0.01)
    angle = np.arccos(np.clip((np.trace(r, axis1=1, axis2=2) - 1) / 2, -1, 1))
    assert np.mean(angle < np.pi / 2) == pytest.approx((np.pi / 2 - 1) / np.pi, abs=0.01)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_healpix_pixels_are_unit_vectors_of_equal_area(order):
    d = so3.healpix_directions(order)
    n = 12 * 4**order
    assert d.shape == (n, 3)
    np.testing.assert_allclose(np.linalg.norm(d, axis=1), 1, atol=1e-14)
    np.testing.assert_allclose(d.mean(0), 0, atol=1e-14)
    # second moments of an even distribution; pixel centres of equal areas reach them as 1 / n
    np.testing.assert_allclose(d.T @ d / n, np.eye(3) / 3, atol=0.8 / n)
    if order == 2:
        assert _largest_cell_error(d) < 0.25


def _largest_cell_error(directions: np.ndarray) -> float:
    """Relative spread of the areas that are nearest to each direction (Monte Carlo)."""
    from scipy.spatial import cKDTree

    points = so3.fibonacci_sphere(200_000)
    _, owner = cKDTree(directions).query(points)
    areas = np.bincount(owner, minlength=len(directions)) * len(directions) / len(points)
    return float(np.abs(areas - 1).max())


def test_healpix_pixel_centres_are_the_published_ones():
    """Rings and longitudes after Gorski et al. 2005, equations 2-9, for Nside 4."""
    side = 4
    rings = {}
    for i in range(1, 4 * side):
        j = min(i, 4 * side - i)
        if j < side:
            z, count, shift = 1 - j * j / (3 * side * side), 4 * j, 0.5
            z = z if i < 2 * side else -z
        else:
            z, count, shift = 4 / 3 - 2 * i / (3 * side), 4 * side, 0.5 * ((i - side + 1) % 2)
        rings[i] = [(z, (2 * np.pi / count) * ((k + shift) % count)) for k in range(count)]
    z, phi = np.array([p for ring in rings.values() for p in ring]).T
    expected = np.stack([np.sqrt(1 - z**2) * np.cos(phi), np.sqrt(1 - z**2) * np.sin(phi), z], 1)
    ours = so3.healpix_directions(2)
    distance = np.linalg.norm(ours[:, None] - expected[None], axis=2)
    assert len(expected) == len(ours)
    assert distance.min(0).max() < 1e-12 and distance.min(1).max() < 1e-12


def test_healpix_nested_order_keeps_children_with_their_parent():
    parents, children = so3.healpix_directions(2), so3.healpix_directions(4).reshape(-1, 16, 3)
    spread = np.degrees(np.arccos(np.clip((children * parents[:, None]).sum(2), -1, 1)))
    assert spread.max() < 12  # the pixel's own half-diagonal is about 10 degrees at order 2


def test_fibonacci_sphere_is_even():
    d = so3.fibonacci_sphere(500)
    np.testing.assert_allclose(np.linalg.norm(d, axis=1), 1, atol=1e-14)
    assert _largest_cell_error(d) < 0.25


@pytest.mark.parametrize("symmetry", ["C1", "C3", "C7", "D2", "D7", "T", "O", "I"])
@pytest.mark.parametrize("order", [1, 2])
def test_grid_covers_all_rotations_evenly(order, symmetry):
    """Of any pose, modulo symmetry, a grid point lies within about a step, and nowhere is the grid much denser."""
    ops = point_group(symmetry)
    grid = so3.so3_grid(order, symmetry)
    poses = so3.random_rotations(np.random.default_rng(0), 1000).reshape(-1, 9)
    trace = np.max([(poses @ (grid @ op).reshape(-1, 9).T).max(1) for op in ops], 0)
    distance = np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1))) / so3.grid_step_deg(order)
    assert distance.max() < 1.02 and 0.42 < distance.mean() < 0.51
    assert 0.93 < len(grid) * len(ops) / (72 * 8**order) < 1.46


def test_grid_is_the_nominal_one_without_symmetry():
    assert [len(so3.so3_grid(o)) for o in (1, 2, 3)] == [576, 4608, 36864]
    assert so3.grid_step_deg(3) == 7.5


def test_grid_holds_the_whole_asymmetric_unit():
    directions = so3.healpix_directions(3)
    inside = directions[in_asymmetric_unit(directions, "C3")]
    kept = {tuple(d) for d in so3.so3_directions(3, "C3").round(9)}
    assert {tuple(d) for d in inside.round(9)} <= kept


def test_local_rotations_start_at_the_identity_and_have_the_step():
    for extent, cube, count in ((0, False, 1), (1, False, 7), (1.5, False, 19), (2, False, 33), (1, True, 27)):
        grid = so3.local_rotations(2.0, extent, cube=cube)
        assert len(grid) == count
        np.testing.assert_array_equal(grid[0], np.eye(3))
    angles = so3.angular_distance_deg(so3.local_rotations(2.0, 1), np.eye(3))
    np.testing.assert_allclose(angles[1:], 2.0, atol=1e-9)
