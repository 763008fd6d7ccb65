"""Whether a device computes what the reference computes: the inner loops on the same small input, both ways.

On a GPU its kernels are compared with those of the CPU; on a CPU the compiled kernels with plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BOX_PX, IMAGES, VIEWS = 32, 6, 8


@dataclass(frozen=True)
class KernelComparison:
    """Largest difference of one inner loop's results, as a share of the largest value."""

    kernel: str
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed  # False for NaN


def comparisons(device: str) -> list[KernelComparison]:
    """Slices, scores of the global and of the local search, and back-projection."""
    import torch

    from cryoiso.physics.backproject import SliceAccumulator
    from cryoiso.physics.fourier import fourier_disc
    from cryoiso.physics.projection import FourierVolume
    from cryoiso.physics.so3 import random_rotations
    from cryoiso.refine.likelihood import ReferenceSlices, Whitened, global_scores, local_scores, local_scores_torch

    g, on_cpu = torch.Generator().manual_seed(1), torch.device(device).type == "cpu"
    disc = fourier_disc(BOX_PX, BOX_PX // 2 - 1)
    volume = FourierVolume.from_volume(torch.randn(BOX_PX, BOX_PX, BOX_PX, generator=g))
    data = torch.randn(IMAGES, disc.size, dtype=torch.complex64, generator=g)
    white = Whitened(data, torch.rand(IMAGES, disc.size, generator=g), disc, None)
    rotation = torch.as_tensor(random_rotations(np.random.default_rng(1), IMAGES * VIEWS), dtype=torch.float32)
    row = torch.arange(IMAGES).repeat_interleave(VIEWS)
    shift = torch.randn(IMAGES, 2, generator=g).repeat_interleave(VIEWS, 0)
    there = Whitened(data.to(device), white.weight.to(device), disc, None)
    volume_there = FourierVolume(volume.grid.to(device), BOX_PX, volume.padding, volume.radius_px)
    row_there, rotation_there, shift_there = row.to(device), rotation.to(device), shift.to(device)
    if on_cpu:
        slices = volume.slices_torch(rotation, disc)
        scores = local_scores_torch(white, volume, row, rotation, shift, 0.5)
    else:
        slices = volume_there.slices(rotation_there, disc)
        scores = local_scores(there, volume_there, row_there, rotation_there, shift_there, 0.5, VIEWS)
    compared = [
        ("slices", slices, volume.slices(rotation, disc), 1e-5),
        ("local", scores, local_scores(white, volume, row, rotation, shift, 0.5), 1e-4),
    ]
    if not on_cpu:
        shifts, even = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
        here_scores, there_scores = (
            global_scores(w, ReferenceSlices.of(v, r, disc, None), shifts.to(r.device), even.to(r.device))
            for w, v, r in ((there, volume_there, rotation_there), (white, volume, rotation))
        )
        compared.append(("gemm", here_scores, there_scores, 2e-3))  # TF32
    here, elsewhere = SliceAccumulator.empty(BOX_PX), SliceAccumulator.empty(BOX_PX, device=device)
    here.insert(white.data, white.weight, rotation[::VIEWS], disc)
    insert = elsewhere.insert_torch if on_cpu else elsewhere.insert
    insert(there.data, there.weight, rotation_there[::VIEWS], disc)
    compared.append(("insert", elsewhere.grid, here.grid, 1e-5))
    return [
        KernelComparison(name, _difference(here_scores, there_scores), allowed)
        for name, here_scores, there_scores, allowed in compared
    ]


def _difference(first: Tensor, second: Tensor) -> float:
    first = first.cpu()
    return float((first - second).abs().max() / second.abs().max())
