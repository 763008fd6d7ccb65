"""Which images make the batch of a step, and how they come off the disk.

The images of a step are a pure function of (seed, step): neither the number of ranks nor the order in which anybody
reads matters. An epoch visits every row once. A set that fits into memory is read once and shuffled freely. A larger
one is shuffled like this: its chunks (runs of neighbouring rows) in random order, cut into buffers of many chunks, the
rows of a buffer in random order. So whole chunks are read one after the other, and two buffers at most are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import ImageSource
from cryoiso.core.rng import shuffle_keys
from cryoiso.parallel.partition import chunk_bounds, owned_rows

MEMORY_BYTES = 1 << 30
BLOCK_BYTES = 16 << 20
"""Read at once when a whole set is brought into memory."""
CHUNK_IMAGES = 128
SPARSE = 8
"""Rows are picked singly from a chunk of which less than one in this many are wanted."""


@dataclass
class BatchPlan:
    """The rows of every step.

    Attributes:
        rows: (n,) of the particle table, ascending; what is trained on (one half-set, say).
        uid: (n,) of these rows.
        batch: images a step, of all ranks together.
        seed: of the shuffling.
        chunks: number of the chunk of each row, or None if the set is shuffled freely.
        buffer_images: rows shuffled together where there are chunks.
    """

    rows: np.ndarray
    uid: np.ndarray
    batch: int
    seed: int
    chunks: np.ndarray | None = None
    buffer_images: int = 4096
    _epochs: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise InputError("there are no particles to train on", code="particles-too-few")
        if self.batch < 1:
            raise InputError("a batch needs at least one image", found=self.batch, code="option-out-of-range")

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (n,) in ``rows`` in the order of this epoch, and the edges (k + 1,) of its buffers."""
        if number not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = self._shuffle(number)
        return self._epochs[number]

    def rows_of(self, step: int) -> np.ndarray:
        """(batch,) rows of a step; the last batch of an epoch is filled from the next."""
        rows: np.ndarray = self.rows[self.positions(np.arange(step * self.batch, (step + 1) * self.batch))]
        return rows

    def positions(self, places: np.ndarray) -> np.ndarray:
        """Positions in ``rows`` of places in the endless sequence of epochs."""
        out = np.empty(len(places), np.int64)
        for number in np.unique(places // len(self)):
            here = places // len(self) == number
            out[here] = self.epoch(int(number))[0][places[here] % len(self)]
        return out

    def share(self, index: int, size: int) -> range:
        """Which part of a batch belongs to a rank of a group: contiguous, sizes differing by one at most.

        Raises:
            InputError: more ranks than images.
        """
        if size > self.batch:
            raise InputError(
                "a batch needs at least one image per rank",
                expected=f"{size} or more",
                found=self.batch,
                code="particles-too-few",
            )
        return owned_rows(self.batch, 1, index, size)

    def _shuffle(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        keys = shuffle_keys(self.seed, f"epoch {number}", self.uid)
        if self.chunks is None:
            return _by_key(keys, self.uid), np.array([0, len(self)])
        _, first, chunk = np.unique(self.chunks, return_index=True, return_inverse=True)
        counts = np.bincount(chunk)
        chunk_order = np.argsort(shuffle_keys(self.seed, f"chunks of epoch {number}", self.uid[first]), kind="stable")
        sizes = counts[chunk_order]
        buffer_of_chunk = np.empty(len(sizes), np.int64)
        buffer_of_chunk[chunk_order] = (np.cumsum(sizes) - sizes) // max(self.buffer_images, 1)
        buffers = buffer_of_chunk[chunk]
        order = np.lexsort((self.uid, keys, buffers))
        edges = np.flatnonzero(np.diff(buffers[order])) + 1
        return order, np.concatenate([[0], edges, [len(self)]])


def _by_key(keys: np.ndarray, uid: np.ndarray) -> np.ndarray:
    """Order by key; equal keys by uid, so that the order of the rows cannot matter."""
    return np.lexsort((uid, keys))


class Batches:
    """Images of this rank's part of each step's batch. Use it from one thread."""

    def __init__(
        self,
        source: ImageSource,
        rows: np.ndarray,
        batch: int,
        seed: int,
        *,
        index: int = 0,
        size: int = 1,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """
        Args:
            source: images.
            rows: (n,) rows of ``source.particles`` to train on.
            batch: images a step, of all ranks of the group together.
            seed: of the shuffling.
            index, size: this rank's place in the group.
            memory_bytes: a set larger than this is streamed, in two buffers that hold as much together. Part of
                the recipe: it decides how the set is shuffled, so make it no function of the machine.

        Raises:
            InputError: no rows, or fewer images in a batch than ranks.
        """
        self.source = source
        rows = np.unique(np.asarray(rows, np.int64))
        image_bytes = 4 * source.box_px**2
        self.in_memory = len(rows) * image_bytes <= memory_bytes
        chunks = None if self.in_memory else _chunk_of(rows, _chunks(source))
        buffer_images = max(memory_bytes // (2 * image_bytes), batch, 1)
        self.plan = BatchPlan(rows, source.particles.uid[rows], batch, seed, chunks, buffer_images)
        self.share = self.plan.share(index, size)
        self._whole: np.ndarray | None = None
        self._buffers: dict[tuple[int, int], _Buffer] = {}
        self._block = max(1, BLOCK_BYTES // image_bytes)

    def rows_of(self, step: int) -> np.ndarray:
        """(b,) this rank's rows of a step."""
        return self.plan.rows_of(step)[self.share.start : self.share.stop]

    def places_of(self, step: int) -> np.ndarray:
        """(b,) places of this rank's images in the endless sequence of all images of all steps."""
        return step * self.plan.batch + np.arange(self.share.start, self.share.stop)

    def images(self, step: int) -> np.ndarray:
        """(b, D, D) float32: this rank's images of a step, in the order of ``rows_of``."""
        places = self.places_of(step)
        if self.in_memory:
            images: np.ndarray = self._all()[self.plan.positions(places)]
            return images
        out = np.empty((len(places), self.source.box_px, self.source.box_px), np.float32)
        n = len(self.plan)
        self._leave_others(int(places[0]))
        for i, place in enumerate(places):
            out[i] = self._buffer_at(int(place) // n, int(place) % n).image(int(place) % n)
        self._advance(int(places[-1]))
        return out

    def _all(self) -> np.ndarray:
        if self._whole is None:
            self._whole = np.empty((len(self.plan), self.source.box_px, self.source.box_px), np.float32)
            bounds = _chunks(self.source)
            for start, stop in _merged(bounds, self._block):
                _read_into(self._whole, self.source, self.plan.rows, start, stop)
        return self._whole

    def _buffer_at(self, epoch: int, place: int) -> _Buffer:
        """The buffer that holds this place of an epoch, read whole."""
        buffer = self._open(epoch, self._number(epoch, place))
        buffer.fill(1.0)
        return buffer

    def _open(self, epoch: int, number: int) -> _Buffer:
        key = (epoch, number)
        if key not in self._buffers:
            for old in sorted(self._buffers)[: max(0, len(self._buffers) - 1)]:
                del self._buffers[old]
            order, edges = self.plan.epoch(epoch)
            self._buffers[key] = _Buffer(self, epoch, order, int(edges[number]), int(edges[number + 1]))
        return self._buffers[key]

    def _advance(self, place: int) -> None:
        """Reads the next buffer bit by bit while this one is used up, so that no step waits for a whole one."""
        epoch, number = self._leave_others(place)
        edges, within = self.plan.epoch(epoch)[1], place % len(self.plan)
        done = (within - edges[number] + 1) / (edges[number + 1] - edges[number])
        self._open(*self._after(epoch, number)).fill(float(done))

    def _leave_others(self, place: int) -> tuple[int, int]:
        """Forgets all buffers but that of a place and the next; those of later steps too, when steps begin anew.

        Returns:
            Epoch and number of the buffer of that place.
        """
        epoch, within = divmod(place, len(self.plan))
        number = self._number(epoch, within)
        wanted = {(epoch, number), self._after(epoch, number)}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in wanted}
        return epoch, number

    def _number(self, epoch: int, place: int) -> int:
        """Which buffer holds this place of an epoch."""
        return int(np.searchsorted(self.plan.epoch(epoch)[1], place, side="right")) - 1

    def _after(self, epoch: int, number: int) -> tuple[int, int]:
        """Epoch and number of the buffer after this one."""
        return (epoch, number + 1) if number + 2 < len(self.plan.epoch(epoch)[1]) else (epoch + 1, 0)


class _Buffer:
    """This rank's images of one stretch of an epoch, read chunk by chunk in the order they have on the disk."""

    def __init__(self, owner: Batches, epoch: int, order: np.ndarray, start: int, stop: int) -> None:
        plan, box = owner.plan, owner.source.box_px
        places = np.arange(start, stop)
        offset = (epoch * len(plan) + places) % plan.batch
        self._places = places[(offset >= owner.share.start) & (offset < owner.share.stop)]
        positions = order[self._places]
        self._slot = np.argsort(np.argsort(positions))
        self._rows = plan.rows[np.sort(positions)]
        self._source = owner.source
        self._images = np.empty((len(positions), box, box), np.float32)
        bounds = _chunks(owner.source)
        self._todo = [bounds[c] for c in np.unique(_chunk_of(self._rows, bounds))]
        self._done, self._count = 0, len(self._todo)

    def fill(self, fraction: float) -> None:
        """Reads until this fraction of the chunks is there."""
        while self._done < min(self._count, int(np.ceil(fraction * self._count))):
            _read_into(self._images, self._source, self._rows, *self._todo[self._done])
            self._done += 1

    def image(self, place: int) -> np.ndarray:
        images: np.ndarray = self._images[self._slot[np.searchsorted(self._places, place)]]
        return images


def _read_into(out: np.ndarray, source: ImageSource, rows: np.ndarray, start: int, stop: int) -> None:
    """Reads those of the ascending ``rows`` that lie in [start, stop) into their places of ``out``, in one go."""
    first, last = np.searchsorted(rows, (start, stop))
    if first == last:
        return
    wanted = rows[first:last]
    low, high = int(wanted[0]), int(wanted[-1]) + 1
    if len(wanted) * SPARSE < high - low:
        out[first:last] = source.read(wanted)
    else:
        out[first:last] = source.read(np.arange(low, high))[wanted - low]


def _chunks(source: ImageSource) -> Sequence[tuple[int, int]]:
    """(start, stop) of the runs of rows that lie together."""
    return getattr(source, "chunks", None) or chunk_bounds(len(source.particles), CHUNK_IMAGES)


def _chunk_of(rows: np.ndarray, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    starts = np.array([start for start, _ in bounds], np.int64)
    return np.searchsorted(starts, rows, side="right") - 1


def _merged(bounds: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Neighbouring chunks joined up to ``limit`` rows."""
    out: list[tuple[int, int]] = []
    for start, stop in bounds:
        if out and out[-1][1] == start and stop - out[-1][0] <= limit:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out
