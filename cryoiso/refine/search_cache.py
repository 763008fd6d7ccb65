"""Search results of an unfinished iteration, on disk, so that an interruption repeats no search.

The search of a batch depends only on the model of the iteration and on the batch, so its posterior can be saved and
used again on any number of ranks. The sums computed from it are exact in any order; they are repeated, which is cheap
compared with the search.
"""

from __future__ import annotations

import io
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from cryoiso.core.log import logger
from cryoiso.core.protocols import Communicator
from cryoiso.io.append_log import Record, append, content, read_records
from cryoiso.refine.search import Posterior

EVERY_S = 60.0
"""Interval at which posteriors are written; shorter iterations leave nothing on the disk."""
EVERY_BYTES = 1 << 26
"""... or when this much is pending."""
PATTERN = "searched-*.frames"
"""Not ".part", which a resumed run treats as an unfinished file and removes."""


@dataclass
class SearchCache:
    """Posteriors of one iteration, batch by batch: one file per rank, read by all after an interruption."""

    folder: Path | None
    """None: nothing is saved."""
    identity: str = ""
    _known: dict[tuple[int, ...], Record] = field(default_factory=dict)
    _waiting: list[tuple[str, bytes]] = field(default_factory=list)
    _file: Path = Path()
    _end: int = 0
    _written: float = 0.0

    @classmethod
    def of(cls, folder: Path, identity: str, comm: Communicator) -> SearchCache:
        """Open the results of an earlier attempt at the same iteration; results of other iterations are removed
        (collective).

        Args:
            identity: of the iteration: everything on which the posteriors depend, except the batch.
        """
        records_found: list[Record] = []
        if comm.rank == 0:
            records_found = [
                record for path in sorted(folder.glob(PATTERN)) for record in _of_iteration(path, identity)
            ]
        records_found = comm.bcast(records_found)
        cache = cls(folder, identity, _file=folder / PATTERN.replace("*", str(comm.rank)), _written=time.monotonic())
        cache._known = {_rows_of(record.key): record for record in records_found}
        cache._end = max((record.end for record in records_found if record.path == cache._file), default=0)
        return cache

    def __len__(self) -> int:
        return len(self._known)

    def get(self, rows: np.ndarray, device: str) -> Posterior | None:
        """The posterior of the batch with these rows, if available."""
        record = self._known.get(_brief(rows))
        data = None if record is None else content(record)
        if data is None:
            return None
        arrays = np.load(io.BytesIO(data))
        return Posterior(**{f.name: torch.as_tensor(arrays[f.name]).to(device) for f in fields(Posterior)})

    def put(self, rows: np.ndarray, posterior: Posterior) -> None:
        """Add the posterior of a batch; written to disk at intervals."""
        if self.folder is None:
            return
        stream = io.BytesIO()
        np.savez(stream, **{f.name: getattr(posterior, f.name).cpu().numpy() for f in fields(Posterior)})
        self._waiting.append((f"{self.identity} {' '.join(map(str, _brief(rows)))}", stream.getvalue()))
        due = time.monotonic() - self._written > EVERY_S or sum(len(d) for _, d in self._waiting) > EVERY_BYTES
        if due:
            self.flush()

    def flush(self) -> None:
        """Write pending results. A full disk is reported once; the iteration continues without."""
        if self.folder is None or not self._waiting:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._end = append(self._file, self._end, self._waiting)
        except OSError as error:
            logger.warning("%s: cannot be written (%s); an interruption would cost this iteration", self._file, error)
            self.folder = None
        self._waiting, self._written = [], time.monotonic()


def clear(folder: Path) -> None:
    """Remove the saved results of a finished iteration."""
    for path in folder.glob(PATTERN):
        with suppress(OSError):
            path.unlink()


def _of_iteration(path: Path, identity: str) -> list[Record]:
    """The records of a file up to the first of another iteration; a file without any is removed."""
    known: list[Record] = []
    with suppress(OSError):
        for record in read_records(path):
            if record.key.split(" ")[0] != identity:
                break
            known.append(record)
        if not known:
            path.unlink()
    return known


def _brief(rows: np.ndarray) -> tuple[int, ...]:
    return int(rows[0]), int(rows[-1]), len(rows)


def _rows_of(key: str) -> tuple[int, ...]:
    return tuple(int(word) for word in key.split(" ")[1:])
