"""Particle images in the form used by the likelihood: Fourier coefficients inside a radius with their CTF, in fixed
batches.

Batches follow from the source's row order alone, never from the number of ranks, so that every matrix product has the
same shape wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.allocator import return_free_memory
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.physics.contrast_transfer import beam_tilt_phase, ctf_for
from cryoiso.physics.ctf_applied import divide_by_ctf
from cryoiso.physics.fourier import Disc, fourier_disc, images_to_fourier

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int, Shaped

BATCH_IMAGES = 128
KEPT_ON_CPU = 1 << 30
READS_BETWEEN_RETURNS = 8
"""Batches read between two returns of free memory to the system; the work on a batch frees some tens of MB."""
KEPT_SHARE_OF_GPU = 0.4
"""Of a GPU's free memory, for coefficients that every iteration uses again."""


def room_for_batches(device: str) -> int:
    """Bytes of coefficients that may stay in the memory of a device."""
    if torch.device(device).type != "cuda":
        return KEPT_ON_CPU
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return max(KEPT_ON_CPU, int(KEPT_SHARE_OF_GPU * free))


@dataclass(frozen=True)
class Batch:
    """B images of one half-set and one sampling geometry."""

    rows: Int[np.ndarray, " n"]
    """(B,) rows of the particle table."""
    group: Int[np.ndarray, " n"]
    """(B,) optics group indices."""
    coefficients: Complex[Tensor, "n k"]
    """(B, K) complex64: centred transform, beam tilt removed."""
    ctf: Float[Tensor, "n k"]
    """(B, K) float32."""
    disc: Disc
    magnification: Float[np.ndarray, "2 2"] | None
    """(2, 2): image frequency -> frequency on the reference's grid; None for the identity."""
    premultiplied: np.ndarray | None = None
    """(B,) bool: coefficients that are y / c of a premultiplied image, unknown where c is 0; None: none is."""
    mean: Float[Tensor, " n"] | None = None
    """(B,) transform at zero frequency, which is no coefficient of the disc; None: it is one."""
    share: Float[np.ndarray, "n shells"] | None = None
    """(B, S) power of white noise of variance 1 in each shell of a masked image (``image_mask``); None: 1."""

    def __len__(self) -> int:
        return len(self.rows)

    def power_weight(self, full_from: float | None = None) -> Float[Tensor, "n k"] | None:
        """(B, K) weight of the power of each coefficient where noise is measured; None: 1 everywhere.

        For premultiplied images it is c^2, so that a sum is one of y and not of y / c.

        Args:
            full_from: smallest |c| of coefficients with full weight; those below have the weight c^2 / full_from^2.
        """
        if self.premultiplied is None:
            return None
        premultiplied = torch.as_tensor(self.premultiplied, device=self.ctf.device)[:, None]
        weight = self.ctf.square()
        if full_from is not None:
            weight = (weight / full_from**2).clamp(max=1.0)
        return torch.where(premultiplied, weight, 1.0)

    def scaled(self, scale: Float[np.ndarray, " n"], noise: Float[np.ndarray, " n"]) -> Batch:
        """The batch of images whose signal has the factor ``scale`` (B,) and whose noise has ``noise`` (B,) times the
        variance of their optics group: divided so that it has that variance, with the CTF that remains."""
        if (scale == 1).all() and (noise == 1).all():
            return self
        root = np.sqrt(noise)
        for_data, for_ctf = (
            torch.as_tensor(factor, dtype=torch.float32, device=self.ctf.device)[:, None]
            for factor in (1 / root, scale / root)
        )
        mean = None if self.mean is None else self.mean * for_data[:, 0]
        return replace(self, coefficients=self.coefficients * for_data, ctf=self.ctf * for_ctf, mean=mean)

    def alike(self, other: Batch) -> bool:
        """Whether both sample the same frequencies."""
        return self.disc is other.disc and np.array_equal(
            np.eye(2) if self.magnification is None else self.magnification,
            np.eye(2) if other.magnification is None else other.magnification,
        )


