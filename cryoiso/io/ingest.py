"""Particle stacks into shards: plan, write (each rank its own files), index. Memory does not grow with the set.

The plan is a pure function of the input and the settings, never of the number of ranks, so that any number of ranks
writes the same bytes. A shard that is complete and belongs to the same plan is left alone, which makes a rerun
continue where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.protocols import Communicator, Progress
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io.atomic import make_folder, temporary_name
from cryoiso.io.contrast_sign import SignDecision, decide_sign
from cryoiso.io.imagenames import distinct, first_stack
from cryoiso.io.imageprep import IngestSettings, by_stack, read_prepared
from cryoiso.io.particle_file import read_particle_file
from cryoiso.io.project_folder import KEY, project_of
from cryoiso.io.regular_file import open_regular
from cryoiso.io.shard_writer import (
    hdf5_chunk,
    row_columns,
    shard_attributes,
    shard_matches,
    write_index,
    write_shard_file,
)
from cryoiso.io.shards import COLUMNS, FORMAT, VERSION, ShardSource, groups_to_json, shard_name
from cryoiso.io.stack import StackReader, number_of_file

logger = logging.getLogger("cryoiso")

BLOCK_IMAGES = 256
BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class IngestPlan:
    """Everything that decides what the shards will contain. Small, picklable, equal on every rank."""

    particles: Particles
    """As read, but with the box of the shards in every optics group."""
    settings: IngestSettings
    box_px: int
    decision: SignDecision
    shards: tuple[tuple[int, int], ...]
    digest: str
    source: str
    source_sha256: str
    newest_stack_s: float
    """Modification time of the youngest stack; older shards are written again."""
    project: str = ""
    """Absolute folder that the source's names of stacks start from; "" where they are absolute."""


def check_stacks(particles: Particles, file: object = None) -> tuple[OpticsGroup, ...]:
    """Makes sure that every image exists, once, and has its optics group's size; reads headers only.

    Returns:
        the optics groups, with box sizes filled in where the particle file had none.

    Raises:
        InputError: missing or truncated stack, image beyond its stack, the same image twice, wrong or non-square size.
    """
    if not len(particles) or (particles.index < 0).any():
        raise InputError(
            "the particles have no image names",
            file=file,
            expected="_rlnImageName in every row",
            code="star-column-missing",
        )
    groups = list(particles.groups)
    with StackReader() as reader:
        for rows in by_stack(particles.stack):
            header = reader.check(str(particles.stack[rows[0]]), particles.index[rows], file, rows)
            for number in np.unique(particles.optics[rows]):
                groups[number] = _check_box(groups[number], header.shape, particles, rows, number, file)
    _refuse_doubles(particles, file)
    return tuple(groups)


def _refuse_doubles(particles: Particles, file: object) -> None:
    """No image twice, whatever its stack is called: a link, another spelling of the path or another mount."""
    for rows in by_stack(number_of_file(particles.stack)):
        index = particles.index[rows]
        values, counts = np.unique(index, return_counts=True)
        if counts.max() > 1:
            first, second = rows[index == values[counts.argmax()]][:2].tolist()
            names = [str(particles.stack[row]) for row in (first, second)]
            raise InputError(
                f"the same image is in two rows: {first + 1} and {second + 1}"
                + (f"; {names[0]} and {names[1]} are one file" if names[0] != names[1] else ""),
                file=file,
                row=second + 1,
                code="duplicate-particles",
            )


def _check_box(
    group: OpticsGroup, shape: tuple[int, int, int], particles: Particles, rows: np.ndarray, number: int, file: object
) -> OpticsGroup:
    row = int(rows[particles.optics[rows] == number][0])
    stack = particles.stack[row]
    if shape[1] != shape[2]:
        raise InputError(
            f"the images of {stack} are not square",
            file=file,
            row=row + 1,
            found=f"{shape[2]} x {shape[1]} px",
            code="stack-not-of-images",
        )
    if group.box_px not in (0, shape[2]):
        raise InputError(
            f"the images of {stack} have another size than optics group {group.number}",
            file=file,
            row=row + 1,
            expected=f"{group.box_px} px",
            found=f"{shape[2]} px",
            code="box-mismatch",
        )
    return replace(group, box_px=shape[2])


