"""What a job will take of memory: from the arrays that are alive together in the largest step of each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np

from cryoiso.core.errors import MissingError
from cryoiso.methods.audit import extent
from cryoiso.pipeline.finding import Needs
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.planning.job_size import PARAMETERS, Problem, Stored, disk, most, preset_of, problem_of
from cryoiso.pipeline.workflow import RECORDS, kind_of, working_stages

GRID_VOXEL_BYTES = 24
"""Of the sums of back-projection: three 64-bit integers."""
SUMS_VOXEL_BYTES = 12
REDUCTION_BYTES = 128 << 20
"""Of MPI, which adds up grids slab by slab: 120 MiB measured, whatever the box (docs/scaling.md)."""
SORTED_SAMPLE_BYTES = 28
WAITING = 2**23
"""Coefficients that wait for insertion, 12 B each, and samples that are sorted for it."""
SCORES_BYTES = 4 * 4 << 24
"""Four arrays of the scores that the search holds at once."""
IMAGE_ARRAYS = 128 * 6
"""Slices of a batch beside its images in the cache: images x arrays."""
REFERENCE_VOXEL_BYTES = 8
CACHE_BYTES = 1 << 30
"""Of ``refine.batches.BatchReader`` and of ``train.batches.Batches``."""
MEMORY_MARGIN = 1.15
"""On top of what is counted: measured peaks were 0.93 to 1.17 times that."""
PROGRAM_BYTES = 480 << 20
"""Python, torch, numba and their kernels, measured."""
GPU_BYTES = 600 << 20
"""Of a GPU: its context and kernels."""
ROW_BYTES, REFINED_ROW_BYTES = 1200, 1400
"""Metadata of a particle on rank 0: text of its row and columns. Measured with a million rows of 344 characters in 20
columns (docs/scaling.md): 870 held and 950 while they are read, to which come 270 while columns are handed out; in a
refinement 1,180 while a new file is written, and poses and results of another iteration (150, counted)."""
COLUMNS_BYTES = 700
"""Of that what every rank has: columns without the text, poses, 8 B for the name of the stack. Measured while that name
was a text of fixed width, of 22 characters: 450 held, 720 while poses are handed out; rows share their names now."""
TRAINED_BYTES = {
    ("generator", "small"): (490.0, 368.3, 1.7), ("generator", "paper"): (9571.0, 12078.5, 1.4),
    ("unet", "small"): (432.0, 300.0, 1.8), ("unet", "paper"): (2446.0, 1561.0, 1.3),
}  # fmt: skip
"""A pixel of an image, or a voxel of a sub-map, in a training step: bytes that the forward pass leaves for the backward
one, on a CPU in float32 and on a GPU in bfloat16 (counted in tests/pipeline/test_plan_memory.py; a GPU keeps joined
channels as well, see ``nets.channel_parts``), and the peak of a step over that (measured)."""
ALONE_BYTES = {"small": 1000.0, "paper": 5600.0}
"""The same in float32 for one sub-map alone on a CPU, which is convolved as two slabs (``nets.unet``)."""
APPLIED_BYTES = {
    ("generator", "small"): 400.0, ("generator", "paper"): 5100.0, ("unet", "small"): 830.0, ("unet", "paper"): 3000.0,
}  # fmt: skip
"""The peak a pixel or voxel where a network is only applied, in float32, measured."""
STATES = 4
"""Copies of a network's parameters in a training: themselves, gradients, two moments."""
TRAINING_MAPS = 15
"""Maps beside a training: references, estimates, transforms, filters."""


def needs_of(inputs: Inputs, ranks: int) -> Needs:
    """What the machine is asked for (rank 0)."""
    problem = problem_here(inputs)
    return needs_of_stages(problem, ranks, working_stages(problem.job), disk(problem, ranks))


