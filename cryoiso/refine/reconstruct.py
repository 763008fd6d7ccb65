"""Half-maps from given poses: insertion on all ranks, reduction, division."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from cryoiso.core.errors import InputError, Interrupted
from cryoiso.core.log import ProgressLine
from cryoiso.core.protocols import Communicator, ImageSource
from cryoiso.core.types import DensityMap, Particles
from cryoiso.parallel.partition import owned_chunks, root_of_half
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.symmetry import point_group
from cryoiso.refine.batches import Batch, BatchReader
from cryoiso.refine.likelihood import shift_factors, with_magnification


def reconstruct_halves(
    source: ImageSource,
    particles: Particles,
    comm: Communicator,
    *,
    symmetry: str = "C1",
    padding: int = 2,
    device: str = "cpu",
    halves: Sequence[int] = (1, 2),
    pixel_size_A: float | None = None,
) -> dict[int, DensityMap | None]:
    """CTF-corrected maps of the half-sets (collective).

    Numerator sum x c, weight sum c^2, both with trilinear interpolation on a grid padded by ``padding``, symmetrised,
    divided, corrected for the interpolation. One half after the other, so that one grid is in memory at a time.

    Args:
        source: images, row for row those of ``particles``.
        particles: poses and half numbers.
        pixel_size_A: of the map's grid (default: the first optics group's).

    Returns:
        half -> map on the half's root rank, None elsewhere. Half h's root is ``parallel.partition.root_of_half``.

    Raises:
        InputError: no poses, or a half-set is empty.
    """
    rotation, shift_A = particles.require_poses()
    pixel = pixel_size_A or particles.groups[0].pixel_size_A
    reader = BatchReader(source, particles, pixel, device, with_dc=True, memory_bytes=0)
    operations = point_group(symmetry)
    maps: dict[int, DensityMap | None] = {}
    for half in halves:
        plan = reader.plan((half,))
        if not plan:
            raise InputError(f"half-set {half} is empty", hint="Both half-sets need particles: check rlnRandomSubset.")
        accumulator = SliceAccumulator.empty(source.box_px, padding=padding, device=device)
        insert_batches(reader, plan, rotation, shift_A, accumulator, comm, f"half {half}")
        bound = sum(comm.allgather(accumulator.bound))
        total = comm.sum_to(accumulator.grid.cpu().numpy(), root_of_half(half, comm.size))
        maps[half] = None
        if total is not None:
            accumulator = replace(accumulator, grid=torch.as_tensor(total).to(device), bound=bound)
            volume = accumulator.finish().symmetrised(operations).reconstruct()
            maps[half] = DensityMap(volume.cpu().numpy().astype(np.float32), pixel)
    return maps


def insert_batches(
    reader: BatchReader,
    plan: list[np.ndarray],
    rotation: np.ndarray,
    shift_A: np.ndarray,
    accumulator: SliceAccumulator,
    comm: Communicator,
    label: str,
) -> None:
    """Back-projects this rank's batches with one pose an image (collective only in asking whether to stop)."""
    mine = owned_chunks(len(plan), comm.rank, comm.size)
    most = max(len(owned_chunks(len(plan), r, comm.size)) for r in range(comm.size))
    radius = (reader.source.box_px - 1) // 2
    line = ProgressLine(f"back-projecting {label}", most, active=comm.rank == 0)
    for i in range(most):
        if comm.stop_requested():
            raise Interrupted("stopped by a signal while reconstructing. Continue with 'cryoiso resume'.")
        if i < len(mine):
            _insert(reader.read(plan[mine[i]], radius), rotation, shift_A, reader, accumulator)
        line.update(i + 1)
    line.close()


def _insert(batch: Batch, rotation: np.ndarray, shift_A: np.ndarray, reader: BatchReader, accumulator) -> None:
    device = batch.ctf.device
    pixel = reader.particles.group_values("pixel_size_A")[batch.rows]
    content = torch.as_tensor(-shift_A[batch.rows] / pixel[:, None], dtype=torch.float32, device=device)
    data = batch.coefficients * batch.ctf * shift_factors(batch.where, content)
    rot = torch.as_tensor(rotation[batch.rows], dtype=torch.float32, device=device)
    accumulator.insert(data, batch.ctf.square(), with_magnification(rot, batch.magnification), batch.where)
