"""Back-projection: insertion of slices into a Fourier grid, and the division that makes a map of it.

Sums are kept in fixed point (64-bit integers). Integer addition is associative, so the grid has the same bits whatever
the order of particles, the number of threads or of ranks. The unit 2^-32 is far below single precision for the whitened
values that are inserted (order 1 a coefficient), and leaves room for sums up to 2^31.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import CryoisoError
from cryoiso.physics.fourier import Disc, divide_by_gridding, sinc2_profile
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.project import (
    SAMPLES_AT_ONCE,
    FourierVolume,
    check_reach,
    corner_shares,
    flat_pairs,
    pairs,
    slice_corners,
)

UNIT = float(2**32)
MOST_SAMPLES = 2**24
"""Samples that are sorted at once: 28 B each."""
EDGE_PX = 3.0


@dataclass
class SliceAccumulator:
    """Numerator and weight of one half-set: (2h+1, 2h+1, h+1, 3) int64 (re, im, weight), h = padding * radius + 2."""

    grid: Tensor
    box_px: int
    padding: int
    radius_px: int
    bound: float = 0.0
    """Upper bound of any voxel's sum, to detect overflow."""
    _tile: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32), repr=False, compare=False)
    _sample: np.ndarray = field(default_factory=lambda: np.empty((0, 6), np.float32), repr=False, compare=False)

    @classmethod
    def empty(cls, box_px: int, radius_px: int | None = None, padding: int = 2, device="cpu") -> SliceAccumulator:
        radius = min(radius_px or (box_px - 1) // 2, (box_px - 1) // 2)
        h = padding * radius + 2
        shape = (2 * h + 1, 2 * h + 1, h + 1, 3)
        if torch.device(device).type == "cpu":
            grid = torch.from_numpy(np.zeros(shape, np.int64))  # numpy asks the system for huge pages, torch does not
        else:
            grid = torch.zeros(shape, dtype=torch.int64, device=device)
        return cls(grid, box_px, padding, radius)

    def clear(self) -> None:
        """Makes it empty again; its memory is there already, which new memory is not."""
        self.grid.zero_()
        self.bound = 0.0

    def insert(self, data: Tensor, weight: Tensor, rotation: Tensor, where: Disc) -> None:
        """Adds slices.

        Args:
            data: (J, K) complex: CTF-weighted, centred coefficients (over the noise variance).
            weight: (J, K) real: CTF^2 (over the noise variance), times the posterior weight.
            rotation: (J, 3, 3); ``where`` must hold each Friedel pair once.
        """
        if data.numel() == 0:
            return
        if self.grid.device.type == "cpu":
            self._insert_numba(data, weight, rotation, where)
            return
        step = max(1, SAMPLES_AT_ONCE // max(where.size, 1))
        for part in zip(data.split(step), weight.split(step), rotation.split(step), strict=True):
            self.insert_torch(*part, where)

    def _insert_numba(self, data: Tensor, weight: Tensor, rotation: Tensor, where: Disc) -> None:
        import numba

        from cryoiso.physics import _kernels

        rot = np.ascontiguousarray(rotation.numpy(), np.float32)
        check_reach(rot, where, self.padding, self.grid.shape[0])
        flat, values = self.grid.view(-1).numpy(), np.ascontiguousarray(weight.numpy(), np.float32)
        step = self._working_space(len(rot), where.size)
        for i in range(0, len(rot), step):
            part = slice(i, i + step)
            self.bound += 8 * _kernels.insert_slices(
                flat,
                self.grid.shape[0],
                rot[part],
                where.ky,
                where.kx,
                np.float32(self.padding),
                pairs(data[part].to(torch.complex64)),
                values[part],
                np.float32(UNIT),
                numba.get_num_threads(),
                self._tile,
                self._sample,
            )

    def _working_space(self, slices: int, size: int) -> int:
        """Makes the room that samples are sorted in: 28 B for every second voxel of the grid at most.

        Returns:
            the number of slices that fit.
        """
        most = max(size, min(self.grid.numel() // 6, MOST_SAMPLES))
        samples = min(slices * size, most // size * size)
        if len(self._tile) < samples:
            self._tile = np.empty(samples, np.int32)
            self._sample = np.empty((samples, 6), np.float32)
        return len(self._tile) // size

    def insert_torch(self, data: Tensor, weight: Tensor, rotation: Tensor, where: Disc) -> None:
        """The plain torch twin of the CPU kernel, for GPUs and as its reference."""
        largest = torch.maximum(torch.maximum(data.real.abs(), data.imag.abs()), weight).amax(dim=1)
        self.bound += 8 * float(largest.double().sum())
        corner, fraction, flip = slice_corners(rotation.float(), where, self.padding, self.grid.shape[0])
        data = torch.where(flip, data.conj(), data)
        rows = torch.stack([data.real, data.imag, weight.to(data.real.dtype)], dim=-1) * UNIT
        flat = self.grid.view(-1, 3)
        for offset, share in corner_shares(fraction, self.grid.shape[:3]):
            flat.index_add_(0, (corner + offset).reshape(-1), (rows * share[..., None]).to(torch.int64).reshape(-1, 3))

    def finish(self) -> FourierSums:
        """Converts the sums to floating point, with the x = 0 plane made whole by its Friedel mates.

        Raises:
            CryoisoError: if the sums may have overflowed.
        """
        if self.bound * UNIT >= 2.0**63:
            raise CryoisoError(
                f"the back-projection sums reach {self.bound:.3g}, beyond the fixed-point range of "
                f"{2.0**63 / UNIT:.3g}. The images are not normalised; ingest them with normalise = true."
            )
        if self.grid.device.type == "cpu":
            return self._finish_numba()
        return self.finish_torch()

    def _finish_numba(self) -> FourierSums:
        from cryoiso.physics import _grid_kernels

        shape = tuple(self.grid.shape[:3])
        numerator, weight = np.empty(shape, np.complex64), np.empty(shape, np.float32)
        _grid_kernels.to_float(self.grid.view(-1).numpy(), shape[0], UNIT, _flat(numerator), weight.reshape(-1))
        return FourierSums(
            torch.from_numpy(numerator), torch.from_numpy(weight), self.box_px, self.padding, self.radius_px
        )

    def finish_torch(self) -> FourierSums:
        """The plain torch twin of the CPU kernel, for GPUs and as its reference."""
        grid = self.grid
        plane = grid[:, :, 0, :]
        mate = plane.flip(0, 1) * torch.tensor([1, -1, 1], dtype=torch.int64, device=grid.device)
        whole = torch.cat([(plane + mate)[:, :, None], grid[:, :, 1:]], dim=2).to(torch.float64) / UNIT
        numerator = torch.complex(whole[..., 0].float(), whole[..., 1].float())
        return FourierSums(numerator, whole[..., 2].float(), self.box_px, self.padding, self.radius_px)


@dataclass(frozen=True)
class FourierSums:
    """Reduced sums of one half-set on the padded half-space grid."""

    numerator: Tensor
    """(2h+1, 2h+1, h+1) complex64."""
    weight: Tensor
    """(2h+1, 2h+1, h+1) float32."""
    box_px: int
    padding: int
    radius_px: int

    def shells(self) -> Tensor:
        """(2h+1, 2h+1, h+1) int64: radius in units of the unpadded grid, nearest shell."""
        h = (self.weight.shape[0] - 1) // 2
        z = torch.arange(-h, h + 1, device=self.weight.device, dtype=torch.float32)
        x = torch.arange(0, h + 1, device=self.weight.device, dtype=torch.float32)
        r = torch.sqrt(z[:, None, None] ** 2 + z[None, :, None] ** 2 + x[None, None, :] ** 2)
        return torch.round(r / self.padding).long()

    def shell_mean_weight(self) -> Tensor:
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

    def symmetrised(self, operations: np.ndarray) -> FourierSums:
        """Adds the copies rotated by every operation of the point group (g, 3, 3), by trilinear interpolation."""
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

    def reconstruct(self, inverse_ssnr: Tensor | None = None) -> Tensor:
        """The map (D, D, D) float32: numerator / (weight + Wiener term), inverse transform, gridding correction.

        Zero outside the sphere of diameter D (soft edge of ``EDGE_PX``): what lies beyond leaves the image in some
        views, and there the gridding correction amplifies the noise most.

        Args:
            inverse_ssnr: (>= radius+1,) 1/SSNR a shell; the Wiener term is the shell's mean weight times it. Without
                it, weights are only kept from vanishing (a thousandth of their shell's mean).
        """
        mean = self.shell_mean_weight()[: self.radius_px + 1].float()
        floor = (mean * 1e-3).clamp(min=float(mean.max()) * 1e-9 + 1e-30)
        term = torch.zeros_like(mean) if inverse_ssnr is None else mean * inverse_ssnr[: self.radius_px + 1].to(mean)
        if self.weight.device.type == "cpu":
            transform = self._divide_numba(term, floor)
        else:
            transform = to_transform(self.divide_torch(term, floor), self.box_px * self.padding) * self.box_px
        volume = transform_to_volume(transform, self.box_px, self.padding)
        return volume * sphere_mask(self.box_px, self.box_px / 2, EDGE_PX, device=volume.device, dtype=volume.dtype)

    def completed(self, prior: Tensor, inverse_ssnr: Tensor) -> FourierSums:
        """These sums with a prior map added at the weight of the Wiener term: what was measured well is data, what was
        not is prior (the posterior mean under a Gaussian prior about that map).

        Args:
            prior: (D, D, D) map on the data's grey scale.
            inverse_ssnr: (>= radius+1,) 1/SSNR a shell.
        """
        mean = self.shell_mean_weight()[: self.radius_px + 1].to(self.weight)
        term = (mean * inverse_ssnr[: self.radius_px + 1].to(mean))[self.shells().clamp(max=self.radius_px)]
        numerator = self.numerator + term * self.sampled(prior)
        return FourierSums(numerator, self.weight + term, self.box_px, self.padding, self.radius_px)

    def sampled(self, volume: Tensor) -> Tensor:
        """The transform of a map (D, D, D) where these sums have voxels, as insertion of its slices would see it."""
        # insertion spreads by the interpolation kernel, whose envelope the reconstruction divides by in the end
        profile = sinc2_profile(self.box_px, self.padding, volume.device, volume.dtype)
        envelope = profile[:, None, None] * profile[None, :, None] * profile[None, None, :]
        volume = volume * envelope.square()  # once for FourierVolume, which divides by it
        return FourierVolume.from_volume(volume, self.padding, self.radius_px).grid.to(self.numerator)

    def _divide_numba(self, term: Tensor, floor: Tensor) -> Tensor:
        from cryoiso.physics import _grid_kernels

        size = self.box_px * self.padding
        transform = np.zeros((size, size, size // 2 + 1), np.complex64)
        _grid_kernels.divide(
            flat_pairs(self.numerator),
            self.weight.contiguous().view(-1).numpy(),
            self.weight.shape[0],
            self.padding,
            term.numpy(),
            floor.numpy(),
            np.float32(self.box_px),
            size,
            _flat(transform),
        )
        return torch.from_numpy(transform)

    def divide_torch(self, term: Tensor, floor: Tensor) -> Tensor:
        """The plain torch twin of the CPU kernel: numerator / max(weight + term, floor) on the half-space grid.

        Args:
            term, floor: (radius+1,) a number a shell.
        """
        shell = self.shells()
        inside = (shell <= self.radius_px) & (self.weight > 0)
        shell = shell.clamp(max=self.radius_px)
        quotient = self.numerator / torch.maximum(self.weight + term[shell], floor[shell])
        return torch.where(inside, quotient, torch.zeros_like(quotient))


def _flat(values: np.ndarray) -> np.ndarray:
    """complex64 of any shape -> flat float32 view."""
    return values.reshape(-1).view(np.float32)


def half_space_to_volume(half_space: Tensor, box_px: int, padding: int) -> Tensor:
    """Inverse of what FourierVolume.from_volume does: centred half-space -> (D, D, D), gridding corrected."""
    return transform_to_volume(to_transform(half_space, box_px * padding) * box_px, box_px, padding)


def to_transform(half_space: Tensor, size: int) -> Tensor:
    """Centred half-space -> (size, size, size//2+1) with its origin at index 0, zero beyond."""
    h = min((half_space.shape[0] - 1) // 2, (size - 1) // 2)
    cut = (half_space.shape[0] - 1) // 2 - h
    inner = half_space[cut : cut + 2 * h + 1, cut : cut + 2 * h + 1, : h + 1]
    index = torch.arange(-h, h + 1, device=half_space.device) % size
    full = torch.zeros(size, size, size // 2 + 1, dtype=half_space.dtype, device=half_space.device)
    full[index[:, None], index[None, :], : h + 1] = inner
    return full


def transform_to_volume(transform: Tensor, box_px: int, padding: int) -> Tensor:
    """(P, P, P//2+1) transform, P = padding D, origin at index 0 -> the inner (D, D, D), gridding corrected.

    Axis by axis, keeping only what is inside: less than half the work of the whole transform.
    """
    size = box_px * padding
    inner = (torch.arange(box_px, device=transform.device) - box_px // 2) % size
    volume = torch.fft.ifft(transform, dim=0)[inner]
    volume = torch.fft.ifft(volume, dim=1)[:, inner]
    volume = torch.fft.irfft(volume, n=size, dim=2)[:, :, inner]
    return divide_by_gridding(volume, padding)


def rotate_half_space(numerator: Tensor, weight: Tensor, operation: np.ndarray) -> tuple[Tensor, Tensor]:
    """Trilinear rotation of Hermitian sums: new(k) = old(S k), zero outside the grid. Works plane by plane to stay
    small."""
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
