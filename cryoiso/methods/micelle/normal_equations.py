"""The normal equations of the micelle problem, as masks and Fourier transforms of a volume.

With exact slices, sum_i P_i^T C_i^2 P_i is a convolution: (T V)(r) = sum_r' K(r - r') V(r'), where K is the transform
of the CTF^2 that the views have put into each frequency. Within a box of E voxels |r - r'| < E, so the convolution is
exact on a grid of 2E. The sums hold those weights interpolated onto a finer grid, which multiplies K by a known
envelope; it is divided out.

The unknown is z = (g, u): V = g h + q L u with h = M V_homo, q = 1 - M, and L a low-pass filter, so that the micelle
is smooth by construction. The prior is u ~ N(0, tau^2 / mean(L^2)): a voxel of the micelle is a priori 0 +- tau.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryoiso.physics.filters import lowpass_curve, radius_grid
from cryoiso.physics.fourier_sums import FourierSums, to_transform, transform_to_volume
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.resample import resample_map

OVERSAMPLING = 1.5
"""Nyquist frequency of the grid over the finest frequency used: products of masks and maps need the room."""
LEAST_ENVELOPE = 0.4
"""The interpolation's envelope (padding 2) at a distance of E, the largest in a sphere that the box holds."""
SPHERE_EDGE_PX = 3.0
FINE_PADDING, PLAIN_PADDING, MOST_FINE_PX = 3, 2, 64
"""The sums are kept on a grid padded by 3 (interpolation error of the solution 3 % without noise, 7 % by 2) up to this
radius; beyond it they would take GiBs."""