def plan(particles: Particles, settings: Any = None, source: object = "") -> IngestPlan:
    """Decides everything before the first image is written. Reads headers and, for the sign, a sample of images.

    Args:
        particles: with image stacks.
        settings: IngestSettings, or the job's [particles] section.
        source: the particle file, for messages and provenance.

    Raises:
        InputError: whatever ``check_stacks`` finds.
    """
    settings = IngestSettings.of(settings) if settings is not None else IngestSettings()
    file = source or None
    groups = check_stacks(particles, file)
    particles = replace(particles, groups=groups)
    decision = decide_sign(particles, settings, file)
    logger.info(
        "protein is %s in the images (%s, contrast %+.1f standard errors)",
        "dark; they are inverted" if decision.inverted else "white",
        decision.reason,
        decision.z,
    )
    for kind, words in (("flipped", "phase-flipped"), ("premultiplied", "multiplied by their CTF")):
        count = sum(int((particles.optics == i).sum()) for i, g in enumerate(groups) if g.ctf_applied == kind)
        if count:
            logger.info("%d of %d images are %s, as their optics groups say", count, len(particles), words)
    box = groups[int(particles.optics[0])].box_px
    others = sorted({g.box_px for i, g in enumerate(groups) if g.box_px != box and (particles.optics == i).any()})
    if others:
        logger.warning(
            "optics groups have different boxes: images of %s px are cropped or padded to %d px", others, box
        )
    per_shard = _images_per_shard(box, settings)
    n = len(particles)
    shards = tuple((start, min(start + per_shard, n)) for start in range(0, n, per_shard))
    sha = _sha256(source) if source else ""
    newest = max(os.stat(s).st_mtime for s in distinct(particles.stack)[0].tolist())
    project = project_of(first_stack(particles), str(particles.stack[0]))
    unhashed = IngestPlan(particles, settings, box, decision, shards, "", str(source), sha, newest, project)
    return replace(unhashed, digest=_digest(unhashed))


