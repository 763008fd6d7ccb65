"""What a machine can do at best: memory traffic and products of matrices; and what the inner loops ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryoiso.pipeline.planning.rates import best_time

COPIED_FLOATS = 1 << 26
"""256 MiB: more than the caches hold."""
MATRIX_EDGE = {"cpu": 1024, "cuda": 8192}
BYTES, FLOPS, LOW_FLOPS = "GB/s", "GFLOP/s", "GFLOP/s in bfloat16"


@dataclass(frozen=True)
class Ceilings:
    """Of one device with the threads of this process."""

    memory: float
    """GB/s, reading and writing, of a copy of 256 MiB"""
    products: float
    """GFLOP/s of a product of float32 matrices (TF32 on GPUs, as the search uses)"""
    low_products: float
    """GFLOP/s of a product of bfloat16 matrices, as networks use them where the device is fast at it"""

    def of(self, kind: str) -> float:
        return {BYTES: self.memory, FLOPS: self.products, LOW_FLOPS: self.low_products}[kind]


def ceilings(device: str, limit_s: float = 0.5) -> Ceilings:
    """Measured now, about ``limit_s`` seconds each."""
    import torch

    from cryoiso.refine.likelihood import tensor_cores

    source, target = torch.ones(2, COPIED_FLOATS, device=device)
    moved = 8 * COPIED_FLOATS / best_time(lambda: target.copy_(source), device, limit_s)
    edge = MATRIX_EDGE[torch.device(device).type]
    left, right = torch.randn(2, edge, edge, device=device)

    def product() -> Any:
        with tensor_cores(left.device):
            return left @ right

    products = 2 * edge**3 / best_time(product, device, limit_s) / 1e9
    low_left, low_right = left.bfloat16(), right.bfloat16()
    low = 2 * edge**3 / best_time(lambda: low_left @ low_right, device, limit_s) / 1e9
    return Ceilings(moved / 1e9, products, low)


def demand(kernel: str, box_px: int, padding: int) -> tuple[float, str] | None:
    """What a unit of an inner loop needs at least, and of what; None where it is counted by :func:`flops_of`."""
    known = {
        "gemm": (1.0, FLOPS),
        # eight complex numbers of the reference; an image's own are shared by eight views and nine shifts
        "local": (64.0 + 12 / 8, BYTES),
        # eight voxels of three 64-bit integers, read and written
        "insert": (8 * 3 * 8 * 2.0, BYTES),
        # a Fourier transform of real numbers: 2.5 n log2 n
        "transform": (2.5 * 3 * math.log2(padding * box_px), FLOPS),
        "read": (2.5 * 2 * math.log2(box_px), FLOPS),
    }
    return known.get(kernel)


def flops_of(call: Callable[[], Any]) -> float:
    """Floating-point operations of the products and convolutions in a call, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())
