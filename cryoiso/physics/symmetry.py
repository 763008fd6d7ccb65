"""Point groups in RELION's axis conventions, and the asymmetric unit of view directions.

An operation S of the group leaves the map unchanged, V(S x) = V(x), so the poses A and A S give the same image.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.shapes import require_rotations

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

KNOWN_GROUPS = "C1, C2, ... Cn; D2, D3, ... Dn; T; O; I (the same as I2), I1, I2, I3, I4"
_MAX_FOLD = 100

_GOLDEN = (1 + 5**0.5) / 2
_S3, _S23 = 3**-0.5, (2 / 3) ** 0.5
_A5, _B5 = 1 / (1 + _GOLDEN**2) ** 0.5, _GOLDEN / (1 + _GOLDEN**2) ** 0.5
"""(0.5257, 0.8507): components of a 5-fold axis of an icosahedron whose 2-fold axes are x, y and z."""

_GENERATORS: dict[str, list[tuple[int, tuple[float, float, float]]]] = {
    "T": [(3, (0, 0, 1)), (2, (0, _S23, _S3))],
    "O": [(4, (0, 0, 1)), (3, (_S3, _S3, _S3))],
    "I1": [(2, (0, 0, 1)), (5, (_B5, 0, _A5))],
    "I2": [(2, (0, 0, 1)), (5, (_A5, 0, _B5))],
    "I3": [(5, (0, 0, 1)), (2, (-_A5, 0, _B5))],
    "I4": [(5, (0, 0, 1)), (2, (_A5, 0, _B5))],
}


def normalise_name(name: str) -> str:
    """The group's name as written everywhere else ('c3' -> 'C3', 'I' -> 'I2').

    Raises:
        InputError: the group is not known; mirrors and inversions do not exist in proteins.
    """
    text = str(name).strip().upper()
    if text == "I":
        return "I2"
    if text in _GENERATORS:
        return text
    match = re.fullmatch(r"([CD])([1-9]\d*)", text)
    if match and int(match[2]) <= _MAX_FOLD:
        return text
    raise InputError("unknown point group", expected=KNOWN_GROUPS, found=repr(name), code="symmetry-unknown")


def point_group(name: str) -> Float[np.ndarray, "g 3 3"]:
    """All proper rotations of a point group.

    Axes as in RELION: Cn about z; Dn with a 2-fold axis on x besides; T with a 3-fold axis on z and a 2-fold one on
    (0, 0.816, 0.577); O with its 4-fold axes on x, y, z; I2 (= I) with 2-fold axes on x, y, z and a 5-fold one on
    (0.526, 0, 0.851); I1 likewise but 5-fold on (0.851, 0, 0.526); I3 and I4 with a 5-fold axis on z and a 2-fold one
    on (-0.526, 0, 0.851) and (0.526, 0, 0.851).

    Args:
        name: C1, C3, D7, T, O, I, I1 ... in any case of letters.

    Returns:
        (g, 3, 3) float64, the identity first.

    Raises:
        InputError: unknown group.
    """
    return _point_group(normalise_name(name)).copy()


@lru_cache(maxsize=64)
def _point_group(name: str) -> np.ndarray:
    if name[0] in "CD":
        fold = int(name[1:])
        about_z = np.stack([_axis_rotation((0, 0, 1), 2 * np.pi * i / fold) for i in range(fold)])
        if name[0] == "C":
            return about_z
        return np.concatenate([about_z, about_z @ np.diag([1.0, -1.0, -1.0])])
    return _closure([_axis_rotation(axis, 2 * np.pi / fold) for fold, axis in _GENERATORS[name]])


def generators(name: str) -> list[tuple[int, tuple[float, float, float]]]:
    """One or two (fold, axis) whose rotations generate the group, the axis on z first.

    Raises:
        InputError: unknown group.
    """
    group = normalise_name(name)
    if group[0] in "CD":
        main: list[tuple[int, tuple[float, float, float]]] = [(int(group[1:]), (0, 0, 1))]
        return main if group[0] == "C" else [*main, (2, (1, 0, 0))]
    return list(_GENERATORS[group])


def cryosparc_turn(name: str) -> Float[np.ndarray, "3 3"] | None:
    """The rotation T that takes a map from cryoSPARC's frame of a point group to cryoiso's; None if they are the same.

    cryoSPARC's Dn has a two-fold axis on y, RELION's and cryoiso's on x (a cryoSPARC developer, discuss.cryosparc.com
    topic 12482; Scipion's plugin calls it Dyn). For even n both are on two-fold axes; for odd n, T is a rotation by
    90/n degrees about z. T (3-fold on z) and O are as in RELION according to the same source; so are I1 and I2, by the
    axes in cryosparc-issues 127. A pose A of the map becomes A T^-1.

    Returns:
        (3, 3) or None.

    Raises:
        InputError: unknown group.
    """
    group = normalise_name(name)
    if group[0] != "D" or int(group[1:]) % 2 == 0:
        return None
    return _axis_rotation((0, 0, 1), np.pi / 2 / int(group[1:]))


def _axis_rotation(axis: tuple[float, float, float], angle_rad: float) -> np.ndarray:
    """Rodrigues' formula: rotation by an angle about a unit axis."""
    x, y, z = axis
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]], np.float64)
    rotation: np.ndarray = np.eye(3) + np.sin(angle_rad) * k + (1 - np.cos(angle_rad)) * (k @ k)
    return rotation