@dataclass
class BatchReader:
    """Read batches, and cache them in memory while they fit, since every iteration uses them again.

    Phase-flipped and premultiplied images are converted only here to the form used by the rest of the engine: |c|
    replaces the CTF of the first, and the second are divided by theirs (``physics.ctf_applied``).
    """

    source: ImageSource
    particles: Particles
    pixel_size_A: float
    """Of the reference's grid."""
    device: str = "cpu"
    with_dc: bool = False
    memory_bytes: int = KEPT_ON_CPU
    apart: np.ndarray | None = None
    """(N,) bool: particles that share no batch with the others; None: none."""
    _kept: dict[tuple[int, int, int], tuple[int, Batch]] = field(default_factory=dict)
    _used: int = 0
    _reads: int = 0

    def plan(self, halves: tuple[int, ...] = (1, 2)) -> list[np.ndarray]:
        """Row lists of all batches, the same on every rank: BATCH_IMAGES consecutive rows of one half and one geometry,
        separately for particles that are summed apart (auxiliary ones) and the others."""
        half = self.particles.half if self.particles.half is not None else np.zeros(len(self.particles), np.int8)
        geometry = self._geometry_of_groups()[self.particles.optics]
        if self.apart is not None:
            geometry = 2 * geometry + self.apart
        batches = []
        for h in halves:
            for g in np.unique(geometry):
                rows = np.flatnonzero((half == h) & (geometry == g))
                batches += [rows[i : i + BATCH_IMAGES] for i in range(0, len(rows), BATCH_IMAGES)]
        return batches

    def _geometry_of_groups(self) -> np.ndarray:
        keys = [(g.pixel_size_A, g.magnification) for g in self.particles.groups]
        distinct = list(dict.fromkeys(keys))
        return np.array([distinct.index(k) for k in keys])

    def matrix(self, group: OpticsGroup) -> Float[np.ndarray, "2 2"] | None:
        """(2, 2) from the image's frequency index to the reference's: magnification times the ratio of pixel sizes."""
        m = np.array(group.magnification, float).reshape(2, 2) * (self.pixel_size_A / group.pixel_size_A)
        return None if np.allclose(m, np.eye(2), atol=1e-6) else m

    def read(self, rows: Shaped[np.ndarray, " n"], radius_px: int) -> Batch:
        """The batch of these rows with all coefficients up to radius_px of the reference's grid."""
        self._reads += 1
        if self._reads % READS_BETWEEN_RETURNS == 0:
            return_free_memory()
        if self._holds(rows, radius_px):
            return self._cut(self._kept[_key(rows)][1], radius_px)
        return self._keep(rows, radius_px, self._prepare(rows, radius_px))

    def in_order(self, batches: list[np.ndarray], radius_px: int) -> Iterator[Batch]:
        """``read`` of these rows, one after the other; on a GPU the images of the next are read from disk meanwhile."""
        if torch.device(self.device).type == "cpu":
            yield from (self.read(rows, radius_px) for rows in batches)
            return
        with ThreadPoolExecutor(1, "images") as thread:
            coming = None
            for i, rows in enumerate(batches):
                images = coming.result() if coming is not None else None
                after = batches[i + 1] if i + 1 < len(batches) else None
                ahead = after is not None and not self._holds(after, radius_px)
                coming = thread.submit(self._images, after) if after is not None and ahead else None
                if images is None:
                    yield self.read(rows, radius_px)
                else:
                    yield self._keep(rows, radius_px, self._prepare(rows, radius_px, images))

    def _holds(self, rows: np.ndarray, radius_px: int) -> bool:
        kept = self._kept.get(_key(rows))
        return kept is not None and kept[0] >= radius_px

    def _keep(self, rows: np.ndarray, radius_px: int, batch: Batch) -> Batch:
        """The batch, kept for later iterations if there is room."""
        key = _key(rows)
        kept = self._kept.get(key)
        size = batch.coefficients.numel() * 12
        if kept is None and self._used + size <= self.memory_bytes:
            self._used += size
            self._kept[key] = (radius_px, batch)
        return batch

    def preload_radius(self, radius_px: int, rows: list[np.ndarray]) -> int:
        """The radius to read at first, larger than needed so that later iterations find their data cached: everything
        if it fits."""
        box = self.source.box_px
        full = (box - 1) // 2
        return full if sum(map(len, rows)) * box * box * 5 <= self.memory_bytes else radius_px

    def disc_of(self, radius_px: int, matrix: Float[np.ndarray, "2 2"] | None) -> Disc:
        """Coefficients of images that lie within radius_px of the reference's grid, for a ``matrix`` of their group."""
        largest = 1.0 if matrix is None else float(np.linalg.norm(matrix, 2))
        return fourier_disc(self.source.box_px, radius_px / largest, self.with_dc)

    def _cut(self, batch: Batch, radius_px: int) -> Batch:
        disc = self.disc_of(radius_px, batch.magnification)
        k = disc.size
        return replace(batch, coefficients=batch.coefficients[:, :k], ctf=batch.ctf[:, :k], disc=disc)

    def _images(self, rows: np.ndarray) -> Tensor:
        """(B, D, D) float32 on the CPU, in memory that a GPU copies from without waiting."""
        images = torch.from_numpy(np.ascontiguousarray(self.source.read(rows), np.float32))
        return images.pin_memory() if torch.device(self.device).type == "cuda" else images

    def _prepare(self, rows: np.ndarray, radius_px: int, images: Tensor | None = None) -> Batch:
        particles = self.particles
        groups = particles.optics[rows]
        first = particles.groups[groups[0]]
        matrix = self.matrix(first)
        disc = self.disc_of(radius_px, matrix)
        images = (self._images(rows) if images is None else images).to(self.device, non_blocking=True)
        plane = images_to_fourier(images)
        x, mean = disc.gather(plane).to(torch.complex64), None if self.with_dc else plane[:, 0, 0].real.clone()
        freq = disc.frequencies(first.pixel_size_A)
        c = ctf_for(particles, rows, self.source.box_px, freq_invA=freq, device=self.device)
        premultiplied = np.array([g.ctf_applied == "premultiplied" for g in particles.groups])[groups]
        if premultiplied.any():
            these = torch.as_tensor(np.flatnonzero(premultiplied), device=self.device)
            x[these] = divide_by_ctf(x[these], c[these])
        for g in np.unique(groups):
            group = particles.groups[g]
            if any(group.beam_tilt_mrad) or any(group.odd_zernike):
                rows_of_group = torch.as_tensor(np.flatnonzero(groups == g), device=self.device)
                x[rows_of_group] *= beam_tilt_phase(*freq, group).conj().to(x)
        return Batch(rows, groups, x, c, disc, matrix, premultiplied if premultiplied.any() else None, mean)


def _key(rows: np.ndarray) -> tuple[int, int, int]:
    return int(rows[0]), int(rows[-1]), len(rows)
