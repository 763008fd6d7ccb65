"""Convolutions of volumes without an additive constant, in the form that each device computes fastest.

On a CPU torch leaves a small volume that is alone in its batch to convolutions that take five times as long as oneDNN's
(``use_mkldnn`` in its Convolution.cpp), unless it is in bfloat16. So one volume is convolved as a batch of two slabs,
and the gradient is put together from theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cryoiso.nets.channel_parts import convolved


def _in_slabs(x: Tensor, unit: int) -> bool:
    """Is this one volume on a CPU, not in bfloat16, whose lower and upper half are whole multiples of ``unit``?"""
    if len(x) != 1 or x.device.type != "cpu" or x.shape[2] % (2 * unit):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype != torch.bfloat16


def _stacked(slabs: Tensor) -> Tensor:
    """(2, C, d, h, w) -> (1, C, 2 d, h, w)."""
    return torch.cat(slabs.chunk(2), 2)


class _ThreesInSlabs(torch.autograd.Function):
    """3x3x3 convolution of one volume as two slabs that overlap by two planes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        padded = functional.pad(x, (0, 0, 0, 0, padding, padding)) if padding else x
        half = padded.shape[2] // 2 - 1
        slabs = torch.cat([padded[:, :, : half + 2], padded[:, :, half:]])
        ctx.save_for_backward(slabs, weight)
        ctx.padding = padding
        return _stacked(functional.conv3d(slabs, weight, padding=(0, padding, padding)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        slabs, weight = ctx.saved_tensors
        p, half, ones = ctx.padding, slabs.shape[2] - 2, [1, 1, 1]
        wanted = [*ctx.needs_input_grad[:2], False]
        of_slabs, of_weight, _ = torch.ops.aten.convolution_backward(
            torch.cat(gradient.chunk(2, 2)), slabs, weight, None, ones, [0, p, p], ones, False, [0, 0, 0], 1, wanted
        )
        if not wanted[0]:
            return None, of_weight, None
        low, high = of_slabs.chunk(2)
        shared = low[:, :, half:] + high[:, :, :2]
        return torch.cat([low[:, :, p:half], shared, high[:, :, 2 : half + 2 - p]], 2), of_weight, None


class Same(nn.Conv3d):
    """3x3x3, to the same size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, *parts: Tensor, padding: int = 1) -> Tensor:
        """
        Args:
            parts: the input, (B, inputs, d, h, w), or several tensors with its channels divided among them.
            padding: 0 leaves out the outermost voxels: (B, outputs, d - 2, h - 2, w - 2).
        """
        return convolved(parts, self.weight, None, lambda part, weight, _: _threes(part, weight, padding))


def _threes(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    if not _in_slabs(x, 1):
        return functional.conv3d(x, weight, padding=padding)
    sums: Tensor = _ThreesInSlabs.apply(x, weight, padding)  # type: ignore[no-untyped-call]
    return sums


class Halve(nn.Conv3d):
    """2x2x2, to half the edge."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _stacked(super().forward(torch.cat(x.chunk(2, 2)))) if _in_slabs(x, 2) else super().forward(x)


class Double(nn.ConvTranspose3d):
    """2x2x2, to twice the edge."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no output_size
        return _stacked(super().forward(torch.cat(x.chunk(2, 2)))) if _in_slabs(x, 1) else super().forward(x)
