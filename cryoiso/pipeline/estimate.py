"""What a job will take of disk and memory, from its settings and the size of its particle set.

Sizes of files follow from what the stages write (``stages``, ``auxiliary``, ``correct``); memory follows from the
arrays that are alive together in the largest step of each stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.config import Job
from cryoiso.io.shards import CHUNK_IMAGES
from cryoiso.io.shardset import SHARD_BYTES, SPREAD
from cryoiso.pipeline.finding import Needs
from cryoiso.pipeline.plan import folder_stages
from cryoiso.pipeline.work import Work

GRID_VOXEL_BYTES = 24
"""Of the sums of back-projection: three 64-bit integers."""
SUMS_VOXEL_BYTES = 12
SORTED_SAMPLE_BYTES = 28
SCORES_BYTES = 4 * 4 << 24
"""Four arrays of the scores that the search holds at once."""
WEIGHED_SLICES = 128 * 8 * 5
"""Slices of a batch that wait for insertion: images x views x arrays."""
CACHE_BYTES = 1 << 30
"""Of ``refine.batches.BatchReader``."""
MEMORY_MARGIN = 1.15
"""On top of what is counted: measured peaks were 0.93 to 1.17 times that."""
PROGRAM_BYTES = 480 << 20
"""Python, torch, numba and their kernels, measured."""
PARTICLE_BYTES = 1700
"""Metadata of a particle on rank 0, measured (docs/benchmarks.md)."""
PARAMETERS = {
    ("generator", "small"): 122_000, ("generator", "paper"): 7_292_000, ("unet", "small"): 429_000,
    ("unet", "paper"): 26_410_000,
}  # fmt: skip
"""Weights of the networks."""
POSE_TEXT_BYTES = 120
"""What a row of a STAR file grows by with poses and results."""
STATE_BYTES = 5000
"""History and names in a checkpoint."""
REPORT_BYTES = 1_800_000


@dataclass(frozen=True)
class Problem:
    """The size of a job."""

    job: Job
    particles: int
    box_px: int
    pixel_size_A: float
    diameter_A: float
    row_bytes: int = 150
    """of a row of the particle file"""
    with_shards: bool = False
    """the particles are shards already"""
    groups: int = 1
    largest_input_bytes: int = 0
    device: str = "cpu"

    @property
    def auxiliaries(self) -> int:
        return round(self.particles * self.job.auxiliary.ratio)

    @property
    def map_bytes(self) -> int:
        return 4 * self.box_px**3 + 1024


@dataclass(frozen=True)
class Stored:
    """What a stage leaves on the disk."""

    name: str
    bytes: int
    files: int


def problem_of(work: Work) -> Problem:
    """Reads what it needs of the inputs (rank 0)."""
    job, particles = work.job, work.particles()
    box, pixel = work.grid()
    diameter = job.sample.diameter_A or work.reference().diameter_A
    file = Path(job.particles.file)
    text = file.suffix == ".star" and file.is_file()
    stacks = {str(name) for name in np.unique(particles.stack).tolist()} if not file.is_dir() else set()
    largest = max((Path(name).stat().st_size for name in stacks), default=0)
    row = max(60, file.stat().st_size // max(len(particles), 1)) if text else 250
    return Problem(job, len(particles), box, pixel, diameter, row, file.is_dir(), len(particles.groups), largest)


def needs_of(work: Work, ranks: int) -> Needs:
    """What the machine is asked for (rank 0)."""
    problem = problem_of(work)
    stored = disk(problem, ranks)
    memory = max(memory_of_stages(problem, ranks).values())
    return Needs(
        problem.job, memory, sum(s.bytes for s in stored), sum(s.files for s in stored), problem.largest_input_bytes,
        gpu_bytes=gpu_memory(problem, ranks),
    )  # fmt: skip


# --- disk


def shard_layout(n: int, box_px: int, storage: str, shard_mib: int) -> list[int]:
    """Images of every shard of n images, as ``io.ingest.plan`` cuts them."""
    image = box_px * box_px * np.dtype(storage).itemsize
    chunk = max(1, (1 << 20) // image)
    per_shard = max(chunk, (shard_mib << 20) // image // chunk * chunk)
    return [min(per_shard, n - start) for start in range(0, n, per_shard)]


def _shards(name: str, n: int, p: Problem) -> Stored:
    """Shards hold whole HDF5 chunks; 69 B of columns an image and 15 kB of structure were measured."""
    section = p.job.particles
    image = p.box_px**2 * np.dtype(section.storage).itemsize
    total, layout = 0, shard_layout(n, p.box_px, section.storage, section.shard_mib)
    for count in layout:
        chunk = min(max(1, (1 << 20) // image), count)
        total += ceil(count / chunk) * chunk * image + 69 * count + 15_000
    return Stored(name, total, len(layout))


def _made_shards(name: str, p: Problem) -> Stored:
    """As ``io.shardset.plan_shards`` cuts them, float16."""
    n, image = p.auxiliaries, 2 * p.box_px**2
    wanted = max(ceil(n * image / SHARD_BYTES), min(SPREAD, ceil(n / CHUNK_IMAGES)))
    per_shard = max(1, ceil(n / (wanted * CHUNK_IMAGES))) * CHUNK_IMAGES
    shards = ceil(n / per_shard)
    chunk = max(1, (1 << 20) // image)
    waste = (chunk - per_shard % chunk) % chunk if per_shard > chunk else 0
    return Stored(name, n * image + shards * (waste * image + 15_000) + 69 * n, shards)


def disk(p: Problem, ranks: int = 1) -> list[Stored]:
    """Bytes and files that every stage leaves, in order, the folder's own files last."""
    known = {"truth": bool(p.job.truth.particles), "true_map": bool(p.job.truth.map)}
    found = [_stage(name, p, known["truth"]) for name in folder_stages(p.job)]
    return [*found, _result(p), Stored("run folder", 40_000 + 3_000 * ranks + REPORT_BYTES * _pictures(p), 8 + ranks)]


