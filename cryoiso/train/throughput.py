"""How much arithmetic a training does, beside what matrix products reach on the same device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

EDGE = {"cpu": 1024, "cuda": 8192}
REPEATS = 3
PASSES = 3
"""A backward pass has two products for each of the forward one."""


def training_flop(forward: Callable[[], Any]) -> int:
    """Floating-point operations of a forward pass and its backward pass: those of convolutions and matrix products.

    Args:
        forward: makes the forward pass once; it is called without gradients, and must not be compiled.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return PASSES * int(counter.get_total_flops())


@functools.cache
def product_tflops(device: str, bfloat16: bool) -> float:
    """TFLOP/s of the product of two large square matrices, the best of a few; float32 is TF32 on GPUs if that is on.

    Measured once in a process: a refinement with the correction in its loop trains in every iteration.
    """
    kind = torch.device(device).type
    edge = EDGE[kind]
    left, right = torch.randn(2, edge, edge, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)

    def now() -> float:
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    torch.mm(left, right)
    best = float("inf")
    for _ in range(REPEATS):
        start = now()
        torch.mm(left, right)
        best = min(best, now() - start)
    return 2 * edge**3 / max(best, 1e-9) / 1e12
