"""The share that an image has in its own reference, and its likelihood without that share.

An image that is part of a class's map matches that map better than others do, by its own noise: particles would stay
where they happened to be first. With x_i of weight w in a map N / (W + 1/tau^2), what the map holds at its coefficients
is c P = (1 - h) c P_{-i} + h x, h = kappa gamma w / (W + 1/tau^2): gamma is the image's posterior in that class, kappa
how much of a slice comes back where it was inserted. So x - c P_{-i} = (x - c P) / (1 - h), the residual of
leave-one-out cross-validation (Cook and Weisberg 1982), without making any map twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.rng import generator
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.fourier import fourier_disc
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.so3 import random_rotations
from cryoiso.refine.likelihood import Whitened, shift_factors, with_magnification

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PROBES = 4
MOST = 0.9
"""No share counts for more."""
NO_SHARE = np.float32(1e30)
"""Total weight where an image has no share."""


@dataclass(frozen=True)
class Leverage:
    """The own shares of a half-set's images in one reference."""

    total: FourierVolume
    """(W + 1/tau^2) / kappa, real."""
    share: Float[np.ndarray, " n"]
    """(N,) gamma of every particle in the sums that the reference was made of."""

    @classmethod
    def of(
        cls, total: Float[np.ndarray, "z y x"], share: Float[np.ndarray, " n"], box_px: int, padding: int, device: str
    ) -> Leverage:
        """
        Args:
            total: (2h+1, 2h+1, h+1), as ``total_weight`` makes it.
        """
        radius = ((len(total) - 1) // 2 - 2) // padding
        grid = torch.as_tensor(total, device=device).to(torch.complex64)
        return cls(FourierVolume(grid, box_px, padding, radius), share)

    def __call__(
        self, white: Whitened, rows: Int[np.ndarray, " b"], rotation: Float[Tensor, "b 3 3"]
    ) -> Float[Tensor, "b k"]:
        """(B, K) h of every coefficient of the particles ``rows`` at poses (B, 3, 3)."""
        gamma = torch.as_tensor(self.share[rows], dtype=torch.float32, device=white.weight.device)[:, None]
        slices = self.total.slices(with_magnification(rotation, white.magnification), white.disc).real
        return (gamma * white.weight / slices).clamp(0, MOST)


def score_without(
    white: Whitened, volume: FourierVolume, rotation: Float[Tensor, "b 3 3"], shift_px: Float[Tensor, "b 2"],
    own: Float[Tensor, "b k"] | None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:  # fmt: skip
    """As ``likelihood.score_and_norm``, against the reference without the image's own share.

    Args:
        own: (B, K) that share h; None: none.
    """
    slices = volume.slices(with_magnification(rotation, white.magnification), white.disc)
    norm = white.weight * slices.abs().square()
    cross = (slices.conj() * white.data * shift_factors(white.disc, shift_px)).real
    if own is None:
        return (cross - 0.5 * norm).sum(1), norm.sum(1)
    power = white.data.abs().square() / white.weight.clamp(min=1e-20)
    left = (power - 2 * cross + norm) / (1 - own).square()
    return 0.5 * (power - left).sum(1), norm.sum(1)


def noise_change(
    before: Float[np.ndarray, "groups shells"], after: Float[np.ndarray, "groups shells"]
) -> Float[np.ndarray, " shells"]:
    """(S,) ratio of two noise spectra, the mean over optics groups; 1 where a shell is empty."""
    held = np.isfinite(before) & np.isfinite(after)
    ratio = np.divide(before, after, out=np.ones_like(before), where=held & (after > 0))
    return np.asarray(ratio.mean(0))


def total_weight(
    sums: FourierSums, wiener: Float[Tensor, " shells"], shared: int, kappa: float, change: Float[np.ndarray, " s"]
) -> Float[np.ndarray, "z y x"]:
    """(2h+1, 2h+1, h+1) float32 (W + 1/tau^2) / kappa of a half-set's sums.

    Args:
        wiener: (radius+1,) 1/tau^2 of every shell.
        shared: up to this shell both halves have the mean of their sums, so that an image's own share is half.
        change: (S,) of ``noise_change``: the sums have the weights of the noise before, images are compared with that
            after.
    """
    shell = sums.shells().clamp(max=sums.radius_px)
    floor = sums.floor(True)
    weight = torch.maximum(sums.weight + wiener.to(sums.weight)[shell], floor[shell])
    weight = (
        weight * torch.as_tensor(change, dtype=weight.dtype, device=weight.device)[shell.clamp(max=len(change) - 1)]
    )
    return (torch.where(shell <= shared, 2 * weight, weight) / kappa).cpu().numpy().astype(np.float32)


def cropped(total: Float[np.ndarray, "z y x"], padding: int, radius_px: int) -> Float[np.ndarray, "pz py px"]:
    """The same for slices up to a radius only; beyond the data no image has a share."""
    have, want = (len(total) - 1) // 2, padding * radius_px + 2
    cut, more = max(have - want, 0), max(want - have, 0)
    inner = total[cut : len(total) - cut, cut : len(total) - cut, : total.shape[2] - cut]
    return np.pad(inner, ((more, more), (more, more), (0, more)), constant_values=NO_SHARE)


def own_response(box_px: int, radius_px: int, padding: int, mask: Float[np.ndarray, "d d d"], seed: int) -> float:
    """kappa: how much of a noise image is found in its own slice of the map made of it alone, with even weights.

    Interpolation spreads a coefficient over its neighbours, and the mask ((D, D, D), what references are multiplied by)
    does as well, so it is less than 1.
    """
    rng, disc = generator(seed, "probes of own shares"), fourier_disc(box_px, radius_px)
    rotation = torch.as_tensor(random_rotations(rng, PROBES), dtype=torch.float32)
    noise = rng.standard_normal((2, PROBES, disc.size)).astype(np.float32)
    images, response, power = torch.complex(*map(torch.as_tensor, noise)), 0.0, 0.0
    for i in range(PROBES):
        row = slice(i, i + 1)
        accumulator = SliceAccumulator.empty(box_px, radius_px, padding)
        accumulator.insert(images[row], torch.ones(1, disc.size), rotation[row], disc)
        sums = accumulator.finish()
        even = replace(sums, weight=torch.ones_like(sums.weight))
        volume = even.reconstruct() * torch.as_tensor(mask, dtype=torch.float32)
        back = FourierVolume.from_volume(volume, padding, radius_px).slices(rotation[row], disc)
        response += float((back.conj() * images[row]).real.double().sum())
        power += float(images[row].abs().square().double().sum())
    return response / power