def _size(preset: str, device: str) -> str:
    return preset if preset != "auto" else "small" if device == "cpu" else "paper"


def _pictures(p: Problem) -> int:
    """A report that compares before and after is twice as large."""
    return 2 if p.job.run.workflow in ("auxiliary", "both") else 1


def _stage(name: str, p: Problem, truth: bool) -> Stored:
    kind = re.sub(r"-\d+$", "", name)
    if kind == "ingest":
        if p.with_shards:
            return Stored(name, 0, 0)
        made = _shards(name, p.particles, p)
        return Stored(name, made.bytes + 1200, made.files + 2)
    if kind == "reference":
        return Stored(name, 2 * p.map_bytes + 300, 3)
    if kind == "refine":
        if p.job.auxiliary.poses == "given" and p.job.run.workflow in ("auxiliary", "both"):
            return Stored(name, 3 * p.map_bytes + _star(p), 5)
        return _refined(name, p, p.particles)
    if kind == "reconstruct":
        return _reconstructed(name, p, truth)
    if kind == "diagnose":
        return Stored(name, 140_000 * _pictures(p), 1)
    if kind == "correct":
        return _corrected(name, p)
    return _auxiliary(kind, name, p)


def _star(p: Problem, n: int | None = None) -> int:
    return (p.row_bytes + POSE_TEXT_BYTES) * (p.particles if n is None else n)


def _refined(name: str, p: Problem, n: int) -> Stored:
    """Two generations of the checkpoint, two maps, particles, two summaries."""
    if p.job.refine.engine == "relion":
        return Stored(name, p.job.refine.max_iterations * (6 * p.map_bytes + 350 * n) + 2 * p.map_bytes, 40)
    state = 4 * (p.map_bytes - 1024) + 112 * n + STATE_BYTES
    return Stored(name, 2 * state + 2 * p.map_bytes + _star(p, n) + 2500, 7)


def _reconstructed(name: str, p: Problem, truth: bool) -> Stored:
    """Halves, mean, weighted mean and mask; halves, mean and weighted mean again for each further set of poses."""
    more = truth + (p.job.run.workflow in ("auxiliary", "both"))
    maps = 5 + 4 * more
    return Stored(name, maps * p.map_bytes + 100, maps + 1)


def _result(p: Problem) -> Stored:
    """Maps and particles; two FSC curves, a picture, two texts, numbers and checksums."""
    maps = 5 + 2 * (p.job.run.workflow in ("realign", "both"))
    return Stored("result", maps * p.map_bytes + _star(p) + 150_000, maps + 8)


def _corrected(name: str, p: Problem) -> Stored:
    """Mask, filter, corrected halves and mean, two maps of what was measured, networks; while it works also at most two
    checkpoints of each training, whose bytes are counted and whose files are not: they go."""
    networks, rounds = 1 if p.job.correct.mode == "paired" else 2, p.job.correct.rounds
    weights = 4 * PARAMETERS["unet", _size(p.job.correct.preset, p.device)]
    checkpoints = rounds * 2 * 3 * weights
    return Stored(name, 7 * p.map_bytes + networks * (weights + checkpoints), 8 + networks)