def problem_here(inputs: Inputs) -> Problem:
    """The job's problem on the device that it would get on this rank."""
    if "cpu" in (inputs.job.run.device, inputs.comm.device_preference):
        return replace(problem_of(inputs), device="cpu")
    with suppress(MissingError):  # what a GPU would have to hold is of interest all the same
        return replace(problem_of(inputs), device=inputs.comm.device("auto"))
    return replace(problem_of(inputs), device="cuda")


def needs_of_stages(p: Problem, ranks: int, stages: Sequence[str], stored: list[Stored]) -> Needs:
    """What some of the stages of a job ask of the machine.

    Args:
        stages: their names.
        stored: what they will still write.
    """

    def largest(bytes_of_stages: dict[str, int]) -> int:
        return max((bytes_of_stages.get(stage, 0) for stage in stages), default=0)

    most_bytes, most_files = most(stored)
    return Needs(
        p.job, largest(memory_of_stages(p, ranks)), most_bytes, most_files, p.largest_input_bytes,
        gpu_bytes=largest(gpu_memory(p, ranks)), first_rank_bytes=largest(metadata_of_stages(p)),
    )  # fmt: skip


def metadata_of_stages(p: Problem) -> dict[str, int]:
    """Bytes of main memory that rank 0 holds in each stage beside what every rank does: the source's text."""
    metadata = {}
    for name in working_stages(p.job):
        kind = kind_of(name)
        each = REFINED_ROW_BYTES if RECORDS[kind].searches else ROW_BYTES
        metadata[name] = int(MEMORY_MARGIN * (each - COLUMNS_BYTES) * _particles(kind, p))
    return metadata


def memory_of_stages(p: Problem, ranks: int) -> dict[str, int]:
    """Most bytes of main memory that any rank holds in each stage, without rank 0's metadata.

    Of a run on GPUs as well: refinement is counted as on CPUs there, which is more than it takes.
    """
    memory = {}
    for name in working_stages(p.job):
        kind = kind_of(name)
        held = PROGRAM_BYTES + COLUMNS_BYTES * _particles(kind, p) + MEMORY[kind](p, ranks)
        memory[name] = int(MEMORY_MARGIN * held)
    return memory


def gpu_memory(p: Problem, ranks: int) -> dict[str, int]:
    """Most bytes of a GPU that a rank holds in each stage that computes there."""
    p = p if p.device != "cpu" else replace(p, device="cuda")
    kinds = {name: kind_of(name) for name in working_stages(p.job)}
    return {
        name: int(MEMORY_MARGIN * (GPU_BYTES + GPU[kind](p, ranks)))
        for name, kind in kinds.items()
        if RECORDS[kind].on_gpu
    }


def _particles(kind: str, p: Problem) -> int:
    return p.particles + (p.auxiliaries if RECORDS[kind].auxiliaries else 0)


def _little(p: Problem, ranks: int) -> int:
    return 128 << 20


def _train(p: Problem, ranks: int) -> int:
    return _images_kept(p) + (TRAINING_MAPS * p.map_bytes if p.device != "cpu" else _generator_training(p, ranks))


def _generate(p: Problem, ranks: int) -> int:
    return _little(p, ranks) + (0 if p.device != "cpu" else _generation(p))


def _correct(p: Problem, ranks: int) -> int:
    own = TRAINING_MAPS * p.map_bytes if p.device != "cpu" else _correction(p, ranks, p.job.correct.mode)
    return _little(p, ranks) + own


# --- refinement


def grid_voxels(radius_px: int, padding: int) -> int:
    """Of the half-space grid of slices up to a radius."""
    h = padding * radius_px + 2
    return (2 * h + 1) ** 2 * (h + 1)


def _refinement_and_loop(kind: str, p: Problem, ranks: int) -> int:
    """Of a refinement, or of the correction between two of its iterations, which the images stay in memory for."""
    n, workflow = _particles(kind, p), p.job.run.workflow
    refinement = _refinement(p, n, ranks, 2 if kind == "corefine" else 1)
    if p.job.realign.correct and (workflow, kind) in (("realign", "refine"), ("both", "corefine")):
        refinement = max(refinement, _images_of_refinement(p, n, ranks) + _correction(p, ranks, p.job.realign.mode))
    return refinement


