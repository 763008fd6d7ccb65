"""Log-likelihood of every image against a change of its defocus, from radial sums.

A change d of both defoci adds phi = pi lambda d s^2 to the CTF's phase, so c(d) = c cos(phi) + q sin(phi), q the CTF a
quarter of a turn later. Four radial sums per image give the log-likelihood at any d: sum over radii of A cos(phi) +
B sin(phi) + C cos(2 phi) + D sin(2 phi).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.types import Particles
from cryoiso.methods.ctf_refinement.image_model import ImageModel
from cryoiso.methods.ctf_refinement.image_pass import ImagePass, Observed
from cryoiso.physics.contrast_transfer import ctf_for, wavelength_A

if TYPE_CHECKING:
    from jaxtyping import Float

BIN_RAD = 0.05
"""Width of a radial bin in units of 2 phi at the end of the range: curves differ from those without bins by less than a
hundredth of their height."""


def quarter_turned(particles: Particles) -> Particles:
    """The same particles with the phase of their CTFs advanced by 90 degrees: their CTF is dc/d(phase)."""
    return replace(particles, phase_shift_deg=np.asarray(particles.phase_shift_deg, np.float64) + 90.0)


def derivative_of_ctf(turned: Particles, block: Observed) -> Float[Tensor, "n k"]:
    """(B, K) float32: dc/d(phase) of a block's images, from ``quarter_turned`` particles."""
    freq = block.batch.disc.frequencies(block.group.pixel_size_A)
    return ctf_for(turned, block.batch.rows, freq_invA=freq)


@dataclass(frozen=True)
class DefocusCurves:
    """Log-likelihoods of n particles relative to no change of defocus."""

    values: Float[np.ndarray, "n g"]
    fisher: Float[np.ndarray, " n"]
    """(n,) expected information at no change, 1/Å^2."""


def defocus_curves(images: ImagePass, model: ImageModel, grid: Float[np.ndarray, " g"]) -> DefocusCurves:
    """Curves of all particles, on every rank (collective).

    Args:
        grid: (g,) changes of defocus in Å.
    """
    turned = quarter_turned(images.particles)

    def work(block: Observed) -> np.ndarray:
        return block_curves(block, model, turned, grid)

    numbers = images.rows("defocus", len(grid) + 1, work)
    return DefocusCurves(numbers[:, :-1], numbers[:, -1].astype(np.float64))


def block_curves(
    block: Observed, model: ImageModel, turned: Particles, grid: Float[np.ndarray, " g"]
) -> Float[np.ndarray, "n g+1"]:
    """(B, g + 1): the curve of each image, and its Fisher information."""
    cross, power = model.whitened(block)
    c, q = block.batch.ctf.double(), derivative_of_ctf(turned, block).double()
    fy, fx = block.frequencies()
    s2 = fy * fy + fx * fx
    out = np.empty((len(c), len(grid) + 1))
    volts = np.array([turned.groups[g].voltage_kV for g in block.batch.group])
    for voltage in np.unique(volts):
        lam, rows = wavelength_A(float(voltage)), torch.as_tensor(np.flatnonzero(volts == voltage))
        parts = _radial_parts(cross[rows], power[rows], c[rows], q[rows])
        out[rows.numpy(), :-1] = _curves(parts, s2, lam, grid)
        slope = math.pi * lam * s2
        out[rows.numpy(), -1] = (power[rows] * q[rows].square() * slope.square()).sum(1).numpy()
    return out


def _radial_parts(cross: Tensor, power: Tensor, c: Tensor, q: Tensor) -> Tensor:
    """(4, B, K): coefficients of cos(phi), sin(phi), cos(2 phi), sin(2 phi)."""
    return torch.stack([cross * c, cross * q, 0.25 * power * (q * q - c * c), -0.5 * power * c * q])


def _curves(parts: Tensor, s2: Tensor, lam: float, grid: np.ndarray) -> np.ndarray:
    width = BIN_RAD / (2 * math.pi * lam * float(grid[-1]))
    index = (s2 / width).long()
    bins = int(index.max()) + 1
    sums = torch.zeros(*parts.shape[:2], bins, dtype=torch.float64).index_add_(2, index, parts)
    count = torch.bincount(index, minlength=bins).clamp(min=1)
    centre = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, s2) / count
    phi = math.pi * lam * centre[:, None] * torch.as_tensor(grid)
    waves = (phi.cos(), phi.sin(), (2 * phi).cos(), (2 * phi).sin())
    curve: Tensor = sum((part @ wave for part, wave in zip(sums, waves, strict=True)), torch.zeros(()))
    return (curve - curve[:, len(grid) // 2, None]).numpy()
