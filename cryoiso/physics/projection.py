"""Central-slice projection: an image's transform is a plane through the volume's transform (Fourier slice theorem).

Trilinear interpolation on a grid padded by 2; the volume is divided by the interpolation's sinc^2 envelope beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.shapes import require_cube, require_rotations
from cryoiso.physics.fourier import Disc, divide_by_gridding, fourier_disc, fourier_to_images, pad_volume, shift_phases
from cryoiso.physics.padded_transform import to_half_space

if TYPE_CHECKING:
    from jaxtyping import Bool, Complex, Float, Int

SAMPLES_AT_ONCE = 1 << 23
"""Samples processed at once by the torch path: the eight corners' temporaries are some hundred bytes per sample."""


@dataclass(frozen=True)
class FourierVolume:
    """Half-space transform of a volume inside a radius, scaled so that its slices match orthonormal image
    transforms."""

    grid: Complex[Tensor, "rows rows columns"]
    """(2h+1, 2h+1, h+1) complex (z, y, x), origin at (h, h, 0), h = padding * radius + 2."""
    box_px: int
    padding: int
    radius_px: int

    @classmethod
    def from_volume(
        cls, volume: Float[Tensor, "box box box"], padding: int = 2, radius_px: int | None = None
    ) -> FourierVolume:
        """Prepare a volume (D, D, D) real for slicing up to radius_px (default: inside Nyquist).

        Raises:
            InputError: the volume is not a cube.
        """
        box = require_cube(volume)
        radius = min(radius_px or (box - 1) // 2, (box - 1) // 2)
        h = padding * radius + 2
        if not (volume.requires_grad and torch.is_grad_enabled()):
            return cls(to_half_space(divide_by_gridding(volume, padding) / box, padding * box, h), box, padding, radius)
        padded = pad_volume(divide_by_gridding(volume, padding), box * padding)
        transform = torch.fft.rfftn(torch.fft.ifftshift(padded), dim=(0, 1, 2)) / box
        return cls(_crop_half_space(transform, h), box, padding, radius)

    def slices(self, rotation: Float[Tensor, "n 3 3"], disc: Disc) -> Complex[Tensor, "n k"]:
        """Central slices at the coefficients of ``disc``.

        Args:
            rotation: (J, 3, 3); map coordinates -> image coordinates (a 2x2 magnification may be multiplied in before,
                see :func:`magnified`).

        Returns:
            (J, K) complex, before CTF and shift.
        """
        needs_grad = torch.is_grad_enabled() and (rotation.requires_grad or self.grid.requires_grad)
        if self.grid.device.type == "cpu" and self.grid.dtype == torch.complex64 and not needs_grad:
            return self._slices_numba(rotation, disc)
        if needs_grad:
            return self.slices_torch(rotation, disc)
        step = max(1, SAMPLES_AT_ONCE // max(disc.size, 1))
        return torch.cat([self.slices_torch(part, disc) for part in rotation.split(step)])

    def _slices_numba(self, rotation: Tensor, disc: Disc) -> Tensor:
        from cryoiso.physics import _kernels

        rot = np.ascontiguousarray(rotation.detach().numpy(), np.float32)
        check_reach(rot, disc, self.padding, self.grid.shape[0])
        out = torch.empty(len(rot), disc.size, dtype=torch.complex64)
        _kernels.extract_slices(
            flat_pairs(self.grid), self.grid.shape[0], rot, disc.ky, disc.kx, disc.neighbours,
            np.float32(self.padding), pairs(out),
        )  # fmt: skip
        return out

    def slices_torch(self, rotation: Float[Tensor, "n 3 3"], disc: Disc) -> Complex[Tensor, "n k"]:
        """The plain torch version of the CPU kernel: any device and precision, differentiable in grid and rotation."""
        corner, fraction, flip = slice_corners(
            rotation.to(self.grid.real.dtype), disc, self.padding, self.grid.shape[0]
        )
        value = torch.zeros(flip.shape, dtype=self.grid.dtype, device=self.grid.device)
        flat = self.grid.reshape(-1)
        for offset, share in corner_shares(fraction, self.grid.shape):
            value = value + flat[corner + offset] * share
        return torch.where(flip, value.conj(), value)


def check_reach(rotation: Float[np.ndarray, "n 3 3"], disc: Disc, padding: int, grid_rows: int) -> None:
    """Refuse samples beyond the grid, and NaN, for which the CPU kernels would access memory out of bounds.

    Args:
        rotation: (J, 3, 3), possibly magnified: the largest singular value of the upper two rows is the magnification.

    Raises:
        CryoisoError: magnification times radius exceeds the grid.
    """
    if not len(rotation) or not disc.size:
        return
    x, y = rotation[:, 0].astype(np.float64), rotation[:, 1].astype(np.float64)
    xx, yy, xy = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
    largest = float(np.sqrt((xx + yy) / 2 + np.hypot((xx - yy) / 2, xy)).max())
    radius = float(np.hypot(disc.ky, disc.kx).max())
    if not padding * radius * largest < (grid_rows - 1) // 2:
        raise CryoisoError(
            f"slices reach to {radius * largest:.1f} Fourier pixels but the grid ends at "
            f"{((grid_rows - 1) // 2 - 2) / padding:g}. Cut the frequencies of magnified images first.",
            code="grid-too-coarse",
        )


def pairs(values: Complex[Tensor, "n k"]) -> Float[np.ndarray, "n 2*k"]:
    """(J, K) complex64 on the CPU -> (J, 2K) float32 view, the layout of the kernels."""
    return torch.view_as_real(values.contiguous()).numpy().reshape(len(values), -1)


def flat_pairs(grid: Complex[Tensor, " ..."]) -> Float[np.ndarray, " numbers"]:
    """Any complex64 tensor on the CPU -> flat float32 view."""
    return torch.view_as_real(grid.contiguous()).numpy().reshape(-1)


def _crop_half_space(transform: Tensor, h: int) -> Tensor:
    """rfft layout (P, P, P//2+1) -> centred half-space (2h+1, 2h+1, h+1), zero beyond the transform."""
    size = transform.shape[0]
    h_in = min(h, (size - 1) // 2)
    index = torch.arange(-h_in, h_in + 1, device=transform.device) % size
    inner = transform[index][:, index][:, :, : h_in + 1]
    e = h - h_in
    return torch.nn.functional.pad(inner, (0, e, e, e, e, e)).contiguous() if e else inner.contiguous()


def slice_corners(
    rotation: Float[Tensor, "n 3 3"], disc: Disc, padding: int, grid_rows: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "3 n k"], Bool[Tensor, "n k"]]:
    """Lower corner (flat index), fractions (3, J, K) as (x, y, z) and the Friedel flag of each sample of each slice."""
    device, dtype = rotation.device, rotation.dtype
    there = disc.on(device)
    ky, kx = there.ky.to(dtype), there.kx.to(dtype)
    h = (grid_rows - 1) // 2
    # (3, J, K): k3 = A^T (kx, ky, 0), so component a is kx * A[0, a] + ky * A[1, a]
    k3 = padding * (rotation[:, 0, :].T[:, :, None] * kx + rotation[:, 1, :].T[:, :, None] * ky)
    flip = k3[0] < 0
    k3 = torch.where(flip, -k3, k3)
    origin = torch.tensor([0.0, h, h], device=device, dtype=dtype)[:, None, None]
    k3 = k3 + origin
    low = k3.detach().floor()
    x0, y0, z0 = low.long()
    return (z0 * grid_rows + y0) * (h + 1) + x0, k3 - low, flip


def corner_shares(
    fraction: Float[Tensor, "3 n k"], shape: torch.Size | tuple[int, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (flat offset, trilinear share) of the eight corners."""
    fx, fy, fz = fraction
    row = shape[2]
    for dz, wz in ((0, 1 - fz), (1, fz)):
        for dy, wy in ((0, 1 - fy), (1, fy)):
            for dx, wx in ((0, 1 - fx), (1, fx)):
                yield (dz * shape[1] + dy) * row + dx, wz * wy * wx


def magnified(rotation: Float[Tensor, "n 3 3"], matrix: Float[Tensor, "2 2"]) -> Float[Tensor, "n 3 3"]:
    """Rotations that sample a slice at frequencies M k (2x2 M: anisotropic magnification or a ratio of pixel sizes).

    A^T (M k, 0) = (M^T A[:2])^T k, so the first two rows are replaced by M^T A[:2].
    """
    top = torch.einsum("ba,jbc->jac", matrix.to(rotation), rotation[:, :2])
    return torch.cat([top, rotation[:, 2:]], dim=1)


def project(
    volume: Float[Tensor, "box box box"],
    rotation: Float[Tensor, "n 3 3"],
    shift_A: Float[Tensor, "n 2"] | None = None,
    pixel_size_A: float = 1.0,
    padding: int = 2,
) -> Float[Tensor, "n box box"]:
    """Real-space projections of a map.

    Args:
        volume: (D, D, D) real.
        rotation: (n, 3, 3), map -> image coordinates.
        shift_A: (n, 2) RELION origins (the content lands at minus this from pixel D//2), or None.

    Returns:
        (n, D, D) real, band-limited to the Nyquist circle, differentiable in volume, rotation and shift.

    Raises:
        InputError: a shape is another.
    """
    box, n = require_cube(volume), require_rotations(rotation)
    if shift_A is not None and tuple(shift_A.shape) != (n, 2):
        raise InputError(
            "a shift for each rotation", expected=(n, 2), found=tuple(shift_A.shape), code="arrays-do-not-fit"
        )
    disc = fourier_disc(box, (box - 1) // 2, with_dc=True)
    slices = FourierVolume.from_volume(volume, padding).slices(rotation.to(volume.dtype), disc)
    if shift_A is not None:
        ky, kx = disc.frequencies(1.0)
        phases = shift_phases(ky.to(shift_A), kx.to(shift_A), -shift_A / pixel_size_A)
        slices = slices * phases.to(slices.dtype)
    return fourier_to_images(scatter_to_half_plane(slices, disc), box)


def scatter_to_half_plane(values: Complex[Tensor, "n k"], disc: Disc) -> Complex[Tensor, "n box columns"]:
    """(n, K) -> (n, D, D//2+1), the Friedel mates of the kx = 0 column filled in, zero elsewhere."""
    n, box = values.shape[0], disc.box_px
    columns = box // 2 + 1
    there = disc.on(values.device)
    index = there.flat
    plane = torch.zeros(n, box * columns, dtype=values.dtype, device=values.device)
    plane = plane.index_copy(1, index, values)
    on_axis = (there.kx == 0) & (there.ky > 0)
    mates = (box - index[on_axis] // columns) * columns
    return plane.index_copy(1, mates, values[:, on_axis].conj()).reshape(n, box, columns)
