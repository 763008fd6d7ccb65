"""Defocus and astigmatism of micrographs: Newton steps on the likelihood of all their particles.

Defocus in the direction theta changes by d + a cos 2 theta + b sin 2 theta. With T = pi lambda (s^2, fx^2 - fy^2, 2 fx
fy) the gradient of an image's log-likelihood is sum (cross - power c) q T and its Fisher information sum power q^2 T
T^t (``defocus_curves``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.types import Particles
from cryoiso.methods.ctf_refinement.defocus_curves import derivative_of_ctf, quarter_turned
from cryoiso.methods.ctf_refinement.image_model import ImageModel
from cryoiso.methods.ctf_refinement.image_pass import ImagePass, Observed
from cryoiso.physics.contrast_transfer import wavelength_A

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
"""Entries of a symmetric 3 x 3 matrix that are summed."""
EM_ITERATIONS = 200


def astigmatism_of(particles: Particles) -> Float[np.ndarray, "n 3"]:
    """(n, 3) in Å: mean defocus, and half the difference of U and V times cos and sin of twice the angle."""
    u, v = (np.asarray(d, np.float64) for d in (particles.defocus_u_A, particles.defocus_v_A))
    twice = 2 * np.radians(np.asarray(particles.defocus_angle_deg, np.float64))
    half = 0.5 * (u - v)
    return np.stack([0.5 * (u + v), half * np.cos(twice), half * np.sin(twice)], 1)


def with_change(particles: Particles, change_A: Float[np.ndarray, "n 3"]) -> Particles:
    """Particles whose (mean, cos, sin) of the defocus changed by (n, 3) Å.

    Where the astigmatism changes, U is the larger defocus and the angle lies in 0 to 180 degrees; elsewhere U and V
    change alike, and the angle stays.
    """
    change_A = np.asarray(change_A, np.float64)
    mean, cos, sin = (astigmatism_of(particles) + change_A).T
    half, angle = np.hypot(cos, sin), np.degrees(0.5 * np.arctan2(sin, cos)) % 180.0
    turned = (change_A[:, 1:] != 0).any(1)
    shift = change_A[:, 0]
    return replace(
        particles,
        defocus_u_A=np.where(turned, mean + half, particles.defocus_u_A + shift),
        defocus_v_A=np.where(turned, mean - half, particles.defocus_v_A + shift),
        defocus_angle_deg=np.where(turned, angle, particles.defocus_angle_deg),
    )


@dataclass(frozen=True)
class Slopes:
    """Gradient and Fisher information of m micrographs' likelihoods in (mean, cos, sin)."""

    gradient: Float[np.ndarray, "m 3"]
    fisher: Float[np.ndarray, "m 3 3"]


def micrograph_slopes(images: ImagePass, model: ImageModel, micrograph: Int[np.ndarray, " n"]) -> Slopes:
    """Sums over the particles of each micrograph, on every rank (collective).

    Args:
        micrograph: (n,) index of each particle's micrograph.
    """
    turned = quarter_turned(images.particles)
    rows = images.rows("astigmatism", 9, lambda block: _block_slopes(block, model, turned)).astype(np.float64)
    sums = np.zeros((int(micrograph.max()) + 1, 9))
    np.add.at(sums, micrograph, rows)
    fisher = np.empty((len(sums), 3, 3))
    for k, (i, j) in enumerate(PAIRS):
        fisher[:, i, j] = fisher[:, j, i] = sums[:, 3 + k]
    return Slopes(sums[:, :3], fisher)


def _block_slopes(block: Observed, model: ImageModel, turned: Particles) -> np.ndarray:
    """(B, 9): gradient, and the entries PAIRS of the information."""
    cross, power = model.whitened(block)
    c, q = block.batch.ctf.double(), derivative_of_ctf(turned, block).double()
    fy, fx = block.frequencies()
    basis = torch.stack([fx * fx + fy * fy, fx * fx - fy * fy, 2 * fx * fy])
    lam = torch.tensor([wavelength_A(turned.groups[g].voltage_kV) for g in block.batch.group], dtype=torch.float64)
    slope: Tensor = (cross - power * c) * q
    gradient = math.pi * lam[:, None] * (slope @ basis.T)
    products = torch.stack([basis[i] * basis[j] for i, j in PAIRS])
    fisher = (math.pi * lam[:, None]) ** 2 * ((power * q * q) @ products.T)
    return torch.cat([gradient, fisher], 1).numpy()


@dataclass(frozen=True)
class MicrographStep:
    """One Newton step of all micrographs."""

    change_A: Float[np.ndarray, "m 3"]
    covariance_A2: Float[np.ndarray, "m 3 3"]
    width_A: tuple[float, float]
    """Prior standard deviations of the mean and of each of the two components of the astigmatism."""


def newton_step(slopes: Slopes, before_A: Float[np.ndarray, "m 3"]) -> MicrographStep:
    """Posterior means under Gaussian priors around no change since the start, whose widths are estimated by
    expectation-maximisation over the micrographs.

    Args:
        before_A: (m, 3) change made so far.
    """
    information = slopes.fisher
    target = slopes.gradient + np.einsum("mij,mj->mi", information, before_A)  # of the total change
    best = np.linalg.solve(information + 1e-12 * np.eye(3), target[..., None])[..., 0]
    mean, shape = float(np.mean(best[:, 0] ** 2)), float(np.mean(best[:, 1:] ** 2))
    total, covariance = best, np.linalg.inv(information + 1e-12 * np.eye(3))
    for _ in range(EM_ITERATIONS):
        prior = np.diag(1.0 / np.maximum([mean, shape, shape], 1e-6))
        covariance = np.linalg.inv(information + prior)
        total = np.einsum("mij,mj->mi", covariance, target)
        second = total**2 + np.einsum("mii->mi", covariance)
        mean, shape = float(second[:, 0].mean()), float(second[:, 1:].mean())
    return MicrographStep(total - before_A, covariance, (math.sqrt(mean), math.sqrt(shape)))
