"""Launch of the Triton kernels, with plain torch where they cannot run.

Triton comes with torch's builds for CUDA and ROCm. A kernel is compiled at its first use (seconds) and kept in Triton's
own cache. Without Triton or the compiler that it needs, and for grids beyond 32-bit indices, plain torch does the same
with some twenty times the memory traffic; the log says which one runs.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryoiso.core.log import logger
from cryoiso.physics.fourier import Disc
from cryoiso.physics.projection import FourierVolume

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int

SCORE_BLOCK, SCORE_WARPS = 32, 8
"""Coefficients of a step, and warps: one for each of eight views."""
INSERT_BLOCK, INSERT_WARPS = 256, 4
LARGEST_GRID = 2**31
"""Elements that the kernels' 32-bit indices reach."""


@cache
def kernels(device_type: str) -> Any:
    """The module of kernels, or None where plain torch has to do; says so in the log once."""
    if device_type != "cuda":
        return None
    try:
        from cryoiso.physics import _triton_kernels
    except ImportError as error:
        logger.warning("local scores and back-projection run in plain torch, which is slower: %s", error)
        return None
    logger.info("local scores and back-projection run in Triton kernels")
    return _triton_kernels


@cache
def compiled(kernel: str, device_type: str) -> bool:
    """Whether a kernel works on this kind of device, by a tiny trial; a failure is logged and plain torch used."""
    module = kernels(device_type)
    if module is None:
        return False
    try:
        _trial(module, kernel, torch.device(device_type))
    except Exception as error:  # whatever a compiler or a driver raises: the other way of computing exists
        logger.warning("the kernel %s does not run here (%s), so plain torch does its work, more slowly", kernel, error)
        return False
    return True


def kernels_for(kernel: str, grid: Tensor) -> Any:
    """The module of kernels where this one works on the grid, else None: plain torch does its work."""
    usable = grid.device.type == "cuda" and grid.numel() < LARGEST_GRID and compiled(kernel, grid.device.type)
    return kernels(grid.device.type) if usable else None


def score_local(
    module: Any,
    volume: FourierVolume,
    disc: Disc,
    data: Complex[Tensor, "n k"],
    weight: Float[Tensor, "n k"],
    particle: Int[Tensor, " r"],
    rotation: Float[Tensor, "r 3 3"],
    shift_px: Float[Tensor, "r 2"],
    spacing_px: float,
    views: int,
) -> Float[Tensor, "r 9"]:
    """``refine.likelihood.local_scores`` by the kernel.

    Args:
        module: the kernels.
        views: consecutive rows that share particle and shift, a power of two; R is a multiple of it.
    """
    out = torch.empty(len(particle), 9, device=rotation.device)
    if not len(particle):
        return out
    there = disc.on(rotation.device)
    unit = 2 * torch.pi / disc.box_px
    along_x, along_y = spacing_px * unit * there.kx, spacing_px * unit * there.ky
    turns = torch.stack([along_x.cos(), along_x.sin(), along_y.cos(), along_y.sin()])
    module.score_local[(len(particle) // views,)](
        _whole(volume.grid), rotation.float().contiguous(), there.kx, there.ky, turns, particle.contiguous(),
        _whole(data), weight.contiguous(), shift_px.contiguous(), out, disc.size, (volume.grid.shape[0] - 1) // 2,
        float(volume.padding), unit, VIEWS=views, BLOCK=SCORE_BLOCK, num_warps=SCORE_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def insert_slices(
    module: Any,
    grid: Int[Tensor, "rows rows columns 3"],
    disc: Disc,
    data: Complex[Tensor, "n k"],
    weight: Float[Tensor, "n k"],
    rotation: Float[Tensor, "n 3 3"],
    padding: int,
    unit: float,
) -> None:
    """``physics.backproject.SliceAccumulator.insert`` by the kernel; adds to ``grid``."""
    there = disc.on(grid.device)
    blocks = -(-disc.size // INSERT_BLOCK)
    module.insert_slices[(len(data), blocks)](
        grid, rotation.float().contiguous(), there.kx, there.ky, _whole(data), weight.float().contiguous(), disc.size,
        (grid.shape[0] - 1) // 2, float(padding), unit, BLOCK=INSERT_BLOCK, num_warps=INSERT_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip


def _whole(values: Complex[Tensor, "*n"]) -> Int[Tensor, "*n 1"]:
    """Complex64 numbers as 64-bit integers, so that one load gets both parts."""
    return torch.view_as_real(values.to(torch.complex64).contiguous()).view(torch.int64)


def _trial(module: Any, kernel: str, device: torch.device) -> None:
    from cryoiso.physics.fourier import fourier_disc

    disc, turn = fourier_disc(8, 3), torch.eye(3, device=device).repeat(8, 1, 1)
    data = torch.ones(8, disc.size, dtype=torch.complex64, device=device)
    if kernel == "score_local":
        volume = FourierVolume.from_volume(torch.ones(8, 8, 8, device=device))
        row, shift = torch.zeros(8, dtype=torch.int64, device=device), torch.zeros(8, 2, device=device)
        score_local(module, volume, disc, data, data.real.contiguous(), row, turn, shift, 1.0, 8)
    else:
        grid = torch.zeros(17, 17, 9, 3, dtype=torch.int64, device=device)
        insert_slices(module, grid, disc, data, data.real, turn, 2, 1.0)
    torch.cuda.synchronize(device)
