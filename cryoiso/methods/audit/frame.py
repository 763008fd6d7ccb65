"""Two maps of one molecule in one frame: refinements from different references end some tenths of a degree and some
tenths of an ångström apart, which is no difference between the maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.physics import fit_search
from cryoiso.physics.fit import apply_fit
from cryoiso.physics.fit_result import Placement

if TYPE_CHECKING:
    from jaxtyping import Float


def in_frame_of(
    moving: Float[np.ndarray, "box box box"], target: Float[np.ndarray, "box box box"], pixel_size_A: float,
    resolution_A: float, symmetry: str,
) -> Float[np.ndarray, "box box box"]:  # fmt: skip
    """A map rotated and shifted to where it agrees best with another, from where it is: (D, D, D) float32.

    Only what the symmetry leaves free is changed: everything for C1, spin and slide about z for Cn, nothing for others.

    Args:
        resolution_A: finest information used.
    """
    allowed = {"C1": fit_search.FULL}.get(symmetry, fit_search.AXIS if symmetry[0] == "C" else fit_search.FIXED)
    if allowed == fit_search.FIXED:
        return np.asarray(moving, np.float32)
    moved, other = (DensityMap(np.asarray(v, np.float32), pixel_size_A) for v in (moving, target))
    finest_A = max(resolution_A, 2.5 * pixel_size_A)
    pair = fit_search.make_pair(fit_search.make_body(moved, finest_A, hold=allowed), other, finest_A)
    centre_A = np.asarray(pair.body.centre_A, np.float64)
    rotation, shift_A, score = fit_search.refine(pair, np.eye(3)[None], centre_A[None], False, allowed)
    placement = Placement(rotation[0], shift_A[0] - rotation[0] @ centre_A, float(score[0]))
    return np.asarray(apply_fit(moved, placement).data, np.float32)