@dataclass(frozen=True)
class SolutionGrid:
    """The grid that is solved on: the particles' box in Å, with no more voxels than the frequencies in use need."""

    box_px: int
    """D, of the images."""
    pixel_size_A: float
    """Of the images."""
    radius_px: int
    """Frequencies used, in pixels of the transform of the box."""
    size_px: int
    """E."""
    padding: int = FINE_PADDING
    """Of the grid of the sums; the convolution itself needs 2."""

    @classmethod
    def of(cls, box_px: int, pixel_size_A: float, finest_A: float) -> SolutionGrid:
        """The grid for data up to a resolution."""
        from scipy.fft import next_fast_len

        radius = min((box_px - 1) // 2, max(2, int(np.ceil(box_px * pixel_size_A / finest_A))))
        size = next_fast_len(int(np.ceil(2 * OVERSAMPLING * radius)) + 2, real=True)
        padding = FINE_PADDING if radius <= MOST_FINE_PX else PLAIN_PADDING
        return cls(box_px, pixel_size_A, radius, min(size, box_px), padding)

    @property
    def voxel_A(self) -> float:
        """Å a voxel of the solver's grid."""
        return self.pixel_size_A * self.box_px / self.size_px

    def coarse(self, volume: np.ndarray) -> np.ndarray:
        """(D, D, D) -> (E, E, E)."""
        if self.size_px == self.box_px:
            return np.asarray(volume, np.float32)
        return resample_map(volume, self.pixel_size_A, self.size_px, self.voxel_A)

    def fine(self, volume: np.ndarray) -> np.ndarray:
        """(E, E, E) -> (D, D, D)."""
        if self.size_px == self.box_px:
            return np.asarray(volume, np.float32)
        return resample_map(volume, self.voxel_A, self.box_px, self.pixel_size_A)

    def outside(self, mask: np.ndarray, diameter_A: float | None, size_px: int | None = None) -> np.ndarray:
        """q = 1 - M inside the sphere where a micelle may be: (E, E, E), or (D, D, D) for size_px = D.

        Args:
            mask: (D, D, D).
            diameter_A: of the sphere; None or too large: what the box holds.
        """
        size = size_px or self.size_px
        free = 1 - np.asarray(mask, np.float32) if size == self.box_px else 1 - self.coarse(mask)
        voxel = self.pixel_size_A * self.box_px / size
        most = size / 2 - SPHERE_EDGE_PX
        radius = min(most, diameter_A / (2 * voxel)) if diameter_A else most
        sphere = np.asarray(sphere_mask(size, radius, SPHERE_EDGE_PX), np.float32)
        return np.clip(free, 0, 1) * sphere


@dataclass(frozen=True)
class Unknowns:
    """z = (g, u)."""

    grey: float
    u: Tensor
    """(E, E, E)."""

    def plus(self, factor: float, other: Unknowns) -> Unknowns:
        """self + factor * other."""
        return Unknowns(self.grey + factor * other.grey, self.u + factor * other.u)

    def dot(self, other: Unknowns) -> float:
        """Inner product, added in one order whatever the number of threads."""
        return self.grey * other.grey + inner(self.u, other.u)


def inner(a: Tensor, b: Tensor) -> float:
    """Sum of products in float64; on a CPU the same bits with any number of threads."""
    if a.device.type == "cpu":
        return float(np.sum(np.multiply(a.numpy(), b.numpy(), dtype=np.float64)))
    return float((a.double() * b.double()).sum())


class NormalEquations:
    """A z = rhs of one half-set, A = J^T J + sigma^2 / tau^2 and rhs = J^T x."""

    def __init__(
        self, sums: FourierSums, grid: SolutionGrid, protein: np.ndarray, outside: np.ndarray, lowpass_A: float
    ) -> None:
        """
        Args:
            sums: numerator and weight of a half-set up to grid.radius_px, not symmetrised.
            protein: (E, E, E) h = M V_homo.
            outside: (E, E, E) q.
            lowpass_A: of the micelle; 0 leaves it to the prior alone.
        """
        device = sums.weight.device
        self.grid, self.size = grid, grid.size_px
        self.protein = torch.as_tensor(protein, dtype=torch.float32, device=device)
        self.outside = torch.as_tensor(outside, dtype=torch.float32, device=device)
        # slices are transforms of the box of D voxels over D; a voxel of the solver's grid stands for (D / E)^3 of them
        amplitude = (grid.box_px / self.size) ** 3 / grid.box_px
        # each Friedel pair is counted once, the inverse transform (of P^3 points, divided by P^3) adds both
        padded = grid.padding * self.size
        self.kernel = toeplitz_weight(sums, self.size) * (0.5 * amplitude**2 * padded**3)
        back = transform_to_volume(to_transform(sums.numerator, padded), self.size, grid.padding)
        self.data = back * (0.5 * amplitude * padded**3)
        self.lowpass = _lowpass_factor(grid, lowpass_A, device)
        self.precision, self.noise = 0.0, 1.0
        self.homologue_power = inner(self.protein, self.convolve(self.protein))
        self.rhs = Unknowns(inner(self.protein, self.data), self.smooth(self.outside * self.data))

    def set_prior(self, noise_variance: float, micelle_sd: float) -> None:
        """Noise variance of an image's coefficient, and tau: the micelle's standard deviation a voxel (0: no prior)."""
        pass_band = float(self.lowpass.square().mean()) if micelle_sd > 0 else 0.0
        self.noise = noise_variance
        self.precision = noise_variance * pass_band / micelle_sd**2 if micelle_sd > 0 else 0.0
        mean_outside = float(self.outside.square().mean())
        shells = self._shell_means()
        curvature = shells * mean_outside * self.lowpass.square()
        floor = max(self.precision, 1e-4 * float(curvature.max()), 1e-30)
        self.preconditioner = 1 / (curvature + floor)

    def _shell_means(self) -> Tensor:
        """Mean of the kernel over shells, on the unpadded grid's frequencies: (E, E, E//2+1) float32."""
        e = self.size
        shell = radius_grid(2 * e, 3, self.kernel.device).div(2).round().long().reshape(-1)
        total = torch.bincount(shell.cpu(), self.kernel.reshape(-1).double().cpu())
        mean = (total / torch.bincount(shell.cpu()).clamp(min=1)).float().to(self.kernel.device)
        own = radius_grid(e, 3, self.kernel.device).round().long().clamp(max=len(mean) - 1)
        return mean[own]

    def convolve(self, volume: Tensor) -> Tensor:
        """T V = sum_i P_i^T C_i^2 P_i V: (E, E, E)."""
        p, e = 2 * self.size, self.size
        transform = torch.fft.rfftn(volume, s=(p, p, p), dim=(0, 1, 2))
        product: Tensor = torch.fft.irfftn(transform * self.kernel, s=(p, p, p), dim=(0, 1, 2))[:e, :e, :e]
        return product

    def smooth(self, volume: Tensor) -> Tensor:
        """L u, which is its own transpose."""
        return _filter(volume, self.lowpass)

    def micelle(self, u: Tensor) -> Tensor:
        """q L u."""
        return self.outside * self.smooth(u)

    def apply(self, z: Unknowns) -> Unknowns:
        """A z."""
        y = self.convolve(z.grey * self.protein + self.micelle(z.u))
        return Unknowns(inner(self.protein, y), self.smooth(self.outside * y) + self.precision * z.u)

    def precondition(self, r: Unknowns) -> Unknowns:
        """An approximate inverse of A: every shell of frequencies by its mean weight, the grey scale by its own."""
        return Unknowns(r.grey / self.homologue_power, _filter(r.u, self.preconditioner))

    def zero(self) -> Unknowns:
        """The start: the homologue alone, at the grey scale that fits best."""
        return Unknowns(self.rhs.grey / self.homologue_power, torch.zeros_like(self.protein))


def toeplitz_weight(sums: FourierSums, size_px: int) -> Tensor:
    """The weight W on the grid of 2E such that F^-1 W F is sum_i P_i^T C_i^2 P_i: (2E, 2E, E+1) float32.

    Insertion into a grid of P = padding E spreads every sample over its eight neighbours, which multiplies the kernel
    by sinc^2(r / P) along each axis; that is divided out. The weight itself may then be negative between the slices of
    few images; the operator is positive on what is zero outside E, to the accuracy of the interpolation (a few
    thousandths), and the prior makes up for that.
    """
    p = sums.padding * size_px
    near = torch.arange(2 * size_px, device=sums.weight.device)
    near = (near + size_px) % (2 * size_px) - size_px
    kernel = torch.fft.irfftn(to_transform(sums.weight.to(torch.complex64), p), s=(p, p, p), dim=(0, 1, 2))
    kernel = kernel[near % p][:, near % p][:, :, near % p]
    s = torch.sinc(near.double() / p).square().float()
    envelope = (s[:, None, None] * s[None, :, None] * s[None, None, :]).clamp(min=LEAST_ENVELOPE)
    transform: Tensor = torch.fft.rfftn(kernel / envelope, dim=(0, 1, 2)).real
    return transform


def _filter(volume: Tensor, factor: Tensor) -> Tensor:
    filtered: Tensor = torch.fft.irfftn(torch.fft.rfftn(volume) * factor, s=volume.shape)
    return filtered


def _lowpass_factor(grid: SolutionGrid, lowpass_A: float, device: torch.device) -> Tensor:
    """(E, E, E//2+1) float32; without a low-pass, everything up to the finest frequency used."""
    radius = radius_grid(grid.size_px, 3, device)
    if not lowpass_A:
        return (radius <= grid.radius_px).float()
    curve = lowpass_curve(grid.size_px, grid.voxel_A, lowpass_A).float().to(device)
    low = radius.long().clamp(max=len(curve) - 1)
    high = (low + 1).clamp(max=len(curve) - 1)
    share = (radius - low).clamp(0, 1).float()
    return curve[low] * (1 - share) + curve[high] * share
