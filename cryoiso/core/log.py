"""Progress with an ETA: a live line on a terminal, plain lines in a batch log; silent on ranks other than 0."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from cryoiso.core.progress import board

logger = logging.getLogger("cryoiso")
BY_ANY_RANK = {"by_any_rank": True}
"""``extra`` of a message that is told by whatever rank says it: of a group of ranks that rank 0 is not one of."""


_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters: a terminal moves, clears, renames itself or types
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction: what is shown is not what is there
    "\u2028\u2029\ufeff\ud800-\udfff]"  # line ends that are not seen as such; halves of characters
)


def printable(text: object, *, lines: bool = True) -> str:
    """A text from elsewhere (a file's name, a value in it, a program's output) as a terminal or a log may show it.

    Args:
        lines: line ends and tabs stay; False: they are escaped as well.

    >>> printable("a\\x1b[2Jb.mrc"), printable("x\\ny", lines=False), printable("50 Å")
    ('a\\\\x1b[2Jb.mrc', 'x\\\\ny', '50 Å')
    """
    shown = _UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), str(text))
    return shown if lines else shown.replace("\n", "\\n").replace("\t", "\\t")


def indented(text: object) -> str:
    """``printable``, with every line but the first set in, so that none can pass for a message of its own."""
    return printable(text).replace("\n", "\n    ")


class LineFormatter(logging.Formatter):
    """Lines of a log file: time, level, message, nothing that steers whatever shows them."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return indented(super().format(record))


def is_told(record: logging.LogRecord, rank: int) -> bool:
    """Whether people see a message of a rank: all of rank 0, of others errors and what is to be told by any rank."""
    return rank == 0 or record.levelno >= logging.ERROR or getattr(record, "by_any_rank", False)


@contextmanager
def warnings_about(subject: str) -> Iterator[None]:
    """While the block runs, warnings begin with what they are about ("audit, null noise: "), since they are no words
    on the user's own particles then."""

    def begin_with_subject(record: logging.LogRecord) -> bool:
        if record.levelno == logging.WARNING:
            record.msg, record.args = subject + record.getMessage(), ()
        return True

    logger.addFilter(begin_with_subject)
    try:
        yield
    finally:
        logger.removeFilter(begin_with_subject)


def duration(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> duration(42), duration(184), duration(7300)
    ('42 s', '3 min 04 s', '2 h 01 min')
    """
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


def quantity(number: int, noun: str) -> str:
    """A number of things as a person writes it.

    >>> quantity(1, "rank"), quantity(1500, "particle"), quantity(0, "file")
    ('1 rank', '1,500 particles', '0 files')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def amount(size_bytes: float) -> str:
    """Bytes in the unit that leaves a number to be read.

    >>> amount(13_852_672), amount(3.2 * 2**30), amount(700)
    ('13.2 MiB', '3.2 GiB', '0.7 KiB')
    """
    scale, unit = next(
        ((s, u) for s, u in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")) if size_bytes >= s), (2**10, "KiB")
    )
    return f"{size_bytes / scale:.1f} {unit}"


class PatientFileHandler(logging.FileHandler):
    """A log file that is not worth a run: where it cannot be written (a full disk), lines are lost and nothing else."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Says nothing, where the usual handler would print a traceback for every line."""

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class ProgressLine:
    """Shows how far a loop is. ``update(done)`` is cheap: it prints at most once a second (terminal) or every 30 s
    (log). What an earlier process had done counts as done, not as this one's pace."""

    def __init__(self, label: str, total: int, *, active: bool = True, stream: TextIO | None = None) -> None:
        self.label, self.total, self.active = label, max(int(total), 1), active
        self.stream = stream or sys.stderr
        self.live = bool(getattr(self.stream, "isatty", lambda: False)())
        self.start = self.last = time.monotonic()
        self._first: tuple[float, int] | None = None
        if active:
            board.open(label)

    def update(self, done: int, words: str = "") -> None:
        """``words`` are shown behind the numbers."""
        if not self.active:
            return
        board.note(self.label, done, self.total)
        now = time.monotonic()
        self._first = self._first or (now, done)
        if now - self.last < (0.5 if self.live else 30.0):
            return
        self.last = now
        left = self._pace_s(now, done) * max(self.total - done, 0)
        text = (
            f"{self.label}: {done:,} of {self.total:,} ({100 * done / self.total:.0f} %), about {duration(left)} left"
        )
        text += f", {words}" if words else ""
        if self.live:
            self.stream.write("\r\x1b[2K" + printable(text, lines=False))
            self.stream.flush()
        else:
            logger.info(text)

    def _pace_s(self, now: float, done: int) -> float:
        """Seconds a count, since the first update if there was another one."""
        since, before = self._first if self._first and done > self._first[1] else (self.start, 0)
        return (now - since) / max(done - before, 1)

    def close(self, summary: str = "") -> None:
        if not self.active:
            return
        if self.live:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()
        if summary:
            took = duration(time.monotonic() - self.start)
            logger.info("%s: %s (%s)", self.label, summary, took, extra=BY_ANY_RANK)

    def callback(self) -> Callable[[int, int], None]:
        def on_progress(done: int, total: int) -> None:
            self.total = max(total, 1)
            self.update(done)

        return on_progress
