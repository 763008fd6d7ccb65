"""Which images make a batch, and how they are read."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from errors_helper import raises_code
from train_helper import source_of

from cryoiso.core.errors import InputError
from cryoiso.io.sources import ArraySource
from cryoiso.train.batches import Batches
from cryoiso.train.prefetch import Prefetcher

BOX = 8
IMAGE_BYTES = 4 * BOX * BOX


class CountingSource:
    """An image whose pixels are its row number; keeps account of every read. ``order`` permutes the rows."""

    def __init__(self, n: int, chunk: int = 16, order: np.ndarray | None = None) -> None:
        plain = source_of(n, BOX)
        order = np.arange(n) if order is None else order
        self.particles = plain.particles.take(order)
        self.box_px, self.chunks = BOX, [(i, min(i + chunk, n)) for i in range(0, n, chunk)]
        self.reads: list[np.ndarray] = []

    def read(self, rows: np.ndarray) -> np.ndarray:
        self.reads.append(np.asarray(rows))
        return np.broadcast_to(np.asarray(rows, np.float32)[:, None, None], (len(rows), BOX, BOX))


def streamed(source, rows, batch: int, images: int, seed: int = 1, **place) -> Batches:
    """Batches with memory for so many images."""
    return Batches(source, rows, batch, seed, memory_bytes=images * IMAGE_BYTES, **place)


@pytest.fixture(params=["in memory", "streamed"])
def memory_images(request) -> int:
    return 10**6 if request.param == "in memory" else 64


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_an_epoch_visits_every_row_once(memory_images, batch):
    rows = np.arange(0, 300, 2)  # a half-set: every other row
    batches = streamed(CountingSource(300), rows, batch, memory_images)
    seen = np.concatenate([batches.rows_of(step) for step in range(-(-3 * len(rows) // batch))])
    epochs = [seen[i * len(rows) : (i + 1) * len(rows)] for i in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), rows)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_every_image_is_the_one_of_its_row(memory_images):
    source = CountingSource(300)
    batches = streamed(source, np.arange(1, 300, 2), 9, memory_images)
    assert batches.in_memory == (memory_images > 300)
    for step in [*range(60), 3, 4, 90, 2]:  # forwards over several epochs, then anywhere
        rows = batches.rows_of(step)
        assert np.array_equal(batches.images(step)[:, 0, 0], rows) and len(rows) == 9


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_the_batch_of_one(memory_images, size):
    rows = np.arange(200)
    alone = streamed(CountingSource(200), rows, 5, memory_images)
    ranks = [streamed(CountingSource(200), rows, 5, memory_images, index=i, size=size) for i in range(size)]
    for step in range(90):
        parts = [rank.images(step)[:, 0, 0] for rank in ranks]
        assert np.array_equal(np.concatenate(parts), alone.images(step)[:, 0, 0])
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_order_of_rows_does_not_matter_in_memory():
    order = np.random.default_rng(0).permutation(100)
    one, two = CountingSource(100), CountingSource(100, order=order)
    a, b = Batches(one, np.arange(100), 8, 1), Batches(two, np.arange(100), 8, 1)
    for step in range(30):
        assert np.array_equal(one.particles.uid[a.rows_of(step)], two.particles.uid[b.rows_of(step)])


def test_seeds_differ_and_repeat():
    source = CountingSource(100)
    first, again, other = (Batches(source, np.arange(100), 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.rows_of(0), again.rows_of(0)) and not np.array_equal(first.rows_of(0), other.rows_of(0))


def test_a_streamed_epoch_reads_each_chunk_once_and_whole():
    source = CountingSource(1024)
    batches = streamed(source, np.arange(1024), 8, 256)
    for step in range(128):  # one epoch
        batches.images(step)
    count = np.bincount(np.concatenate(source.reads), minlength=1024)
    assert count.min() == 1 and count.max() <= 2, "the first buffer of the next epoch may be on its way"
    assert all(len(rows) == 16 and (np.diff(rows) == 1).all() for rows in source.reads)
    spread = [np.ptp(batches.rows_of(step)) for step in range(128)]
    assert np.median(spread) > 500, "a batch of eight comes from all over the set"


@pytest.mark.parametrize("left_at", [1, 70, 127])
def test_a_training_that_begins_anew_reads_each_chunk_once(left_at):
    """Buffers of the attempt before must not push out those of the new one, step after step."""
    source = CountingSource(1024)
    batches = streamed(source, np.arange(1024), 8, 256)
    for step in range(left_at + 1):
        batches.images(step)
    source.reads.clear()
    for step in range(128):
        assert np.array_equal(batches.images(step)[:, 0, 0], batches.rows_of(step))
    count = np.bincount(np.concatenate(source.reads), minlength=1024)
    assert count.max() <= 2 and count.mean() < 1.3


def test_rows_of_one_chunk_are_shuffled_anew_in_each_epoch():
    batches = streamed(CountingSource(64, 64), np.arange(64), 8, 32)
    first, second = (np.concatenate([batches.rows_of(8 * e + i) for i in range(8)]) for e in (0, 1))
    assert not batches.in_memory and (first != second).sum() > 50


def test_half_sets_are_read_in_whole_runs_and_sparse_rows_singly():
    source = CountingSource(1024, 128)
    batches = streamed(source, np.arange(0, 1024, 2), 8, 128)
    batches.images(0)
    assert all(len(rows) == 127 for rows in source.reads), "a run with the other half's images in it"
    sparse = CountingSource(1024, 128)
    streamed(sparse, np.arange(0, 1024, 32), 4, 16).images(0)
    assert all(np.all(np.diff(rows) == 32) for rows in sparse.reads)


@pytest.mark.parametrize("size", [1, 4])
def test_memory_and_waiting_are_bounded(size):
    """Images held at once, and images read for one step after the first."""
    source = CountingSource(4096)
    batches = streamed(source, np.arange(4096), 16, 1024, index=size - 1, size=size)
    held, read = [], []
    for step in range(400):
        before = len(source.reads)
        batches.images(step)
        held.append(sum(len(buffer._images) for buffer in batches._buffers.values()))
        read.append(sum(map(len, source.reads[before:])))
    assert max(held) <= (1024 + 2 * 16) / size * 1.3
    assert max(read[1:]) <= 3 * 16 and np.mean(read[1:]) < 1.1 * 16


def test_what_fits_is_read_once_in_large_blocks():
    source = CountingSource(1000)
    batches = Batches(source, np.arange(1000), 10, 1)
    for step in range(300):
        batches.images(step)
    assert [len(rows) for rows in source.reads] == [1000]


def test_images_are_those_of_a_real_source():
    source = source_of(50)
    batches = streamed(source, np.arange(50), 6, 20 * 4)
    assert isinstance(source, ArraySource) and not batches.in_memory
    for step in range(20):
        assert np.array_equal(batches.images(step), source.read(batches.rows_of(step)))


def test_a_set_smaller_than_a_batch():
    batches = Batches(CountingSource(3), np.arange(3), 8, 1)
    assert np.bincount(batches.rows_of(0), minlength=3).min() >= 2
    assert batches.images(2).shape == (8, BOX, BOX)


def test_bad_requests():
    with raises_code("particles-too-few", InputError, match="no particles"):
        Batches(CountingSource(5), np.empty(0, int), 2, 1)
    with raises_code("particles-too-few", InputError, match="at least one image per rank"):
        Batches(CountingSource(5), np.arange(5), 2, 1, index=0, size=3)
    with raises_code("option-out-of-range", InputError, match="at least one image"):
        Batches(CountingSource(5), np.arange(5), 0, 1)


# --- made ahead of time


def test_prefetched_batches_come_in_order_from_another_thread():
    threads = set()

    def prepare(step: int):
        threads.add(threading.current_thread())
        return step

    with Prefetcher(prepare, 3, 9, "cpu") as batches:
        assert [batches.get() for _ in range(6)] == [3, 4, 5, 6, 7, 8]
    assert threads and threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_leaving_early_ends_the_thread_and_wastes_little():
    made = []
    with Prefetcher(lambda step: made.append(step), 0, 10**9, "cpu") as batches:
        batches.get()
    assert len(made) <= 5
    assert not any(thread.name == "batches" for thread in threading.enumerate())


def test_errors_of_the_thread_are_raised_where_the_batch_is_wanted():
    def prepare(step: int):
        if step == 2:
            raise InputError("no such image", file="a.mrcs", row=7, code="stack-too-short")
        return step

    with Prefetcher(prepare, 0, 5, "cpu") as batches:
        assert [batches.get(), batches.get()] == [0, 1]
        with pytest.raises(InputError, match="no such image"):
            batches.get()
