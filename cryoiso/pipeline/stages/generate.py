"""The stage and the command that make auxiliary particles with trained generators."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import CryoisoError, Interrupted
from cryoiso.core.log import ProgressLine
from cryoiso.core.progress import board
from cryoiso.core.protocols import ImageSource, Progress
from cryoiso.core.types import HALVES, Particles
from cryoiso.io import shardset
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import write_stack
from cryoiso.io.shards import ShardSource
from cryoiso.io.sources import as_recorded
from cryoiso.io.star.write import write_particles
from cryoiso.methods.auxiliary.generate import Maker, batches
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.methods.auxiliary.particles import apart, auxiliary_particles, both_halves
from cryoiso.methods.auxiliary.transfer import measure as measure_transfer
from cryoiso.parallel import signals
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import owned_rows
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.records.hashing import digest_of, sha256_of
from cryoiso.pipeline.stages.rounds import UNCONFIRMED, found_before, is_settled, nothing_confirmed, poses_after, skip

logger = logging.getLogger("cryoiso")
SAMPLES = 8
"""Images of each kind that the report shows."""
COMPARED = 512
"""Raw and generated images that are compared, of each half."""
COMPARED_BLOCK = 64


def generator_files(folder: Path, shared: bool) -> dict[int, Path]:
    """Half -> file of its generator."""
    return {h: folder / (products.SHARED_GENERATOR if shared else products.generator(h)) for h in HALVES}


def generate_stage(round_: int, run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """Auxiliary particles of both halves, and how alike they are to the raw ones."""
    name, comm, job, section = f"generate-{round_}", run.comm, run.job, run.job.auxiliary
    if is_settled(run, round_):
        return skip(run, name)
    if nothing_confirmed(found_before(run, round_)):
        return skip(run, name, UNCONFIRMED, round=round_)
    folder = run.folder.stage(name)
    files = generator_files(run.folder.stage(f"train-{round_}"), section.generators == "shared")
    posed = poses_after(run, inputs, round_ - 1)
    particles = on_root(comm, planned_particles, inputs, posed, round_)
    maker = load_maker(files, particles, section.temperature, job.run.seed, comm)
    write_images(maker, files, folder, comm, lambda done, of: run.note_checkpoint(name, images=done, of=of))
    shards = inputs.source(once=True)
    shards.particles = posed
    raw, _ = as_recorded(shards, posed)
    facts = {"round": round_, "counts": _counts(particles), "temperature": section.temperature}
    # how well the images are modelled shows at temperature 1; what is made may be colder on purpose
    facts["transfer"] = measure_transfer(ShardSource(folder), particles, maker.conditions, comm, job.run.seed)
    facts["statistics"] = compare(raw, MadeSource(maker.at_temperature(1.0)), comm, job.run.seed)
    on_root(comm, _finish, folder, maker, raw, facts, particles)
    if section.export:
        written = apart(particles, posed) if section.noise_group == "own" else particles
        on_root(comm, export, ShardSource(folder), written, folder, shards.index["inverted"])


def planned_particles(inputs: Inputs, raw: Particles, round_: int) -> Particles:
    """Who the auxiliary particles of a round are (rank 0): identities, CTFs and true poses.

    Args:
        raw: the data with the poses that the round starts from.
    """
    box, pixel = inputs.grid()
    known = inputs.particles().shift_A
    sets = []
    for half in HALVES:
        count = max(1, round(inputs.job.auxiliary.ratio * int(np.sum(raw.half == half))))
        sets.append(
            auxiliary_particles(
                raw, half, count, round_=round_, seed=inputs.job.run.seed, symmetry=inputs.job.sample.symmetry,
                box_px=box, pixel_size_A=pixel, known_shift_A=known,
            )
        )  # fmt: skip
    return both_halves(*sets)


def load_maker(files: dict[int, Path], particles: Particles, temperature: float, seed: int, comm: Context) -> Maker:
    """The generators on every rank, ready to make images."""
    device = comm.device()
    loaded: dict[Path, Generator] = {}
    error = None
    try:
        for path in set(files.values()):
            loaded[path] = Generator.load(path, device)
    except CryoisoError as caught:
        error = caught
    agree(comm, error)
    return Maker(particles, {h: loaded[p] for h, p in files.items()}, temperature, seed, device)


def write_images(
    maker: Maker, files: dict[int, Path], folder: Path, comm: Context, note: Progress | None = None
) -> None:
    """Writes the shards of a set; ranks work side by side, finished shards are left alone (collective)."""
    digest = on_root(comm, lambda: digest_of(*(sha256_of(files[h]) for h in HALVES)))
    plan = maker.plan(digest)
    total = len(maker.particles)
    board.expect(0, 1)
    line = ProgressLine("generating", total, active=comm.rank == 0)
    for first in range(0, len(plan.shards), comm.size):
        if comm.stop_requested():
            raise Interrupted("stopped by a signal while generating; finished shards are kept")
        agree(comm, _write_shard(plan, maker, folder, first + comm.rank))
        done = plan.shards[min(first + comm.size, len(plan.shards)) - 1][1]
        line.update(done)
        if note:
            note(done, total)
    on_root(comm, shardset.finish, plan, folder)
    line.close(f"{total:,} images of {plan.box_px} px")


def _write_shard(plan: shardset.ShardSet, maker: Maker, folder: Path, number: int) -> CryoisoError | None:
    try:
        if number < len(plan.shards) and not shardset.is_written(plan, folder, number):
            shardset.write_one(plan, folder, number, _heeding(maker.blocks(*plan.shards[number])))
    except CryoisoError as error:
        return error
    return None


def _heeding(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same; stops between two where a signal asked for it (a shard that is not finished leaves nothing behind)."""
    for block in blocks:
        signals.heed()
        yield block


