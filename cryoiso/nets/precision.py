"""Which numbers networks compute with fastest on a device."""

from __future__ import annotations

import torch


def fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware.

    GPUs since 2020, and CPUs with AMX (5 times as fast as float32) or AVX-512 BF16 (twice).
    """
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
