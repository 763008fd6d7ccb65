"""Hashes of large inputs, made beside the ingestion: each rank reads its share in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryoiso.core.errors import CryoisoError, InputError, Interrupted
from cryoiso.core.log import ProgressLine, duration
from cryoiso.core.progress import board
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline import manifest as provenance
from cryoiso.pipeline.hashing import Stopped, sha256_of, share_by_size
from cryoiso.pipeline.work import Work

logger = logging.getLogger("cryoiso")


class Hasher:
    """Hashes files one after the other in a thread; neither reading nor hashing holds Python's lock."""

    def __init__(self, paths: list[str]) -> None:
        self.found: dict[str, str] = {}
        self.error: CryoisoError | None = None
        self.bytes = 0
        self._paths, self._stop = paths, threading.Event()
        self._thread = threading.Thread(target=self._work, name="hash-inputs", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for path in self._paths:
            try:
                self.found[path] = sha256_of(Path(path), self._seen)
            except OSError as error:
                self.error = InputError(f"cannot be read: {error.strerror}", file=path)
                return
            except Stopped:
                return

    def _seen(self, size: int) -> None:
        self.bytes += size
        if self._stop.is_set():
            raise Stopped

    @property
    def working(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def hashed_meanwhile(work: Work) -> Iterator[None]:
    """Hashes the run's stacks while the block reads images out of them; the manifest has the hashes afterwards.

    Collective. Outside of a run nothing is hashed.

    Raises:
        InputError: a stack cannot be read.
        Interrupted: a signal came while the block was done already and the hashes were not.
    """
    comm = work.comm
    sizes = on_root(comm, lambda: {} if work.manifest is None else provenance.unhashed(work.manifest, work.job))
    names = sorted(sizes)
    owner = share_by_size([sizes[name] for name in names], comm.size)
    hasher = Hasher([name for name, rank in zip(names, owner) if rank == comm.rank])
    began = time.monotonic()
    try:
        yield
        if names:
            _wait(hasher, comm, sum(sizes.values()))
    finally:
        hasher.stop()
    if names:
        found = comm.allgather(hasher.found)
        on_root(comm, _note, work, {path: digest for part in found for path, digest in part.items()})
    if names and comm.rank == 0:
        size = sum(sizes.values()) / 2**30
        logger.info("inputs hashed: %d file(s), %.3g GiB, %s", len(names), size, duration(time.monotonic() - began))


def _wait(hasher: Hasher, comm: Context, total: int) -> None:
    """Until every rank is through; all ranks take the same turns."""
    board.expect(1, 2)
    line = ProgressLine("hashing inputs", total >> 20, active=comm.rank == 0)
    while comm.max_all(float(hasher.working)) > 0:
        if comm.stop_requested():
            raise Interrupted("stopped by a signal while inputs were hashed. 'cryoiso resume' goes on from there.")
        line.update(sum(comm.allgather(hasher.bytes)) >> 20, "MiB")
        time.sleep(0.1)
    agree(comm, hasher.error)


def _note(work: Work, hashes: dict[str, str]) -> None:
    if work.manifest is not None:
        provenance.note_hashes(work.folder, work.manifest, hashes)
