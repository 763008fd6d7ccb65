"""Rotations: Euler angles, grids on the sphere and on SO(3), distances modulo symmetry.

A rotation A maps map coordinates to image coordinates; its third row is the view direction in the map's frame. Angles
are RELION's (rot, tilt, psi), intrinsic ZYZ: A = Rz(-psi) Ry(-tilt) Rz(-rot) acting on column vectors (x, y, z).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from cryoiso.physics.symmetry import in_asymmetric_unit, normalise_name, point_group

if TYPE_CHECKING:
    from jaxtyping import Float, Real


def euler_to_matrix(rot_deg: ArrayLike, tilt_deg: ArrayLike, psi_deg: ArrayLike) -> Float[np.ndarray, "n 3 3"]:
    """Rotation matrices of RELION's Euler angles.

    Args:
        rot_deg, tilt_deg, psi_deg: scalars or (n,), degrees; they broadcast.

    Returns:
        (n, 3, 3) float64.
    """
    angles = np.broadcast_arrays(*(np.atleast_1d(np.asarray(a, np.float64)) for a in (rot_deg, tilt_deg, psi_deg)))
    (ca, cb, cg), (sa, sb, sg) = (np.cos(np.radians(angles)), np.sin(np.radians(angles)))
    rows = [
        [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
        [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
        [sb * ca, sb * sa, cb],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def matrix_to_euler(rotation: Float[np.ndarray, "*n 3 3"]) -> Float[np.ndarray, "m 3"]:
    """RELION's Euler angles of rotation matrices.

    Args:
        rotation: (n, 3, 3) or (3, 3).

    Returns:
        (n, 3) degrees: rot and psi in (-180, 180], tilt in [0, 180]. Where tilt is 0 or 180, rot is 0.
    """
    a = np.asarray(rotation, np.float64).reshape(-1, 3, 3)
    sin_tilt = np.hypot(a[:, 2, 0], a[:, 2, 1])
    tilt = np.arctan2(sin_tilt, a[:, 2, 2])
    rot = np.arctan2(a[:, 2, 1], a[:, 2, 0])
    psi = np.arctan2(a[:, 1, 2], -a[:, 0, 2])
    pole = sin_tilt < 1e-9
    rot = np.where(pole, 0.0, rot)
    psi = np.where(pole, np.arctan2(a[:, 0, 1], a[:, 0, 0] * np.sign(a[:, 2, 2])), psi)
    angles_deg: np.ndarray = np.degrees(np.stack([rot, tilt, psi], 1))
    return angles_deg


def view_direction(rotation: Float[np.ndarray, "*n 3 3"]) -> Float[np.ndarray, "*n 3"]:
    """View directions in the map's frame: the third rows of (n, 3, 3) rotations, (n, 3)."""
    return np.array(np.asarray(rotation)[..., 2, :])


def rotation_with_view(directions: Real[np.ndarray, "*n 3"], psi_deg: ArrayLike = 0.0) -> Float[np.ndarray, "m 3 3"]:
    """Rotations with given view directions.

    Args:
        directions: (n, 3) vectors, any length.
        psi_deg: in-plane angle, scalar or (n,).

    Returns:
        (n, 3, 3).
    """
    d = np.asarray(directions, np.float64).reshape(-1, 3)
    tilt = np.degrees(np.arctan2(np.hypot(d[:, 0], d[:, 1]), d[:, 2]))
    return euler_to_matrix(np.degrees(np.arctan2(d[:, 1], d[:, 0])), tilt, psi_deg)


def rotvec_to_matrix(rotvec_rad: Real[np.ndarray, "*n 3"]) -> Float[np.ndarray, "m 3 3"]:
    """Exponential map: (n, 3) rotation vectors in radians to (n, 3, 3) rotations (Rodrigues)."""
    v = np.asarray(rotvec_rad, np.float64).reshape(-1, 3)
    angle = np.linalg.norm(v, axis=1)[:, None, None]
    k = np.zeros((len(v), 3, 3))
    k[:, 0, 1], k[:, 0, 2], k[:, 1, 2] = -v[:, 2], v[:, 1], -v[:, 0]
    k -= np.swapaxes(k, 1, 2)
    rotation: np.ndarray = np.eye(3) + np.sinc(angle / np.pi) * k + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * (k @ k)
    return rotation


