"""One pass over the images at fixed poses, each beside its prediction; ranks share the batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import Interrupted
from cryoiso.core.log import ProgressLine
from cryoiso.core.protocols import Communicator, ImageSource
from cryoiso.core.types import HALVES, OpticsGroup, Particles
from cryoiso.parallel.partition import owned_chunks
from cryoiso.physics.contrast_transfer import magnify
from cryoiso.physics.fourier import Disc
from cryoiso.physics.projection import FourierVolume
from cryoiso.refine.batches import Batch, BatchReader
from cryoiso.refine.likelihood import shift_factors, with_magnification

if TYPE_CHECKING:
    from jaxtyping import Complex, Float

BLOCK_COEFFICIENTS = 1 << 20
"""Coefficients treated at once: a dozen arrays of them stay below 200 MB."""


@dataclass(frozen=True)
class Observed:
    """B images of one half-set and one sampling geometry with their predictions."""

    batch: Batch
    half: int
    group: OpticsGroup
    """Of the first image; pixel size and magnification are those of all."""
    data: Complex[Tensor, "n k"]
    """(B, K): the particle's centre at the origin, beam tilt removed."""
    slices: Complex[Tensor, "n k"]
    """(B, K): projections of the half-set's reference, without CTF."""

    def frequencies(self) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        """(K,) each: (fy, fx) in 1/Å, magnification corrected, at which the CTF is evaluated."""
        return true_frequencies(self.batch.disc, self.group)


def true_frequencies(disc: Disc, group: OpticsGroup) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """(K,) each: (fy, fx) in 1/Å of the coefficients of a group's images, magnification corrected."""
    return magnify(*disc.frequencies(group.pixel_size_A), group.magnification)


class ImagePass:
    """Passes over the images of a particle set with fixed poses."""

    def __init__(
        self,
        source: ImageSource,
        particles: Particles,
        volumes: dict[int, FourierVolume],
        radius_px: int,
        pixel_size_A: float,
        comm: Communicator,
    ) -> None:
        """
        Args:
            particles: with poses and half numbers, row for row the images of ``source``.
            volumes: half -> reference.
            radius_px: last shell of the references that is used.
            pixel_size_A: of the references.
        """
        self.particles, self.volumes, self.radius_px, self.comm = particles, volumes, radius_px, comm
        self.reader = BatchReader(source, particles, pixel_size_A, "cpu", memory_bytes=0)
        self.rotation, self.shift_A = particles.require_poses()
        self.pixel_A = particles.group_values("pixel_size_A")
        assert particles.half is not None
        self.half = particles.half
        self.plan = self.reader.plan(HALVES)

    def disc(self, group: OpticsGroup) -> Disc:
        """Coefficients of the images of an optics group."""
        return self.reader.disc_of(self.radius_px, self.reader.matrix(group))

    def each(self, label: str, work: Callable[[Observed], None]) -> None:
        """Call ``work`` for the blocks of this rank (collective in the check for stop signals).

        Raises:
            Interrupted: stopped by a signal.
        """
        size = self.comm.size
        chunks = owned_chunks(len(self.plan), self.comm.rank, size)
        most = max(len(owned_chunks(len(self.plan), rank, size)) for rank in range(size))
        line = ProgressLine(label, most, active=self.comm.rank == 0)
        for i in range(most):
            if self.comm.stop_requested():
                raise Interrupted("stopped by a signal; nothing has been written")
            rows = self.plan[chunks[i]] if i < len(chunks) else np.zeros(0, np.int64)
            block = max(1, BLOCK_COEFFICIENTS // (2 * self.radius_px**2))
            for start in range(0, len(rows), block):
                work(self._observed(rows[start : start + block]))
            line.update(i + 1)
        line.close()

    def rows(
        self, label: str, width: int, work: Callable[[Observed], Float[np.ndarray, "n width"]]
    ) -> Float[np.ndarray, "n width"]:
        """(n, width) float32 numbers of every particle, on every rank (collective). Ranks own consecutive batches, so
        the order of all rows is that of the plan for any number of ranks."""
        parts = [np.zeros((0, width), np.float32)]
        self.each(label, lambda block: parts.append(np.asarray(work(block), np.float32)))
        everything = self.comm.concat_all(np.concatenate(parts))
        order = np.concatenate(self.plan)
        out = np.empty((len(self.particles), width), np.float32)
        out[order] = everything
        return out

    def _observed(self, rows: np.ndarray) -> Observed:
        batch = self.reader.read(rows, self.radius_px)
        half = int(self.half[rows[0]])
        content_px = torch.as_tensor(-self.shift_A[rows] / self.pixel_A[rows, None], dtype=torch.float32)
        pose = with_magnification(torch.as_tensor(self.rotation[rows], dtype=torch.float32), batch.magnification)
        return Observed(
            batch=batch, half=half, group=self.particles.groups[batch.group[0]],
            data=batch.coefficients * shift_factors(batch.disc, content_px),
            slices=self.volumes[half].slices(pose, batch.disc),
        )  # fmt: skip
