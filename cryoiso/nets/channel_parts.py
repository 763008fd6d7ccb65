"""Convolutions of what comes as several tensors, with the channels divided among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def in_parts(x: Tensor) -> bool:
    """Whether the parts are convolved one by one and added up, on the device of ``x``.

    On CPUs: joining them costs more than adding what each contributes, the joined tensor is kept for the backward
    pass, and the gradient of a part of it is a view of every n-th number, on which arithmetic is slow. GPUs get few
    large convolutions.
    """
    return x.device.type == "cpu"


def convolved(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The sum of ``convolve(part, weights of its channels, bias)``, the same as of the joined parts but for rounding.

    Args:
        parts: (B, n_i, ...).
        weight: (outputs, sum of n_i, ...).
        bias: (outputs,), added once.
    """
    if len(parts) == 1 or not in_parts(parts[0]):
        return convolve(parts[0] if len(parts) == 1 else torch.cat(list(parts), 1), weight, bias)
    first, *others = weight.split([part.shape[1] for part in parts], 1)
    total = convolve(parts[0], first, bias)
    for part, own in zip(parts[1:], others, strict=True):
        total = total + convolve(part, own, None)
    return total


def pointwise_each(x: Tensor, weight: Tensor, bias: Tensor, width: int) -> list[Tensor]:
    """A 1 x 1 convolution whose outputs go apart, ``width`` channels each.

    On CPUs one by one, so that each is a tensor of its own and not every n-th number of a larger one.

    Args:
        x: (B, inputs, h, w) in channels_last order.
        weight, bias: (n width, inputs) and (n width,).
    """
    pixels = x.permute(0, 2, 3, 1)
    if not in_parts(x):
        return list(functional.linear(pixels, weight, bias).permute(0, 3, 1, 2).split(width, 1))
    own = zip(weight.split(width), bias.split(width), strict=True)
    return [functional.linear(pixels, w, b).permute(0, 3, 1, 2) for w, b in own]


def with_vector(maps: Tensor, vector: Tensor) -> Tensor:
    """(B, c, h, w) in channels_last order + (B, c).

    On CPUs by lines of the image: arithmetic on the few channels of one pixel after another takes eight times as long.
    """
    if not in_parts(maps):
        return maps + vector[:, :, None, None]
    n, c, h, w = maps.shape
    lines = maps.permute(0, 2, 3, 1).reshape(n, h, w * c) + vector.repeat(1, w)[:, None]
    return lines.view(n, h, w, c).permute(0, 3, 1, 2)