class MadeSource:
    """Auxiliary images made when they are read (an ``ImageSource``)."""

    def __init__(self, maker: Maker) -> None:
        self.particles, self._maker = maker.particles, maker
        self.box_px = maker.generators[1].reference.box_px

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images of these rows, ascending: (n, D, D) float32."""
        assert self.particles.half is not None  # auxiliary particles have half-sets
        parts = [self._maker.images(rows[part])[0] for part in batches(self.particles.half[rows], 0, len(rows))]
        return np.concatenate(parts)


def _counts(particles: Particles) -> dict[str, int]:
    return {str(h): int(np.sum(particles.half == h)) for h in HALVES}


def compare(raw: ImageSource, generated: ImageSource, comm: Context, seed: int) -> dict[str, Any]:
    """Statistics of raw and generated images, half by half paired, ranks sharing the reading (collective)."""
    from cryoiso.core.rng import shuffle_keys
    from cryoiso.metrics.imagestats import image_statistics, image_sums

    pairs = []
    for half in HALVES:
        sides = []
        for source in (raw, generated):
            rows = np.flatnonzero(source.particles.half == half)
            keys = shuffle_keys(seed, "compared image", source.particles.uid[rows])
            sides.append(np.sort(rows[np.argsort(keys, kind="stable")[:COMPARED]]))
        n = min(map(len, sides))
        pairs.append([side[:n] for side in sides])
    left, right = (np.concatenate([p[i] for p in pairs]) for i in (0, 1))
    own_rows = owned_rows(len(left), COMPARED_BLOCK, comm.rank, comm.size)
    radius = 0.5 * raw.box_px
    parts = []
    for start in range(own_rows.start, own_rows.stop, COMPARED_BLOCK):
        some = slice(start, min(start + COMPARED_BLOCK, own_rows.stop))
        parts.append(image_sums(raw.read(left[some]), generated.read(right[some]), radius))
    sums = np.sum([part for share in comm.allgather(parts) for part in share], axis=0)
    group = raw.particles.first_group
    return image_statistics(sums, raw.box_px, group.pixel_size_A)


def _finish(folder: Path, maker: Maker, raw: ImageSource, facts: dict[str, Any], particles: Particles) -> None:
    """Samples for the report and the facts."""
    from cryoiso.io.atomic import atomic_write

    sample_rows = np.arange(min(SAMPLES, int(np.sum(particles.half == 1))))
    generated, clean = maker.at_temperature(1.0).images(sample_rows)
    shown = raw.read(np.arange(min(SAMPLES, len(raw.particles))))
    with atomic_write(folder / products.SAMPLES) as stream:
        np.savez(stream, raw=shown, auxiliary=generated, projections=clean)
    write_json(folder / products.facts("generate"), facts)
    kl = facts["statistics"].get("kl_nats")
    logger.info("%d auxiliary particles%s", len(particles), "" if kl is None else f", KL to the raw ones {kl:.3g} nats")


def export(source: ImageSource, particles: Particles, folder: Path, inverted: bool) -> list[Path]:
    """MRCS stacks and a STAR file beside the shards, for other programs, with the sign of the raw stacks.

    Returns:
        the files written.
    """
    assert particles.half is not None  # auxiliary particles have half-sets
    written = []
    names = np.empty(len(particles), object)
    for half in HALVES:
        rows = np.flatnonzero(particles.half == half)
        path = folder / str(particles.stack[rows[0]])
        with write_stack(path, source.box_px, particles.groups[0].pixel_size_A) as stack:
            for block in batches(particles.half, int(rows[0]), int(rows[-1]) + 1):
                stack.append(-source.read(block) if inverted else source.read(block))
        names[rows] = [f"{i + 1:06d}@{path.name}" for i in range(len(rows))]
        written.append(path)
    star = folder / "auxiliary.star"
    write_particles(star, particles, list(names))
    return [*written, star]
