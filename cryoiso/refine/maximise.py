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
from cryoiso.physics.fourier import Disc, fourier_disc
from cryoiso.physics.projection import FourierVolume, check_reach, flat_pairs, pairs
from cryoiso.refine.batches import Batch
from cryoiso.refine.intensity import ImageTerms
from cryoiso.refine.likelihood import Whitened, runs, shift_factors, with_magnification
from cryoiso.refine.noise import floored
from cryoiso.refine.own_shares import without_own
from cryoiso.refine.search import Posterior

if TYPE_CHECKING:
    from jaxtyping import Float, Int

COEFFICIENTS_AT_ONCE = 2**23
"""Largest number of coefficients prepared for back-projection at once, 12 B each."""
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
            count = np.bincount(batch.disc.shell, minlength=self.power.shape[1])[: self.power.shape[1]]
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
        shell = batch.disc.on(values.device).shell
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
    means: list[tuple[Tensor, Tensor, Tensor]] = []
    for posterior, volume, accumulator in parts:
        if not len(posterior.particle):
            continue
        _insert(batch, white, posterior, accumulator, scale)
        cross, norm = model_terms(scored, posterior, volume)
        power[:, : cross.shape[1]] += norm - 2 * cross
        if images is not None and images.wanted:
            means.append(_terms_of_images(scored, white, posterior, volume, images, cross, norm))
    noise.add(scored, power.clamp_(min=0))
    for cross_mean, norm_mean, own in means:
        if images is not None:
            shown = np.bincount(posterior.particle.cpu().numpy(), posterior.weight.double().cpu().numpy(), len(batch))
            k = own.shape[1]
            residual = torch.cat([power[:, :k] / (1 - own), power[:, k:]], 1) if k else power
            images.add(scored, residual, cross_mean, norm_mean, shown)


def _terms_of_images(
    batch: Batch, white: Whitened, posterior: Posterior, volume: FourierVolume, images: ImageTerms, cross: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Posterior means of Re conj(M) x and |M|^2 against the reference without the image, and of the image's own share
    in it: (B, k) each, the last (B, 0) where it has none."""
    if images.own is None:
        return cross, norm, torch.zeros(len(batch), 0, device=cross.device)
    disc = _inside(batch, volume)
    own = images.own(batch.rows, white, posterior, disc)
    square = batch.coefficients[posterior.particle, : disc.size].abs().square()
    terms = (*without_own(*_sample_terms(batch, posterior, volume), square, own), own)
    means = (_posterior_sum(batch, posterior, term) for term in terms)
    return next(means), next(means), next(means)


def _insert(batch: Batch, white: Whitened, posterior: Posterior, accumulator: SliceAccumulator, scale: float) -> None:
    """Back-project the samples of a posterior, a bounded number of coefficients at a time."""
    rotation = with_magnification(posterior.rotation, batch.magnification)
    factor = posterior.weight * scale if scale != 1 else posterior.weight
    step = max(1, COEFFICIENTS_AT_ONCE // batch.disc.size)
    for i in range(0, len(factor), step):
        part = slice(i, i + step)
        data, weight = weighed(batch.disc, white, posterior.particle[part], posterior.shift_px[part], factor[part])
        accumulator.insert(data, weight, rotation[part], batch.disc)


def weighed(disc: Disc, white: Whitened, rows: Tensor, shift_px: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Data and weight (R, K) of these rows, shifted to the centre and times ``factor`` (R,)."""
    if white.data.device.type != "cpu":
        back = shift_factors(disc, shift_px)
        return white.data[rows] * back * factor[:, None], white.weight[rows] * factor[:, None]
    from cryoiso.physics import _kernels

    data = torch.empty(len(rows), disc.size, dtype=torch.complex64)
    weight = torch.empty(len(rows), disc.size)
    shift = shift_px.double().numpy() * (2 * np.pi / disc.box_px)
    _kernels.centre_and_scale(
        pairs(white.data), white.weight.contiguous().numpy(), rows.numpy(), factor.float().numpy(), disc.ky, disc.kx,
        shift, pairs(data), weight.numpy(),
    )  # fmt: skip
    return data, weight


def model_terms(
    batch: Batch, posterior: Posterior, volume: FourierVolume
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Posterior sums of Re conj(M) x and |M|^2 of each image, (B, k) each inside the reference's radius, with M = c P
    exp(-2 pi i k.s/D)."""
    if batch.ctf.device.type != "cpu":
        return model_terms_torch(batch, posterior, volume)
    from cryoiso.physics import _patch_kernels

    disc = _inside(batch, volume)
    unit = 2 * np.pi / disc.box_px
    rotation = np.ascontiguousarray(with_magnification(posterior.rotation, batch.magnification).numpy(), np.float32)
    check_reach(rotation, disc, volume.padding, volume.grid.shape[0])
    member, frequency = disc.patches
    rows = posterior.particle.numpy()
    cross, norm = torch.zeros(len(batch), disc.size), torch.zeros(len(batch), disc.size)
    _patch_kernels.model_terms(
        flat_pairs(volume.grid), volume.grid.shape[0], rotation, member, frequency, np.float32(volume.padding),
        runs(rows), rows, pairs(batch.coefficients), batch.ctf.contiguous().numpy(),
        posterior.shift_px.double().numpy() * unit, posterior.weight.float().numpy(),
        disc.reach, cross.numpy(), norm.numpy(),
    )  # fmt: skip
    return cross, norm


def model_terms_torch(batch: Batch, posterior: Posterior, volume: FourierVolume) -> tuple[Tensor, Tensor]:
    """The plain torch version of the CPU kernel, for GPUs and as its reference."""
    cross, norm = _sample_terms(batch, posterior, volume)
    return _posterior_sum(batch, posterior, cross), _posterior_sum(batch, posterior, norm)


def _sample_terms(batch: Batch, posterior: Posterior, volume: FourierVolume) -> tuple[Tensor, Tensor]:
    """Re conj(M) x and |M|^2 of each sample of the posterior, (R, k) each inside the reference's radius."""
    inner, rows = _inside(batch, volume), posterior.particle
    back = shift_factors(inner, posterior.shift_px)
    slices = volume.slices(with_magnification(posterior.rotation, batch.magnification), inner)
    model = slices * batch.ctf[rows, : inner.size]
    return (model.conj() * batch.coefficients[rows, : inner.size] * back).real, model.abs().square()


def _posterior_sum(batch: Batch, posterior: Posterior, values: Tensor) -> Tensor:
    """Sum of values (R, k) of the samples, times their weights, of each image: (B, k)."""
    zero = torch.zeros(len(batch), values.shape[1], device=values.device)
    return zero.index_add(0, posterior.particle, posterior.weight[:, None] * values)


def _inside(batch: Batch, volume: FourierVolume) -> Disc:
    ratio = 1.0 if batch.magnification is None else float(np.linalg.norm(batch.magnification, 2))
    radius = min(volume.radius_px / ratio, batch.disc.radius_px)
    return fourier_disc(batch.disc.box_px, radius)
