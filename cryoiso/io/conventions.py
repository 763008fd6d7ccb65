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
    "anisomag_of_magnification",
    "beam_tilt_mrad",
    "beam_tilt_to_A",
    "detector_pixel_size_A",
    "euler_to_matrix",
    "from_cryosparc_frame",
    "join_two_level",
    "magnification_of_anisomag",
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


def beam_tilt_mrad(
    tilt_A: Float[np.ndarray, "n 2"], spherical_aberration_mm: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n 2"]:
    """Beam tilt (rlnBeamTiltX, Y) of cryoSPARC's ``ctf/tilt_A``.

    cryoSPARC keeps the third-order term of the phase as a length, Cs sin(tilt) (its authors, in their forum: the tilt
    is that term over the spherical aberration). The sign is pyem's, which has x and y as RELION has them.

    Args:
        tilt_A: (n, 2) Å. spherical_aberration_mm: (n,).

    Returns:
        (n, 2) mrad; NaN where no tilt gives that term, because Cs is too small for it.
    """
    cs_A = np.asarray(spherical_aberration_mm, np.float64)[:, None] * 1e7
    tilt = np.asarray(tilt_A, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        sine = np.where(tilt == 0, 0.0, tilt / cs_A)
    tilt_mrad: np.ndarray = 1e3 * np.arcsin(np.where(np.abs(sine) < 1, sine, np.nan))
    return tilt_mrad


def beam_tilt_to_A(
    tilt_mrad: Float[np.ndarray, "n 2"], spherical_aberration_mm: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n 2"]:
    """Inverse of ``beam_tilt_mrad``: (n, 2) mrad -> (n, 2) Å."""
    cs_A = np.asarray(spherical_aberration_mm, np.float64)[:, None] * 1e7
    lengths_A: np.ndarray = cs_A * np.sin(np.asarray(tilt_mrad, np.float64) * 1e-3)
    return lengths_A


def magnification_of_anisomag(anisomag: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """rlnMagMat00, 01, 10, 11 of cryoSPARC's ``ctf/anisomag``.

    cryoSPARC keeps M - 1 row by row, where M takes Fourier coordinates of the image to those of the undistorted one
    (its authors, in their forum); RELION keeps such an M itself.
    """
    matrix: np.ndarray = np.asarray(anisomag, np.float64) + np.array([1.0, 0.0, 0.0, 1.0])
    return matrix


def anisomag_of_magnification(magnification: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Inverse of ``magnification_of_anisomag``."""
    without_identity: np.ndarray = np.asarray(magnification, np.float64) - np.array([1.0, 0.0, 0.0, 1.0])
    return without_identity


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
