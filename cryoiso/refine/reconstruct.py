"""Half-maps from given poses: insertion on all ranks, reduction, division."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.errors import InputError, Interrupted
from cryoiso.core.log import ProgressLine, logger
from cryoiso.core.protocols import Communicator, ImageSource
from cryoiso.core.types import HALVES, DensityMap, Particles
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import owned_chunks, root_of_half
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.projection import pairs
from cryoiso.physics.symmetry import point_group
from cryoiso.refine import references
from cryoiso.refine.agreement import Agreement, agreement, as_map, on_every_rank
from cryoiso.refine.batches import Batch, BatchReader
from cryoiso.refine.intensity import Intensity
from cryoiso.refine.junk import particle_probability
from cryoiso.refine.likelihood import shift_factors, with_magnification
from cryoiso.refine.maximise import NOISE_UNIT, NoiseSums
from cryoiso.refine.noise import ROUNDING, last_shell, mean_spectra
from cryoiso.refine.offsets import check_poses

if TYPE_CHECKING:
    from jaxtyping import Complex, Float

BLOCK_IMAGES = 64
"""Images prepared at once: few enough to stay in the cache."""
SAMPLED_IMAGES = 128
"""Images of each optics group and half that are examined for shells without power."""
WAITING_COEFFICIENTS = 2**23
"""Largest number of coefficients waiting for insertion, 12 B each."""


def reconstruct_halves(
    source: ImageSource,
    particles: Particles,
    comm: Communicator | None = None,
    *,
    symmetry: str = "C1",
    padding: int = 2,
    device: str = "cpu",
    halves: Sequence[int] = (1, 2),
    pixel_size_A: float | None = None,
) -> dict[int, DensityMap | None]:
    """CTF-corrected maps of the half-sets (collective).

    Numerator sum x c, weight sum c^2, both with trilinear interpolation on a grid padded by ``padding``, symmetrised,
    divided, corrected for the interpolation; nothing beyond the last shell in which the images have power. One half
    after the other, so that one grid is in memory at a time.

    Args:
        source: images, row for row those of ``particles``.
        particles: poses and half numbers.
        comm: the ranks that share the work; None: this process alone.
        pixel_size_A: of the map's grid (default: the first particle's, which need not be in the first optics group).

    Returns:
        half -> map on the half's root rank, None elsewhere. Half h's root is ``parallel.partition.root_of_half``.

    Raises:
        InputError: no poses, one that cannot be, or a half-set is empty.
    """
    comm = comm if comm is not None else Context()
    pixel = pixel_size_A or particles.first_group.pixel_size_A
    maps: dict[int, DensityMap | None] = dict.fromkeys(halves)
    limits: dict[int, int] = {}
    for half, sums in half_sums(source, particles, comm, symmetry, padding, device, halves, pixel, limits):
        maps[half] = DensityMap(references.within(as_map(sums.reconstruct()), limits[half]), pixel)
    return maps


def reconstruct_references(
    source: ImageSource,
    particles: Particles,
    comm: Communicator | None = None,
    *,
    symmetry: str = "C1",
    padding: int = 2,
    device: str = "cpu",
    diameter_A: float | None = None,
    prior: dict[int, DensityMap] | None = None,
    precision: Float[np.ndarray, " _"] | None = None,
    pixel_size_A: float | None = None,
) -> tuple[dict[int, DensityMap], dict[int, DensityMap], Float[np.ndarray, " shells"]]:
    """Half-maps twice: as they are, and regularised by the half-map FSC as references are (collective).

    The regularised map of a half divides by weight + 1/tau^2 (``agreement``), so that directions which few images saw
    are damped instead of noisy. Of the other half it knows the FSC curve, nothing else.

    Args:
        diameter_A: the FSC is taken inside a soft sphere of this diameter (default: 0.9 boxes).
        prior: half -> map that the regularised map falls back on where that half's images measured nothing (its grey
            scale is fitted); without it such coefficients go to zero. It never enters the plain maps.
        precision: of that prior by shell, in units of 1/tau^2 (``homologue.HomologueCorrelation.precision``), beside
            a prior without a map; zero beyond its end. None: a prior about the map alone, with variance tau^2.
        comm, pixel_size_A: as ``reconstruct_halves``.

    Returns:
        half -> plain map, half -> regularised map inside the sphere, both on every rank; FSC (D//2+1,).

    Raises:
        InputError: as ``reconstruct_halves``.
    """
    comm = comm if comm is not None else Context()
    pixel, box = pixel_size_A or particles.first_group.pixel_size_A, source.box_px
    limits: dict[int, int] = {}
    sums = dict(half_sums(source, particles, comm, symmetry, padding, device, HALVES, pixel, limits))
    plain = on_every_rank({h: references.within(as_map(s.reconstruct()), limits[h]) for h, s in sums.items()}, comm)
    sphere = references.spherical(box, pixel, diameter_A or 0.9 * box * pixel)

    def curve_of(maps: dict[int, np.ndarray]) -> np.ndarray:
        curve = references.half_map_fsc(maps, sphere)
        if min(limits.values()) < (box - 1) // 2:  # the mask leaks into shells without data
            curve = np.where(np.arange(len(curve)) <= min(limits.values()), curve, 0.0)
        return curve

    agreed = agreement(sums, plain, curve_of, comm)
    priors = {h: None if prior is None else prior[h].data for h in HALVES}
    damped = on_every_rank(
        {h: _regularised(s, agreed, h, priors[h], precision) * sphere for h, s in sums.items()}, comm
    )
    as_maps = [{h: DensityMap(m[h], pixel) for h in HALVES} for m in (plain, damped)]
    return as_maps[0], as_maps[1], agreed.plain


def _regularised(
    sums: FourierSums, agreed: Agreement, half: int, prior: np.ndarray | None, precision: np.ndarray | None
) -> np.ndarray:
    wiener = agreed.wiener[half]
    if prior is None or (precision is not None and not precision.any()):
        return as_map(sums.reconstruct(wiener))
    known = torch.from_numpy(np.ascontiguousarray(prior, np.float32)).to(sums.weight.device)
    scale = _prior_scale(sums, known, agreed.plain)
    if precision is None:
        return as_map(sums.completed(known * scale, wiener).reconstruct(torch.zeros_like(wiener)))
    believed = torch.zeros_like(wiener)
    measured = torch.as_tensor(precision[: len(wiener)]).to(wiener)
    believed[: len(measured)] = measured * wiener[: len(measured)]
    return as_map(sums.completed(known * scale, believed).reconstruct(wiener))


def _prior_scale(sums: FourierSums, prior: torch.Tensor, curve: np.ndarray) -> float:
    """Least-squares factor of a prior on the sums' grey scale, over the shells where the half-maps agree (FSC 0.5)."""
    seen = sums.sampled(prior)
    shell = sums.shells()
    last = max(3, int(np.argmax(np.append(curve[1:], 0.0) < 0.5)))
    where = (shell >= 1) & (shell <= min(last, sums.radius_px))
    cross = (sums.numerator[where].conj() * seen[where]).real.double().sum()
    square = (sums.weight[where] * seen[where].abs().square()).double().sum()
    return max(float(cross / square.clamp(min=1e-30)), 0.0)


def half_sums(
    source: ImageSource,
    particles: Particles,
    comm: Communicator,
    symmetry: str,
    padding: int,
    device: str,
    halves: Sequence[int],
    pixel_size_A: float,
    limits: dict[int, int] | None = None,
) -> Iterator[tuple[int, FourierSums]]:
    """Yield (half, symmetrised sums) for the halves of which this rank is the root; all ranks must exhaust it together.

    Args:
        limits: receives half -> last shell in which its images have power, on every rank.
    """
    rotation, shift_A = particles.require_poses()
    check_poses(particles, source.box_px)
    reader = BatchReader(source, particles, pixel_size_A, device, with_dc=True, memory_bytes=0)
    operations = point_group(symmetry)
    accumulator = SliceAccumulator.empty(source.box_px, padding=padding, device=device)
    for half in halves:
        plan = reader.plan((half,))
        if not plan:
            raise InputError(
                f"half-set {half} is empty",
                hint="Both half-sets need particles: check rlnRandomSubset.",
                code="half-set-empty",
            )
        if half != halves[0]:
            accumulator.clear()
        noise = NoiseSums.empty(len(particles.groups), source.box_px // 2 + 1)
        insert_batches(reader, plan, rotation, shift_A, accumulator, comm, f"half {half}", noise)
        limit = _power_limit(noise, particles, pixel_size_A, source.box_px, comm)
        if limits is not None:
            limits[half] = limit
        bound = sum(comm.allgather(accumulator.bound))
        total = comm.sum_to(accumulator.grid.cpu().numpy(), root_of_half(half, comm.size))
        finished = []
        if total is not None:
            total_accumulator = replace(accumulator, grid=torch.as_tensor(total).to(device), bound=bound)
            finished.append(total_accumulator.finish(release=True))
            total = None
            del total_accumulator
        if half == halves[-1]:
            accumulator.discard()  # before there are further arrays of its size
        if finished:
            yield half, finished.pop().symmetrised(operations)


def insert_batches(
    reader: BatchReader,
    plan: list[np.ndarray],
    rotation: Float[np.ndarray, "n 3 3"],
    shift_A: Float[np.ndarray, "n 2"],
    accumulator: SliceAccumulator,
    comm: Communicator,
    label: str,
    noise: NoiseSums,
) -> None:
    """Back-project this rank's batches with one pose per image (collective only in the check for stop signals).

    The weight of an image is its probability of showing a particle (``junk.particle_probability``), else 1.

    Args:
        noise: receives the power of some images of each optics group.
    """
    some = _first_of_groups(reader.particles, plan)
    chunks = owned_chunks(len(plan), comm.rank, comm.size)
    most = max(len(owned_chunks(len(plan), r, comm.size)) for r in range(comm.size))
    radius = (reader.source.box_px - 1) // 2
    pixel = reader.particles.group_values("pixel_size_A")
    intensity, probability = Intensity.of_particles(reader.particles), particle_probability(reader.particles)
    waiting = _Waiting(accumulator)
    line = ProgressLine(f"back-projecting {label}", most, active=comm.rank == 0)
    for i in range(most):
        if comm.stop_requested():
            raise Interrupted("stopped by a signal while reconstructing")
        rows = plan[chunks[i]] if i < len(chunks) else np.zeros(0, np.int64)
        for start in range(0, len(rows), BLOCK_IMAGES):
            part = rows[start : start + BLOCK_IMAGES]
            batch = intensity.of(reader.read(part, radius))
            if some[part].any():
                _note_power(batch, some[part], noise)
            if probability is not None:  # x c and c^2 are both multiplied by it
                batch = batch.scaled(np.ones(len(part)), 1 / probability[part])
            waiting.add(batch, rotation[part], -shift_A[part] / pixel[part, None])
        line.update(i + 1)
    waiting.insert()
    line.close()


def _first_of_groups(particles: Particles, plan: list[np.ndarray]) -> np.ndarray:
    """(n,) bool: the first SAMPLED_IMAGES of each optics group, as the plan has them, on any number of ranks."""
    rows = np.concatenate(plan)
    chosen = np.zeros(len(particles), bool)
    for group in np.unique(particles.optics[rows]):
        chosen[rows[particles.optics[rows] == group][:SAMPLED_IMAGES]] = True
    return chosen


def _note_power(batch: Batch, some: np.ndarray, noise: NoiseSums) -> None:
    rows = np.flatnonzero(some)
    part = replace(
        batch, rows=batch.rows[rows], group=batch.group[rows], coefficients=batch.coefficients[rows],
        ctf=batch.ctf[rows], premultiplied=None if batch.premultiplied is None else batch.premultiplied[rows],
    )  # fmt: skip
    noise.add(part, part.coefficients.abs().square())


def _power_limit(noise: NoiseSums, particles: Particles, pixel_size_A: float, box_px: int, comm: Communicator) -> int:
    """Last shell in which the images have power (collective); with a warning if that is not the last shell."""
    power, count = comm.sum_all(noise.power) / NOISE_UNIT, comm.sum_all(noise.count) / NOISE_UNIT
    full = (box_px - 1) // 2
    spectra = mean_spectra(power, count, particles.groups, ROUNDING)
    limit = last_shell(spectra, particles, pixel_size_A, full)
    if limit < full and comm.rank == 0:
        length_A = box_px * pixel_size_A
        logger.warning("the images have no power beyond %.2f Å; the map ends there", length_A / (limit + 1))
    return limit


class _Waiting:
    """Buffer of weighted slices: insertion is fastest for many at a time."""

    data: torch.Tensor
    weight: torch.Tensor
    rotation: torch.Tensor

    def __init__(self, accumulator: SliceAccumulator) -> None:
        self.accumulator = accumulator
        self.first: Batch | None = None
        self.count = 0

    def add(self, batch: Batch, rotation: np.ndarray, content_px: np.ndarray) -> None:
        """Add a batch whose content sits at content_px (B, 2) from the centre."""
        if self.first is None or not batch.alike(self.first) or self.count + len(batch) > len(self.weight):
            self.insert()
            self._make_room(batch)
        here = slice(self.count, self.count + len(batch))
        shift = torch.as_tensor(content_px, device=batch.ctf.device)
        weigh(batch, shift, self.data[here], self.weight[here])
        self.rotation[here] = torch.as_tensor(rotation, dtype=torch.float32)
        self.count += len(batch)

    def _make_room(self, batch: Batch) -> None:
        size, device = batch.disc.size, batch.ctf.device
        room = max(len(batch), min(self.accumulator.grid.numel() // 6, WAITING_COEFFICIENTS) // size)
        if self.first is None or (room, size) != self.weight.shape:
            self.data = torch.empty(room, size, dtype=torch.complex64, device=device)
            self.weight = torch.empty(room, size, device=device)
            self.rotation = torch.empty(room, 3, 3, device=device)
        self.first = batch

    def insert(self) -> None:
        """Insert all waiting slices."""
        if self.first is not None and self.count:
            rotation = with_magnification(self.rotation[: self.count], self.first.magnification)
            self.accumulator.insert(self.data[: self.count], self.weight[: self.count], rotation, self.first.disc)
        self.count = 0


def weigh(
    batch: Batch,
    content_px: Float[torch.Tensor, "n 2"],
    data: Complex[torch.Tensor, "n k"],
    weight: Float[torch.Tensor, "n k"],
) -> None:
    """Write x c exp(2 pi i k.s / D) into data (B, K) and c^2 into weight (B, K), for content at s = content_px."""
    disc = batch.disc
    if data.device.type == "cpu":
        from cryoiso.physics import _kernels

        shift = (2 * np.pi / disc.box_px) * content_px.double().numpy()
        _kernels.centre_and_weigh(
            pairs(batch.coefficients), batch.ctf.numpy(), disc.ky, disc.kx, shift, pairs(data), weight.numpy()
        )
    else:
        data[:] = batch.coefficients * batch.ctf * shift_factors(disc, content_px.float())
        weight[:] = batch.ctf.square()
