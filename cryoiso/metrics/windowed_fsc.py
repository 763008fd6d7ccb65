"""Local resolution: the FSC of two half-maps within a soft window around each point.

A windowed FSC (Cardone et al. 2013, doi 10.1016/j.jsb.2013.08.002) transforms both half-maps, multiplied by a window,
anew at every point. By Parseval's theorem its sums over a shell are sums over space of the products of the shell's
part of both windowed maps. Where the window is broader than the reciprocal width of the shell, filtering to the shell
and multiplying by the window may be exchanged; then the sums at all points at once are a convolution of the products of
the filtered maps with the squared window:

    FSC_k(x) = G * (a_k b_k) / sqrt(G * a_k^2  G * b_k^2),   a_k = map filtered to band k, G Gaussian

Three convolutions a band replace a transform a voxel, and products of a coarse band are formed on a coarse grid.

Correction for the window: filtering comes first, so that the window carries no power from strong coarse shells into
weak fine ones, which is what phase randomisation corrects in windowed FSCs. What is left is chance: a window holds few
independent coefficients of a band. A local FSC counts as agreement only where it exceeds both the threshold and twice
its standard deviation for independent noise, 1/sqrt(n), n = `independent`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.metrics.fsc_curve import check_pair, transform

if TYPE_CHECKING:
    from jaxtyping import Float, Real, Shaped

LEAST_WINDOW_A, LEAST_WINDOW_PX, WINDOWS_OF_RESOLUTION = 25.0, 10.0, 4.0
"""The default window is the largest of: this length, this many pixels, this many times the resolution of the map."""
FWHM = 2 * np.sqrt(2 * np.log(2))
DIES_OUT = 0.592
"""sigma times the frequency at which the transform of a Gaussian is a thousandth."""
SIGMAS = 2.0
"""Standard deviations of chance that a local FSC must exceed."""
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class LocalResolution:
    """Resolution at every voxel, and how it was measured."""

    resolution_A: Float[np.ndarray, "box box box"]
    """between ``coarsest_A`` (there or worse) and two pixels (there or better)"""
    window_A: float
    """full width at half maximum of the Gaussian window"""
    threshold: float
    coarsest_A: float
    frequency_invA: Float[np.ndarray, " bands"]
    independent: Float[np.ndarray, " bands"]
    """independent real numbers of a band in the window"""

    def summary(self, mask: Shaped[np.ndarray, "box box box"] | None = None) -> dict[str, Any]:
        """Percentiles inside the mask (above 0.5), and the settings."""
        inside = self.resolution_A if mask is None else self.resolution_A[np.asarray(mask) > 0.5]
        known = inside if np.size(inside) else np.array([np.nan])
        values = np.percentile(known, PERCENTILES)
        return {
            "window_A": self.window_A,
            "threshold": self.threshold,
            "coarsest_A": self.coarsest_A,
            "percentiles_A": dict(zip(map(str, PERCENTILES), values, strict=True)),
            "share_at_coarsest": float(np.mean(known >= 0.999 * self.coarsest_A)),
            "frequency_invA": self.frequency_invA,
            "least_fsc": np.maximum(self.threshold, SIGMAS / np.sqrt(self.independent)),
        }


def local_resolution(
    half1: Real[np.ndarray, "box box box"],
    half2: Real[np.ndarray, "box box box"],
    pixel_size_A: float,
    *,
    window_A: float | None = None,
    threshold: float = 0.143,
    resolution_A: float | None = None,
    each_band: Callable[[], None] = lambda: None,
) -> LocalResolution:
    """Local resolution of two half-maps.

    Args:
        half1, half2: (D, D, D) half-maps, neither masked nor filtered.
        window_A: full width at half maximum of the window; None: see ``LEAST_WINDOW_A``.
        threshold: 0.143 or 0.5.
        resolution_A: of the whole map, for the default window.
        each_band: called before each band; may raise, to stop.

    Raises:
        InputError: the window does not fit the box.
    """
    box_px = check_pair(half1, half2)
    length_A = box_px * pixel_size_A
    wide_A = window_A or min(default_window_A(pixel_size_A, resolution_A), length_A / 3)
    if not 2 * pixel_size_A < wide_A <= length_A / 2:
        raise InputError(
            "the window of the local resolution does not fit these maps",
            expected=f"more than {2 * pixel_size_A:g} Å, at most {length_A / 2:g} Å", found=f"{wide_A:g} Å",
            code="option-out-of-range",
        )  # fmt: skip
    bands = _Bands.of(box_px, pixel_size_A, wide_A)
    fa, fb = (transform(np.asarray(half, np.float32)) for half in (half1, half2))
    curves = []
    for k in range(len(bands.centres)):
        each_band()
        curves.append(_local_fsc(fa, fb, box_px, bands, k))
    least = np.maximum(threshold, SIGMAS / np.sqrt(bands.independent))
    crossing = _first_crossing(np.stack(curves), least, bands.centres)
    return LocalResolution(
        length_A / _interpolated(crossing, box_px), wide_A, threshold, length_A / float(bands.centres[0]),
        bands.centres / length_A, bands.independent,
    )  # fmt: skip


def default_window_A(pixel_size_A: float, resolution_A: float | None) -> float:
    """See ``LEAST_WINDOW_A``."""
    return max(LEAST_WINDOW_A, LEAST_WINDOW_PX * pixel_size_A, WINDOWS_OF_RESOLUTION * (resolution_A or 0.0))


@dataclass(frozen=True)
class _Bands:
    """Overlapping bands of frequencies, in Fourier pixels, and the window in voxels of the map."""

    centres: np.ndarray
    half_width: float
    """a band is a Hann function that ends here on both sides; its FWHM as well"""
    sigma_px: float
    independent: np.ndarray

    @classmethod
    def of(cls, box_px: int, pixel_size_A: float, window_A: float) -> _Bands:
        length_A = box_px * pixel_size_A
        half_width = max(length_A / window_A, 2.0)
        last = box_px / 2
        # two periods in the window at least; half a band apart, ending at the last shell
        count = max(2, int(np.ceil((last - 2 * length_A / window_A) / (half_width / 2))) + 1)
        centres = np.linspace(min(2 * length_A / window_A, last / 2), last, count)
        sigma_A = window_A / FWHM
        volume = (4 * np.pi * sigma_A**2) ** 1.5  # (sum of the window)^2 over the sum of its square
        # of powers h^2, h the Hann function: (integral of h^2)^2 over that of h^4, which are 3/4 and 35/64 half widths
        width = half_width * 0.75**2 / (35 / 64) / length_A
        independent = volume * 4 * np.pi * (centres / length_A) ** 2 * width
        independent[-1] /= 2  # half of the last band lies beyond the last shell
        return cls(centres, half_width, sigma_A / pixel_size_A, independent)


def _local_fsc(fa: np.ndarray, fb: np.ndarray, box_px: int, bands: _Bands, k: int) -> np.ndarray:
    """(C, C, C) local FSC of one band on a grid that suffices for the window."""
    from scipy import fft

    reach = min(bands.centres[k] + bands.half_width, box_px / 2)
    passed = DIES_OUT * box_px / bands.sigma_px
    # products of frequencies up to `reach` fold back at this size onto no frequency that the window lets through
    size = fft.next_fast_len(int(np.ceil(2 * reach + passed)) + 1, real=True)
    a, b = (_filtered(spectrum, box_px, size, float(bands.centres[k]), bands.half_width) for spectrum in (fa, fb))
    across, power1, power2 = (_windowed(product, box_px, bands.sigma_px, passed) for product in (a * b, a * a, b * b))
    power = np.clip(power1, 0, None) * np.clip(power2, 0, None)
    return np.where(power > 0, across / np.sqrt(np.where(power > 0, power, 1)), 0.0)


def _filtered(spectrum: np.ndarray, box_px: int, size: int, centre: float, half_width: float) -> np.ndarray:
    """The part of a map in a band, on a grid of another size over the same box."""
    from scipy import fft

    last = min(int(np.floor(min(centre + half_width, box_px / 2))), (box_px - 1) // 2, (size - 1) // 2)
    low = np.arange(-last, last + 1)
    x = np.arange(last + 1)
    radius = np.sqrt(low[:, None, None] ** 2 + low[None, :, None] ** 2 + x[None, None, :] ** 2)
    near = np.abs(radius - centre) < half_width
    weight = np.where(near, np.cos(0.5 * np.pi * (radius - centre) / half_width) ** 2, 0).astype(np.float32)
    weight[radius > box_px / 2] = 0
    small = np.zeros((size, size, size // 2 + 1), np.complex64)
    small[np.ix_(low % size, low % size, x)] = spectrum[np.ix_(low % box_px, low % box_px, x)] * weight
    volume: np.ndarray = fft.irfftn(small, s=(size,) * 3, overwrite_x=True, workers=_workers())
    return volume


def _windowed(product: np.ndarray, box_px: int, sigma_px: float, passed: float) -> np.ndarray:
    """Convolution with the Gaussian window, on a coarse grid."""
    from scipy import fft

    spectrum = fft.rfftn(product, overwrite_x=True, workers=_workers())
    size = len(product)
    coarse = coarse_px(passed)
    last = min((coarse - 1) // 2, (size - 1) // 2)
    low, x = np.arange(-last, last + 1), np.arange(last + 1)
    radius2 = low[:, None, None] ** 2 + low[None, :, None] ** 2 + x[None, None, :] ** 2
    gaussian = np.exp(-2 * (np.pi * sigma_px / box_px) ** 2 * radius2)
    small = np.zeros((coarse, coarse, coarse // 2 + 1), np.complex128)
    small[np.ix_(low % coarse, low % coarse, x)] = spectrum[np.ix_(low % size, low % size, x)] * gaussian
    return np.asarray(fft.irfftn(small, s=(coarse,) * 3))


def coarse_px(passed: float) -> int:
    """Size of the grid that holds frequencies up to ``passed`` Fourier pixels."""
    from scipy import fft

    return int(fft.next_fast_len(2 * int(np.ceil(passed)) + 2, real=True))


def _workers() -> int:
    import torch

    return int(torch.get_num_threads())


def _first_crossing(curves: np.ndarray, least: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Frequency (in Fourier pixels) at which each local curve first falls below what it must exceed, linear between
    bands; the first band where it is already, the last where it never is."""
    excess = curves - least[:, None, None, None]
    below = excess < 0
    first = np.where(below.any(0), below.argmax(0), len(centres))
    at = np.clip(first, 1, len(centres) - 1)
    before, after = (np.take_along_axis(excess, i[None], 0)[0] for i in (at - 1, at))
    part = np.clip(before / np.where(before > after, before - after, 1), 0, 1)
    crossing = centres[at - 1] + part * (centres[at] - centres[at - 1])
    frequency: np.ndarray = np.where(first == 0, centres[0], np.where(first == len(centres), centres[-1], crossing))
    return frequency


def _interpolated(coarse: np.ndarray, box_px: int) -> np.ndarray:
    """From the periodic coarse grid onto the map's, linear."""
    from scipy.ndimage import map_coordinates

    along = np.arange(box_px) * (len(coarse) / box_px)
    places = np.meshgrid(along, along, along, indexing="ij", copy=False)
    fine: np.ndarray = map_coordinates(coarse, places, order=1, mode="grid-wrap", output=np.float32)
    return fine
