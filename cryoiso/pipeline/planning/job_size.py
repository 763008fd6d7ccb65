"""The size of a job, and what it will take of the disk: sizes of files follow from what the stages write
(``pipeline.stages``, ``engines.relion``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np

from cryoiso.core.config import Job
from cryoiso.core.errors import InputError
from cryoiso.io.imageprep import read_prepared
from cryoiso.io.ingest import IngestPlan
from cryoiso.io.shards import CHUNK_IMAGES, ShardSource
from cryoiso.io.shardset import SHARD_BYTES, SPREAD
from cryoiso.io.stack import StackReader
from cryoiso.methods.audit import extent
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.stages.map_numbers import wants_local_resolution
from cryoiso.pipeline.workflow import CO_REFINEMENTS, kind_of, program_of, starts_a_program, working_stages

PARAMETERS = {
    ("generator", "small"): 122_000, ("generator", "paper"): 7_292_000, ("unet", "small"): 429_000,
    ("unet", "paper"): 26_410_000,
}  # fmt: skip
"""Weights of the networks."""
POSE_TEXT_BYTES = 120
"""What a row of a STAR file grows by with poses and results."""
CHECKPOINTS = 2 * 3
"""Copies of a network's weights in the two checkpoints of a training: themselves and two moments."""
STATE_BYTES = 5000
"""History and names in a checkpoint."""
REPORT_BYTES = 2_800_000


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
    originals: bool = False
    """RELION may read the particles' own stacks; unless it is told to, it gets a copy of all others"""

    @property
    def auxiliaries(self) -> int:
        return round(self.particles * self.job.auxiliary.ratio)

    @property
    def map_bytes(self) -> int:
        return 4 * self.box_px**3 + 1024


@dataclass(frozen=True)
class Stored:
    """What a stage leaves on the disk, and what it removes again when it ends."""

    name: str
    bytes: int
    files: int
    temporary_bytes: int = 0
    temporary_files: int = 0


