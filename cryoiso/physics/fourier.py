"""Centred Fourier transforms, and the set of independent Fourier coefficients of an image.

Layout: half-plane of ``rfft`` (ky in FFT order, kx = 0..D//2), centre of images and volumes at pixel D//2 (odd and
even). Images use the orthonormal transform, so that white noise of standard deviation 1 has E|X|^2 = 1 at every
coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int, Shaped


def images_to_fourier(images: Float[Tensor, "*n box box"]) -> Complex[Tensor, "*n box box//2+1"]:
    """Orthonormal centred transform: (n, D, D) real -> (n, D, D//2+1) complex."""
    coefficients: Tensor = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1)), norm="ortho")
    return coefficients


def fourier_to_images(
    coefficients: Complex[Tensor, "*n {box_px} {box_px}//2+1"], box_px: int
) -> Float[Tensor, "*n {box_px} {box_px}"]:
    """Inverse of :func:`images_to_fourier`: (n, D, D//2+1) complex -> (n, D, D) real."""
    images = torch.fft.irfft2(coefficients, s=(box_px, box_px), norm="ortho")
    centred: Tensor = torch.fft.fftshift(images, dim=(-2, -1))
    return centred


def volume_to_fourier(volume: Float[Tensor, "box box box"]) -> Complex[Tensor, "box box box//2+1"]:
    """Centred transform without a factor: (D, D, D) real -> (D, D, D//2+1) complex."""
    coefficients: Tensor = torch.fft.rfftn(torch.fft.ifftshift(volume), dim=(0, 1, 2))
    return coefficients


def fourier_to_volume(
    coefficients: Complex[Tensor, "{box_px} {box_px} {box_px}//2+1"], box_px: int
) -> Float[Tensor, "{box_px} {box_px} {box_px}"]:
    """Inverse of :func:`volume_to_fourier`."""
    volume: Tensor = torch.fft.fftshift(torch.fft.irfftn(coefficients, s=(box_px,) * 3, dim=(0, 1, 2)))
    return volume


def pad_volume(volume: Float[Tensor, "box box box"], box_px: int) -> Float[Tensor, "{box_px} {box_px} {box_px}"]:
    """Zero-pads (or crops) a cube about its centre pixel D//2 to box_px."""
    old = volume.shape[0]
    lo = box_px // 2 - old // 2
    hi = box_px - old - lo
    return torch.nn.functional.pad(volume, (lo, hi, lo, hi, lo, hi))


PATCH_SIDE = 8


@dataclass(frozen=True)
class DiscTensors:
    """The arrays of a :class:`Disc` on a device."""

    ky: Float[Tensor, " k"]
    kx: Float[Tensor, " k"]
    flat: Int[Tensor, " k"]
    shell: Int[Tensor, " k"]