def _sha256(source: object) -> str:
    digest = hashlib.sha256()
    with open_regular(source) as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _images_per_shard(box_px: int, settings: IngestSettings) -> int:
    chunk = hdf5_chunk(box_px, settings.storage)
    per_shard = settings.shard_mib * 2**20 // (box_px * box_px * np.dtype(settings.storage).itemsize)
    return max(chunk, per_shard // chunk * chunk)


def _digest(p: IngestPlan) -> str:
    h = hashlib.sha256()
    settings = replace(p.settings, project="")
    facts = [FORMAT, VERSION, repr(settings), p.box_px, p.shards, groups_to_json(p.particles.groups), p.source_sha256]
    h.update(json.dumps(facts, default=str).encode())
    for name in COLUMNS:
        values = getattr(p.particles, name)
        h.update(b"none" if values is None else np.ascontiguousarray(values).tobytes())
    stacks, inverse = distinct(p.particles.stack)
    h.update(json.dumps([(s, os.stat(s).st_size) for s in stacks.tolist()]).encode())
    h.update(inverse.tobytes())
    h.update(p.decision.sign.tobytes())
    return h.hexdigest()


def shard_is_complete(plan: IngestPlan, folder: Path, number: int) -> bool:
    """Whether this shard is there and of this plan (a shard under its final name is always complete)."""
    return shard_matches(folder, number, plan.digest, plan.shards[number])


def shard_is_done(plan: IngestPlan, folder: Path, number: int) -> bool:
    """Whether this shard need not be written: complete, and not older than the images."""
    path = folder / shard_name(number)
    fresh = path.is_file() and path.stat().st_mtime >= plan.newest_stack_s
    return fresh and shard_is_complete(plan, folder, number)


def write_shard(plan: IngestPlan, folder: object, number: int, progress: Progress | None = None) -> Path:
    """Writes one shard, or leaves it if it is done.

    Raises:
        InputError: an image is bad. DiskFullError: no space. In both cases nothing half-written stays.
    """
    path = Path(str(folder)) / shard_name(number)
    start, stop = plan.shards[number]
    if shard_is_done(plan, path.parent, number):
        if progress:
            progress(stop, len(plan.particles))
        return path
    attributes = shard_attributes(
        plan.digest, (start, stop), plan.box_px, plan.particles.groups,
        normalisation=plan.settings.describe(), inverted=int(plan.decision.inverted), source=Path(plan.source).name,
        source_sha256=plan.source_sha256,
    )  # fmt: skip
    columns = row_columns(plan.particles, start, stop)
    blocks = _blocks(plan, start, stop, progress)
    write_shard_file(path, blocks, stop - start, plan.box_px, plan.settings.storage, columns, attributes)
    return path


def _blocks(plan: IngestPlan, start: int, stop: int, progress: Progress | None) -> Iterator[np.ndarray]:
    chunk = hdf5_chunk(plan.box_px, plan.settings.storage)
    step = min(BLOCK_IMAGES, BLOCK_BYTES // (4 * plan.box_px**2))
    step = max(step // chunk, 1) * chunk if chunk <= BLOCK_IMAGES else BLOCK_IMAGES
    file = plan.source or None
    limit = float(np.finfo(plan.settings.storage).max)
    empty = 0
    with StackReader() as reader:
        for first in range(start, stop, step):
            rows = np.arange(first, min(first + step, stop))
            images, empty_now = read_prepared(
                reader, plan.particles, rows, plan.decision.sign, plan.settings, plan.box_px, file
            )
            empty += empty_now
            peaks = np.abs(images).max((1, 2))
            if peaks.max() > limit:
                raise InputError(
                    f"pixel values do not fit {plan.settings.storage}",
                    file=file,
                    row=int(rows[peaks.argmax()]) + 1,
                    expected=f"at most {limit:g}",
                    found=f"{peaks.max():g}",
                    hint="Set storage = 'float32', or leave normalise on.",
                    code="images-not-normalised",
                )
            yield images.astype(plan.settings.storage)
            if progress:
                progress(int(rows[-1]) + 1, len(plan.particles))
    if empty:
        logger.warning("%d images have an empty background; only their mean was normalised", empty)


def finish_index(plan: IngestPlan, folder: object, hashes: Mapping[str, str] | None = None) -> Path:
    """Writes index.json after all ranks have written their shards; removes what an earlier plan left behind.

    Args:
        hashes: SHA-256 of each shard by name, where they are known.

    Raises:
        CryoisoError: a shard is missing.
    """
    return write_index(
        Path(str(folder)), plan.digest, plan.particles, plan.box_px, plan.settings.storage, plan.shards, hashes,
        normalisation=plan.settings.describe(), inverted=plan.decision.inverted, sign=plan.decision.reason,
        contrast_standard_errors=round(plan.decision.z, 3), source=plan.source, source_sha256=plan.source_sha256,
        **{KEY: plan.project},
    )  # fmt: skip


def write_own_shards(
    plan: IngestPlan, folder: object, rank: int = 0, size: int = 1, progress: Progress | None = None
) -> None:
    """Writes the shards of one rank: those whose number is ``rank`` modulo ``size``."""
    own = range(rank, len(plan.shards), size)
    total = sum(plan.shards[k][1] - plan.shards[k][0] for k in own)
    before = 0
    for k in own:
        start, stop = plan.shards[k]
        seen = None
        if progress:

            def seen(done: int, _total: int, start: int = start, before: int = before) -> None:
                progress(before + done - start, total)

        write_shard(plan, folder, k, seen)
        before += stop - start


def ingest(
    particles_file: object,
    folder: object,
    settings: Any = None,
    rank: int = 0,
    size: int = 1,
    progress: Progress | None = None,
    comm: Communicator | None = None,
) -> Path:
    """A particle file into a folder of shards.

    With a communicator every rank calls this; rank 0 plans and writes the index. With ``rank`` and ``size`` alone,
    each process plans for itself and, if there are several, the caller runs ``finish_index`` after all are done.

    Args:
        particles_file: STAR or .cs.
        folder: made if it is not there.
        settings: IngestSettings, or the job's [particles] section.
        progress: called with (done, total) images of this rank.

    Returns:
        path of index.json.

    Raises:
        InputError, DiskFullError: see ``check_stacks`` and ``write_shard``.
    """
    settings = IngestSettings.of(settings) if settings is not None else IngestSettings()
    folder = Path(str(folder))
    rank, size = (comm.rank, comm.size) if comm is not None else (rank, size)
    plan_: Any = None
    if comm is None or rank == 0:
        make_folder(folder)
        particles = read_particle_file(particles_file, settings.project)
        plan_ = plan(particles, settings, particles_file)
        plan_ = replace(plan_, particles=replace(plan_.particles, table=_sign_column(particles)))
        del particles  # with its text
    if comm is not None:
        plan_ = comm.bcast(plan_)
    write_own_shards(plan_, folder, rank, size, progress)
    if comm is not None:
        comm.barrier()
    if rank == 0 and (comm is not None or size == 1):
        finish_index(plan_, folder)
    if comm is not None:
        comm.barrier()
    return folder / products.INDEX


def _sign_column(particles: Particles) -> Any:
    """The plan needs no source table but the sign; dropping the rest keeps it small."""
    if particles.table is not None and "cryoisoSign" in particles.table:
        return particles.table[["cryoisoSign"]]
    return None


def is_ingested(folder: object) -> bool:
    """Whether a folder holds a finished set of shards."""
    path = Path(str(folder)) / products.INDEX
    return path.is_file() and not temporary_name(path).exists()


def open_shards(folder: object) -> ShardSource:
    """The images of an ingested folder."""
    return ShardSource(folder)
