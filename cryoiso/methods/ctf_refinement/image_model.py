"""Grey scale of the references and noise spectra of the images: all that the likelihood needs besides the CTF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.types import HALVES, OpticsGroup
from cryoiso.methods.ctf_refinement.image_pass import ImagePass, Observed
from cryoiso.methods.ctf_refinement.reference import COARSEST_A
from cryoiso.refine.noise import mean_spectra

if TYPE_CHECKING:
    from jaxtyping import Float

LEAST_SIGNIFICANCE = 5.0
"""A grey scale below this many standard deviations means that images and reference have nothing in common."""
UNIT = 2.0**24
"""Sums over images are kept in fixed point, so that they are the same on any number of ranks."""


@dataclass(frozen=True)
class ImageModel:
    """x = a c P + n, noise of variance sigma^2 per coefficient."""

    scale: dict[int, float]
    """Half -> a."""
    scale_error: dict[int, float]
    sigma2: Float[np.ndarray, "groups shells"]

    def whitened(self, block: Observed) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
        """(B, K) each: 2 a Re(P* x) / sigma^2 and 2 a^2 |P|^2 / sigma^2, zero coarser than COARSEST_A; the
        log-likelihood of a CTF c is sum(first c - second c^2 / 2) over Friedel pairs."""
        disc, a = block.batch.disc, self.scale[block.half]
        shell = np.minimum(disc.shell, self.sigma2.shape[1] - 1)
        fy, fx = block.frequencies()
        used = ((fy * fy + fx * fx) >= COARSEST_A**-2).numpy()
        inverse = torch.as_tensor((2.0 / self.sigma2[block.batch.group])[:, shell] * used)
        cross = (block.slices.conj() * block.data).real.double() * (a * inverse)
        power = block.slices.abs().square().double() * (a * a * inverse)
        return cross, power

    def facts(self) -> dict[str, float]:
        return {f"half{half}": value for half, value in self.scale.items()}


@dataclass
class ShellSums:
    """Sums over images by half, optics group and shell, in UNIT: |x|^2, Re((c P)* x), |c P|^2, count."""

    values: np.ndarray

    @classmethod
    def empty(cls, groups: int, shells: int) -> ShellSums:
        return cls(np.zeros((4, len(HALVES), groups, shells), np.int64))

    def add(self, block: Observed) -> None:
        """Add a block of images."""
        model = block.slices * block.batch.ctf
        parts = (block.data.abs().square(), (model.conj() * block.data).real, model.abs().square())
        shell = torch.as_tensor(np.minimum(block.batch.disc.shell, self.values.shape[-1] - 1))
        for k, part in enumerate((*parts, torch.ones_like(parts[0]))):
            each = torch.zeros(len(part), self.values.shape[-1], dtype=torch.float64)
            each.index_add_(1, shell, part.double())
            fixed = (each * UNIT).round().to(torch.int64).numpy()
            np.add.at(self.values[k, block.half - 1], block.batch.group, fixed)


def measured_model(images: ImagePass, *, require_match: bool = True) -> ImageModel:
    """Grey scale of each half by least squares, weighted by the images' power, and the mean residual power of each
    optics group and shell (collective).

    Args:
        require_match: refuse a reference that does not correlate with the images.

    Raises:
        InputError: images without power, or a reference that does not fit them.
    """
    groups = images.particles.groups
    sums = ShellSums.empty(len(groups), images.reader.source.box_px // 2 + 1)
    images.each("grey scale and noise", sums.add)
    power, cross, square, count = images.comm.sum_all(sums.values) / UNIT
    total = mean_spectra(power.sum(0), count.sum(0), groups)
    fine = _fine_shells(groups, images.reader.source.box_px)
    scale, error = _scales(cross, square, np.where(fine, 1.0 / total, 0.0))
    for half in HALVES if require_match else ():
        if count[half - 1].any() and scale[half] < LEAST_SIGNIFICANCE * error[half]:
            raise InputError(
                f"the images of half-set {half} do not correlate with their reference",
                expected=f"a grey scale above {LEAST_SIGNIFICANCE:g} standard deviations",
                found=f"{scale[half]:.3g} ± {error[half]:.3g}",
                hint="Are these the poses and the symmetry of this map, and is protein white in it (--invert)?",
            code="reference-does-not-match-images")  # fmt: skip
    a = np.array([scale[h] for h in HALVES])[:, None, None]
    residual = (power - 2 * a * cross + a * a * square).sum(0)
    sigma2 = mean_spectra(residual, count.sum(0), groups)
    return ImageModel(scale, error, np.where(np.isinf(total), np.inf, sigma2))


def _scales(cross: np.ndarray, square: np.ndarray, weight: np.ndarray) -> tuple[dict[int, float], dict[int, float]]:
    scale, error = {}, {}
    for i, half in enumerate(HALVES):
        information = float((weight * square[i]).sum())
        scale[half] = float((weight * cross[i]).sum()) / information if information > 0 else 0.0
        error[half] = float(np.sqrt(0.5 / information)) if information > 0 else 0.0
    return scale, error


def _fine_shells(groups: Sequence[OpticsGroup], box_px: int) -> np.ndarray:
    """(G, S) bool: shells that are not coarser than COARSEST_A."""
    lengths_A = np.array([box_px * g.pixel_size_A for g in groups])
    fine: np.ndarray = np.arange(box_px // 2 + 1)[None, :] >= lengths_A[:, None] / COARSEST_A
    return fine
