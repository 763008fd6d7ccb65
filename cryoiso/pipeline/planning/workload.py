"""What a job has to work, in units that machines can be timed by, stage by stage.

Units (``KERNELS``): each names an inner loop of the program; the counts follow its formulas: the schedule of the search
(``refine.schedule``), levels and beams (``refine.search``), insertion and transforms (``physics``), steps of trainings.
What depends on the data is assumed, see ``Assumed``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cryoiso.methods.audit import extent
from cryoiso.pipeline.planning.job_size import Problem, preset_of
from cryoiso.pipeline.planning.memory import grid_voxels
from cryoiso.pipeline.stages.map_numbers import wants_local_resolution
from cryoiso.pipeline.workflow import CO_REFINEMENTS, kind_of, working_stages

WorkUnits = dict[str, float]
"""Kernel -> units."""
KERNELS = {
    "write": "byte of image read, normalised and written to a shard, on a CPU",
    "prepare": "voxel of the reference brought onto the particles' grid and low-passed, on a CPU",
    "read": "pixel of an image read, transformed and given its CTF",
    "gemm": "multiplication and addition of the global search",
    "local": "coefficient of a view of the local search, with its nine shifts",
    "insert": "coefficient put into the grid",
    "transform": "voxel of a padded box, there and back between a map and its transform",
    "train_small": "pixel of an image of a training step, small generator",
    "train_paper": "the same, generator as published",
    "generate_small": "pixel of a generated image, small generator",
    "generate_paper": "the same, generator as published",
    "unet_small": "voxel of a sub-map of a training step, small network",
    "unet_paper": "the same, network as published",
    "measure": "voxel of a map whose quality is measured, on a CPU",
    "fixed": "second that any run takes for it",
}
POSTERIOR_VIEWS = 4
"""Views that an image is inserted at, on average."""
CLASS_ITERATIONS = 12
"""Of a classification."""
ALIVE = 0.5
"""Share of the candidates that are refined further."""


@dataclass(frozen=True)
class Assumed:
    """What the images decide."""

    iterations: int = 8
    nyquist_share: float = 0.7
    """Resolution that the search reaches, as a share of the finest that the grid holds."""
    rounds: int | None = None
    """Rounds of auxiliary particles; None: as many as the job allows."""


def add(*parts: WorkUnits) -> WorkUnits:
    total: WorkUnits = {}
    for part in parts:
        for kernel, units in part.items():
            total[kernel] = total.get(kernel, 0.0) + units
    return total


def times(work: WorkUnits, factor: float) -> WorkUnits:
    return {kernel: factor * units for kernel, units in work.items()}


def stages(p: Problem, ranks: int, assumed: Assumed, device: str) -> dict[str, WorkUnits]:
    """Stage -> work of one rank, of stages that have a folder and the report."""
    works = {name: WORKS[kind_of(name)](p, ranks, assumed, device) for name in (*working_stages(p.job), "report")}
    rounds = assumed.rounds or p.job.auxiliary.rounds
    for name in list(works):
        match = re.search(r"-(\d+)$", name)
        if match and int(match[1]) > rounds:
            works[name] = {}
    return works


def _ingest(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    return {} if p.with_shards else {"write": p.particles * p.box_px**2 * 4 / ranks}


def _reference(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    return {"prepare": float(p.box_px**3)}


def _refine(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    if p.job.auxiliary.poses == "given" and p.job.run.workflow in CO_REFINEMENTS:
        return reconstruction(p, p.particles, ranks)
    loop = correction(p, ranks, device, inside=True) if p.job.run.workflow == "realign" else {}
    return refinement(p, p.particles, ranks, assumed, loop)


def _classify(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    section = p.job.classify
    if section.align == "none":  # a reconstruction of every class in every iteration
        each = reconstruction(p, p.particles, ranks, weighted=True)
    else:
        near = section.local_deg if section.align == "local" else None
        work = refinement(p, p.particles, ranks, assumed, {}, local_deg=near)
        each = times(work, 1 / min(assumed.iterations, p.job.refine.max_iterations))
    return times(each, section.classes * min(CLASS_ITERATIONS, section.max_iterations))


def _micelle(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    return times(reconstruction(p, p.particles, ranks), 6)  # two passes to set up, and some to solve


def _train(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    return training(p, ranks, device)


def _generate(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    if not p.job.auxiliary.has_network:
        return {"fixed": 1.0}
    return {f"generate_{preset_of(p.job.auxiliary.preset, device)}": p.auxiliaries * p.box_px**2 / ranks}


def _corefine(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    loop = correction(p, ranks, device, inside=True) if p.job.run.workflow == "both" else {}
    work = refinement(p, p.particles + p.auxiliaries, ranks, assumed, loop)
    return add(work, reconstruction(p, p.particles, ranks))


def _local(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    near = refinement(p, p.particles, ranks, assumed, {}, local_deg=p.job.auxiliary.local_deg)
    return add(near, reconstruction(p, p.particles, ranks))


def _reconstruct(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    sets = 1 + bool(p.job.truth.particles) + (p.job.run.workflow in CO_REFINEMENTS)
    return times(reconstruction(p, p.particles, ranks, weighted=True), sets)


def _correct(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    return correction(p, ranks, device)


def _diagnose(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    local = 2.0 if wants_local_resolution(p.job.diagnose, p.box_px) else 0.0
    times_measured = 2 if p.job.run.workflow in CO_REFINEMENTS else 1
    return {"measure": (6.0 * times_measured + local) * p.box_px**3, "fixed": 2.0}


def _report(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    return {"fixed": 5.0, "measure": 2.0 * p.box_px**3}


def _audit(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    """The stages from the reference to the reconstruction, of every refinement of the controls."""
    n = extent.particles_of(p.job, p.particles)
    jobs = dict(zip(("same", "plain", "local"), (*extent.jobs(p.job), extent.jobs(p.job)[1]), strict=True))
    parts = [{"write": 2 * n * p.box_px**2 * 4 / ranks}]
    for (kind, size), count in extent.repetitions(p.job, n).items():
        part = replace(p, job=jobs[kind], particles=size, with_shards=True)
        units = _near(part, ranks, assumed) if kind == "local" else _chain(part, ranks, assumed, device)
        parts.append(times(units, count))
    return add(*parts)


def _near(p: Problem, ranks: int, assumed: Assumed) -> WorkUnits:
    """A local search from known poses and its reconstruction."""
    search = refinement(p, p.particles, ranks, assumed, {}, local_deg=extent.LOCAL_DEG)
    return add(search, reconstruction(p, p.particles, ranks, weighted=True))


def _chain(p: Problem, ranks: int, assumed: Assumed, device: str) -> WorkUnits:
    """All stages of a workflow up to its final maps."""
    left_out = ("ingest", "diagnose", "audit", "report")
    return add(*(units for name, units in stages(p, ranks, assumed, device).items() if kind_of(name) not in left_out))


WORKS: dict[str, Callable[[Problem, int, Assumed, str], WorkUnits]] = {
    "ingest": _ingest, "reference": _reference, "refine": _refine, "classify": _classify, "micelle": _micelle,
    "train": _train, "generate": _generate, "corefine": _corefine, "local": _local, "reconstruct": _reconstruct,
    "correct": _correct, "diagnose": _diagnose, "audit": _audit, "report": _report,
}  # fmt: skip
"""Kind of stage -> its work of one rank."""


# --- refinement


def refinement(
    p: Problem, n: int, ranks: int, assumed: Assumed, loop: WorkUnits, local_deg: float | None = None
) -> WorkUnits:
    """All iterations of a refinement of n images, on one rank; ``loop`` is added to each."""
    each = [add(iteration, loop) for iteration in iterations(p, n, ranks, assumed, local_deg)]
    first_passes = {"read": 2.0 * n * p.box_px**2 / ranks}
    return add(first_passes, *each)


def iterations(p: Problem, n: int, ranks: int, assumed: Assumed, local_deg: float | None = None) -> Iterator[WorkUnits]:
    """Work of each iteration."""
    from cryoiso.refine.schedule import ScheduleState, global_grid, local_grid, search_plan

    settings = p.job.refine
    limit = (p.box_px - 1) // 2
    if settings.max_resolution_A:
        limit = min(limit, int(p.box_px * p.pixel_size_A / settings.max_resolution_A))
    first = int(np.clip(round(p.box_px * p.pixel_size_A / p.job.reference.lowpass_A), 3, limit))
    last = int(np.clip(round(assumed.nyquist_share * p.box_px / 2), first, limit))
    order = settings.healpix_order
    grid = global_grid(order, p.job.sample.symmetry) if local_deg is None else local_grid(order, local_deg)
    kept = n / ranks * p.box_px**2 * 5 <= 1 << 30
    operations = _operations(p.job.sample.symmetry)
    for i in range(min(assumed.iterations, settings.max_iterations)):
        radius = first if i == 0 else last
        # poses that allow any step: the resolution alone decides
        state = ScheduleState(i, radius, max(2.0, 0.03 * p.box_px) if i == 0 else 2.0, uncertainty_deg=0.0)
        plan = search_plan(state, settings, grid, p.box_px, p.pixel_size_A, p.diameter_A, local_deg)
        inserted = min(limit, int(1.5 * radius) + 6)
        views, shifts = len(grid), len(plan.shifts_px)
        image = add(
            {"gemm": _coefficients(plan.coarse_radius_px) * views * (4.0 * shifts + 2)},
            *({"local": 8 * ALIVE * level.max_candidates * _coefficients(level.radius_px)} for level in plan.levels),
            {"insert": POSTERIOR_VIEWS * _coefficients(inserted)},
            {} if kept else {"read": float(p.box_px**2)},
        )
        maps = 8 * (settings.padding * p.box_px) ** 3 + 2 * (operations - 1) * grid_voxels(inserted, settings.padding)
        yield add(times(image, n / ranks), {"transform": maps / (1 if ranks == 1 else 2)})


def _coefficients(radius_px: int) -> float:
    """Of a slice, one of each Friedel pair."""
    return np.pi / 2 * radius_px**2


def _operations(symmetry: str) -> int:
    from cryoiso.physics.symmetry import point_group

    return len(point_group(symmetry))


def reconstruction(p: Problem, n: int, ranks: int, *, weighted: bool = False) -> WorkUnits:
    """Both half-maps of n images with given poses; ``weighted``: filtered halves and the map of both as well."""
    padding, limit = p.job.reconstruct.padding, (p.box_px - 1) // 2
    maps = (5 if weighted else 2) * (padding * p.box_px) ** 3
    maps += 2 * (_operations(p.job.sample.symmetry) - 1) * grid_voxels(limit, padding)
    each = n / ranks
    return {"read": each * p.box_px**2, "insert": each * _coefficients(limit), "transform": float(maps)}


# --- networks


def training(p: Problem, ranks: int, device: str) -> WorkUnits:
    """Generators of a round: side by side on half of the ranks each, or one after the other."""
    from cryoiso.methods.auxiliary.settings import training as settings_of

    if not p.job.auxiliary.has_network:  # the grey scale of each half, and perhaps its noise
        passes = 2 if p.job.auxiliary.generators == "coloured-noise" else 1
        return {"read": 2.0 * passes * 2048 * p.box_px**2 / ranks}
    settings = settings_of(p.job.auxiliary, device)
    courses = 1 if p.job.auxiliary.generators == "shared" else 2
    group = ranks if courses == 1 or ranks == 1 else ranks // 2
    turns = courses if ranks == 1 else 1
    images = settings.steps * max(1.0, settings.batch / max(group, 1))
    return {f"train_{settings.preset}": turns * images * p.box_px**2}


def correction(p: Problem, ranks: int, device: str, *, inside: bool = False) -> WorkUnits:
    """The anisotropy correction: networks' trainings and the map through them; ``inside`` a refinement."""
    from cryoiso.methods.anisotropy.settings import resolve

    if inside and not p.job.realign.correct:
        return {"measure": float(p.box_px**3)}
    epochs = p.job.realign.epochs or (5 if device != "cpu" else 3) if inside else None
    settings = resolve(p.job.correct, device, epochs)
    mode = p.job.realign.mode if inside else p.job.correct.mode
    alone = 1 if mode == "paired" or ranks > 1 else 2
    group = ranks if mode == "paired" else max(1, ranks // 2)
    voxels = settings.steps * max(1.0, settings.batch / group) * settings.cube_px**3
    applied = settings.rounds * 2 * (2 * p.box_px) ** 3 / (3 * group)  # overlapping tiles, forward only
    return {f"unet_{settings.preset}": alone * (voxels + applied), "measure": float(p.box_px**3)}
