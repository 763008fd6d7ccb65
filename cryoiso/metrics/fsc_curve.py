"""Fourier shell correlation of two maps, the resolution read from it, and its correction for the mask.

Shell k holds the Fourier coefficients whose index length rounds to k, k = 0..D//2; its frequency is k / (D * pixel).
Sums over a shell count the half-complex transform of a real map twice except for its self-conjugate planes, so that odd
and even boxes give what the full transform gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Complex, Float, Real

Select = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Called with (kz, ky, kx, |k|) of a slab of coefficients, broadcastable; returns the weight (or a bool) of each."""


def check_pair(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> int:
    """Box size of two maps that must have one cubic shape (D, D, D).

    Raises:
        InputError: shapes differ or are not cubic.
    """
    for name, other in (("the other map", b), ("the mask", mask)):
        if other is not None and np.shape(other) != np.shape(a):
            raise InputError(
                f"{name} has another shape than the map",
                expected=np.shape(a),
                found=np.shape(other),
                code="arrays-do-not-fit",
            )
    if np.ndim(a) != 3 or len(set(np.shape(a))) != 1:
        raise InputError("the map is not cubic", expected="(D, D, D)", found=np.shape(a), code="map-not-cubic")
    return int(np.shape(a)[0])


def require_transforms(fa: np.ndarray, fb: np.ndarray, box_px: int) -> None:
    """Makes sure that both are half-complex transforms of maps of this box, see `transform`.

    Raises:
        InputError: one has another shape.
    """
    expected = (box_px, box_px, box_px // 2 + 1)
    for spectrum in (fa, fb):
        if np.shape(spectrum) != expected:
            raise InputError(
                "no transform of a map of this box",
                expected=expected,
                found=np.shape(spectrum),
                code="arrays-do-not-fit",
            )


def transform(
    volume: Real[np.ndarray, "box box box"], mask: Real[np.ndarray, "box box box"] | None = None
) -> Complex[np.ndarray, "box box box//2+1"]:
    """Half-complex transform (D, D, D//2+1) of a real map, in the map's own precision; its origin is irrelevant."""
    from scipy import fft

    volume = np.asarray(volume)
    if volume.dtype not in (np.float32, np.float64):
        volume = volume.astype(np.float64)
    coefficients: np.ndarray = fft.rfftn(volume if mask is None else volume * np.asarray(mask, volume.dtype))
    return coefficients


def shell_correlation(
    fa: Complex[np.ndarray, "box box box//2+1"],
    fb: Complex[np.ndarray, "box box box//2+1"],
    box_px: int,
    select: Select | None = None,
) -> Float[np.ndarray, " box//2+1"]:
    """Sum Re(A conj B) / sqrt(sum |A|^2 sum |B|^2) over each shell of two half-complex transforms.

    Args:
        fa, fb: (D, D, D//2+1) complex, from `transform`.
        box_px: D, which the half-complex shape alone does not tell.
        select: weight of every coefficient, e.g. a cone; None takes all.

    Returns:
        (D//2+1,) float64; 0 where a shell is empty or has no power, and 1 at shell 0 (see `fsc`).

    Raises:
        InputError: the transforms are not those of maps of this box.
    """
    require_transforms(fa, fb, box_px)
    half = box_px // 2
    k = np.fft.fftfreq(box_px) * box_px
    ky, kx = k[None, :, None], np.arange(half + 1.0)[None, None, :]
    double = np.where((kx == 0) | ((box_px % 2 == 0) & (kx == half)), 1.0, 2.0)
    sums = np.zeros((3, half + 1))
    step = max(1, 2**21 // (box_px * (half + 1)))
    for start in range(0, box_px, step):
        kz = k[start : start + step, None, None]
        radius = np.sqrt(kz**2 + ky**2 + kx**2)
        shell = np.rint(radius).astype(np.intp)
        keep = shell <= half
        weight = np.broadcast_to(double, shell.shape)
        if select is not None:
            weight = weight * select(kz, ky, kx, radius)
        a, b, index, w = fa[start : start + step][keep], fb[start : start + step][keep], shell[keep], weight[keep]
        for row, values in enumerate((a.real * b.real + a.imag * b.imag, _power(a), _power(b))):
            sums[row] += np.bincount(index, w * values, minlength=half + 1)
    curve = np.zeros(half + 1)
    power = np.sqrt(sums[1] * sums[2])
    np.divide(sums[0], power, out=curve, where=power > 0)
    curve[0] = 1.0
    return curve


def _power(x: np.ndarray) -> np.ndarray:
    power: np.ndarray = x.real**2 + x.imag**2
    return power


def fsc(
    a: Real[np.ndarray, "box box box"],
    b: Real[np.ndarray, "box box box"],
    mask: Real[np.ndarray, "box box box"] | None = None,
) -> Float[np.ndarray, " box//2+1"]:
    """Fourier shell correlation of two real maps (Harauz & van Heel 1986).

    Args:
        a, b: (D, D, D) maps on the same grid.
        mask: (D, D, D), multiplies both.

    Returns:
        (D//2+1,) float64. Shell 0 is a single number, the product of the two means, whose correlation is only a sign;
        it is set to 1.
    """
    box_px = check_pair(a, b, mask)
    return shell_correlation(transform(a, mask), transform(b, mask), box_px)


def shell_frequencies(box_px: int, pixel_size_A: float) -> Float[np.ndarray, " {box_px}//2+1"]:
    """(D//2+1,) spatial frequency of each shell in 1/Å."""
    return np.arange(box_px // 2 + 1) / (box_px * pixel_size_A)


def resolution_at(curve: Float[np.ndarray, " shells"], threshold: float, box_px: int, pixel_size_A: float) -> float:
    """Resolution in Å at which a curve first drops below a threshold, linear in frequency between shells.

    Args:
        curve: (D//2+1,) from `fsc`; shell 0 is ignored, NaN counts as below.
        threshold: 0.143 for independent half-maps (Rosenthal & Henderson 2003), 0.5 for a map against its truth.

    Returns:
        The box length in Å if the first shell is already below; the resolution of the last shell (in an even box
        Nyquist, two pixels) if no shell is.
    """
    curve = np.nan_to_num(np.asarray(curve, np.float64), nan=-1.0)
    length_A = float(box_px * pixel_size_A)
    below = np.flatnonzero(curve[1:] < threshold) + 1
    if len(below) == 0:
        return length_A / (len(curve) - 1)
    i = int(below[0])
    if i == 1:
        return length_A
    part = (curve[i - 1] - threshold) / (curve[i - 1] - curve[i])
    return length_A / (i - 1 + float(part))


def non_increasing(curve: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The non-increasing curve nearest in least squares (isotonic regression; Barlow & Brunk 1972).

    A dip or a spike of one noisy shell is pooled with its neighbours; a curve that only falls is unchanged.

    Args:
        curve: (n,), no NaN.

    Returns:
        (n,) float64, by the min-max formula min over a <= i of max over b >= i of the mean of curve[a..b].
    """
    curve = np.asarray(curve, np.float64)
    n = len(curve)
    total = np.concatenate([[0.0], np.cumsum(curve)])
    first, last = np.arange(n)[:, None], np.arange(n)[None, :]
    mean = np.where(last >= first, (total[None, 1:] - total[:-1, None]) / np.maximum(last - first + 1, 1), -np.inf)
    best = np.maximum.accumulate(mean[:, ::-1], axis=1)[:, ::-1]  # over b >= i, for each a
    best[np.tril_indices(n, -1)] = np.inf  # a > i
    lowest: np.ndarray = best.min(axis=0)
    return lowest


def smooth_resolution_at(
    curve: Float[np.ndarray, " shells"], threshold: float, box_px: int, pixel_size_A: float
) -> float:
    """`resolution_at` of the `non_increasing` curve: for curves of few coefficients, such as cones against a truth.

    The first crossing of such a curve jumps by many Å when one noisy shell falls below the threshold.

    Args:
        curve: (D//2+1,) from `cryoiso.metrics.mapmodel`; shell 0 is ignored, NaN counts as 0.
    """
    curve = np.nan_to_num(np.asarray(curve, np.float64), nan=0.0)
    return resolution_at(np.concatenate([curve[:1], non_increasing(curve[1:])]), threshold, box_px, pixel_size_A)


def curve_area(curve: Float[np.ndarray, " shells"]) -> float:
    """Mean of a curve (D//2+1,) over the shells from 1 to Nyquist: the area under it, 1 at most; NaN counts as 0."""
    return float(np.nan_to_num(np.asarray(curve, np.float64)[1:], nan=0.0).mean())


def randomise_phases(
    volume: Float[np.ndarray, "box box box"], from_shell: int, seed: int, uid: int = 0
) -> Float[np.ndarray, "box box box"]:
    """Replace the phases of a map by random ones from a shell on; amplitudes are unchanged, and the map remains real.

    Every coefficient is multiplied by the phase of the transform of real white noise, which has the Hermitian symmetry
    that independently drawn phases lack on the self-conjugate planes.

    Args:
        volume: (D, D, D).
        from_shell: first shell that is changed.
        seed, uid: of the counter-based generator; give the two half-maps different uids.

    Returns:
        (D, D, D) in the precision of ``volume``.
    """
    box_px = check_pair(volume, volume)
    k2 = (np.fft.fftfreq(box_px) * box_px) ** 2
    x2 = np.arange(box_px // 2 + 1.0) ** 2
    radius = np.sqrt(k2[:, None, None] + k2[None, :, None] + x2)
    return randomise_where(volume, np.rint(radius) >= max(from_shell, 1), seed, uid)


def randomise_where(
    volume: Float[np.ndarray, "box box box"], change: Bool[np.ndarray, "box box box//2+1"], seed: int, uid: int = 0
) -> Float[np.ndarray, "box box box"]:
    """As `randomise_phases`, for selected coefficients.

    Args:
        volume: (D, D, D). change: (D, D, D//2+1) bool, the same at k and -k.
    """
    from scipy import fft

    spectrum = transform(volume)
    dtype = spectrum.real.dtype.type
    noise = transform(generator(seed, "phase randomisation", uid).standard_normal(np.shape(volume), dtype=dtype))
    size = np.abs(noise)
    change = change & (size > 0)
    spectrum[change] *= noise[change] / size[change]
    density: np.ndarray = fft.irfftn(spectrum, s=np.shape(volume), overwrite_x=True)
    return density


NOTHING = 1e-11
"""Shells of a map with less than this share of its strongest shell's power hold rounding errors only."""


def last_filled_shell(a: Real[np.ndarray, "box box box"], b: Real[np.ndarray, "box box box"]) -> int:
    """Last shell in which both unmasked maps contain more than rounding errors (low-passed and padded maps end before
    D//2)."""
    from cryoiso.physics.filters import shell_index

    box_px = check_pair(a, b)
    shell = shell_index(box_px, 3).numpy().ravel()
    last = box_px // 2
    for volume in (a, b):
        total = np.bincount(shell, _power(transform(volume)).ravel())[: box_px // 2 + 1]
        mean = total / np.maximum(np.bincount(shell)[: box_px // 2 + 1], 1)
        filled = np.flatnonzero(mean > NOTHING * mean[1:].max())  # the mean of the map alone says nothing
        last = min(last, int(filled[-1])) if mean[1:].max() > 0 else 0
    return last


def without_shells_beyond(
    spectrum: Complex[np.ndarray, "box box box//2+1"], box_px: int, last: int
) -> Complex[np.ndarray, "box box box//2+1"]:
    """A half-complex transform (D, D, D//2+1) with zeros beyond a shell; itself where that is the last."""
    from cryoiso.physics.filters import shell_index

    if last >= box_px // 2:
        return spectrum
    return np.where(shell_index(box_px, 3).numpy() <= last, spectrum, 0).astype(spectrum.dtype)


def fsc_corrected(
    a: Real[np.ndarray, "box box box"],
    b: Real[np.ndarray, "box box box"],
    mask: Real[np.ndarray, "box box box"] | None,
    seed: int = 0,
) -> dict[str, Any]:
    """FSC of half-maps corrected for the mask (Chen et al. 2013, doi 10.1016/j.ultramic.2013.06.004).

    Phases of both maps are randomised, independently, from the first shell at which the unmasked FSC is below 0.8; the
    remaining correlation comes from the mask: corrected = (masked - randomised) / (1 - randomised) from two shells on.

    Args:
        a, b: (D, D, D) half-maps, not masked. mask: (D, D, D) in [0, 1]; None gives the unmasked curve four times.
        seed: of the random phases.

    Returns:
        ``unmasked``, ``masked``, ``randomised``, ``corrected``: (D//2+1,) each; ``randomise_from_shell``: int, or None
        where the unmasked FSC never falls below 0.8 (or there is no mask) and nothing was randomised. ``last_shell``:
        the last one with data; beyond it all curves are 0, since a mask would correlate leakage from the others there.
    """
    last = last_filled_shell(a, b)
    result = _fsc_corrected(a, b, mask, seed)
    if last < np.shape(a)[0] // 2:
        for name in ("unmasked", "masked", "randomised", "corrected"):
            result[name] = np.where(np.arange(len(result[name])) <= last, result[name], 0.0)
    return {**result, "last_shell": last}


def _fsc_corrected(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None, seed: int) -> dict[str, Any]:
    unmasked = fsc(a, b)
    result: dict[str, Any] = dict.fromkeys(("unmasked", "masked", "randomised", "corrected"), unmasked)
    result["randomise_from_shell"] = None
    if mask is None:
        return result
    result["masked"] = result["corrected"] = masked = fsc(a, b, mask)
    below = np.flatnonzero(unmasked[1:] < 0.8) + 1
    if len(below) == 0:
        result["randomised"] = np.zeros_like(masked)
        return result
    start = int(below[0])
    noise_curve = fsc(randomise_phases(a, start, seed, 1), randomise_phases(b, start, seed, 2), mask)
    corrected = masked.copy()
    beyond = slice(min(start + 2, len(masked)), None)
    spare = np.maximum(1 - noise_curve[beyond], 1e-6)
    corrected[beyond] = np.clip((masked[beyond] - noise_curve[beyond]) / spare, -1, 1)
    return {**result, "randomised": noise_curve, "corrected": corrected, "randomise_from_shell": start}
