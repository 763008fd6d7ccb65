"""The reduced sums of one half-set in Fourier space, and the division that yields a map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.physics.fourier import divide_by_gridding, sinc2_profile
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.padded_transform import to_volume
from cryoiso.physics.projection import FourierVolume, corner_shares, flat_pairs

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int

EDGE_PX = 3.0
LEAST_WEIGHT = 1e-3
"""Smallest divisor as a share of a shell's mean weight."""
LEAST_REGULARISED = 1e-6
"""The same if a Wiener term is added to the weight."""


@dataclass(frozen=True)
class FourierSums:
    """Reduced sums of one half-set on the padded half-space grid."""

    numerator: Complex[Tensor, "rows rows columns"]
    """(2h+1, 2h+1, h+1) complex64."""
    weight: Float[Tensor, "rows rows columns"]
    """(2h+1, 2h+1, h+1) float32."""
    box_px: int
    padding: int
    radius_px: int

    def to(self, device: str) -> FourierSums:
        """The same sums on another device."""
        return FourierSums(self.numerator.to(device), self.weight.to(device), self.box_px, self.padding, self.radius_px)

    def shells(self, reach: int | None = None) -> Int[Tensor, "rows rows columns"]:
        """(2h+1, 2h+1, h+1) int64: radius in units of the unpadded grid, nearest shell; with a ``reach`` in voxels only
        so far from the origin."""
        h = (self.weight.shape[0] - 1) // 2 if reach is None else reach
        z = torch.arange(-h, h + 1, device=self.weight.device, dtype=torch.float32)
        x = torch.arange(0, h + 1, device=self.weight.device, dtype=torch.float32)
        r = torch.sqrt(z[:, None, None] ** 2 + z[None, :, None] ** 2 + x[None, None, :] ** 2)
        return torch.round(r / self.padding).long()

    def shell_mean_weight(self) -> Float[Tensor, " shells"]:
        """(R+2,) mean weight of each shell, over all voxels of the shell, measured or not."""
        if self.weight.device.type == "cpu":
            from cryoiso.physics import _grid_kernels

            sums, voxels = np.zeros(self.radius_px + 2), np.zeros(self.radius_px + 2, np.int64)
            flat = self.weight.contiguous().view(-1).numpy()
            _grid_kernels.sum_shells(flat, self.weight.shape[0], self.padding, sums, voxels)
            return torch.from_numpy(sums / np.maximum(voxels, 1))
        shell = self.shells().clamp(max=self.radius_px + 1).reshape(-1)
        total = torch.bincount(shell, self.weight.reshape(-1).double(), minlength=self.radius_px + 2)
        return total / torch.bincount(shell, minlength=self.radius_px + 2).clamp(min=1)

    def symmetrised(self, operations: Float[np.ndarray, "g 3 3"]) -> FourierSums:
        """The sums plus copies rotated by every operation of the point group (g, 3, 3), by trilinear interpolation."""
        if len(operations) == 1:
            return self
        numerator, weight = self.numerator.clone(), self.weight.clone()
        if numerator.device.type == "cpu":
            from cryoiso.physics import _grid_kernels

            others = np.ascontiguousarray(operations[1:], np.float32)
            old, old_weight = flat_pairs(self.numerator), self.weight.contiguous().view(-1).numpy()
            _grid_kernels.add_rotated(
                old, old_weight, len(weight), others, flat_pairs(numerator), weight.view(-1).numpy()
            )
            return FourierSums(numerator, weight, self.box_px, self.padding, self.radius_px)
        for operation in operations[1:]:
            rotated_n, rotated_w = rotate_half_space(self.numerator, self.weight, operation)
            numerator += rotated_n
            weight += rotated_w
        return FourierSums(numerator, weight, self.box_px, self.padding, self.radius_px)

    def reconstruct(self, wiener: Float[Tensor, " shells"] | None = None) -> Float[Tensor, "box box box"]:
        """The map (D, D, D) float32: numerator / (weight + Wiener term), inverse transform, gridding correction.

        Zero outside the sphere of diameter D (soft edge of ``EDGE_PX``): density beyond leaves the image in some views,
        and the gridding correction amplifies the noise most there.

        Args:
            wiener: (>= radius+1,) term of each shell, in units of the weight (``wiener_term``). Without it, only
                ``floor`` keeps the divisor from vanishing.
        """
        term, floor = self._per_shell(wiener), self.floor(wiener is not None)
        if self.weight.device.type == "cpu":
            size = self.box_px * self.padding
            count = min(self.weight.shape[2], (size - 1) // 2 + 1)
            padded = to_volume(partial(self._divide_numba, term, floor), count, self.box_px, size)
            volume = divide_by_gridding(padded, self.padding)
        else:
            volume = half_space_to_volume(self.divide_torch(term, floor), self.box_px, self.padding)
        return volume * sphere_mask(self.box_px, self.box_px / 2, EDGE_PX, device=volume.device, dtype=volume.dtype)

    def floor(self, regularised: bool = False) -> Float[Tensor, " shells"]:
        """(radius+1,) float32: smallest divisor. A fraction of the shell's mean weight; a far smaller one with a Wiener
        term, which bounds weak coefficients itself."""
        mean = self.shell_mean_weight()[: self.radius_px + 1].float()
        return (mean * (LEAST_REGULARISED if regularised else LEAST_WEIGHT)).clamp(min=float(mean.max()) * 1e-9 + 1e-30)

    def _per_shell(self, wiener: Tensor | None) -> Tensor:
        if wiener is None:
            return torch.zeros(self.radius_px + 1, device=self.weight.device)
        return wiener[: self.radius_px + 1].to(self.weight)

    def wiener_term(
        self, curve: Float[np.ndarray, " curve"], wiener: Float[Tensor, " _"] | None = None, *, uneven: bool = True
    ) -> Float[Tensor, " shells"]:
        """(radius+1,) float32: the term 1 / tau^2 that makes the division a Wiener filter, in units of the weight.

        The FSC R of two maps that were divided by max(w + term, floor) depends, in a shell, on the signal tau^2 sum (w
        f)^2 and the noise sum w f^2, f = 1 / max(w + term, floor), so that tau^2 = R / (1 - R) * sum w f^2 / sum (w
        f)^2 with this half-set's own weights. The arithmetic mean of the weights, used by RELION (Scheres 2012, doi
        10.1016/j.jsb.2012.09.006), gives the same only for evenly measured directions; otherwise tau^2 is too small
        (Jensen), by the ratio of the weights' arithmetic and harmonic means. Derived in docs/formulas.md.

        Args:
            curve: (>= radius+1,) FSC of the two half-maps, clipped to (0.001, 0.999) here.
            wiener: the term with which both maps were divided; None: none.
            uneven: False: the mean weight, for any distribution of directions.
        """
        ssnr = np.clip(np.asarray(curve, np.float64)[: self.radius_px + 1], 0.001, 0.999)
        inverse = torch.as_tensor((1 - ssnr) / ssnr)
        if not uneven:
            return (self.shell_mean_weight()[: self.radius_px + 1] * inverse.to(self.weight.device)).float()
        signal, noise = self.passed(wiener)
        ratio = torch.where(noise > 0, signal / noise.clamp(min=1e-300), self.shell_mean_weight()[: self.radius_px + 1])
        return (ratio * inverse.to(ratio.device)).float()

    def passed(
        self, wiener: Float[Tensor, " _"] | None = None
    ) -> tuple[Float[Tensor, " shells"], Float[Tensor, " shells"]]:
        """Signal and noise that the division passes: (radius+1,) float64 sums of (w f)^2 and of w f^2 over the voxels
        of each shell, f = 1 / max(w + term, floor)."""
        term, floor = self._per_shell(wiener), self.floor(wiener is not None)
        if self.weight.device.type == "cpu":
            from cryoiso.physics import _grid_kernels

            signal, noise = np.zeros(self.radius_px + 1), np.zeros(self.radius_px + 1)
            flat = self.weight.contiguous().view(-1).numpy()
            rows = self.weight.shape[0]
            _grid_kernels.sum_filtered(flat, rows, self.padding, term.numpy(), floor.numpy(), signal, noise)
            return torch.from_numpy(signal), torch.from_numpy(noise)
        return self.passed_torch(term, floor)

    def passed_torch(self, term: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        """The plain torch version of the CPU kernel, for GPUs and as its reference."""
        shell = self.shells().reshape(-1)
        w = self.weight.reshape(-1)
        inside = (shell <= self.radius_px) & (w > 0)
        shell, w = shell[inside], w[inside]
        f = 1 / torch.maximum(w + term[shell], floor[shell]).double()
        a = w.double() * f
        size = self.radius_px + 1
        return torch.bincount(shell, a * a, minlength=size), torch.bincount(shell, a * f, minlength=size)

    def completed(self, prior: Float[Tensor, "box box box"], wiener: Float[Tensor, " _"]) -> FourierSums:
        """These sums with a prior map added at the weight of the Wiener term: well-measured coefficients come from the
        data, the others from the prior (the posterior mean under a Gaussian prior about that map).

        Args:
            prior: (D, D, D) map on the data's grey scale.
            wiener: (>= radius+1,) term of each shell, as for ``reconstruct``.
        """
        term = self._per_shell(wiener)[self.shells().clamp(max=self.radius_px)]
        numerator = self.numerator + term * self.sampled(prior)
        return FourierSums(numerator, self.weight + term, self.box_px, self.padding, self.radius_px)

    def sampled(self, volume: Float[Tensor, "box box box"]) -> Complex[Tensor, "rows rows columns"]:
        """The transform of a map (D, D, D) where these sums have voxels, as insertion of its slices would see it."""
        # insertion spreads by the interpolation kernel, whose envelope the reconstruction divides by in the end
        profile = sinc2_profile(self.box_px, self.padding, volume.device, volume.dtype)
        envelope = profile[:, None, None] * profile[None, :, None] * profile[None, None, :]
        volume = volume * envelope.square()  # once for FourierVolume, which divides by it
        return FourierVolume.from_volume(volume, self.padding, self.radius_px).grid.to(self.numerator)

    def _divide_numba(self, term: Tensor, floor: Tensor, first: int, last: int) -> Tensor:
        """Columns first..last of the quotient's transform: (P, P, last - first) complex64, origin at index 0."""
        from cryoiso.physics import _grid_kernels

        size = self.box_px * self.padding
        transform = np.zeros((size, size, last - first), np.complex64)
        _grid_kernels.divide(
            flat_pairs(self.numerator),
            self.weight.contiguous().view(-1).numpy(),
            self.weight.shape[0],
            self.padding,
            term.numpy(),
            floor.numpy(),
            np.float32(self.box_px),
            size,
            first,
            last,
            _flat(transform),
        )
        return torch.from_numpy(transform)

    def divide_torch(self, term: Tensor, floor: Tensor) -> Tensor:
        """The plain torch version of the CPU kernel: numerator / max(weight + term, floor) on the half-space grid.

        Args:
            term, floor: (radius+1,) one number per shell.
        """
        shell = self.shells()
        inside = (shell <= self.radius_px) & (self.weight > 0)
        shell = shell.clamp(max=self.radius_px)
        quotient = self.numerator / torch.maximum(self.weight + term[shell], floor[shell])
        return torch.where(inside, quotient, torch.zeros_like(quotient))


def _flat(values: np.ndarray) -> np.ndarray:
    """complex64 of any shape -> flat float32 view."""
    return values.reshape(-1).view(np.float32)


def half_space_to_volume(
    half_space: Complex[Tensor, "rows rows columns"], box_px: int, padding: int
) -> Float[Tensor, "{box_px} {box_px} {box_px}"]:
    """Inverse of FourierVolume.from_volume: centred half-space -> (D, D, D), gridding corrected."""
    return transform_to_volume(to_transform(half_space, box_px * padding) * box_px, box_px, padding)


def to_transform(
    half_space: Complex[Tensor, "rows rows columns"], size: int
) -> Complex[Tensor, "{size} {size} {size}//2+1"]:
    """Centred half-space -> (size, size, size//2+1) with its origin at index 0, zero beyond."""
    h = min((half_space.shape[0] - 1) // 2, (size - 1) // 2)
    cut = (half_space.shape[0] - 1) // 2 - h
    inner = half_space[cut : cut + 2 * h + 1, cut : cut + 2 * h + 1, : h + 1]
    index = torch.arange(-h, h + 1, device=half_space.device) % size
    full = torch.zeros(size, size, size // 2 + 1, dtype=half_space.dtype, device=half_space.device)
    full[index[:, None], index[None, :], : h + 1] = inner
    return full


def transform_to_volume(transform: Tensor, box_px: int, padding: int) -> Tensor:
    """(P, P, P//2+1) transform, P = padding D, origin at index 0 -> the inner (D, D, D), gridding corrected."""
    volume = to_volume(lambda first, last: transform[:, :, first:last], transform.shape[2], box_px, box_px * padding)
    return divide_by_gridding(volume, padding)


def rotate_half_space(
    numerator: Complex[Tensor, "rows rows columns"],
    weight: Float[Tensor, "rows rows columns"],
    operation: Float[np.ndarray, "3 3"],
) -> tuple[Complex[Tensor, "rows rows columns"], Float[Tensor, "rows rows columns"]]:
    """Trilinear rotation of Hermitian sums: new(k) = old(S k), zero outside the grid. Plane by plane, to save
    memory."""
    rows = numerator.shape[0]
    h = (rows - 1) // 2
    device = numerator.device
    s = torch.as_tensor(np.asarray(operation), dtype=torch.float32, device=device)
    axis = torch.arange(-h, h + 1, device=device, dtype=torch.float32)
    x = torch.arange(0, h + 1, device=device, dtype=torch.float32)
    y_grid, x_grid = torch.meshgrid(axis, x, indexing="ij")
    flat_n, flat_w = numerator.reshape(-1), weight.reshape(-1)
    out_n, out_w = torch.zeros_like(numerator), torch.zeros_like(weight)
    for i in range(rows):
        k = torch.stack([x_grid, y_grid, torch.full_like(x_grid, float(i - h))])
        k = torch.einsum("ab,byx->ayx", s, k)
        flip = k[0] < 0
        k = torch.where(flip, -k, k)
        inside = (k[0] < h - 1) & (k[1].abs() < h - 1) & (k[2].abs() < h - 1)
        k = k + torch.tensor([0.0, h, h], device=device)[:, None, None]
        low = torch.where(inside, k.floor(), torch.zeros_like(k))
        x0, y0, z0 = low.long()
        corner = (z0 * rows + y0) * (h + 1) + x0
        plane_n = torch.zeros_like(out_n[i])
        for offset, share in corner_shares(k - low, numerator.shape):
            share = torch.where(inside, share, torch.zeros_like(share))
            index = torch.where(inside, corner + offset, torch.zeros_like(corner))
            plane_n += flat_n[index] * share
            out_w[i] += flat_w[index] * share
        out_n[i] = torch.where(flip, plane_n.conj(), plane_n)
    return out_n, out_w
