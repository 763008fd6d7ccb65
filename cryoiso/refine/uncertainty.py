"""How well each Fourier coefficient of a reference is known, for a likelihood that takes it into account.

A half-set's Wiener-filtered map passes the share a = w / (w + 1/tau^2) of a coefficient. Its mean squared error is that
of the shrinkage, (1 - a)^2 tau^2, and of the noise, a (1 - a) tau^2, of which only what lies inside the particle is
left in a reference without solvent. Where few views measured, the reference is near zero and its error near tau^2: an
image of such a view must not be punished for what the reference does not know.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryoiso.physics.fourier_sums import FourierSums


@dataclass(frozen=True)
class ReferenceVariance:
    """Mean squared error of the slices' coefficients on the unpadded half-space grid, zero beyond its radius."""

    grid: Tensor
    """(2n+1, 2n+1, n+1) float32 for (z, y, x), in the units of ``FourierVolume.slices`` squared."""

    def slices(self, rotation: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
        """Values of the nearest grid points: (R, K) for rotations (R, 3, 3) and frequencies (K,)."""
        n = self.grid.shape[2] - 1
        k = rotation[:, 0, :, None] * kx + rotation[:, 1, :, None] * ky
        k = torch.where(k[:, :1] < 0, -k, k).round().long()
        x, y, z = k[:, 0], k[:, 1] + n, k[:, 2] + n
        return self.grid[z, y, x]


MARGIN = 3
"""Empty shells around the grid: what a view's corner or a magnified image may reach."""


def error_variance(sums: FourierSums, wiener: Tensor, reference: np.ndarray) -> np.ndarray:
    """Mean squared error of a reference's coefficients.

    Args:
        sums: of the half-set. wiener: (>= radius+1,) the term that the reference was made with.
        reference: (D, D, D), zero in the solvent, which tells how much of the noise is left in it.

    Returns:
        (2r+1, 2r+1, r+1) float32 on the unpadded half-space grid, r the sums' radius; zero in shell 0.
    """
    share = sums.passed_shares(wiener).cpu().numpy()
    tau2 = sums.signal_power(wiener).cpu().numpy()
    tau2[0] = 0.0
    n = sums.radius_px
    axis = np.arange(-n, n + 1, dtype=np.float32)
    shell = np.rint(np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis[n:] ** 2)).astype(np.int32)
    inside = np.float32(np.mean(reference != 0))
    known = np.append(tau2, 0.0).astype(np.float32)[np.minimum(shell, n + 1)]
    return np.asarray(known * (1 - share) * (1 - share + inside * share), np.float32)


def reference_variance(error: np.ndarray, radius_px: int, device: str) -> ReferenceVariance:
    """What ``error_variance`` gave, on the grid of a search: zero beyond what was measured, where the reference holds
    nothing, and beyond the search."""
    n = (len(error) - 1) // 2
    m = min(radius_px, n)
    inner = error[n - m : n + m + 1, n - m : n + m + 1, : m + 1]
    edge = radius_px - m + MARGIN
    padded = np.pad(inner, ((edge, edge), (edge, edge), (0, edge)))
    return ReferenceVariance(torch.as_tensor(np.ascontiguousarray(padded, np.float32), device=device))