@dataclass(frozen=True)
class Disc:
    """The coefficients of a half-plane inside a radius, each Friedel pair once (kx > 0, or kx = 0 and ky > 0; DC on
    request)."""

    box_px: int
    radius_px: float
    ky: Float[np.ndarray, " k"]
    """(K,) float32, signed."""
    kx: Float[np.ndarray, " k"]
    """(K,) float32."""
    flat: Int[np.ndarray, " k"]
    """(K,) int64: index into the flattened (D, D//2+1) half-plane."""
    shell: Int[np.ndarray, " k"]
    """(K,) int64: nint of the radius."""
    _on: dict[torch.device, DiscTensors] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: str | torch.device) -> DiscTensors:
        """The same arrays as tensors of a device, copied there once: a copy makes the device wait."""
        device = torch.device(device)
        if device not in self._on:
            arrays = (torch.as_tensor(a, device=device) for a in (self.ky, self.kx, self.flat, self.shell))
            self._on[device] = DiscTensors(*arrays)
        return self._on[device]

    @property
    def size(self) -> int:
        return len(self.flat)

    @cached_property
    def neighbours(self) -> Int[np.ndarray, " k"]:
        """(K,) int64: the coefficients in an order that keeps neighbours together: one square of PATCH_SIDE^2 after the
        other."""
        ky, kx = self.ky.astype(np.int64), self.kx.astype(np.int64)
        return np.lexsort((kx, ky, kx // PATCH_SIDE, ky // PATCH_SIDE)).astype(np.int64)

    @cached_property
    def patches(self) -> tuple[Int[np.ndarray, "patches members"], Float[np.ndarray, "patches 2 members"]]:
        """The coefficients in that order, cut into patches of PATCH_SIDE^2: their places in the disc, -1 for none, and
        their frequencies (kx, ky) float32, 0 for none."""
        size = PATCH_SIDE**2
        member = np.full(-(-self.size // size) * size, -1, np.int64)
        member[: self.size] = self.neighbours
        frequency = np.where(member >= 0, np.stack([self.kx[member], self.ky[member]]), 0).astype(np.float32)
        return member.reshape(-1, size), frequency.reshape(2, -1, size).swapaxes(0, 1).copy()

    @cached_property
    def reach(self) -> Int[np.ndarray, 2]:
        """Largest |kx| and |ky|."""
        return np.array([np.abs(self.kx).max(initial=0), np.abs(self.ky).max(initial=0)]).astype(np.int64)

    def gather(self, coefficients: Shaped[Tensor, "*batch box columns"]) -> Shaped[Tensor, "*batch k"]:
        """(..., D, D//2+1) -> (..., K)."""
        index = self.on(coefficients.device).flat
        plane = coefficients.flatten(-2)
        return plane.gather(-1, index.expand(*plane.shape[:-1], -1))

    def frequencies(self, pixel_size_A: float) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """(ky, kx) in 1/Å, float64, each (K,)."""
        scale = 1.0 / (self.box_px * pixel_size_A)
        ky, kx = (torch.as_tensor(k, dtype=torch.float64) for k in (self.ky, self.kx))
        return ky * scale, kx * scale


@lru_cache(maxsize=64)
def fourier_disc(box_px: int, radius_px: float, with_dc: bool = False) -> Disc:
    """Coefficients with |k| <= radius_px, ordered by shell so that a smaller radius is a prefix of a larger one.

    The Nyquist column of an even box is left out: it is its own Friedel mate and cannot be interpolated.
    """
    ky = np.fft.fftfreq(box_px) * box_px
    kx = np.arange(box_px // 2 + 1, dtype=np.float64)
    yy, xx = np.meshgrid(ky, kx, indexing="ij")
    radius = np.hypot(yy, xx)
    limit = min(radius_px, (box_px - 1) // 2)
    keep = (radius <= limit + 1e-6) & ((xx > 0) | (yy > 0))
    if with_dc:
        keep |= radius == 0
    flat = np.flatnonzero(keep)
    flat = flat[np.argsort(radius.ravel()[flat], kind="stable")]
    r = radius.ravel()[flat]
    return Disc(
        box_px,
        radius_px,
        yy.ravel()[flat].astype(np.float32),
        xx.ravel()[flat].astype(np.float32),
        flat,
        np.rint(r).astype(np.int64),
    )


def shift_phases(
    ky: Float[Tensor, " k"], kx: Float[Tensor, " k"], shift_px: Float[Tensor, "*n 2"]
) -> Complex[Tensor, "*n k"]:
    """Factors that move the content by ``shift_px``: exp(-2 pi i k.shift / D).

    Args:
        ky, kx: (K,) frequencies in cycles per pixel.
        shift_px: (..., 2) as (x, y).

    Returns:
        (..., K) complex.
    """
    angle = -2 * torch.pi * (shift_px[..., :1] * kx + shift_px[..., 1:] * ky)
    return torch.polar(torch.ones_like(angle), angle)


def sinc2_profile(
    box_px: int, padding: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " {box_px}"]:
    """(D,) envelope by which trilinear interpolation on a grid padded by ``padding`` multiplies a volume, per axis."""
    x = (torch.arange(box_px, device=device, dtype=torch.float64) - box_px // 2) / (padding * box_px)
    return torch.sinc(x).square().to(dtype)


def divide_by_gridding(volume: Float[Tensor, "box box box"], padding: int) -> Float[Tensor, "box box box"]:
    """Undo the separable sinc^2 envelope of trilinear interpolation (before projecting, after back-projecting)."""
    s = sinc2_profile(volume.shape[0], padding, volume.device, volume.dtype)
    return volume / (s[:, None, None] * s[None, :, None] * s[None, None, :])