def _auxiliary(kind: str, name: str, p: Problem) -> Stored:
    generators = 1 if p.job.auxiliary.generators == "shared" else 2
    if kind == "train":
        weights = 4 * PARAMETERS["generator", _size(p.job.auxiliary.preset, p.device)]
        if p.job.auxiliary.generators == "white-noise":
            weights = 0
        return Stored(name, generators * (p.map_bytes + weights) + 60_000, generators + 1 + bool(weights))
    if kind == "generate":
        made = _made_shards(name, p)
        stacks = (4 * p.box_px**2 + 1024) * p.auxiliaries if p.job.auxiliary.export else 0
        return Stored(name, made.bytes + stacks + 100_000, made.files + 3 + 3 * p.job.auxiliary.export)
    if kind == "corefine":
        engine = _refined(name, p, p.particles + p.auxiliaries)
        return Stored(name, engine.bytes + 5 * p.map_bytes + _star(p) + 20_000, engine.files + 7)
    if kind == "local":
        engine = _refined(name, p, p.particles)
        return Stored(name, engine.bytes + 5 * p.map_bytes + _star(p) + 20_000, engine.files + 7)
    return Stored(name, 8 * p.map_bytes + 10_000, 10)  # micelle


# --- memory


def grid_voxels(radius_px: int, padding: int) -> int:
    """Of the half-space grid of slices up to a radius."""
    h = padding * radius_px + 2
    return (2 * h + 1) ** 2 * (h + 1)


def memory_of_stages(p: Problem, ranks: int) -> dict[str, int]:
    """Most bytes of main memory that a rank of a CPU run holds in each stage; rank 0, which has the metadata."""
    base = PROGRAM_BYTES + PARTICLE_BYTES * p.particles
    found = {}
    for name in folder_stages(p.job):
        kind = re.sub(r"-\d+$", "", name)
        n = p.particles + (p.auxiliaries if kind == "corefine" else 0)
        if kind in ("refine", "corefine", "local"):
            found[name] = base + _refinement(p, n, ranks)
        elif kind == "reconstruct":
            found[name] = base + _reconstruction(p, ranks)
        elif kind == "diagnose":
            found[name] = base + 25 * p.map_bytes
        elif kind in ("train", "correct"):
            found[name] = base + 500 * 2**20 + 15 * p.map_bytes
        else:
            found[name] = base + 128 * 2**20
    return {name: int(MEMORY_MARGIN * size) for name, size in found.items()}


def _refinement(p: Problem, n: int, ranks: int) -> int:
    """The larger of expectation (images, grid, scores) and the transforms between iterations."""
    padding, radius = p.job.refine.padding, (p.box_px - 1) // 2
    voxels, padded = grid_voxels(radius, padding), (padding * p.box_px) ** 3
    coefficients = np.pi / 2 * radius**2
    images = min(CACHE_BYTES, 12 * coefficients * n / ranks)
    grid = GRID_VOXEL_BYTES * voxels * (2 if ranks > 1 else 1)
    sorting = SORTED_SAMPLE_BYTES * min(voxels / 2, 2**24)
    sums = SUMS_VOXEL_BYTES * voxels * (2 if ranks == 1 else 1)
    maps = 10 * p.map_bytes + 8 * WEIGHED_SLICES * coefficients
    return int(images + maps + sums + max(grid + sorting + SCORES_BYTES, 16 * padded))


def _reconstruction(p: Problem, ranks: int) -> int:
    padding, radius = p.job.reconstruct.padding, (p.box_px - 1) // 2
    voxels, padded = grid_voxels(radius, padding), (padding * p.box_px) ** 3
    grid = GRID_VOXEL_BYTES * voxels * (2 if ranks > 1 else 1)
    waiting = 12 * min(voxels / 2, 2**23) + SORTED_SAMPLE_BYTES * min(voxels / 2, 2**24)
    return int(grid + max(waiting, SUMS_VOXEL_BYTES * voxels + 8 * padded) + 6 * p.map_bytes)


def gpu_memory(p: Problem, ranks: int) -> int:
    """The same arrays on a GPU: images, grid, scores and transforms of a refinement. Training is not in it."""
    n = p.particles + (p.auxiliaries if p.job.run.workflow in ("auxiliary", "both") else 0)
    return _refinement(p, n, ranks) + (600 << 20)


def total(stored: list[Stored]) -> tuple[int, int]:
    """Bytes and files of all stages."""
    return sum(s.bytes for s in stored), sum(s.files for s in stored)


def peak(memory: dict[str, int]) -> Iterator[Any]:
    """(stage, bytes) with the most memory first."""
    yield from sorted(memory.items(), key=lambda item: -item[1])