def _closure(generators: list[np.ndarray]) -> np.ndarray:
    """The group that the generators make: multiply until nothing new appears."""
    group = [np.eye(3)]
    for element in group:  # grows while it is walked through
        for g in generators:
            new = g @ element
            if all(np.abs(new - old).max() > 1e-6 for old in group):
                group.append(new)
    return np.stack(group)


def in_asymmetric_unit(directions: Float[np.ndarray, "n 3"], name: str) -> Bool[np.ndarray, " n"]:
    """Whether view directions are in the asymmetric unit: exactly one of every orbit under the group is.

    The representative is the one with the largest z, then x, then y; for Cn that is the wedge of 360/n degrees around
    x, for T, O and I a wedge of the cell around the axis on z. Directions that differ by less than 1e-9 count as equal.

    Args:
        directions: (n, 3) unit vectors.
        name: point group.

    Returns:
        (n,) bool.
    """
    d = np.asarray(directions, np.float64).reshape(-1, 3)
    best = np.ones(len(d), bool)
    for op in _point_group(normalise_name(name))[1:]:
        mate = d @ op.T
        undecided = np.ones(len(d), bool)
        for axis in (2, 0, 1):
            gap = mate[:, axis] - d[:, axis]
            best &= ~(undecided & (gap > 1e-9))
            undecided &= np.abs(gap) <= 1e-9
    return best


def to_asymmetric_unit(directions: Float[np.ndarray, "n 3"], name: str) -> Float[np.ndarray, "n 3"]:
    """Move every direction to its representative in the asymmetric unit.

    Args:
        directions: (n, 3) unit vectors.
        name: point group.

    Returns:
        (n, 3): the copies for which ``in_asymmetric_unit`` holds.
    """
    best = np.array(directions, np.float64).reshape(-1, 3)
    original = best.copy()
    for op in _point_group(normalise_name(name))[1:]:
        mate = original @ op.T
        better, undecided = np.zeros(len(best), bool), np.ones(len(best), bool)
        for axis in (2, 0, 1):
            gap = mate[:, axis] - best[:, axis]
            better |= undecided & (gap > 1e-9)
            undecided &= np.abs(gap) <= 1e-9
        best[better] = mate[better]
    return best


def symmetrise_rotations(rotations: Float[np.ndarray, "n 3 3"], name: str) -> Float[np.ndarray, "n g 3 3"]:
    """All poses equivalent to the given ones.

    Args:
        rotations: (n, 3, 3).
        name: point group with g operations.

    Returns:
        (n, g, 3, 3): A S for every operation S, the pose itself first.

    Raises:
        InputError: no rotation matrices, or an unknown point group.
    """
    rotations = np.asarray(rotations, np.float64)
    require_rotations(rotations)
    mates: np.ndarray = np.einsum("nij,gjk->ngik", rotations, _point_group(normalise_name(name)))
    return mates
