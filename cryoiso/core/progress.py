"""How far the running stage is: fed by its progress lines, read by whoever predicts its end.

One board a process, as there is one run a process; only rank 0's is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

LONGEST_STEP_S = 900.0
"""To wait for the end of a longer step would cost every job more than to lose the step."""
WINDOW_S = 300.0
"""The pace is that of the last one or two windows: what went before may be work that an earlier job had done."""
LATE_S = 60.0
"""A stage that should have ended so long ago does not end "now"."""
SURE_S, SURE_SHARE = 60.0, 0.1
"""A pace is believed when it was seen for so long, or over such a share of the piece."""


@dataclass
class Board:
    """A stage is a number of pieces of similar length (iterations, trainings), each counted by one progress line or
    more.

    ``expect`` announces a piece; the lines that are opened next count it. All other lines are passes beside it (noise,
    copies, corrections), and nobody knows what share of the stage they are: they only tell that the stage is alive. Of
    a stage that announces no piece nothing is known.
    """

    stage: str = ""
    began: float = 0.0
    """``time.monotonic()`` at the stage's begin"""
    piece: int = 0
    pieces: int = 0
    """0: none was announced"""
    piece_began: float = 0.0
    lines: int = 1
    """of a piece"""
    line: int = -1
    """the last one that was opened; -1: none"""
    label: str = ""
    done: int = 0
    total: int = 1
    piece_s: float = 0.0
    """what the last whole piece took"""
    tail_s: float = 0.0
    """what followed in it when its lines were done"""
    last: float = 0.0
    longest_s: float = 0.0
    """longest step, in which no stop was possible"""
    _marks: list[tuple[float, float]] = field(default_factory=list)
    """(time, share) where the pace is taken from, one or two windows ago, and a window later"""
    _noted: float = 0.0

    def begin(self, stage: str) -> None:
        """A new stage."""
        now = time.monotonic()
        self.stage, self.began, self.last = stage, now, now
        self.piece, self.pieces, self.piece_began = 0, 0, now
        self.piece_s, self.tail_s = 0.0, 0.0
        self._clear(1)

    def end(self) -> None:
        """The stage has ended."""
        self.heard()
        self.stage = ""

    def expect(self, piece: int, pieces: int, lines: int = 1) -> None:
        """The next lines count piece number ``piece`` (from 0) of about ``pieces``; if that is the running piece
        already, only their number is taken."""
        now, pieces = time.monotonic(), max(pieces, piece + 1)
        self.heard()
        if self.pieces and piece == self.piece:
            self.pieces = pieces
            return
        if self.pieces and piece == self.piece + 1:
            self.tail_s = now - self._noted if self.share >= 1 else 0.0
            self.piece_s = max(now - self.piece_began, self.counted_s() + self.tail_s)
        self.piece, self.pieces, self.piece_began = piece, pieces, now
        self._clear(lines)

    def _clear(self, lines: int) -> None:
        self.lines, self.line, self.label, self.done, self.total = lines, -1, "", 0, 1
        self._marks = []

    def open(self, label: str) -> None:
        """A line begins."""
        if self.pieces and self.line + 1 < self.lines and label != self.label:
            self.line, self.label, self.done, self.total = self.line + 1, label, 0, 1

    def note(self, label: str, done: int, total: int) -> None:
        """A line is at ``done`` of ``total``."""
        self.heard()
        if label != self.label or not label:
            return
        before, (self.done, self.total) = self.share, (done, max(total, 1))
        now, share = time.monotonic(), self.share
        if self._marks and share == before:
            return  # said again
        if not self._marks or share < self._marks[-1][1]:  # the first sign of it, or it was begun afresh
            self._marks = [(now, share)]
        elif now - self._marks[-1][0] > WINDOW_S:
            self._marks = [self._marks[-1], (now, share)]
        self._noted = now

    def heard(self) -> None:
        """The stage is at a place where it could be stopped."""
        now = time.monotonic()
        step = now - self.last if self.last else 0.0
        if self.longest_s < step <= LONGEST_STEP_S:
            self.longest_s = step
        self.last = now

    @property
    def share(self) -> float:
        """Of the running piece, as its lines have it."""
        return 0.0 if self.line < 0 else min((self.line + min(self.done / self.total, 1.0)) / self.lines, 1.0)

    def counted_s(self) -> float:
        """Seconds that the lines of a piece take at the present pace; 0: not known yet."""
        marks = self._marks  # another thread asks
        if not marks:
            return 0.0
        since, before = marks[0]
        seconds, share = self._noted - since, self.share - before
        sure = share > 0 and seconds > 1.0 and (seconds >= SURE_S or share >= SURE_SHARE)
        return seconds / share if sure else 0.0

    def left_s(self, now: float | None = None) -> float | None:
        """Seconds until the stage's end, if pieces to come take as long as this one; None while nothing is known."""
        now = time.monotonic() if now is None else now
        if not self.pieces:
            return None
        counted, share, quiet, more = self.counted_s(), self.share, now - self._noted, self.pieces - self.piece - 1
        total_s = counted + max(self.tail_s, quiet if share >= 1 else 0.0) if counted else self.piece_s
        if total_s <= 0:
            return None
        if share >= 1:
            here = self.tail_s - quiet
        else:
            here = (1 - share) * counted + self.tail_s - quiet if counted else total_s - (now - self.piece_began)
        if not more and ((share >= 1 and not self.tail_s) or here < -LATE_S):
            return None  # something follows the last piece that followed no other
        return max(here, 0.0) + more * total_s


board = Board()
