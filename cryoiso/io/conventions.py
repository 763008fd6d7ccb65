"""The only home of conversions between other programs' conventions and ours.

Ours are RELION's: a rotation A maps map coordinates (x, y, z) to image coordinates, A = Rz(-psi) Ry(-tilt) Rz(-rot),
which is the transpose of the intrinsic ZYZ rotation (rot, tilt, psi); ``shift_A`` moves the image content into the
centre.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.physics.so3 import euler_to_matrix, matrix_to_euler
from cryoiso.physics.symmetry import cryosparc_turn

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "detector_pixel_size_A",
    "euler_to_matrix",
    "from_cryosparc_frame",
    "join_two_level",
    "matrix_to_euler",
    "matrix_to_rotvec",
    "rotvec_to_matrix",
    "split_two_level",
    "to_cryosparc_frame",
    "wrap_degrees",
]


def rotvec_to_matrix(rotvec_rad: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3 3"]:
    """Our rotations from cryoSPARC's ``alignments3D/pose``.

    cryoSPARC keeps the rotation vector (axis times angle, Rodrigues) of the rotation from image to map, so ours is its
    transpose.

    Args:
        rotvec_rad: (n, 3).

    Returns:
        (n, 3, 3) float64.
    """
    v = np.asarray(rotvec_rad, np.float64).reshape(-1, 3)
    angle = np.linalg.norm(v, axis=1)[:, None, None]
    safe = np.where(angle > 1e-12, angle, 1.0)
    k = np.zeros((len(v), 3, 3))
    k[:, 0, 1], k[:, 0, 2], k[:, 1, 2] = -v[:, 2], v[:, 1], -v[:, 0]
    k -= np.swapaxes(k, 1, 2)
    first = np.where(angle > 1e-12, np.sin(angle) / safe, 1.0)
    second = np.where(angle > 1e-12, 2.0 * (np.sin(angle / 2) / safe) ** 2, 0.5)
    return np.swapaxes(np.eye(3) + first * k + second * (k @ k), 1, 2)


def matrix_to_rotvec(rotation: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "n 3"]:
    """cryoSPARC's rotation vectors of our rotations: (n, 3, 3) -> (n, 3) radians, length at most pi."""
    from scipy.spatial.transform import Rotation

    a = np.asarray(rotation, np.float64).reshape(-1, 3, 3)
    rotvec: np.ndarray = Rotation.from_matrix(np.swapaxes(a, 1, 2)).as_rotvec()
    return rotvec


def from_cryosparc_frame(rotation: Float[np.ndarray, "n 3 3"], symmetry: str) -> Float[np.ndarray, "n 3 3"]:
    """Poses of a map in cryoSPARC's frame of a point group as poses of the map in ours.

    They differ for Dn with odd n: cryoSPARC's two-fold axis is on y, ours on x. With the rotation T that takes the map
    there (``physics.symmetry.cryosparc_turn``, with the source), A becomes A T^-1.

    Args:
        rotation: (n, 3, 3).
        symmetry: the point group that the poses were refined with.

    Raises:
        InputError: unknown group.
    """
    turn = cryosparc_turn(symmetry)
    return rotation if turn is None else np.asarray(rotation, np.float64) @ turn.T


def to_cryosparc_frame(rotation: Float[np.ndarray, "n 3 3"], symmetry: str) -> Float[np.ndarray, "n 3 3"]:
    """Inverse of ``from_cryosparc_frame``."""
    turn = cryosparc_turn(symmetry)
    return rotation if turn is None else np.asarray(rotation, np.float64) @ turn


def detector_pixel_size_A(
    detector_pixel_um: Float[np.ndarray, " n"], magnification: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Pixel size in Å of RELION up to 3.0: rlnDetectorPixelSize (micrometres) over rlnMagnification."""
    return np.asarray(detector_pixel_um, np.float64) * 1e4 / np.asarray(magnification, np.float64)


def join_two_level(
    subtomogram: Float[np.ndarray, "n 3 3"], particle: Float[np.ndarray, "n 3 3"]
) -> Float[np.ndarray, "n 3 3"]:
    """One rotation from RELION's two-level subtomogram angles.

    RELION 4 and 5 may store the orientation of a subtomogram in its tomogram (rlnTomoSubtomogramRot, Tilt, Psi) and
    the refined angles relative to it (rlnAngleRot, Tilt, Psi). A_particle maps the reference into the subtomogram and
    A_sub the subtomogram into the tomogram, so the reference comes into the tomogram by A_sub A_particle (checked on
    a real virus: only in this order do the particles' z axes stand upright on the surface that their coordinates form).

    Args:
        subtomogram, particle: (n, 3, 3), our rotations of the two sets of angles.

    Returns:
        (n, 3, 3): maps reference coordinates to tomogram coordinates.
    """
    return np.asarray(subtomogram, np.float64) @ np.asarray(particle, np.float64)


def split_two_level(
    subtomogram: Float[np.ndarray, "n 3 3"], joined: Float[np.ndarray, "n 3 3"]
) -> Float[np.ndarray, "n 3 3"]:
    """The rotation of rlnAngle* that with ``subtomogram`` gives ``joined``; inverse of ``join_two_level``."""
    return np.swapaxes(np.asarray(subtomogram, np.float64), 1, 2) @ np.asarray(joined, np.float64)


def wrap_degrees(angle_deg: Float[np.ndarray, " ..."]) -> Float[np.ndarray, " ..."]:
    """Angles into (-180, 180]."""
    return 180.0 - np.mod(180.0 - np.asarray(angle_deg, np.float64), 360.0)
