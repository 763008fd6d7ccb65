"""The signal's power from RELION's arrays, where directions were measured unevenly.

RELION takes tau^2 = FSC / (1 - FSC) / mean(w) (Scheres 2012, doi 10.1016/j.jsb.2012.09.006). The FSC that it gives is
that of two quotients: data and weights are summed over the padding^3 points that lie nearest to a coefficient of the
unpadded grid, then divided. Their noise is 1 / (sum of the weights), so what that FSC sees is the mean of it over the
coefficients of a shell: tau^2 = FSC / (1 - FSC) * mean(1/w), many times larger for preferred views. Derived in
docs/formulas.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from cryoiso.engines.relion.external import FourierArrays, ReconstructionTask

LEAST_FSC, MOST_FSC = 0.001, 0.999
LEAST_WEIGHT = 1e-3
"""Share of a shell's mean weight below which a coefficient does not count as noisier, as in our own half-maps."""


def with_uneven_tau2(task: ReconstructionTask, arrays: FourierArrays) -> ReconstructionTask:
    """The task with tau^2 from this half's own weights and the FSC that RELION gives, times its tau2_fudge.

    Shells for which RELION has no prior, or that hold no weight, stay as they are. The joined reconstruction at the
    end has the weights of both halves: there the mean of 1/w is half of a half's, so the power of the same signal is
    2 FSC / (1 - FSC) * mean(1/w).
    """
    noise = noise_of_shells(task, arrays)
    fsc = np.clip(np.nan_to_num(task.fsc), LEAST_FSC, MOST_FSC)
    joined = 2.0 if task.name.half is None else 1.0
    tau2 = task.fudge * joined * fsc / (1 - fsc) * noise
    return replace(task, tau2=np.where((task.tau2 > 0) & (noise > 0), tau2, task.tau2))


def ratio(task: ReconstructionTask, tau2: np.ndarray) -> float:
    """Median over the shells of how many times these tau^2 are RELION's; 1 where it has none."""
    known = task.tau2 > 0
    return float(f"{np.median(tau2[known] / task.tau2[known]):.4g}") if known.any() else 1.0


def noise_of_shells(task: ReconstructionTask, arrays: FourierArrays) -> np.ndarray:
    """(D//2+1,) noise that the FSC sees in each shell: sum w f^2 / sum (w f)^2, f = 1 / max(w, floor), of the weights
    w summed onto the unpadded grid. 0 where there is none."""
    weight = summed(task, arrays)
    half = weight.shape[0] // 2
    k = torch.arange(-half, half + 1, dtype=torch.float64, device=weight.device)
    radius = (k[:, None, None].square() + k[None, :, None].square() + k[None, None, half:].square()).sqrt()
    shells = len(task.tau2)
    shell = (radius + 0.5).long().clamp(max=shells).reshape(-1)
    w = weight.reshape(-1)
    size = shells + 1
    mean = torch.bincount(shell, w, size) / torch.bincount(shell, minlength=size).clamp(min=1)
    f = 1 / torch.maximum(w, LEAST_WEIGHT * mean[shell]).clamp(min=1e-300)
    measured = w > 0
    noise = torch.bincount(shell[measured], (w * f * f)[measured], size)
    signal = torch.bincount(shell[measured], (w * f).square()[measured], size)
    noise_power = torch.where(signal > 0, noise / signal.clamp(min=1e-300), torch.zeros_like(signal))
    return np.asarray(noise_power[:shells].cpu())


def summed(task: ReconstructionTask, arrays: FourierArrays) -> torch.Tensor:
    """(m, m, m//2+1) float64 weights on the unpadded grid, zero frequency in the middle of all axes but the last: each
    the sum over the points of the padded grid that are nearest to it (half ways away from zero, as RELION rounds; like
    RELION without the Friedel mates of points beside the plane x = 0)."""
    n = arrays.weight.shape[0]
    k = torch.arange(n, device=arrays.weight.device)
    k = torch.where(k > n // 2, k - n, k).double()
    nearest = (k.sign() * (k.abs() / task.padding + 0.5).floor()).long()
    half = int(nearest.max())
    rows, columns = nearest + half, nearest[: n // 2 + 1]
    m = 2 * half + 1
    index = (rows[:, None, None] * m + rows[None, :, None]) * (half + 1) + columns[None, None, :]
    total = torch.bincount(index.reshape(-1), arrays.weight.reshape(-1), minlength=m * m * (half + 1))
    return total.reshape(m, m, half + 1)
