"""How much of a corrected map was measured and how much the network inferred, place by place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float


def measured_share(
    measured: Float[np.ndarray, "box box box"], inferred: Float[np.ndarray, "box box box"], width_px: float
) -> Float[np.ndarray, "box box box"]:
    """Share of the local power that came from data: G*m^2 / (G*m^2 + G*i^2), G a Gaussian.

    Args:
        measured: (D, D, D) the part of the corrected map that the data gave. inferred: the rest of it.
        width_px: standard deviation of the Gaussian; about a resolution element.

    Returns:
        (D, D, D) float32 in [0, 1]; 1 where there is no power at all, since nothing was inferred there.
    """
    from scipy.ndimage import gaussian_filter

    ours, rest = (gaussian_filter(np.square(part, dtype=np.float64), width_px) for part in (measured, inferred))
    return _share(ours, rest)


def measured_share_fourier(
    measured: Float[np.ndarray, "box box box"], inferred: Float[np.ndarray, "box box box"], width_px: float = 1.0
) -> Float[np.ndarray, "box box box"]:
    """The same for every Fourier coefficient, its power smoothed over neighbours: (D, D, D) float32, centre D//2."""
    from scipy.ndimage import gaussian_filter

    powers = []
    for part in (measured, inferred):
        power = np.abs(np.fft.fftshift(np.fft.fftn(part.astype(np.float64)))) ** 2
        powers.append(gaussian_filter(power, width_px, mode="wrap"))
    return _share(*powers)


def _share(ours: np.ndarray, rest: np.ndarray) -> np.ndarray:
    total = ours + rest
    some = total > 1e-12 * float(total.max(initial=0.0))
    share: np.ndarray = np.divide(ours, total, out=np.ones_like(total), where=some).astype(np.float32)
    return share
