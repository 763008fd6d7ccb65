"""Back-projection: insertion of slices into a Fourier grid, and the division that makes a map of it.

Sums are kept in fixed point (64-bit integers). Integer addition is associative, so the grid has the same bits whatever
the order of particles, the number of threads or of ranks. The unit 2^-32 is far below single precision for the whitened
values that are inserted (order 1 a coefficient), and leaves room for sums up to 2^31.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import CryoisoError
from cryoiso.physics.fourier import Disc, divide_by_gridding, pad_volume
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.project import check_reach, corner_shares, pairs, slice_corners

UNIT = float(2**32)
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

    @classmethod
    def empty(cls, box_px: int, radius_px: int | None = None, padding: int = 2, device="cpu") -> SliceAccumulator:
        radius = min(radius_px or (box_px - 1) // 2, (box_px - 1) // 2)
        h = padding * radius + 2
        return cls(
            torch.zeros(2 * h + 1, 2 * h + 1, h + 1, 3, dtype=torch.int64, device=device), box_px, padding, radius
        )

    def insert(self, data: Tensor, weight: Tensor, rotation: Tensor, where: Disc) -> None:
        """Adds slices.

        Args:
            data: (J, K) complex: CTF-weighted, centred coefficients (over the noise variance).
            weight: (J, K) real: CTF^2 (over the noise variance), times the posterior weight.
            rotation: (J, 3, 3); ``where`` must hold each Friedel pair once.
        """
        if data.numel() == 0:
            return
        largest = torch.maximum(data.abs(), weight).amax(dim=1).double().sum()
        self.bound += 8 * float(largest)
        if self.grid.device.type == "cpu":
            self._insert_numba(data, weight, rotation, where)
        else:
            self.insert_torch(data, weight, rotation, where)

    def _insert_numba(self, data: Tensor, weight: Tensor, rotation: Tensor, where: Disc) -> None:
        import numba

        from cryoiso.physics import _kernels

        rot = np.ascontiguousarray(rotation.numpy(), np.float32)
        check_reach(rot, where, self.padding, self.grid.shape[0])
        _kernels.insert_slices(
            self.grid.view(-1).numpy(),
            self.grid.shape[0],
            rot,
            where.ky,
            where.kx,
            np.float32(self.padding),
            pairs(data.to(torch.complex64)),
            np.ascontiguousarray(weight.numpy(), np.float32),
            np.float32(UNIT),
            numba.get_num_threads(),
        )

    def insert_torch(self, data: Tensor, weight: Tensor, rotation: Tensor, where: Disc) -> None:
        """The plain torch twin of the CPU kernel, for GPUs and as its reference."""
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
        shell = self.shells().clamp(max=self.radius_px + 1).reshape(-1)
        total = torch.bincount(shell, self.weight.reshape(-1).double(), minlength=self.radius_px + 2)
        return total / torch.bincount(shell, minlength=self.radius_px + 2).clamp(min=1)

    def symmetrised(self, operations: np.ndarray) -> FourierSums:
        """Adds the copies rotated by every operation of the point group (g, 3, 3), by trilinear interpolation."""
        if len(operations) == 1:
            return self
        numerator, weight = self.numerator.clone(), self.weight.clone()
        for operation in operations[1:]:
            rotated_n, rotated_w = rotate_half_space(self.numerator, self.weight, operation)
            numerator += rotated_n
            weight += rotated_w
        return FourierSums(numerator, weight, self.box_px, self.padding, self.radius_px)

    def reconstruct(self, inverse_ssnr: Tensor | None = None) -> Tensor:
        """The map (D, D, D) float32: numerator / (weight + Wiener term), inverse transform, gridding correction.

        Zero outside the sphere of diameter D (soft edge of ``EDGE_PX``): what lies beyond leaves the image in some views,
        and there the gridding correction amplifies the noise most.

        Args:
            inverse_ssnr: (>= radius+1,) 1/SSNR a shell; the Wiener term is the shell's mean weight times it. Without
            it,
                weights are only kept from vanishing (a thousandth of their shell's mean).
        """
        shell = self.shells()
        inside = shell <= self.radius_px
        shell = shell.clamp(max=self.radius_px)
        mean = self.shell_mean_weight()[: self.radius_px + 1].float()
        floor = (mean * 1e-3).clamp(min=float(mean.max()) * 1e-9 + 1e-30)
        denominator = self.weight
        if inverse_ssnr is not None:
            term = mean * inverse_ssnr[: self.radius_px + 1].to(mean)
            denominator = denominator + term[shell]
        quotient = self.numerator / torch.maximum(denominator, floor[shell])
        quotient = torch.where(inside & (self.weight > 0), quotient, torch.zeros_like(quotient))
        volume = half_space_to_volume(quotient, self.box_px, self.padding)
        return volume * sphere_mask(self.box_px, self.box_px / 2, EDGE_PX, device=volume.device, dtype=volume.dtype)


def half_space_to_volume(half_space: Tensor, box_px: int, padding: int) -> Tensor:
    """Inverse of what FourierVolume.from_volume does: centred half-space -> (D, D, D), gridding corrected."""
    size = box_px * padding
    h = min((half_space.shape[0] - 1) // 2, (size - 1) // 2)
    cut = (half_space.shape[0] - 1) // 2 - h
    inner = half_space[cut : cut + 2 * h + 1, cut : cut + 2 * h + 1, : h + 1]
    index = torch.arange(-h, h + 1, device=half_space.device) % size
    full = torch.zeros(size, size, size // 2 + 1, dtype=half_space.dtype, device=half_space.device)
    full[index[:, None], index[None, :], : h + 1] = inner
    volume = torch.fft.fftshift(torch.fft.irfftn(full * box_px, s=(size,) * 3, dim=(0, 1, 2)))
    return divide_by_gridding(pad_volume(volume, box_px), padding)


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
