"""Back-projection: insertion of slices into a Fourier grid.

Sums are in fixed point (64-bit integers). Integer addition is associative, so the grid has the same bits for any order
of particles and any number of threads or ranks. The unit 2^-32 is far below single precision for the whitened values
that are inserted (of order 1 per coefficient), and leaves room for sums up to 2^31.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import CryoisoError
from cryoiso.physics import gpu_kernels
from cryoiso.physics.fourier import Disc
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.projection import SAMPLES_AT_ONCE, check_reach, corner_shares, pairs, slice_corners

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int

UNIT = float(2**32)
MOST_SAMPLES = 2**23
"""Samples that are sorted at once: 28 B each."""
RELEASED_VOXELS = 2**21
"""Voxels that are converted at once, before their memory, 24 B each, is released."""


def _mapped(size: int) -> mmap.mmap:
    """Zeros of the system's, in huge pages where it has them, which can be returned in parts."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@dataclass
class SliceAccumulator:
    """Numerator and weight of one half-set: (2h+1, 2h+1, h+1, 3) int64 (re, im, weight), h = padding * radius + 2."""

    grid: Int[Tensor, "rows rows columns 3"]
    box_px: int
    padding: int
    radius_px: int
    bound: float = 0.0
    """Upper bound of any voxel's sum, to detect overflow."""
    _memory: mmap.mmap | None = field(default=None, repr=False, compare=False)
    """Of the grid on a CPU."""
    _tile: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32), repr=False, compare=False)
    _sample: np.ndarray = field(default_factory=lambda: np.empty((0, 6), np.float32), repr=False, compare=False)

    @classmethod
    def empty(
        cls, box_px: int, radius_px: int | None = None, padding: int = 2, device: str | torch.device = "cpu"
    ) -> SliceAccumulator:
        radius = min(radius_px or (box_px - 1) // 2, (box_px - 1) // 2)
        h = padding * radius + 2
        shape = (2 * h + 1, 2 * h + 1, h + 1, 3)
        if torch.device(device).type != "cpu":
            return cls(torch.zeros(shape, dtype=torch.int64, device=device), box_px, padding, radius)
        memory = _mapped(8 * math.prod(shape))
        grid = torch.from_numpy(np.frombuffer(memory, np.int64).reshape(shape))
        return cls(grid, box_px, padding, radius, _memory=memory)

    def clear(self) -> None:
        """Reset to zero, reusing the memory: newly allocated memory would have to be mapped first."""
        self.grid.zero_()
        self.bound = 0.0

    def discard(self) -> None:
        """Give up the grid and the working space."""
        self.grid, self._memory = torch.empty(0), None
        self._tile, self._sample = np.empty(0, np.int32), np.empty((0, 6), np.float32)

    def insert(
        self, data: Complex[Tensor, "n k"], weight: Float[Tensor, "n k"], rotation: Float[Tensor, "n 3 3"], disc: Disc
    ) -> None:
        """Add slices.

        Args:
            data: (J, K) complex: CTF-weighted, centred coefficients (over the noise variance).
            weight: (J, K) real: CTF^2 (over the noise variance), times the posterior weight.
            rotation: (J, 3, 3); ``disc`` must contain each Friedel pair once.
        """
        if data.numel() == 0:
            return
        if self.grid.device.type == "cpu":
            self._insert_numba(data, weight, rotation, disc)
            return
        module = gpu_kernels.kernels_for("insert_slices", self.grid)
        if module is not None:
            self.bound += _bound(data, weight)
            gpu_kernels.insert_slices(module, self.grid, disc, data, weight, rotation, self.padding, UNIT)
            return
        step = max(1, SAMPLES_AT_ONCE // max(disc.size, 1))
        for part in zip(data.split(step), weight.split(step), rotation.split(step), strict=True):
            self.insert_torch(*part, disc)

    def _insert_numba(self, data: Tensor, weight: Tensor, rotation: Tensor, disc: Disc) -> None:
        import numba

        from cryoiso.physics import _kernels

        rot = np.ascontiguousarray(rotation.numpy(), np.float32)
        check_reach(rot, disc, self.padding, self.grid.shape[0])
        flat, values = self.grid.view(-1).numpy(), np.ascontiguousarray(weight.numpy(), np.float32)
        step = self._working_space(len(rot), disc.size)
        for i in range(0, len(rot), step):
            part = slice(i, i + step)
            self.bound += 8 * _kernels.insert_slices(
                flat,
                self.grid.shape[0],
                rot[part],
                disc.ky,
                disc.kx,
                np.float32(self.padding),
                pairs(data[part].to(torch.complex64)),
                values[part],
                np.float32(UNIT),
                numba.get_num_threads(),
                self._tile,
                self._sample,
            )

    def _working_space(self, slices: int, size: int) -> int:
        """Make the room that samples are sorted in: 28 B for every second voxel of the grid at most.

        Returns:
            the number of slices that fit.
        """
        most = max(size, min(self.grid.numel() // 6, MOST_SAMPLES))
        samples = min(slices * size, most // size * size)
        if len(self._tile) < samples:
            self._tile = np.empty(samples, np.int32)
            self._sample = np.empty((samples, 6), np.float32)
        return len(self._tile) // size

    def insert_torch(
        self, data: Complex[Tensor, "n k"], weight: Float[Tensor, "n k"], rotation: Float[Tensor, "n 3 3"], disc: Disc
    ) -> None:
        """The plain torch version of the CPU kernel, for GPUs and as its reference."""
        self.bound += _bound(data, weight)
        corner, fraction, flip = slice_corners(rotation.float(), disc, self.padding, self.grid.shape[0])
        data = torch.where(flip, data.conj(), data)
        rows = torch.stack([data.real, data.imag, weight.to(data.real.dtype)], dim=-1) * UNIT
        flat = self.grid.view(-1, 3)
        for offset, share in corner_shares(fraction, self.grid.shape[:3]):
            flat.index_add_(0, (corner + offset).reshape(-1), (rows * share[..., None]).to(torch.int64).reshape(-1, 3))

    def finish(self, *, release: bool = False) -> FourierSums:
        """Convert the sums to floating point, with the x = 0 plane completed by its Friedel mates.

        Args:
            release: give the grid's memory back plane by plane, on CPUs; afterwards it is empty. Grid and result are
                then never both in memory.

        Raises:
            CryoisoError: if the sums may have overflowed.
        """
        if self.bound * UNIT >= 2.0**63:
            raise CryoisoError(
                f"the back-projection sums reach {self.bound:.3g}, beyond the fixed-point range of "
                f"{2.0**63 / UNIT:.3g}. The images are not normalised; ingest them with normalise = true.",
                code="images-not-normalised",
            )
        if self.grid.device.type == "cpu":
            return self._finish_numba(release)
        return self.finish_torch()

    def _finish_numba(self, release: bool) -> FourierSums:
        from cryoiso.physics import _grid_kernels

        shape = tuple(self.grid.shape[:3])
        numerator, weight = np.empty(shape, np.complex64), np.empty(shape, np.float32)
        pairs_of = numerator.reshape(-1).view(np.float32)
        mates = self.grid[:, :, 0].contiguous().view(-1).numpy().copy()
        step = max(1, RELEASED_VOXELS // (shape[1] * shape[2])) if release else shape[0]
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            flat = self.grid.view(-1).numpy()
            _grid_kernels.to_float(flat, mates, shape[0], first, last, UNIT, pairs_of, weight.reshape(-1))
            if release:
                self._release(last)
        return FourierSums(
            torch.from_numpy(numerator), torch.from_numpy(weight), self.box_px, self.padding, self.radius_px
        )

    def _release(self, planes: int) -> None:
        """Return the memory of the first planes to the system, where it is this object's own."""
        if self._memory is None or np.frombuffer(self._memory, np.int64).ctypes.data != self.grid.data_ptr():
            return
        end = planes * self.grid[0].numel() * 8 // mmap.PAGESIZE * mmap.PAGESIZE
        if end and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, 0, end)

    def finish_torch(self) -> FourierSums:
        """The plain torch version of the CPU kernel, for GPUs and as its reference."""
        grid = self.grid
        plane = grid[:, :, 0, :]
        plane = plane + plane.flip(0, 1) * torch.tensor([1, -1, 1], dtype=torch.int64, device=grid.device)
        numerator = torch.empty(grid.shape[:3], dtype=torch.complex64, device=grid.device)
        weight = torch.empty(grid.shape[:3], device=grid.device)
        step = max(1, RELEASED_VOXELS // plane[0].shape[0] ** 2)
        for i in range(0, len(grid), step):
            part = grid[i : i + step].clone()
            part[:, :, 0] = plane[i : i + step]
            values = (part.to(torch.float64) / UNIT).float()
            numerator[i : i + step] = torch.complex(values[..., 0], values[..., 1])
            weight[i : i + step] = values[..., 2]
        return FourierSums(numerator, weight, self.box_px, self.padding, self.radius_px)


def _bound(data: Complex[Tensor, "n k"], weight: Float[Tensor, "n k"]) -> float:
    """What these slices may add to any voxel at most."""
    largest = torch.maximum(torch.maximum(data.real.abs(), data.imag.abs()), weight).amax(dim=1)
    return 8 * float(largest.double().sum())