def problem_of(inputs: Inputs) -> Problem:
    """Reads what it needs of the inputs (rank 0)."""
    job, particles = inputs.job, inputs.particles()
    box, pixel = inputs.grid()
    diameter = inputs.expected_diameter_A()
    file = Path(job.particles.file)
    text = file.suffix == ".star" and file.is_file()
    stacks = set(particles.stack.tolist()) if not file.is_dir() else set()
    largest = max((Path(name).stat().st_size for name in stacks), default=0)
    row = max(60, file.stat().st_size // max(len(particles), 1)) if text else 250
    if inputs.originals is None:  # images are read for it, and every stage asks
        inputs.originals = starts_a_program(job) and _original_images_do(inputs)
    return Problem(
        job, len(particles), box, pixel, diameter, row, file.is_dir(), len(particles.groups), largest,
        originals=inputs.originals,
    )  # fmt: skip


def _original_images_do(inputs: Inputs) -> bool:
    """Whether RELION needs no copy of them, as the engine decides it: by a sample, prepared as ingest does."""
    from cryoiso.engines.relion.images import usable_originals

    try:
        is_folder = Path(inputs.job.particles.file).is_dir()
        source = ShardSource(inputs.shards) if is_folder else _AsIngested(inputs.plan())
        return bool(usable_originals(source, program_of(inputs.job).images)[0].all())
    except InputError:  # the run will tell
        return False


class _AsIngested:
    """The images that the shards will have (an ``ImageSource``)."""

    def __init__(self, plan: IngestPlan) -> None:
        self.particles, self.box_px, self._plan = plan.particles, plan.box_px, plan

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(n, D, D) float32."""
        plan = self._plan
        with StackReader() as reader:
            return read_prepared(reader, plan.particles, rows, plan.decision.sign, plan.settings, plan.box_px)[0]


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
    stored = [DISK[kind_of(name)](name, p) for name in working_stages(p.job)]
    return [*stored, _result(p), Stored("run folder", 40_000 + 3_000 * ranks + REPORT_BYTES * _pictures(p), 8 + ranks)]


def most(stored: list[Stored]) -> tuple[int, int]:
    """Most bytes and files that are there at once: what was left so far and what the present stage removes again."""
    before = peak = (0, 0)
    for entry in stored:
        before = before[0] + entry.bytes, before[1] + entry.files
        peak = max(peak[0], before[0] + entry.temporary_bytes), max(peak[1], before[1] + entry.temporary_files)
    return peak


def preset_of(preset: str, device: str) -> str:
    """auto: by the device."""
    return preset if preset != "auto" else "small" if device == "cpu" else "paper"


def _pictures(p: Problem) -> int:
    """A report that compares before and after is twice as large."""
    return 2 if p.job.run.workflow in CO_REFINEMENTS else 1


def _ingested(name: str, p: Problem) -> Stored:
    if p.with_shards:
        return Stored(name, 0, 0)
    shards = _shards(name, p.particles, p)
    return Stored(name, shards.bytes + 1200, shards.files + 2)


def _refined_or_given(name: str, p: Problem) -> Stored:
    if p.job.auxiliary.poses == "given" and p.job.run.workflow in CO_REFINEMENTS:
        return Stored(name, 3 * p.map_bytes + _star(p), 5)
    return _refined(name, p)


def _star(p: Problem, n: int | None = None) -> int:
    return (p.row_bytes + POSE_TEXT_BYTES) * (p.particles if n is None else n)


def _refined(name: str, p: Problem, auxiliaries: int = 0) -> Stored:
    """Two generations of the checkpoint, two maps, particles, two summaries."""
    n = p.particles + auxiliaries
    if starts_a_program(p.job):
        full = Stored(name, p.job.refine.max_iterations * (6 * p.map_bytes + 350 * n) + 2 * p.map_bytes, 40)
        copied = auxiliaries + (0 if p.originals or program_of(p.job).images == "original" else p.particles)
        return with_temporary(full, *_images_for_relion(copied, p.box_px))
    state = 4 * (p.map_bytes - 1024) + 112 * n + STATE_BYTES
    if p.job.refine.scale != "none":
        state += _total_weights(p) + 32 * n
    return Stored(name, 2 * state + 2 * p.map_bytes + _star(p, n) + 2500, 7)


def _total_weights(p: Problem) -> int:
    """Of both halves, at the largest radius: what the images' own shares in a reference follow from."""
    h = p.job.refine.padding * ((p.box_px - 1) // 2) + 2
    return 2 * 4 * (2 * h + 1) ** 2 * (h + 1)


def _images_for_relion(n: int, box_px: int) -> tuple[int, int]:
    """Bytes and files of its own stacks (``engines.relion.images``), which are removed when it has ended."""
    from cryoiso.engines.relion.images import images_a_stack

    if not n:
        return 0, 0
    stacks = ceil(n / images_a_stack(n, box_px))
    return 4 * n * box_px**2 + 1024 * stacks + 200, stacks + 1


def with_temporary(stored: Stored, size: int, files: int) -> Stored:
    """The same with more that goes again."""
    more = stored.temporary_bytes + size, stored.temporary_files + files
    return replace(stored, temporary_bytes=more[0], temporary_files=more[1])


def _reconstructed(name: str, p: Problem) -> Stored:
    """Halves, mean, weighted mean and mask; halves, mean and weighted mean again for each further set of poses."""
    more = bool(p.job.truth.particles) + (p.job.run.workflow in CO_REFINEMENTS)
    maps = 5 + 4 * more
    return Stored(name, maps * p.map_bytes + 100, maps + 1)


def _result(p: Problem) -> Stored:
    """Maps and particles; two FSC curves, a picture, two texts, a script, numbers and checksums."""
    maps = 5 + 2 * (p.job.run.workflow in ("realign", "both")) + wants_local_resolution(p.job.diagnose, p.box_px)
    return Stored("result", maps * p.map_bytes + _star(p) + 150_000, maps + 9)


def _corrected(name: str, p: Problem) -> Stored:
    """Mask, filter, corrected halves and mean, two maps of what was measured, networks; while it works also at most two
    checkpoints of each training."""
    networks, rounds = 1 if p.job.correct.mode == "paired" else 2, p.job.correct.rounds
    weights = 4 * PARAMETERS["unet", preset_of(p.job.correct.preset, p.device)]
    trainings = networks * rounds
    left = Stored(name, 7 * p.map_bytes + networks * weights, 8 + networks)
    return with_temporary(left, trainings * CHECKPOINTS * weights, 3 * trainings)


def _trained(name: str, p: Problem) -> Stored:
    generators = 1 if p.job.auxiliary.generators == "shared" else 2
    weights = 4 * PARAMETERS["generator", preset_of(p.job.auxiliary.preset, p.device)]
    if not p.job.auxiliary.has_network:
        weights = 0
    left = Stored(name, generators * (p.map_bytes + weights) + 60_000, generators + 1 + bool(weights))
    return with_temporary(left, generators * CHECKPOINTS * weights, 3 * generators * bool(weights))


def _generated(name: str, p: Problem) -> Stored:
    shards = _made_shards(name, p)
    stacks = (4 * p.box_px**2 + 1024) * p.auxiliaries if p.job.auxiliary.export else 0
    return Stored(name, shards.bytes + stacks + 100_000, shards.files + 3 + 3 * p.job.auxiliary.export)


def _classified(name: str, p: Problem) -> Stored:
    """Two generations of the checkpoint, three maps of each class, particles and those selected, two summaries."""
    k = p.job.classify.classes
    state = k * (5 * (p.map_bytes - 1024) + _total_weights(p)) + (130 + 8 * k) * p.particles + STATE_BYTES
    return Stored(name, 2 * state + 3 * k * p.map_bytes + 2 * _star(p) + 60_000, 3 * k + 7)


def _round_of(engine: Stored, p: Problem) -> Stored:
    """A round's maps, particles and summary beside what the engine leaves."""
    size, files = engine.bytes + 5 * p.map_bytes + _star(p) + 20_000, engine.files + 7
    return replace(engine, bytes=size, files=files)


def _audited(name: str, p: Problem) -> Stored:
    """What every refinement of the controls leaves, and images and checkpoints that are removed again."""
    n, (same, plain) = extent.particles_of(p.job, p.particles), extent.jobs(p.job)
    total = files = 0
    for (kind, size), count in extent.repetitions(p.job, n).items():
        part = replace(p, job=same if kind == "same" else plain, particles=size, with_shards=True)
        stored = [entry for entry in disk(part) if entry.name not in ("ingest", "diagnose", "result", "run folder")]
        total += count * (sum(entry.bytes for entry in stored) + 20_000)
        files += count * (sum(entry.files for entry in stored) + 3)
    images = _shards(name, n, p)
    return Stored(name, total + 8 * p.map_bytes, files + 10, 2 * images.bytes, 2 * images.files + 2)


def _diagnosed(name: str, p: Problem) -> Stored:
    """Numbers, and the map of the local resolution where it is measured; a model's table is small."""
    local = wants_local_resolution(p.job.diagnose, p.box_px)
    table = 400_000 * bool(p.job.diagnose.model)
    size = 140_000 * _pictures(p) + local * p.map_bytes + 2 * table
    return Stored(name, size, 1 + local + bool(table))


DISK: dict[str, Callable[[str, Problem], Stored]] = {
    "ingest": _ingested,
    "reference": lambda name, p: Stored(name, 2 * p.map_bytes + 300, 3),
    "refine": _refined_or_given,
    "classify": _classified,
    "micelle": lambda name, p: Stored(name, 8 * p.map_bytes + 10_000, 10),
    "train": _trained,
    "generate": _generated,
    "corefine": lambda name, p: _round_of(_refined(name, p, p.auxiliaries), p),
    "local": lambda name, p: _round_of(_refined(name, p), p),
    "reconstruct": _reconstructed,
    "correct": _corrected,
    "diagnose": _diagnosed,
    "audit": _audited,
}
"""Kind of stage with a folder -> bytes and files that it leaves there."""