def random_rotations(rng: np.random.Generator, n: int) -> Float[np.ndarray, "{n} 3 3"]:
    """(n, 3, 3) rotations drawn uniformly from SO(3) (normalised Gaussian quaternions)."""
    q = rng.standard_normal((n, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def angular_distance_deg(
    a: Float[np.ndarray, "*#n 3 3"], b: Float[np.ndarray, "*#n 3 3"], ops: Float[np.ndarray, "g 3 3"] | None = None
) -> Float[np.ndarray, " m"]:
    """Angle of the rotation between poses, the smallest over symmetry-equivalent poses.

    sin(angle / 2) = |A S - B| / (2 sqrt 2) in the Frobenius norm, which stays exact for tiny angles.

    Args:
        a, b: (n, 3, 3); either may be (1, 3, 3) or (3, 3).
        ops: (g, 3, 3) operations of the point group, or None.

    Returns:
        (n,) degrees, 0 to 180.
    """
    a = np.asarray(a, np.float64).reshape(-1, 3, 3)
    b = np.asarray(b, np.float64).reshape(-1, 3, 3)
    best = np.full(max(len(a), len(b)), np.inf)
    for op in np.eye(3)[None] if ops is None else np.asarray(ops, np.float64):
        best = np.minimum(best, ((a @ op - b) ** 2).sum((1, 2)))
    angle_deg: np.ndarray = np.degrees(2 * np.arcsin(np.clip(np.sqrt(best / 8), 0, 1)))
    return angle_deg


def healpix_directions(order: int) -> Float[np.ndarray, "12*4**{order} 3"]:
    """Centres of the HEALPix pixels in nested order.

    Each of the 12 base pixels is a square in the plane of the HEALPix projection (H=4, K=3; Calabretta and Roukema
    2007); the pixel centres form a regular grid in it and are projected back. Equal areas, Gorski et al. 2005.

    Args:
        order: 0 or more; there are 12 * 4**order pixels about 58.6 / 2**order degrees apart.

    Returns:
        (12 * 4**order, 3) float64 unit vectors.
    """
    side = 2**order
    nested = np.arange(side * side)
    x, y = _even_bits(nested, order), _even_bits(nested >> 1, order)
    u, v = (x + 0.5) / side, (y + 0.5) / side
    face = np.arange(12)[:, None]
    row, column = face // 4, face % 4
    centre_x = np.pi / 4 * (2 * column + (row != 1))
    plane_x = (u - v) * np.pi / 4
    plane_y = (1 - row) * np.pi / 4 + (u + v - 1) * np.pi / 4
    sigma = 2 - 4 * np.abs(plane_y) / np.pi
    polar = sigma < 1
    z = np.where(polar, np.sign(plane_y) * (1 - sigma**2 / 3), 8 * plane_y / (3 * np.pi))
    phi = centre_x + plane_x / np.where(polar, sigma, 1)
    radius = np.sqrt((1 - z) * (1 + z))
    return np.stack([radius * np.cos(phi), radius * np.sin(phi), z], -1).reshape(-1, 3)


def _even_bits(number: np.ndarray, count: int) -> np.ndarray:
    """Bits 0, 2, 4, ... of the numbers, packed together."""
    packed = np.zeros_like(number)
    for bit in range(count):
        packed |= ((number >> (2 * bit)) & 1) << bit
    return packed


def fibonacci_sphere(n: int) -> Float[np.ndarray, "{n} 3"]:
    """(n, 3) nearly even directions along a golden-angle spiral from +z to -z."""
    i = np.arange(n)
    z = 1 - (2 * i + 1) / n
    phi = i * np.pi * (3 - 5**0.5)
    radius = np.sqrt(1 - z**2)
    return np.stack([radius * np.cos(phi), radius * np.sin(phi), z], 1)


def grid_step_deg(order: int) -> float:
    """Nominal step of ``so3_grid``: 60 / 2**order degrees."""
    return 60.0 / 2.0**order


def so3_directions(order: int, symmetry: str = "C1") -> Float[np.ndarray, "j 3"]:
    """HEALPix directions that cover the distinct views under a point group.

    Those in the asymmetric unit, and some from just outside where the grid, which does not have the group's symmetry,
    would leave a gap along the unit's edge.

    Returns:
        (J, 3), about 12 * 4**order / g of them.
    """
    return _so3_directions(order, normalise_name(symmetry)).copy()


GAP = 0.85
"""A direction outside the asymmetric unit is added where it is farther than this from all copies, in grid spacings."""


@lru_cache(maxsize=16)
def _so3_directions(order: int, symmetry: str) -> np.ndarray:
    directions = healpix_directions(order)
    inside = in_asymmetric_unit(directions, symmetry)
    if symmetry == "C1":
        return directions
    ops = point_group(symmetry)
    spacing = np.sqrt(4 * np.pi / len(directions))
    kept = list(directions[inside])
    copies = np.concatenate([directions[inside] @ op.T for op in ops])
    for d in directions[~inside]:
        if not len(copies) or ((copies - d) ** 2).sum(1).min() > (GAP * spacing) ** 2:
            kept.append(d)
            copies = np.concatenate([copies, ops @ d])
    return np.array(kept)


def so3_grid(order: int, symmetry: str = "C1") -> Float[np.ndarray, "j 3 3"]:
    """An even grid of rotations modulo a point group: HEALPix directions times in-plane angles.

    The in-plane step is 60 / 2**order degrees, so that 72 * 8**order rotations cover SO(3): 30 degrees apart at order
    1, 15 at order 2, 7.5 at order 3.

    Args:
        order: HEALPix order of the directions.
        symmetry: point group.

    Returns:
        (J, 3, 3) float64; all in-plane angles of one direction lie together.
    """
    directions = so3_directions(order, symmetry)
    psi = np.arange(6 * 2**order) * grid_step_deg(order)
    return rotation_with_view(np.repeat(directions, len(psi), 0), np.tile(psi, len(directions)))


def local_rotations(step_deg: float, extent: float, *, cube: bool = False) -> Float[np.ndarray, "m 3 3"]:
    """A grid of small rotations around the identity: rotation vectors on a cubic lattice.

    Args:
        step_deg: spacing.
        extent: range in steps: 1 gives 7 rotations (27 with ``cube``), 2 gives 33 (125).
        cube: the whole cube instead of the ball inside it.

    Returns:
        (m, 3, 3), the identity first, then by increasing angle. Multiply from the left (in the image's frame) or right
        (in the map's frame).
    """
    reach = int(np.floor(extent + 1e-9))
    axis = np.arange(-reach, reach + 1)
    lattice = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    length2 = (lattice**2).sum(1)
    if not cube:
        lattice, length2 = lattice[length2 <= extent**2 + 1e-9], length2[length2 <= extent**2 + 1e-9]
    lattice = lattice[np.argsort(length2, kind="stable")]
    return rotvec_to_matrix(np.radians(step_deg) * lattice)
