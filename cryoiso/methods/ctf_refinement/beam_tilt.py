"""Beam tilt and trefoil of optics groups: weighted least squares on the phases between images and predictions.

Over the images of a group X = sum (a c P)* x / sigma^2 has the phase psi of the aberration, with weight W = sum |a c
P|^2 / sigma^2 and variance 1 / (2 W). psi is odd: a shift, a tilt and, on request, trefoil.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.types import OpticsGroup
from cryoiso.methods.ctf_refinement.image_model import ImageModel
from cryoiso.methods.ctf_refinement.image_pass import ImagePass, Observed, true_frequencies
from cryoiso.physics.contrast_transfer import wavelength_A, zernike_sum

if TYPE_CHECKING:
    pass

UNIT = 2.0**28
GROWTH = (0.4, 0.6, 0.8, 1.0)
"""Shares of the largest frequency up to which the fit goes, one after the other: phases beyond half a turn are then
known from coarser ones."""
STEPS = 8
SIGNIFICANT = 1e-3
"""A group keeps its values unless the gain in log-likelihood is less likely than this by chance."""
SHIFT_Y, SHIFT_X, TREFOIL_SIN, TILT_Y, TILT_X, TREFOIL_COS = range(6)
"""Places in rlnOddZernike, of (m, n) = (-1, 1), (1, 1), (-3, 3), (-1, 3), (1, 3), (3, 3)."""


def tilt_factor(group: OpticsGroup) -> float:
    """Phase at s = (1 / Å) along a tilt of 1 mrad: -2 pi Cs lambda^2 10^-3."""
    return -2 * math.pi * group.spherical_aberration_mm * 1e7 * 1e-3 * wavelength_A(group.voltage_kV) ** 2


@dataclass(frozen=True)
class PhaseSums:
    """X (K,) complex128 and W (K,) of one optics group."""

    cross: np.ndarray
    weight: np.ndarray
    freq_y: np.ndarray
    freq_x: np.ndarray


def phase_sums(images: ImagePass, model: ImageModel) -> dict[int, PhaseSums]:
    """Sums of every optics group with particles, on every rank (collective)."""
    groups = images.particles.groups
    used = np.unique(images.particles.optics).tolist()
    totals = {g: np.zeros((3, images.disc(groups[g]).size), np.int64) for g in used}

    def work(block: Observed) -> None:
        cross, weight = _block_sums(block, model)
        for g in np.unique(block.batch.group).tolist():
            rows_of_group = torch.as_tensor(np.flatnonzero(block.batch.group == g))
            x, w = cross[rows_of_group].sum(0), weight[rows_of_group].sum(0)
            totals[g] += (torch.stack([x.real, x.imag, w]) * UNIT).round().to(torch.int64).numpy()

    images.each("beam tilt", work)
    sums = {}
    for g in used:
        real, imag, weight = images.comm.sum_all(totals[g]) / UNIT
        fy, fx = true_frequencies(images.disc(groups[g]), groups[g])
        sums[g] = PhaseSums(real + 1j * imag, weight, fy.numpy(), fx.numpy())
    return sums


def _block_sums(block: Observed, model: ImageModel) -> tuple[Tensor, Tensor]:
    shell = np.minimum(block.batch.disc.shell, model.sigma2.shape[1] - 1)
    inverse = torch.as_tensor(1.0 / model.sigma2[block.batch.group][:, shell])
    predicted = model.scale[block.half] * block.batch.ctf * block.slices
    return (predicted.conj() * block.data).to(torch.complex128) * inverse, predicted.abs().square().double() * inverse


@dataclass(frozen=True)
class AberrationFit:
    """Change of one optics group's odd aberrations."""

    shift_rad_A: tuple[float, float]
    """(x, y): phase per 1/Å, 2 pi times the shift of the images' content, with the opposite sign."""
    tilt_mrad: tuple[float, float]
    tilt_error_mrad: tuple[float, float]
    trefoil_rad_A3: tuple[float, float]
    """(sin, cos): phase per 1/Å^3."""
    trefoil_error_rad_A3: tuple[float, float]
    gain: float
    """In log-likelihood."""
    significant: bool

    def facts(self) -> dict[str, Any]:
        return {
            "tilt_change_mrad": list(self.tilt_mrad), "tilt_error_mrad": list(self.tilt_error_mrad),
            "shift_change_A": [-value / (2 * math.pi) for value in self.shift_rad_A],
            "trefoil_change_rad_A3": list(self.trefoil_rad_A3),
            "trefoil_error_rad_A3": list(self.trefoil_error_rad_A3),
            "log_likelihood_gain": self.gain, "significant": self.significant,
        }  # fmt: skip