def _images_of_refinement(p: Problem, n: int, ranks: int) -> int:
    coefficients = np.pi / 2 * ((p.box_px - 1) // 2) ** 2
    return int(min(CACHE_BYTES, 12 * coefficients * n / ranks))


def _refinement(p: Problem, n: int, ranks: int, kinds: int = 1) -> int:
    """The larger of expectation (images, reference, grid, scores or samples) and the transforms between iterations.

    Args:
        kinds: of particles whose sums are apart: 2 where there are auxiliaries. Their grids are filled in turn.
    """
    padding, radius = p.job.refine.padding, (p.box_px - 1) // 2
    voxels = grid_voxels(radius, padding)
    coefficients = np.pi / 2 * radius**2
    grid = GRID_VOXEL_BYTES * voxels + (REDUCTION_BYTES if ranks > 1 else 0)
    waiting = 12 * min(WAITING, 128 * 12 * coefficients) + SORTED_SAMPLE_BYTES * min(voxels / 2, WAITING)
    sums = SUMS_VOXEL_BYTES * voxels * (2 * kinds - 1 if ranks == 1 else kinds)  # those of the last half are the grid
    maps = 10 * p.map_bytes + 8 * IMAGE_ARRAYS * coefficients
    images = _images_of_refinement(p, n, ranks)
    searching = grid + REFERENCE_VOXEL_BYTES * voxels + max(waiting, SCORES_BYTES)
    return int(images + maps + sums + max(searching, transform_bytes(p, padding)))


def transform_bytes(p: Problem, padding: int) -> int:
    """Of a transform between a map and its padded cube (``physics.padded_transform``): the map's half-transform, and
    slabs of the cube."""
    return int(padding * p.map_bytes + 4 * 8 * max(2**22, (padding * p.box_px) ** 2))


def _classification(p: Problem, ranks: int) -> int:
    """As a refinement, with a grid and maps for every class (``refine.classes``)."""
    padding, radius = p.job.refine.padding, (p.box_px - 1) // 2
    each = (GRID_VOXEL_BYTES + 2 * SUMS_VOXEL_BYTES) * grid_voxels(radius, padding) + 8 * p.map_bytes
    return _refinement(p, p.particles, ranks) + (p.job.classify.classes - 1) * each


def _reconstruction(p: Problem, ranks: int) -> int:
    padding, radius = p.job.reconstruct.padding, (p.box_px - 1) // 2
    voxels = grid_voxels(radius, padding)
    grid = GRID_VOXEL_BYTES * voxels + (REDUCTION_BYTES if ranks > 1 else 0)
    waiting = 12 * min(voxels / 2, WAITING) + SORTED_SAMPLE_BYTES * min(voxels / 2, WAITING)
    one_half = SUMS_VOXEL_BYTES * voxels  # the first half's, beside the grid of the second; then that grid is gone
    return int(grid + one_half + max(waiting, transform_bytes(p, padding)) + 7 * p.map_bytes)


# --- networks


def trained(network: str, preset: str, units: float, device: str, *, alone: bool = False) -> int:
    """Bytes of a training step: parameters in ``STATES`` copies, and what the forward pass leaves.

    Args:
        network: "generator" or "unet".
        units: pixels of the images, or voxels of the sub-maps, that a rank has in memory at once.
        device: GPUs compute in bfloat16.
        alone: one sub-map at a time on a CPU.
    """
    full, half, peak = TRAINED_BYTES[network, preset]
    each = half if device != "cpu" else ALONE_BYTES[preset] if alone else full
    return int(4 * STATES * PARAMETERS[network, preset] + peak * each * units)


def _images_kept(p: Problem) -> int:
    """Images that a training keeps in main memory: those of one half-set, or buffers of them."""
    if not p.job.auxiliary.has_network:
        return 0
    rows = p.particles if p.job.auxiliary.generators == "shared" else ceil(p.particles / 2)
    return min(CACHE_BYTES, 4 * p.box_px**2 * rows)


def _generator_training(p: Problem, ranks: int) -> int:
    """All images of a rank at a time: two generators have half of the ranks each, where there are several."""
    from cryoiso.methods.auxiliary.settings import network, training

    section = p.job.auxiliary
    if not section.has_network:
        return TRAINING_MAPS * p.map_bytes
    settings = training(section, p.device)
    group = ranks if section.generators == "shared" or ranks == 1 else ranks // 2
    pixels = network(settings, p.box_px).padded_px ** 2
    images = ceil(settings.batch / group)
    return trained("generator", settings.preset, images * pixels, p.device) + TRAINING_MAPS * p.map_bytes


def _generation(p: Problem) -> int:
    from cryoiso.methods.auxiliary.generator import BATCH

    if not p.job.auxiliary.has_network:
        return 0
    preset = preset_of(p.job.auxiliary.preset, p.device)
    return int(APPLIED_BYTES["generator", preset] * min(BATCH, p.auxiliaries) * p.box_px**2) + 10 * p.map_bytes


def _correction(p: Problem, ranks: int, mode: str) -> int:
    """The larger of a training step and of applying the network to a tile.

    On CPUs sub-maps are trained on one by one (``methods.anisotropy.correction_run``); the published losses keep two or
    three passes through the network until the backward one.
    """
    from cryoiso.methods.anisotropy.correction_run import tile_px
    from cryoiso.methods.anisotropy.settings import resolve

    settings = resolve(p.job.correct, p.device)
    on_cpu = p.device == "cpu"
    group = ranks if mode == "paired" else max(1, ranks // 2)
    maps = 1 if on_cpu else ceil(settings.batch / group)
    passes = 1 if settings.method == "completion" else 3 if mode == "paired" and p.job.correct.beta > 0 else 2
    step = trained("unet", settings.preset, passes * maps * settings.cube_px**3, p.device, alone=maps == 1)
    applied = APPLIED_BYTES["unet", settings.preset] * tile_px(settings, p.box_px) ** 3
    return int(max(step, applied) + TRAINING_MAPS * p.map_bytes)


# --- controls


def _audited(p: Problem, ranks: int) -> int:
    return _most_of_chain(MEMORY, p, ranks)


def _most_of_chain(costs: dict[str, Bytes], p: Problem, ranks: int) -> int:
    """The largest stage of the controls' refinements, which have the stages of the run and fewer images."""
    part = replace(p, job=extent.jobs(p.job)[0], particles=extent.particles_of(p.job, p.particles), with_shards=True)
    kinds = {kind_of(name) for name in working_stages(part.job)}
    return max(bytes_of(part, ranks) for kind, bytes_of in costs.items() if kind in kinds)


# --- by kind of stage

Bytes = Callable[[Problem, int], int]
MEMORY: dict[str, Bytes] = {
    "ingest": _little, "reference": _little, "refine": partial(_refinement_and_loop, "refine"),
    "classify": _classification, "micelle": _reconstruction, "train": _train, "generate": _generate,
    "corefine": partial(_refinement_and_loop, "corefine"), "local": partial(_refinement_and_loop, "local"),
    "reconstruct": _reconstruction, "correct": _correct, "diagnose": lambda p, ranks: 25 * p.map_bytes,
    "audit": _audited, "report": _little,
}  # fmt: skip
"""Kind of stage -> main memory of its own arrays."""
GPU: dict[str, Bytes] = {
    "refine": MEMORY["refine"], "classify": _classification, "corefine": MEMORY["corefine"],
    "local": MEMORY["local"], "micelle": _reconstruction,
    "reconstruct": _reconstruction, "train": _generator_training, "generate": lambda p, ranks: _generation(p),
    "correct": lambda p, ranks: _correction(p, ranks, p.job.correct.mode),
    "audit": lambda p, ranks: _most_of_chain(GPU, p, ranks),
}  # fmt: skip
"""Kind of stage that computes on a GPU -> memory there."""
