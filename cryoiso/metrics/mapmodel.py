"""A map against a known map: FSC in all directions, along and across an axis; correlation; alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.metrics.fsc_curve import (
    Select,
    check_pair,
    curve_area,
    fsc,
    shell_correlation,
    smooth_resolution_at,
    transform,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Real, Shaped

Axis = tuple[float, float, float]
Z_AXIS: Axis = (0.0, 0.0, 1.0)


def cone_fsc(
    a: Real[np.ndarray, "box box box"],
    b: Real[np.ndarray, "box box box"],
    mask: Real[np.ndarray, "box box box"] | None = None,
    axis: Axis = Z_AXIS,
    half_angle_deg: float = 20.0,
    belt: bool = False,
) -> Float[np.ndarray, " box//2+1"]:
    """FSC over the coefficients in a double cone about an axis, or in the belt about the plane normal to it.

    Top views (along z) fill the belt of z and leave its cone empty: an anisotropic map is good in one and bad in the
    other.

    Args:
        a, b, mask: (D, D, D). axis: (x, y, z), any length.
        half_angle_deg: from the axis (cone) or from the plane (belt).

    Returns:
        (D//2+1,), 0 in shells with no coefficient in the cone, shell 0 set to 1.
    """
    box_px = check_pair(a, b, mask)
    return shell_correlation(transform(a, mask), transform(b, mask), box_px, _cone(axis, half_angle_deg, belt))


def _cone(axis: Axis, half_angle_deg: float, belt: bool) -> Select:
    x, y, z = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    angle = np.radians(half_angle_deg)

    def select(kz: np.ndarray, ky: np.ndarray, kx: np.ndarray, radius: np.ndarray) -> np.ndarray:
        cosine = np.abs(x * kx + y * ky + z * kz) / np.maximum(radius, 1e-9)
        inside: np.ndarray = cosine < np.sin(angle) if belt else cosine > np.cos(angle)
        return inside

    return select


def correlation(
    a: Real[np.ndarray, "box box box"],
    b: Real[np.ndarray, "box box box"],
    mask: Shaped[np.ndarray, "box box box"] | None = None,
) -> float:
    """Pearson correlation of two maps, multiplied by the mask, where that exceeds 0.1; NaN for a constant map."""
    check_pair(a, b, mask)
    if mask is None:
        x, y = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    else:
        where = np.asarray(mask) > 0.1
        x, y = ((np.asarray(v)[where] * np.asarray(mask)[where]).astype(np.float64) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else float("nan")


def truth_mask(truth: Real[np.ndarray, "box box box"], pixel_size_A: float) -> Float[np.ndarray, "box box box"]:
    """Soft mask of a noise-free map: above a tenth of its maximum after a 3 Å blur, extended by 6 Å, 8 Å cosine
    edge."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    smooth = gaussian_filter(np.asarray(truth, np.float32), 3.0 / pixel_size_A)
    distance_A = distance_transform_edt(smooth <= 0.1 * smooth.max()) * pixel_size_A
    part = np.clip((distance_A - 6.0) / 8.0, 0, 1)
    edge: np.ndarray = (0.5 * (1 + np.cos(np.pi * part))).astype(np.float32)
    return edge


def compare_maps(
    volume: Real[np.ndarray, "box box box"],
    truth: Real[np.ndarray, "box box box"],
    pixel_size_A: float,
    mask: Shaped[np.ndarray, "box box box"] | None = None,
    axis: Axis = Z_AXIS,
) -> dict[str, Any]:
    """All numbers of a map against the true one.

    Resolutions are where the non-increasing fit of a curve falls below 0.5: the cone about an axis holds so few
    coefficients that its curve dips and recovers, so its first crossing is not meaningful.

    Returns:
        ``fsc``, ``axial``, ``equatorial``: (D//2+1,) curves; ``resolution_05_A``, ``axial_A``, ``equatorial_A``;
        ``fsc_area``, ``axial_area``, ``equatorial_area``: means of the curves from shell 1 to Nyquist; ``correlation``.
    """
    box_px = check_pair(volume, truth, mask)
    fa, fb = transform(volume, mask), transform(truth, mask)
    curves = {
        "fsc": shell_correlation(fa, fb, box_px),
        "axial": shell_correlation(fa, fb, box_px, _cone(axis, 20.0, False)),
        "equatorial": shell_correlation(fa, fb, box_px, _cone(axis, 20.0, True)),
    }
    names = {"fsc": "resolution_05_A", "axial": "axial_A", "equatorial": "equatorial_A"}
    numbers = {names[k]: smooth_resolution_at(curve, 0.5, box_px, pixel_size_A) for k, curve in curves.items()}
    areas = {f"{k}_area": curve_area(curve) for k, curve in curves.items()}
    return {**curves, **numbers, **areas, "correlation": correlation(volume, truth, mask)}


def to_frame(
    volume: Real[np.ndarray, "box box box"],
    rotation: Float[np.ndarray, "3 3"],
    shift_A: Real[np.ndarray, " 3"],
    pixel_size_A: float,
) -> Float[np.ndarray, "box box box"]:
    """Transform a map to another frame: out(x) = volume(G x + d), the change of frame fitted by `pose_error`.

    Args:
        volume: (D, D, D), array (z, y, x), centre D//2. rotation: (3, 3) G on (x, y, z). shift_A: (3,) d.

    Returns:
        (D, D, D) float32. The shift is exact (phase ramp); the rotation a cubic spline on a grid of half the spacing
        (of the same spacing in boxes above 320 pixels).
    """
    from scipy import fft, ndimage

    box_px = check_pair(volume, volume)
    rotation = np.asarray(rotation, np.float64)
    spectrum = transform(np.asarray(volume, np.float32))
    k = np.fft.fftfreq(box_px)
    ramps = [k[:, None, None], k[None, :, None], np.arange(box_px // 2 + 1.0) / box_px]
    for ramp, shift_px in zip(ramps, np.asarray(shift_A)[::-1] / pixel_size_A, strict=True):
        spectrum *= np.exp(2j * np.pi * ramp * shift_px).astype(np.complex64)
    if np.allclose(rotation, np.eye(3), atol=1e-5):
        shifted: np.ndarray = fft.irfftn(spectrum, s=volume.shape)
        return shifted
    times = 2 if box_px <= 320 else 1  # a finer grid of a large box would take many gigabytes
    fine = _upsampled(spectrum, box_px) if times == 2 else fft.irfftn(spectrum, s=volume.shape)
    matrix = rotation[::-1, ::-1]  # on (z, y, x)
    centre = float(box_px // 2)
    offset = times * centre - times * matrix @ np.full(3, centre)
    shape = (box_px,) * 3
    placed: np.ndarray = ndimage.affine_transform(fine, times * matrix, offset, shape, np.float32, 3, "constant")
    return placed


def _upsampled(spectrum: np.ndarray, box_px: int) -> np.ndarray:
    """Map of twice the box on half the pixel from the half-complex transform of a map; voxel 2i is voxel i."""
    from scipy import fft

    big = np.zeros((2 * box_px, 2 * box_px, box_px + 1), spectrum.dtype)
    low = np.fft.fftfreq(box_px, 1 / box_px).astype(int)
    keep = np.flatnonzero(np.abs(low) < box_px / 2)
    to = low[keep] % (2 * box_px)
    columns = (box_px + 1) // 2
    big[np.ix_(to, to, np.arange(columns))] = spectrum[np.ix_(keep, keep, np.arange(columns))]
    doubled: np.ndarray = 8 * fft.irfftn(big, s=(2 * box_px,) * 3)
    return doubled


def best_slide(
    volume: Real[np.ndarray, "box box box"], truth: Real[np.ndarray, "box box box"], axis: Axis | None = None
) -> Real[np.ndarray, " 3"]:
    """Whole-voxel shift (x, y, z) of the map that correlates best with another; only along ``axis`` if given.

    The position of a map of Cn symmetry is undetermined along its axis, that of a C1 map in all directions.

    Args:
        volume, truth: (D, D, D). axis: one of the three coordinate axes, or None for all directions.

    Raises:
        InputError: an axis that is not x, y or z.
    """
    from scipy import fft

    box_px = check_pair(volume, truth)
    product = transform(np.asarray(volume, np.float32)) * np.conj(transform(np.asarray(truth, np.float32)))
    score = fft.irfftn(product, s=volume.shape)
    if axis is not None:
        unit = np.asarray(axis, np.float64)
        if np.count_nonzero(unit) != 1:
            raise InputError(
                "can only slide along a coordinate axis", expected="x, y or z", found=axis, code="option-out-of-range"
            )
        line = np.zeros(score.shape, bool)
        line[tuple(slice(None) if u else 0 for u in unit[::-1])] = True
        score = np.where(line, score, -np.inf)
    peak = np.array(np.unravel_index(int(score.argmax()), score.shape))
    return (np.where(peak > box_px // 2, peak - box_px, peak))[::-1]


__all__ = ["best_slide", "compare_maps", "cone_fsc", "correlation", "fsc", "to_frame", "truth_mask"]
