"""Shards of images that this program makes itself, in the same format as those that ``ingest`` writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryoiso.core.types import Particles
from cryoiso.io.shard_writer import row_columns, shard_attributes, shard_matches, write_index, write_shard_file
from cryoiso.io.shards import CHUNK_IMAGES, COLUMNS, FORMAT, VERSION, shard_name

SHARD_BYTES = 256 * 2**20
NORMALISATION = "made normalised"
SPREAD = 16
"""A small set is spread over up to this many shards, so that as many ranks can make it side by side."""


@dataclass(frozen=True)
class ShardSet:
    """What is written: the particles, how they are cut into shards, and a digest of all that decides the images."""

    particles: Particles
    box_px: int
    storage: str
    shards: tuple[tuple[int, int], ...]
    digest: str
    source: str
    """what made the images, in words"""


def plan_shards(particles: Particles, box_px: int, identity: str, source: str, storage: str = "float16") -> ShardSet:
    """Cuts a set into shards of whole chunks; the cut depends on the set alone, never on the number of ranks.

    Args:
        particles: with half-set numbers.
        identity: text of everything else that decides the images (seed, generator, ...).
        source: what made them, for index.json.
    """
    n, image_bytes = len(particles), box_px * box_px * np.dtype(storage).itemsize
    wanted = max(-(-n * image_bytes // SHARD_BYTES), min(SPREAD, -(-n // CHUNK_IMAGES)))
    per_shard = max(1, -(-n // (wanted * CHUNK_IMAGES))) * CHUNK_IMAGES
    shards = tuple((start, min(start + per_shard, n)) for start in range(0, n, per_shard))
    h = hashlib.sha256(json.dumps([FORMAT, VERSION, identity, box_px, storage, shards]).encode())
    for name in COLUMNS:
        values = getattr(particles, name)
        h.update(b"none" if values is None else np.ascontiguousarray(values).tobytes())
    return ShardSet(particles, box_px, storage, shards, h.hexdigest(), source)


def is_written(plan: ShardSet, folder: Path, number: int) -> bool:
    """Whether this shard is there and of this plan."""
    return shard_matches(folder, number, plan.digest, plan.shards[number])


def write_one(plan: ShardSet, folder: Path, number: int, blocks: Iterable[np.ndarray]) -> None:
    """Writes one shard atomically from blocks of images (m, D, D), protein white and normalised.

    Raises:
        DiskFullError: nothing is left behind.
    """
    start, stop = plan.shards[number]
    attributes = shard_attributes(
        plan.digest, (start, stop), plan.box_px, plan.particles.groups,
        normalisation=NORMALISATION, inverted=0, source=plan.source, source_sha256="",
    )  # fmt: skip
    columns = row_columns(plan.particles, start, stop)
    write_shard_file(folder / shard_name(number), blocks, stop - start, plan.box_px, plan.storage, columns, attributes)


def finish(plan: ShardSet, folder: Path) -> Path:
    """Writes index.json; see ``shard_writer.write_index``."""
    return write_index(
        folder, plan.digest, plan.particles, plan.box_px, plan.storage, plan.shards,
        normalisation=NORMALISATION, inverted=False, sign="made with protein white", contrast_standard_errors=0.0,
        source=plan.source, source_sha256="",
    )  # fmt: skip
