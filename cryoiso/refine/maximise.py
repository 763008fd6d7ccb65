"""Sums of the maximisation step: back-projection of the posterior and residual power. Partial sums of this rank; the
reduction follows elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.fourier import Disc, disc
from cryoiso.physics.projection import FourierVolume
from cryoiso.refine.batches import Batch
from cryoiso.refine.intensity import ImageTerms
from cryoiso.refine.likelihood import Whitened, shift_factors, with_magnification
from cryoiso.refine.noise import floored
from cryoiso.refine.search import Posterior

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NOISE_UNIT = 2.0**24
"""Residual power and coefficient counts are summed in fixed point of this unit, exact in any order."""


@dataclass
class NoiseSums:
    """Sums for the noise spectra: (G, S) int64 of power and of coefficient counts, both in NOISE_UNIT.

    A coefficient counts 1, and c^2 in premultiplied images: sigma^2 = sum c^2 |x - model|^2 / sum c^2, which is sum |y
    - c model|^2 / sum c^2 of the images as they are. One of a masked image counts as much as is left of white noise.
    """

    power: Int[np.ndarray, "groups shells"]
    count: Int[np.ndarray, "groups shells"]

    @classmethod
    def empty(cls, n_groups: int, n_shells: int) -> NoiseSums:
        return cls(np.zeros((n_groups, n_shells), np.int64), np.zeros((n_groups, n_shells), np.int64))

    def add(self, batch: Batch, residual: Float[Tensor, "n k"]) -> None:
        """residual (B, K): |x - model|^2 of every coefficient."""
        weight = batch.power_weight()
        if weight is None:
            count = np.bincount(batch.where.shell, minlength=self.power.shape[1])[: self.power.shape[1]]
            if batch.share is not None:
                count = np.rint(count * batch.share * NOISE_UNIT).astype(np.int64)
                np.add.at(self.count, batch.group, count)
            else:
                np.add.at(self.count, batch.group, count * int(NOISE_UNIT))
        else:
            residual = residual * weight
            np.add.at(self.count, batch.group, self._by_shell(batch, weight))
        np.add.at(self.power, batch.group, self._by_shell(batch, residual))

    def _by_shell(self, batch: Batch, values: Tensor) -> np.ndarray:
        """(B, S) int64 sums of values (B, K) over shells."""
        shell = torch.as_tensor(batch.where.shell, device=values.device)
        size = self.power.shape[1]
        per_image = torch.zeros(len(values), size, dtype=torch.float64, device=values.device)
        per_image.index_add_(1, shell.clamp(max=size - 1), values.double())
        return (per_image * NOISE_UNIT).round().to(torch.int64).cpu().numpy()

    def spectra(self, previous: Float[np.ndarray, "groups shells"]) -> Float[np.ndarray, "groups shells"]:
        """(G, S) variances; shells without measurements keep the previous value, empty ones remain infinite."""
        value = self.power / NOISE_UNIT / np.where(self.count > 0, self.count / NOISE_UNIT, 1.0)
        measured = (self.count > 0) & (value > 0)
        return np.where(measured, floored(np.where(measured, value, previous), previous), previous)


def accumulate(
    batch: Batch,
    white: Whitened,
    posterior: Posterior,
    volume: FourierVolume,
    accumulator: SliceAccumulator,
    noise: NoiseSums,
    scale: float = 1.0,
    images: ImageTerms | None = None,
    scored: Batch | None = None,
) -> None:
    """Add a batch's posterior to the half-set's sums.

    Numerator sum_w w 2 x c exp(2 pi i k.s/D) / sigma^2, weight sum_w w 2 c^2 / sigma^2 (the factor 2 is common to
    both), each times ``scale`` (``noise.weight_scale``).

    Args:
        images: receives what the batch says of the images' intensities, if these are estimated.
        scored: the batch as it was searched, if masked: noise and intensities come from that.
    """
    accumulate_mixture(batch, white, [(posterior, volume, accumulator)], noise, scale, images, scored)


def accumulate_mixture(
    batch: Batch,
    white: Whitened,
    parts: Sequence[tuple[Posterior, FourierVolume, SliceAccumulator]],
    noise: NoiseSums,
    scale: float = 1.0,
    images: ImageTerms | None = None,
    scored: Batch | None = None,
) -> None:
    """The same for a posterior over several references, each with sums of its own.

    Args:
        parts: for each reference the samples with their weights, which sum to 1 an image over all references or to
            less, where an image may show nothing.
        images: as in ``accumulate``; with one reference only.
        scored: as in ``accumulate``.
    """
    scored = batch if scored is None else scored
    power = scored.coefficients.abs().square()
    means = []
    for posterior, volume, accumulator in parts:
        rows, weight = posterior.particle, posterior.weight[:, None]
        if not len(rows):
            continue
        back = shift_factors(batch.where, posterior.shift_px)
        rotation = with_magnification(posterior.rotation, batch.magnification)
        weight = weight * scale if scale != 1 else weight
        accumulator.insert(white.data[rows] * back * weight, white.weight[rows] * weight, rotation, batch.where)
        cross, norm = _model_terms(scored, posterior, volume, back, rotation)
        change = _posterior_mean(batch, posterior, norm - 2 * cross)
        power[:, : change.shape[1]] += change
        if images is not None and images.wanted:
            means.append((_posterior_mean(batch, posterior, cross), _posterior_mean(batch, posterior, norm)))
    noise.add(scored, power.clamp_(min=0))
    for cross_mean, norm_mean in means:
        if images is not None:
            images.add(scored, power, cross_mean, norm_mean)


def _model_terms(
    batch: Batch, posterior: Posterior, volume: FourierVolume, back: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor]:
    """Re conj(M) x and |M|^2 of every sample of the posterior, (R, k) each inside the reference's radius, with M = c P
    exp(-2 pi i k.s/D)."""
    inner, rows = _inside(batch, volume), posterior.particle
    slices = volume.slices(rotation, inner)
    k = inner.size
    model = slices * batch.ctf[rows, :k]
    cross = (model.conj() * batch.coefficients[rows, :k] * back[:, :k]).real
    return cross, model.abs().square()


def _posterior_mean(batch: Batch, posterior: Posterior, values: Tensor) -> Tensor:
    """(B, k) sums over each image's samples of values (R, k) times their weights."""
    total = torch.zeros(len(batch), values.shape[1], device=values.device)
    return total.index_add_(0, posterior.particle, posterior.weight[:, None] * values)


def _inside(batch: Batch, volume: FourierVolume) -> Disc:
    ratio = 1.0 if batch.magnification is None else float(np.linalg.norm(batch.magnification, 2))
    radius = min(volume.radius_px / ratio, batch.where.radius_px)
    return disc(batch.where.box_px, radius)