def fit_aberrations(sums: PhaseSums, group: OpticsGroup, *, trefoil: bool) -> AberrationFit:
    """Gauss-Newton from coarse to fine frequencies on sum 2 Re(X exp(-i psi)), the log-likelihood of psi.

    Args:
        sums: of the images, corrected for the aberrations that the group has.
        group: with a spherical aberration above 0.
    """
    from scipy.stats import chi2

    basis = _basis(sums, group, trefoil)
    radius = np.hypot(sums.freq_y, sums.freq_x)
    theta = np.zeros(basis.shape[1])
    for share in GROWTH:
        inside = radius <= share * radius.max()
        part, weight = basis[inside], sums.weight[inside]
        fisher = 2 * (part * weight[:, None]).T @ part
        for _ in range(STEPS):
            gradient = 2 * part.T @ (sums.cross[inside] * np.exp(-1j * (part @ theta))).imag
            theta = theta + _solved(fisher, gradient)
    gain = float(2 * ((sums.cross * np.exp(-1j * (basis @ theta))).real - sums.cross.real).sum())
    size = np.sqrt(np.diag(fisher))
    error = np.sqrt(np.diag(np.linalg.inv(fisher / np.outer(size, size)))) / size
    third = (theta[4], theta[5]) if trefoil else (0.0, 0.0)
    third_error = (error[4], error[5]) if trefoil else (0.0, 0.0)
    return AberrationFit(
        _pair(theta[0], theta[1]), _pair(theta[2], theta[3]), _pair(error[2], error[3]), _pair(*third),
        _pair(*third_error), gain, bool(chi2.sf(max(2 * gain, 0.0), len(theta)) < SIGNIFICANT),
    )  # fmt: skip


def _pair(first: float, second: float) -> tuple[float, float]:
    return float(first), float(second)


def _solved(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Solution of a symmetric system whose rows differ by many orders of magnitude."""
    size = np.sqrt(np.diag(matrix))
    solution: np.ndarray = np.linalg.solve(matrix / np.outer(size, size), vector / size) / size
    return solution


def _basis(sums: PhaseSums, group: OpticsGroup, trefoil: bool) -> np.ndarray:
    """(K, 4 or 6): phases of unit shift x, y, tilt x, y, and trefoil sin, cos."""
    fx, fy = sums.freq_x, sums.freq_y
    factor, s2 = tilt_factor(group), fx * fx + fy * fy
    columns = [fx, fy, factor * s2 * fx, factor * s2 * fy]
    for place in (TREFOIL_SIN, TREFOIL_COS) if trefoil else ():
        unit = [float(k == place) for k in range(6)]
        columns.append(zernike_sum(torch.as_tensor(fy), torch.as_tensor(fx), unit, odd=True).numpy())
    return np.stack(columns, 1)


def with_aberrations(group: OpticsGroup, fit: AberrationFit) -> OpticsGroup:
    """The optics group with a fit added: tilt in the beam tilt, shift and trefoil in the odd Zernike terms.

    The places of the third-order terms with m = -1 and 1 become 0, and what was there becomes beam tilt, since RELION
    overwrites them in groups that have a beam tilt.
    """
    odd = [*group.odd_zernike, *[0.0] * (6 - len(group.odd_zernike))]
    factor = tilt_factor(group)
    tilt_x, tilt_y = (3 * odd[place] / factor for place in (TILT_X, TILT_Y))  # Z(1, 3) = (3 s^2 - 2) x
    odd[SHIFT_X] += fit.shift_rad_A[0] - 2 * odd[TILT_X]
    odd[SHIFT_Y] += fit.shift_rad_A[1] - 2 * odd[TILT_Y]
    odd[TILT_X] = odd[TILT_Y] = 0.0
    odd[TREFOIL_SIN] += fit.trefoil_rad_A3[0]
    odd[TREFOIL_COS] += fit.trefoil_rad_A3[1]
    tilt = (group.beam_tilt_mrad[0] + tilt_x + fit.tilt_mrad[0], group.beam_tilt_mrad[1] + tilt_y + fit.tilt_mrad[1])
    return replace(group, beam_tilt_mrad=tilt, odd_zernike=tuple(odd))
