"""Transforms between a volume (D, D, D) and the half-space of its padded transform, without the padded cube.

One axis after the other, keeping only the lines that hold density or are wanted: less than half of the work of a whole
transform. Slab by slab, so that beside input and result only the volume's half-transform, (D, D, D + 1) complex for a
padding of 2, and a slab are in memory: at 256 px and a padding of 2 the cube alone would be 0.5 GB, and the transform
needs four of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Complex, Float

SLAB = 1 << 22
"""Numbers of a slab."""


def to_half_space(volume: Float[Tensor, "box box box"], size: int, h: int) -> Complex[Tensor, "rows rows columns"]:
    """Transform of a volume whose centre is at D//2, padded with zeros to ``size``: (2h+1, 2h+1, h+1), origin at (h, h,
    0), zero beyond the transform.

    Where the volume needs no gradient.
    """
    box, device = volume.shape[0], volume.device
    reach = min(h, (size - 1) // 2)
    inner, kept = _inner(box, size, device), torch.arange(-reach, reach + 1, device=device) % size
    kind = torch.complex64 if volume.dtype == torch.float32 else torch.complex128
    half = torch.empty(box, box, reach + 1, dtype=kind, device=device)
    for z in _slabs(box, box * size):
        lines = torch.zeros(z.stop - z.start, box, size, dtype=volume.dtype, device=device)
        lines[:, :, inner] = volume[z]
        half[z] = torch.fft.rfft(lines, dim=2)[:, :, : reach + 1]
    result = torch.zeros(2 * h + 1, 2 * h + 1, h + 1, dtype=kind, device=device)
    filled = result[h - reach : h + reach + 1, h - reach : h + reach + 1]
    for x in _slabs(reach + 1, size * size):
        planes = torch.zeros(box, size, x.stop - x.start, dtype=kind, device=device)
        planes[:, inner] = half[:, :, x]
        part = torch.fft.fft(planes, dim=1)[:, kept]
        planes = torch.zeros(size, *part.shape[1:], dtype=kind, device=device)
        planes[inner] = part
        filled[:, :, x] = torch.fft.fft(planes, dim=0)[kept]
    return result


def to_volume(
    columns: Callable[[int, int], Tensor], count: int, box_px: int, size: int
) -> Float[Tensor, "{box_px} {box_px} {box_px}"]:
    """The inner (D, D, D), centre at D//2, of the inverse transform of (P, P, P//2+1).

    Args:
        columns: gives (P, P, last - first) of the transform, x from ``first`` to ``last``, its origin at index 0.
        count: of columns; zero beyond.
        size: P.
    """
    half, inner = None, None
    for x in _slabs(count, size * size):
        part = columns(x.start, x.stop)
        if half is None:
            half = torch.zeros(box_px, box_px, size // 2 + 1, dtype=part.dtype, device=part.device)
            inner = _inner(box_px, size, part.device)
        half[:, :, x] = torch.fft.ifft(torch.fft.ifft(part, dim=0)[inner], dim=1)[:, inner]
    assert half is not None
    volume = torch.empty(box_px, box_px, box_px, dtype=half.real.dtype, device=half.device)
    for z in _slabs(box_px, box_px * size):
        volume[z] = torch.fft.irfft(half[z], n=size, dim=2)[:, :, inner]
    return volume


def _inner(box_px: int, size: int, device: torch.device) -> Tensor:
    """(D,) places of a volume's planes in a padded cube whose origin is at index 0."""
    return (torch.arange(box_px, device=device) - box_px // 2) % size


def _slabs(count: int, numbers: int) -> Iterator[slice]:
    """Slices of ``count`` planes of so many numbers each."""
    step = max(1, SLAB // numbers)
    return (slice(i, min(i + step, count)) for i in range(0, count, step))
