"""Maps in cryoSPARC's frame of a point group, which is another one for Dn with odd n."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.physics.symmetry import cryosparc_turn

if TYPE_CHECKING:
    from jaxtyping import Float


def in_cryosparcs_frame(volume: Float[np.ndarray, "box box box"], symmetry: str) -> Float[np.ndarray, "box box box"]:
    """A smooth map (low-passed reference, mask) as the poses of ``io.conventions.to_cryosparc_frame`` see it.

    A point r of cryoSPARC's map is T r of ours, about the centre D//2; cubic interpolation.

    Args:
        volume: (D, D, D).

    Returns:
        (D, D, D) float32.
    """
    turn = cryosparc_turn(symmetry)
    if turn is None:
        return np.asarray(volume, np.float32)
    from scipy.ndimage import affine_transform

    matrix = np.asarray(turn, np.float64)[::-1, ::-1]  # of (z, y, x)
    centre = np.full(3, volume.shape[0] // 2, np.float64)
    turned: np.ndarray = affine_transform(
        np.asarray(volume, np.float32), matrix, centre - matrix @ centre, order=3, mode="constant"
    )
    return turned
