"""Point groups: group laws, the sphere tiled exactly once, and RELION's own list of operations."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.physics import so3
from cryoiso.physics.symmetry import (
    in_asymmetric_unit,
    normalise_name,
    point_group,
    symmetrise_rotations,
    to_asymmetric_unit,
)

SIZES = {"C1": 1, "C2": 2, "C3": 3, "C7": 7, "D1": 2, "D2": 4, "D3": 6, "D7": 14, "T": 12, "O": 24}
SIZES |= dict.fromkeys(("I", "I1", "I3", "I4"), 60)


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_groups_are_groups(name, size):
    g = point_group(name)
    assert len(g) == size
    np.testing.assert_array_equal(g[0], np.eye(3))
    np.testing.assert_allclose(g @ g.transpose(0, 2, 1), np.broadcast_to(np.eye(3), g.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(g), 1, atol=1e-12)
    products = (g[:, None] @ g[None]).reshape(-1, 9)
    found = np.abs(products[:, None] - g.reshape(1, -1, 9)).max(2) < 1e-9
    assert np.all(found.sum(1) == 1)  # closed, and no operation twice


@pytest.mark.parametrize("name", SIZES)
def test_asymmetric_unit_holds_one_of_every_orbit(name):
    g = point_group(name)
    generic = so3.random_rotations(np.random.default_rng(0), 3000)[:, 2]
    orbits = generic @ g.transpose(0, 2, 1)
    count = in_asymmetric_unit(orbits.reshape(-1, 3), name).reshape(len(g), -1).sum(0)
    assert np.all(count == 1)


@pytest.mark.parametrize("name", SIZES)
def test_special_directions_have_one_representative_too(name):
    """On axes and on the unit's borders, where copies coincide or tie."""
    g = point_group(name)
    axes = np.concatenate([np.eye(3), -np.eye(3), so3.healpix_directions(1), so3.healpix_directions(0)])
    for axis in axes:
        orbit = g @ axis
        chosen = orbit[in_asymmetric_unit(orbit, name)]
        assert len(chosen) >= 1
        np.testing.assert_allclose(chosen, np.broadcast_to(chosen[0], chosen.shape), atol=1e-8)


@pytest.mark.parametrize("name", ["C3", "D7", "T", "O", "I"])
def test_moving_into_the_asymmetric_unit_keeps_the_orbit(name):
    d = so3.fibonacci_sphere(500)
    moved = to_asymmetric_unit(d, name)
    assert in_asymmetric_unit(moved, name).all()
    nearest = np.abs((d @ point_group(name).transpose(0, 2, 1)) - moved).max(2).min(0)
    assert nearest.max() < 1e-9


def test_axes_are_where_relion_has_them():
    golden = (1 + 5**0.5) / 2
    fixed = {
        "C5": [(5, (0, 0, 1))],
        "D5": [(5, (0, 0, 1)), (2, (1, 0, 0))],
        "T": [(3, (0, 0, 1)), (2, (0, 2**0.5, 1))],
        "O": [(4, (0, 0, 1)), (4, (1, 0, 0)), (3, (1, 1, 1))],
        "I": [(2, (0, 0, 1)), (2, (1, 0, 0)), (5, (1, 0, golden))],
        "I1": [(2, (0, 0, 1)), (5, (golden, 0, 1))],
        "I3": [(5, (0, 0, 1)), (2, (-1, 0, golden))],
        "I4": [(5, (0, 0, 1)), (2, (1, 0, golden))],
    }
    for name, axes in fixed.items():
        for fold, axis in axes:
            moved = point_group(name) @ (np.array(axis, float) / np.linalg.norm(axis))
            stay = np.abs(moved - moved[0]).max(1) < 1e-6
            assert stay.sum() == fold, (name, axis)


@pytest.mark.relion
@pytest.mark.parametrize("name", ["C1", "C3", "D2", "D3", "D7", "T", "O", "I", "I1", "I2", "I3", "I4"])
def test_operations_are_relions(name):
    text = subprocess.run(
        ["relion_refine", "--sym", name, "--print_symmetry_ops"], capture_output=True, text=True, check=True
    ).stdout
    matrices = re.findall(r"R\(\d+\)=\s*((?:[-\d.e]+\s+){9})", text)
    relions = np.array([list(map(float, m.split())) for m in matrices]).reshape(-1, 3, 3)
    ours = point_group(name)
    assert len(relions) == len(ours)
    distance = np.abs(ours[:, None] - relions[None]).max((2, 3))
    assert distance.min(0).max() < 2e-5 and distance.min(1).max() < 2e-5  # printed with five digits


def test_equivalent_poses():
    pose = so3.random_rotations(np.random.default_rng(2), 5)
    all_poses = symmetrise_rotations(pose, "D3")
    assert all_poses.shape == (5, 6, 3, 3)
    np.testing.assert_array_equal(all_poses[:, 0], pose)
    for j in range(6):
        assert so3.angular_distance_deg(all_poses[:, j], pose, point_group("D3")).max() < 1e-5


def test_names():
    assert [normalise_name(n) for n in (" c3", "d12", "i", "I4", "t")] == ["C3", "D12", "I2", "I4", "T"]
    for bad in ("", "C0", "C", "Cs", "C2v", "D3h", "Th", "X4", "C1000", "I5"):
        with raises_code("symmetry-unknown", InputError, match="C1, C2"):
            point_group(bad)


def test_groups_cannot_be_spoilt_by_their_users():
    point_group("C3")[:] = 0
    np.testing.assert_array_equal(point_group("C3")[0], np.eye(3))
