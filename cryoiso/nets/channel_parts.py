"""Convolutions of what comes as several tensors, with the channels divided among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
