"""How far the running stage is: fed by its progress lines, read by whoever predicts its end.

One board a process, as there is one run a process; on ranks other than 0 nobody writes on it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Board:
    """A stage is a number of pieces of similar length (iterations and halves, trainings), each counted by a line."""

    stage: str = ""
    began: float = 0.0
    """``time.monotonic()`` at the stage's begin"""
    label: str = ""
    done: int = 0
    total: int = 1
    piece: int = 0
    pieces: int = 1
    piece_began: float = 0.0
    last: float = 0.0
    longest_s: float = 0.0
    """longest time that nothing was heard: no stop was possible within it"""
    piece_s: float = 0.0
    """what the last whole piece took"""
    work_s: dict[str, float] = field(default_factory=dict)
    """stage -> seconds that it took, of those that this process has done"""

    def begin(self, stage: str) -> None:
        """A new stage."""
        now = time.monotonic()
        self.stage, self.began, self.label, self.done, self.total = stage, now, "", 0, 1
        self.piece, self.pieces, self.piece_began, self.piece_s = 0, 1, now, 0.0
        self.last = now

    def end(self) -> None:
        """The stage has ended."""
        self.heard()
        if self.stage:
            self.work_s[self.stage] = time.monotonic() - self.began
        self.stage = ""

    def expect(self, piece: int, pieces: int) -> None:
        """The next line counts piece number ``piece`` (from 0) of about ``pieces``."""
        now = time.monotonic()
        if piece > self.piece:
            self.piece_s = (now - self.piece_began) / (piece - self.piece)
        self.piece, self.pieces, self.piece_began = piece, max(pieces, piece + 1), now
        self.heard()

    def note(self, label: str, done: int, total: int) -> None:
        """A line is at ``done`` of ``total``."""
        if label != self.label:
            self.label = label
            if self.pieces == 1:  # lines of no known number: the newest says how far the stage is
                self.piece_began = time.monotonic()
        self.done, self.total = done, max(total, 1)
        self.heard()

    def heard(self) -> None:
        """The stage is at a place where it could be stopped."""
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self.last) if self.last else 0.0
        self.last = now

    def left_s(self, now: float | None = None) -> float | None:
        """Seconds until the stage's end, if pieces to come take as long as this one; None while nothing is known."""
        now = time.monotonic() if now is None else now
        share = min(self.done / self.total, 1.0)
        spent = now - self.piece_began
        whole = spent / share if share >= 0.1 and spent > 1.0 else self.piece_s
        if whole <= 0:
            return None
        return max(whole - spent, 0.0) + (self.pieces - self.piece - 1) * whole


board = Board()
