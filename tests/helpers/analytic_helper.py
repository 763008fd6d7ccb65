"""Objects whose projections are known in closed form, and measures of how two images agree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cryoiso.physics.fourier import fourier_disc, images_to_fourier


class Gaussians(NamedTuple):
    """Isotropic Gaussians: centres (n, 3) as x, y, z in px from pixel D//2, integrals (n,), one width in px."""

    centres: np.ndarray
    weights: np.ndarray
    sigma: float

    def volume(self, box_px: int) -> np.ndarray:
        """(D, D, D) float64, array order z, y, x."""
        x, y, z = (self._axis(box_px, self.centres[:, a]) for a in range(3))
        return np.einsum("n,nz,ny,nx->zyx", self.weights, z, y, x)

    def images(self, box_px: int, rotation: np.ndarray, shift_px: np.ndarray | None = None) -> np.ndarray:
        """(n, D, D) line integrals: a centre v lands at (A v)_xy - shift."""
        shift_px = np.zeros((len(rotation), 2)) if shift_px is None else shift_px
        out = np.empty((len(rotation), box_px, box_px))
        for i, (a, s) in enumerate(zip(rotation, shift_px)):
            place = self.centres @ a.T[:, :2] - s
            x, y = (self._axis(box_px, place[:, k]) for k in range(2))
            out[i] = np.einsum("n,ny,nx->yx", self.weights, y, x)
        return out

    def transform(self, rotation: np.ndarray, ky: np.ndarray, kx: np.ndarray) -> np.ndarray:
        """(n, K) Fourier integrals of the line integrals at frequencies in cycles per px."""
        fall_off = np.exp(-2 * np.pi**2 * self.sigma**2 * (kx**2 + ky**2))
        place = np.einsum("jab,nb->jna", rotation[:, :2], self.centres)
        phase = np.exp(-2j * np.pi * (place[:, :, :1] * kx + place[:, :, 1:] * ky))
        return fall_off * np.einsum("n,jnk->jk", self.weights, phase)

    def _axis(self, box_px: int, place: np.ndarray) -> np.ndarray:
        x = np.arange(box_px) - box_px // 2
        g = np.exp(-((x - place[:, None]) ** 2) / (2 * self.sigma**2))
        return g / (np.sqrt(2 * np.pi) * self.sigma)


def some_gaussians(box_px: int, n: int = 40, sigma: float = 1.5, seed: int = 0) -> Gaussians:
    """Gaussians of different weights in a ball of 0.28 of the box, not centred on it."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(n, 3))
    radius = 0.28 * box_px * rng.random(n) ** (1 / 3)
    centres = direction / np.linalg.norm(direction, axis=1, keepdims=True) * radius[:, None]
    return Gaussians(centres, rng.uniform(0.5, 1.5, n), sigma)


def relative(a, b) -> float:
    """|a - b| / |b| of arrays or tensors."""
    a, b = (np.asarray(x.resolve_conj().detach().cpu() if isinstance(x, torch.Tensor) else x) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def inside_nyquist(images: np.ndarray, with_dc: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, K) coefficients of images inside the Nyquist circle, each Friedel pair once, and their ky, kx (K,)."""
    box = images.shape[-1]
    disc = fourier_disc(box, (box - 1) // 2, with_dc)
    values = disc.gather(images_to_fourier(torch.as_tensor(np.asarray(images, np.float64))))
    return values.numpy(), disc.ky.astype(float), disc.kx.astype(float)


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) normalised correlation of image pairs inside the Nyquist circle, without the mean."""
    fa, fb = inside_nyquist(a)[0], inside_nyquist(b)[0]
    power = (np.abs(fa) ** 2).sum(1) * (np.abs(fb) ** 2).sum(1)
    return (fa.conj() * fb).real.sum(1) / np.sqrt(power)


def displacements(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 2) (x, y) in px by which the content of b lies from that of a: slope of the phase of the cross-spectrum."""
    fa, ky, kx = inside_nyquist(a)
    fb, _, _ = inside_nyquist(b)
    slope = np.stack([kx, ky], 1) * (-2 * np.pi / a.shape[-1])
    out = np.zeros((len(a), 2))
    for i, cross in enumerate(fa.conj() * fb):
        for _ in range(10):
            phase = np.angle(cross * np.exp(-1j * (slope @ out[i])))
            weight = np.abs(cross) * (np.abs(phase) < 2)
            out[i] += np.linalg.lstsq(slope * weight[:, None], phase * weight, rcond=None)[0]
    return out
