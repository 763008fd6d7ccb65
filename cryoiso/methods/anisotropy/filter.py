"""The filter A that says how well each Fourier coefficient was measured: from a missing cone, and on other grids.

A is (D, D, D) float32 in [0, 1], centre D//2, A(-k) = A(k). Planes at Nyquist of an even box, which have no mate in the
array, are their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Real


def coordinates(box_px: int) -> np.ndarray:
    """(D,) Fourier coordinates in cycles a box, centre D//2."""
    return np.arange(box_px) - box_px // 2


def radii(box_px: int) -> np.ndarray:
    """(D, D, D) float32 distance from zero frequency."""
    k2 = coordinates(box_px).astype(np.float32) ** 2
    radius: np.ndarray = np.sqrt(k2[:, None, None] + k2[None, :, None] + k2)
    return radius


def missing_cone(
    box_px: int, half_angle_deg: float, axis: tuple[float, float, float] = (0.0, 0.0, 1.0)
) -> Float[np.ndarray, "{box_px} {box_px} {box_px}"]:
    """1 where a double cone about an axis leaves something, 0 inside; an edge of one Fourier pixel; 1 at zero.

    Args:
        box_px: D.
        half_angle_deg: from the axis: no coefficient closer to it was measured (as ``physics.views``' missing-cone).
        axis: (x, y, z), any length.

    Returns:
        (D, D, D) float32.

    Raises:
        InputError: an angle outside 0 to 90 degrees, or no axis.
    """
    length = float(np.linalg.norm(axis))
    if not 0 < half_angle_deg < 90 or length == 0:
        raise InputError("impossible missing cone", expected="0 < half angle < 90 degrees and an axis that is not zero",
                         found=f"{half_angle_deg:g} degrees about {axis}", code="option-out-of-range")  # fmt: skip
    x, y, z = np.asarray(axis, np.float64) / length
    k = coordinates(box_px)
    radius = radii(box_px)
    along = np.abs(z * k[:, None, None] + y * k[None, :, None] + x * k)
    across = np.sqrt(np.maximum(radius**2 - along**2, 0))
    angle = np.radians(half_angle_deg)
    outside_px = across * np.cos(angle) - along * np.sin(angle)  # signed distance from the cone's surface
    cone = np.clip(outside_px + 0.5, 0, 1)
    cone[(box_px // 2,) * 3] = 1.0
    weights: np.ndarray = cone.astype(np.float32)
    return weights


def checked(fsc_filter: np.ndarray, box_px: int, file: object = None) -> np.ndarray:
    """The filter, clipped to [0, 1] and made exactly Friedel-symmetric.

    Raises:
        InputError: another box, not finite, far outside [0, 1], not symmetric, or empty.
    """
    a = np.asarray(fsc_filter, np.float32)
    if a.shape != (box_px,) * 3:
        raise InputError(
            "the filter has another box than the map",
            file=file,
            expected=(box_px,) * 3,
            found=a.shape,
            code="box-mismatch",
        )
    if not np.isfinite(a).all() or a.max() > 1.01 or a.max() <= 0:
        raise InputError("the filter has weights outside 0 to 1", file=file, expected="values from 0 to 1",
                         found=f"{a.min():g} to {a.max():g}", code="filter-invalid")  # fmt: skip
    mate = friedel_mate(a)
    if float(np.abs(a - mate).mean()) > 0.02:
        raise InputError(
            "the filter is not symmetric about zero frequency", file=file,
            expected=f"A(-k) = A(k) about voxel {box_px // 2}", hint="Centre it at voxel D//2.", code="filter-invalid",
        )  # fmt: skip
    symmetric: np.ndarray = np.clip(0.5 * (a + mate), 0, 1)
    return symmetric


def friedel_mate(a: np.ndarray) -> np.ndarray:
    """A(-k) on the same grid; in even boxes plane 0 (Nyquist) is its own mirror plane."""
    mate = a[::-1, ::-1, ::-1]
    return np.roll(mate, 1, (0, 1, 2)) if a.shape[0] % 2 == 0 else mate


def on_grid(
    fsc_filter: Float[np.ndarray, "box box box"], box_px: int
) -> Float[np.ndarray, "{box_px} {box_px} {box_px}"]:
    """The filter at the frequencies of another box of the same pixel size.

    Its point-spread function is cut to the new box with a triangular window, which is a convolution of the filter with
    a positive kernel (Fejér): it stays within [0, 1], centred and symmetric. In a larger box the point-spread function
    is surrounded by zeros.

    Args:
        fsc_filter: (D, D, D).
        box_px: C.

    Returns:
        (C, C, C) float32.
    """
    box, new = fsc_filter.shape[0], box_px
    if new == box:
        return np.asarray(fsc_filter, np.float32)
    spread = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(fsc_filter)).real)
    window = np.clip(1 - np.abs(coordinates(box)) / (min(new, box) / 2 + 0.5), 0, 1)
    spread *= window[:, None, None] * window[None, :, None] * window
    keep = np.arange(-(min(new, box) // 2), (min(new, box) - 1) // 2 + 1)
    small = np.zeros((new,) * 3)
    small[np.ix_(*[keep + new // 2] * 3)] = spread[np.ix_(*[keep + box // 2] * 3)]
    out = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(small)).real)
    symmetric: np.ndarray = np.clip(0.5 * (out + friedel_mate(out)), 0, 1).astype(np.float32)
    return symmetric


def seen_shells(curve: np.ndarray, share: float = 1.0) -> int:
    """Last shell up to which two half-maps agree beyond chance in every shell; 0: not even in the first.

    The FSC of noise scatters by 1 / sqrt(2 n) about zero, n the pairs of coefficients of a shell, of which a mask
    leaves about its share of the box independent. More than three of these count, but never more than 0.9: the coarsest
    shells have too few coefficients for such a test.

    Args:
        curve: (D//2+1,) FSC of the half-maps.
        share: of the box that the mask leaves.
    """
    voxels = 4 * np.pi * np.maximum(np.arange(len(curve)), 0.5) ** 2
    chance = 3 / np.sqrt(np.maximum(voxels * share, 1e-9))  # 2 n = voxels: each pair stands twice in the shell
    below = np.flatnonzero(np.nan_to_num(curve[1:], nan=-1.0) < np.minimum(chance[1:], 0.9))
    return int(below[0]) if len(below) else len(curve) - 1


def nothing_beyond(fsc_filter: Float[np.ndarray, "box box box"], shell: int) -> Float[np.ndarray, "box box box"]:
    """The filter, 1 beyond a shell (an edge of one shell): what lies there stays as it is, nothing is inferred."""
    beyond = np.clip(radii(fsc_filter.shape[0]) - shell, 0, 1)
    filled: np.ndarray = np.maximum(fsc_filter, beyond).astype(np.float32)
    return filled


def half_layout(fsc_filter: np.ndarray) -> Tensor:
    """(D, D, D) centred -> (D, D, D//2+1) float32 in the layout of ``rfftn``."""
    box = fsc_filter.shape[0]
    return torch.from_numpy(np.ascontiguousarray(np.fft.ifftshift(fsc_filter)[..., : box // 2 + 1], np.float32))


def band(box_px: int, pixel_size_A: float, resolution_A: float | None) -> np.ndarray:
    """(D, D, D) float32: 1 up to a resolution, a raised cosine of three shells centred on it, 0 beyond; None: all 1."""
    if resolution_A is None:
        return np.ones((box_px,) * 3, np.float32)
    t = np.clip((radii(box_px) - box_px * pixel_size_A / resolution_A) / 3.0 + 0.5, 0, 1)
    return (0.5 * (1 + np.cos(np.pi * t))).astype(np.float32)


def filtered(
    data: Real[np.ndarray, "box box box"], fsc_filter: Float[np.ndarray, "box box box"]
) -> Float[np.ndarray, "box box box"]:
    """The map with its Fourier coefficients multiplied by a centred filter of the same box: (D, D, D) float32."""
    from scipy import fft

    half = np.fft.ifftshift(fsc_filter)[..., : data.shape[-1] // 2 + 1]
    filtered: np.ndarray = fft.irfftn(fft.rfftn(np.asarray(data, np.float32)) * half, s=data.shape).astype(np.float32)
    return filtered
