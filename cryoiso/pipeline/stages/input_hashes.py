"""Hashes of large inputs, made beside the work: each rank reads its share of the images in a thread of its own, and
rank 0 the container image."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryoiso.core.config import Job
from cryoiso.core.errors import CryoisoError, InputError, Interrupted
from cryoiso.core.log import ProgressLine, amount, duration, quantity
from cryoiso.core.progress import board
from cryoiso.parallel import signals
from cryoiso.parallel.abort import agree, on_root
from cryoiso.parallel.context import Context
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.records import manifest as provenance
from cryoiso.pipeline.records.hashing import HashingStopped, sha256_of, share_by_size, verify_outputs
from cryoiso.pipeline.records.manifest_record import Manifest

logger = logging.getLogger("cryoiso")
WRITE_EVERY_S = 30.0
"""The manifest is written no more often than this while hashes come in: it may name thousands of stacks."""
TURN_S = 0.1
Which = Callable[[Manifest, Job], dict[str, int]]
"""Picks files out of a manifest: path -> bytes."""
STOPPED = "stopped by a signal while inputs were hashed"


class Hasher:
    """Hashes files one after the other in a thread; neither reading nor hashing holds Python's lock."""

    def __init__(self, paths: list[str]) -> None:
        self.found: dict[str, tuple[str, int | None]] = {}
        """Path -> (SHA-256, when the file had been modified last)."""
        self.error: CryoisoError | None = None
        self.bytes = 0
        self._paths, self._stop = paths, threading.Event()
        self._thread = threading.Thread(target=self._work, name="hash-inputs", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for path in self._paths:
            try:
                modified = provenance.modified_ns(path)
                self.found[path] = sha256_of(Path(path), self._seen), modified
            except OSError as error:
                self.error = InputError(f"cannot be read: {error.strerror}", file=path, code="file-unreadable")
                return
            except HashingStopped:
                return

    def _seen(self, size: int) -> None:
        self.bytes += size
        if self._stop.is_set():
            raise HashingStopped

    @property
    def working(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class ImageHashes:
    """The hashes of a run's images: every rank makes its share, rank 0 notes them all."""

    def __init__(self, run: RunContext, which: Which) -> None:
        """Begins. Collective."""
        self._run, comm = run, run.comm
        sizes = on_root(comm, lambda: {} if run.manifest is None else which(run.manifest, run.job))
        names = sorted(sizes)
        owner = share_by_size([sizes[name] for name in names], comm.size)
        self.number, self.bytes = len(names), sum(sizes.values())
        self._told: set[str] = set()
        self._began = self._written = time.monotonic()
        self._hasher = Hasher([name for name, rank in zip(names, owner) if rank == comm.rank])

    def share(self, at_once: bool = False) -> None:
        """What the ranks have found goes into the manifest. Collective.

        Args:
            at_once: also onto the disk; else that is done now and then.

        Raises:
            InputError: a file cannot be read, or is not what it was when it was hashed first.
        """
        if not self.number:
            return
        comm, hashed = self._run.comm, dict(self._hasher.found)
        new_hashes = {path: facts for path, facts in hashed.items() if path not in self._told}
        self._told.update(new_hashes)
        new = {path: facts for part in comm.allgather(new_hashes) for path, facts in part.items()}
        if new or at_once:
            on_root(comm, self._note, new, at_once)
        agree(comm, self._hasher.error)

    def _note(self, new: dict[str, tuple[str, int | None]], at_once: bool) -> None:
        manifest, now = self._run.manifest, time.monotonic()
        if manifest is None:
            return
        provenance.note_hashes(manifest, new)
        if at_once or now - self._written > WRITE_EVERY_S:
            provenance.write_manifest(self._run.folder, manifest)
            self._written = now

    def wait(self, counted: bool) -> None:
        """Until every rank is through; all ranks take the same turns. Collective.

        Args:
            counted: it is what is left of the stage.

        Raises:
            Interrupted: a signal came.
            InputError: as ``share``.
        """
        comm = self._run.comm
        if counted:
            board.expect(1, 2)
        line = ProgressLine("hashing inputs", self.bytes >> 20, active=comm.rank == 0)
        while comm.max_all(float(self._hasher.working)) > 0:
            if comm.stop_requested():
                raise Interrupted(STOPPED)
            line.update(sum(comm.allgather(self._hasher.bytes)) >> 20, "MiB")
            self.share()
            time.sleep(TURN_S)
        self.share(at_once=True)
        if comm.rank == 0:
            took = duration(time.monotonic() - self._began)
            logger.info("inputs hashed: %s, %s, %s", quantity(self.number, "file"), amount(self.bytes), took)

    def stop(self) -> None:
        self._hasher.stop()


@contextmanager
def hashed_meanwhile(run: RunContext) -> Iterator[Callable[[], None]]:
    """Hashes the run's images while the block reads them; the manifest has the hashes afterwards. Those that an earlier
    start has made are kept, unless the file was modified since. Collective. Outside of a run nothing is hashed.

    Yields:
        to be called by all ranks together, now and then: notes what has been hashed so far.

    Raises:
        InputError: a file cannot be read, or has changed since the run started.
        Interrupted: a signal came while only hashes were missing.
    """
    with _hashing(run, provenance.modified_since):
        pass  # nothing must be made of a file that has changed
    with _hashing(run, provenance.to_hash, counted=True) as share:
        yield share


@contextmanager
def _hashing(run: RunContext, which: Which, counted: bool = False) -> Iterator[Callable[[], None]]:
    hashes = ImageHashes(run, which)
    try:
        yield hashes.share
        if hashes.number:
            hashes.wait(counted)
    except Interrupted:  # all ranks come here together
        hashes.stop()
        hashes.share(at_once=True)
        raise
    finally:
        hashes.stop()


def check_given_shards(run: RunContext) -> None:
    """Reads the shards that the job was given as its particles again, if an earlier start has hashed them. Collective.

    Raises:
        InputError: one is not what it was; names it.
        Interrupted: a signal came.
    """

    def known() -> dict[str, dict[str, object]]:
        ended = run.journal is not None and run.journal.last("end", "ingest") is not None
        return provenance.given_shards(run.manifest or {}) if ended else {}

    require_unchanged(run.comm, on_root(run.comm, known))


def require_unchanged(comm: Context, shards: dict[str, dict[str, object]]) -> None:
    """Stops if shards are not what was noted of them. Collective.

    Args:
        shards: path -> bytes, sha256; the same on every rank.

    Raises:
        InputError: names the first one.
        Interrupted: a signal came.
    """
    wrong = verify_outputs(Path(), shards, comm, "checking shards") if shards else ""
    agree(
        comm,
        InputError(f"{wrong} since this run started. {provenance.PUT_BACK}", code="run-inputs-changed")
        if wrong
        else None,
    )


@contextmanager
def image_hashed_meanwhile(run: RunContext) -> Iterator[None]:
    """Hashes the container image while the block works, where no earlier start has; on rank 0 of a run.

    A start that is stopped before that gets the digest from the next one in the same image.
    """
    manifest = run.manifest
    image = provenance.unknown_image(manifest) if manifest is not None else ""
    if manifest is None or not image:
        yield
        return
    hasher = Hasher([image])

    def note() -> None:
        hasher.stop()
        if image in hasher.found:
            provenance.note_image(run.folder, manifest, hasher.found[image][0])

    try:
        yield
        while hasher.working and not signals.stop_signal():
            time.sleep(TURN_S)
    except BaseException:
        with suppress(CryoisoError):  # what went wrong before is what the user must hear
            note()
        raise
    note()
