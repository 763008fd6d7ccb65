"""Radial filters and radial averages of images and volumes, odd and even boxes.

Functions take torch tensors or numpy arrays and return the same kind. Half-plane (``rfft``) layout as in fourier.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.shapes import require_box

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real, Shaped

Array = TypeVar("Array", Tensor, np.ndarray)


def as_tensor(array: Array) -> Tensor:
    """The array as a tensor, without a copy where possible; integers become float32."""
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.float()


def like(tensor: Tensor, array: Array) -> Array:
    """The tensor as the same kind as ``array``."""
    return tensor if isinstance(array, Tensor) else tensor.detach().cpu().numpy()


def radius_grid(box_px: int, dims: int, device: str | torch.device = "cpu") -> Float[Tensor, " ..."]:
    """Distance from zero frequency in Fourier pixels: (D, [D,] D//2+1) float64 for dims 2 or 3."""
    full = torch.fft.fftfreq(box_px, dtype=torch.float64, device=device) * box_px
    r2 = torch.arange(box_px // 2 + 1, dtype=torch.float64, device=device) ** 2
    for _ in range(dims - 1):
        r2 = full.reshape(-1, *[1] * r2.dim()) ** 2 + r2
    return r2.sqrt()


def shell_index(box_px: int, dims: int, device: str | torch.device = "cpu") -> Int[Tensor, " ..."]:
    """Nearest radial shell of every coefficient: (D, [D,] D//2+1) int64; corners lie beyond shell D//2."""
    return radius_grid(box_px, dims, device).round().long()


def friedel_weights(box_px: int, device: str | torch.device = "cpu") -> Float[Tensor, " {box_px}//2+1"]:
    """(D//2+1,) float64: how often a column of the half-plane occurs in the whole plane, 2 or 1."""
    weights = torch.full((box_px // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    weights[0] = 1
    if box_px % 2 == 0:
        weights[-1] = 1
    return weights


def radial_average(power: Real[Array, "... box columns"], dims: int = 2) -> Float[Array, "... columns"]:
    """Mean over each shell, every coefficient of the whole transform counted once.

    Args:
        power: (..., D, D//2+1) or, for dims=3, (..., D, D, D//2+1), real.
        dims: 2 or 3.

    Returns:
        (..., D//2+1) float64.
    """
    p = as_tensor(power).double()
    box = p.shape[-2]
    shells = shell_index(box, dims, p.device).reshape(-1)
    weights = friedel_weights(box, p.device).expand(p.shape[-dims:]).reshape(-1)
    flat = p.reshape(-1, len(shells)) * weights
    size = int(shells.max()) + 1
    total = torch.zeros(len(flat), size, dtype=p.dtype, device=p.device).index_add_(1, shells, flat)
    count = torch.zeros(size, dtype=p.dtype, device=p.device).index_add_(0, shells, weights)
    return like((total / count)[:, : box // 2 + 1].reshape(*p.shape[:-dims], box // 2 + 1), power)


def power_spectrum(array: Real[Array, "... box box"], dims: int | None = None) -> Float[Array, "... box//2+1"]:
    """Radially averaged power |F|^2 of orthonormal transforms: white noise of variance v gives v in every shell.

    Args:
        array: (..., D, D) images, or a (D, D, D) volume with dims=3.
        dims: 2 or 3.

    Returns:
        (..., D//2+1) float64.
    """
    dims = 2 if dims is None else dims
    require_box(array, dims)
    x = as_tensor(array)
    axes = tuple(range(-dims, 0))
    return like(radial_average(torch.fft.rfftn(x, dim=axes, norm="ortho").abs().square(), dims), array)


def apply_radial(
    array: Float[Array, "*batch box box"], curve: Float[np.ndarray, " m"] | Float[Tensor, " m"], dims: int = 3
) -> Float[Array, "*batch box box"]:
    """Multiplies the transform by a radial curve, interpolated linearly between shells, its last value beyond.

    Args:
        array: (..., D, D) or (..., D, D, D) real.
        curve: (m,) factor of shells 0, 1, ..., m-1.
        dims: 2 for images, 3 for volumes.

    Returns:
        Same shape and dtype.

    Raises:
        InputError: neither images nor volumes.
    """
    box = require_box(array, dims)
    x = as_tensor(array)
    values = torch.as_tensor(np.asarray(curve, np.float64) if not isinstance(curve, Tensor) else curve)
    values = values.to(x.device, x.dtype)
    radius = radius_grid(box, dims, x.device).clamp(max=len(values) - 1)
    low = radius.long().clamp(max=max(len(values) - 2, 0))
    share = (radius - low).to(x.dtype)
    high = (low + 1).clamp(max=len(values) - 1)
    return like(apply_transfer(x, values[low] * (1 - share) + values[high] * share, dims), array)


def apply_transfer(
    array: Float[Array, "*batch box box"], factor: Shaped[Tensor, "*#filter"], dims: int = 3
) -> Float[Array, "*batch box box"]:
    """Multiply the transform by a factor in half-plane layout that broadcasts; same shape and dtype as ``array``."""
    x = as_tensor(array)
    axes = tuple(range(-dims, 0))
    result = torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * factor, s=x.shape[-dims:], dim=axes)
    return like(result, array)


def lowpass_curve(
    box_px: int, pixel_size_A: float, resolution_A: float, edge_shells: float = 3.0
) -> Float[Tensor, " {box_px}//2+1"]:
    """(D//2+1,) float64: 1, then a raised cosine of this many shells to 0, centred on the resolution."""
    shells = torch.arange(box_px // 2 + 1, dtype=torch.float64)
    return _raised_cosine(shells, box_px * pixel_size_A / resolution_A, edge_shells)


def _raised_cosine(radius: Tensor, cut: float, edge: float) -> Tensor:
    t = ((radius - cut) / max(edge, 1e-6) + 0.5).clamp(0, 1)
    return 0.5 * (1 + torch.cos(torch.pi * t))


def lowpass(
    array: Float[Array, "*batch box box"],
    pixel_size_A: float,
    resolution_A: float,
    edge_shells: float = 3.0,
    dims: int = 3,
) -> Float[Array, "*batch box box"]:
    """Low-pass filter with a raised-cosine edge.

    Args:
        array: (..., D, D, D), or (..., D, D) with dims=2.
        pixel_size_A: Å.
        resolution_A: where the filter is one half.
        edge_shells: width of the edge in Fourier pixels.

    Returns:
        Same shape and dtype.

    Raises:
        InputError: neither images nor volumes.
    """
    box = require_box(array, dims)
    x = as_tensor(array)
    radius = radius_grid(box, dims, x.device)
    factor = _raised_cosine(radius, box * pixel_size_A / resolution_A, edge_shells)
    return like(apply_transfer(x, factor.to(x.dtype), dims), array)


def highpass(
    array: Float[Array, "*batch box box"],
    pixel_size_A: float,
    resolution_A: float,
    edge_shells: float = 3.0,
    dims: int = 3,
) -> Float[Array, "*batch box box"]:
    """The complement of :func:`lowpass`."""
    x = as_tensor(array)
    return like(x - lowpass(x, pixel_size_A, resolution_A, edge_shells, dims), array)


def apply_bfactor(
    array: Float[Array, "*batch box box"], pixel_size_A: float, bfactor_A2: float, dims: int = 3
) -> Float[Array, "*batch box box"]:
    """Multiplies the transform by exp(-B s^2 / 4): a positive B blurs, a negative one sharpens.

    Args:
        array: (..., D, D, D), or (..., D, D) with dims=2.
        pixel_size_A: Å.
        bfactor_A2: Å^2.

    Returns:
        Same shape and dtype.

    Raises:
        InputError: neither images nor volumes.
    """
    box = require_box(array, dims)
    x = as_tensor(array)
    s = radius_grid(box, dims, x.device) / (box * pixel_size_A)
    return like(apply_transfer(x, torch.exp(-0.25 * bfactor_A2 * s * s).to(x.dtype), dims), array)
