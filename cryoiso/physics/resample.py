"""A density map on another grid, by exact band-limited interpolation."""

from __future__ import annotations

import numpy as np


def resample_matrix(box_in: int, pixel_in_A: float, box_out: int, pixel_out_A: float) -> np.ndarray:
    """(box_out, box_in) float64: samples on the old axis -> samples on the new one, both centred at pixel D//2.

    Row i is the trigonometric interpolation kernel of the old grid at the position of the new pixel i, with the
    frequencies beyond the new grid's Nyquist limit left out, so nothing aliases. Positions outside the old box are
    zero.
    """
    x_out = (np.arange(box_out) - box_out // 2) * (pixel_out_A / pixel_in_A)
    x_in = np.arange(box_in) - box_in // 2
    limit = min(0.5, 0.5 * pixel_in_A / pixel_out_A)
    k = np.arange(1, box_in // 2 + 1)
    f = k / box_in
    # every frequency stands for +k and -k; the one at Nyquist, old or new, is shared between the two
    weight = np.where(np.isclose(f, limit), 1.0, np.where(f < limit, 2.0, 0.0))
    used = weight > 0
    phase_out = 2 * np.pi * x_out[:, None] * f[used]
    phase_in = 2 * np.pi * x_in[:, None] * f[used]
    kernel = (np.cos(phase_out) * weight[used]) @ np.cos(phase_in).T
    kernel += (np.sin(phase_out) * weight[used]) @ np.sin(phase_in).T
    inside = (x_out >= -(box_in // 2) - 0.5) & (x_out <= (box_in - 1) // 2 + 0.5)
    return np.where(inside[:, None], (1.0 + kernel) / box_in, 0.0)


def resample_map(data: np.ndarray, pixel_in_A: float, box_out: int, pixel_out_A: float) -> np.ndarray:
    """A cubic map on a grid of another box and pixel size; the centre (voxel D//2) stays where it is.

    Args:
        data: (D, D, D), (z, y, x).
        pixel_in_A: its pixel size.
        box_out: new box E in pixels.
        pixel_out_A: new pixel size.

    Returns:
        (E, E, E) float32. Densities keep their values; what lies outside the old box is zero.
    """
    matrix = resample_matrix(data.shape[0], pixel_in_A, box_out, pixel_out_A)
    out = np.asarray(data, np.float64)
    for axis in range(3):
        out = np.moveaxis(np.tensordot(matrix, out, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(out, np.float32)
