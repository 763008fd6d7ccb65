"""Looks ahead while a run works: when the stage and the run will end, whether the job's time will do, and when to stop.

A thread of rank 0 reads the progress board; the work knows nothing of it. It asks to stop as a signal would, so all
ranks agree at their next step, and what is written does not depend on it.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cryoiso.core import batch_system
from cryoiso.core.log import duration
from cryoiso.core.progress import Board, board
from cryoiso.parallel import signals
from cryoiso.pipeline.batch.walltime import End, job_end
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.planning.remaining_time import RemainingTime, remaining_stages

logger = logging.getLogger("cryoiso")
LOOK_EVERY_S = 1.0
FIRST_AFTER_S = 60.0
"""Nothing is said of a stage before."""
AGAIN_AFTER_S = 900.0
CHANGED = 0.25
"""A forecast that moved by this share of what is left is told at once (but not more often than every minute)."""


@dataclass
class Forecast:
    """What is said, and when. ``look`` is called now and then; the clock is wall time."""

    board: Board
    end: End | None
    stop_before_s: float
    later: RemainingTime
    tell: Callable[..., None] = lambda **facts: None
    stop: Callable[[str], None] = signals.ask_to_stop
    job_began: float = field(default_factory=time.time)
    stopped: bool = False
    _told: dict[str, tuple[float, float]] = field(default_factory=dict)

    def look(self, now: float, elapsed_s: float) -> None:
        """
        Args:
            now: seconds since the epoch.
            elapsed_s: since the stage's begin.
        """
        self._heed_the_end(now)
        left = self.board.left_s() if self.board.stage else None
        if left is None or elapsed_s < FIRST_AFTER_S or self.stopped:
            return
        stage = self.board.stage
        when, last = self._told.get(stage, (-math.inf, now + left))
        moved = abs(now + left - last) > CHANGED * max(left, 240.0)
        if now - when > AGAIN_AFTER_S or (moved and now - when > 60):
            self._told[stage] = (now, now + left)
            self._say(stage, now, elapsed_s, left)

    def margin_s(self) -> float:
        """Time that a stop needs: what the job allows for it, and the longest step."""
        return self.stop_before_s + self.board.longest_s

    def _heed_the_end(self, now: float) -> None:
        if self.end is None or self.stopped or self.stop_before_s <= 0 or now < self.end.time_s - self.margin_s():
            return
        self.stopped = True
        logger.warning(
            "the job ends at %s (%s), in %s: stopping with a checkpoint; 'cryoiso resume' goes on",
            clock(self.end.time_s, now), self.end.source, duration(max(self.end.time_s - now, 0)),
        )  # fmt: skip
        self.tell(stopping=True, job_ends=iso(self.end.time_s))
        self.stop("the job's end")

    def _say(self, stage: str, now: float, elapsed_s: float, left: float) -> None:
        ahead = self.later(stage, elapsed_s, left)
        ends = now + left + ahead.seconds
        words = f"stage {stage}: ends about {clock(now + left, now)}, the run "
        words += f"not before {clock(ends, now)}" if ahead.unknown else f"about {clock(ends, now)}"
        words += f" (how long {' and '.join(ahead.unknown)} will take is unknown)" if ahead.unknown else ""
        facts: dict[str, Any] = {
            "stage": stage, "stage_ends": iso(now + left), "run_ends": None if ahead.unknown else iso(ends),
            "run_ends_not_before": iso(ends), "unknown_stages": list(ahead.unknown),
            "done": self.board.done, "of": self.board.total, "piece": self.board.piece + 1, "pieces": self.board.pieces,
        }  # fmt: skip
        if self.end is None:
            logger.info("%s", words)
            return self.tell(**facts)
        stop_at = self.end.time_s - self.margin_s()
        again = requeues(now, ends, stop_at, self.end.time_s - self.job_began)
        words += f"; the job ends at {clock(self.end.time_s, now)}"
        if again:
            often = f"{'at least' if ahead.unknown else 'about'} {again} time{'s' * (again > 1)}"
            logger.warning(
                "%s: its wall-time limit is too short. "
                "The run stops with a checkpoint about %s and must be started again %s "
                "('cryoiso resume')", words, clock(stop_at, now), often,
            )  # fmt: skip
        else:
            logger.info("%s%s", words, "; whether its time will do is unknown" if ahead.unknown else "")
        self.tell(**facts, job_ends=iso(self.end.time_s), requeues=again)


def requeues(now: float, done_at: float, stop_at: float, job_s: float) -> int:
    """How many further jobs of ``job_s`` seconds it takes if this one stops at ``stop_at``."""
    if done_at <= stop_at:
        return 0
    return max(1, math.ceil((done_at - max(stop_at, now)) / max(job_s, 60.0)))


def clock(when: float, now: float) -> str:
    """Local time of day, with the date unless it is today.

    >>> clock(60.0, 0.0) == time.strftime("%H:%M", time.localtime(60))
    True
    """
    there, here = time.localtime(when), time.localtime(now)
    return time.strftime("%H:%M" if there[:3] == here[:3] else "%a %d %b %H:%M", there)


def iso(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(when))


@contextmanager
def watching(run: RunContext, inputs: Inputs, until: str = "") -> Iterator[None]:
    """Looks ahead while the block works, to the end of the stage ``until`` if given; on rank 0."""
    if run.journal is None:
        yield
        return
    journal, done = run.journal, threading.Event()
    end = job_end()
    forecast = Forecast(
        board, end, run.job.run.stop_before_end_s, remaining_stages(run, inputs, until),
        tell=lambda **facts: journal.append("forecast", **facts), job_began=_began(),
    )  # fmt: skip
    if end is not None:
        logger.info("the job ends at %s (%s)", clock(end.time_s, time.time()), end.source)
    thread = threading.Thread(target=_keep_looking, args=(forecast, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _keep_looking(forecast: Forecast, done: threading.Event) -> None:
    while True:
        try:
            forecast.look(time.time(), time.monotonic() - forecast.board.began)
        except Exception:  # a forecast must never end a run
            logger.debug("no forecast", exc_info=True)
        if done.wait(LOOK_EVERY_S):
            return


def _began() -> float:
    """When the batch job began; now, if nobody says."""
    system = batch_system.current()
    text = os.environ.get(system.start, "") if system is not None and system.start else ""
    return float(text) if text.isdigit() else time.time()
