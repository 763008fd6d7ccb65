"""What the stages to come will take: the planner's work of each, and what this run has measured of stages like it.

A stage like no other and without a built-in rate on this device is unknown, and is said to be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.planning import workload
from cryoiso.pipeline.planning.job_size import problem_of
from cryoiso.pipeline.planning.rates import built_in, of_stages
from cryoiso.pipeline.planning.timing import predicted_stages
from cryoiso.pipeline.planning.workload import Assumed
from cryoiso.pipeline.stages.table import stages_of
from cryoiso.pipeline.workflow import kind_of, record_of

logger = logging.getLogger("cryoiso")
SHORT_S = 10.0
"""A stage that took less was left out, or tells nothing of a longer one."""


@dataclass(frozen=True)
class Ahead:
    """The stages after one."""

    seconds: float = 0.0
    """of those that are known"""
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What the journal tells of this run so far."""

    ended: Mapping[str, float] = field(default_factory=dict)
    """stage -> seconds of all its attempts"""
    begun: Mapping[str, float] = field(default_factory=dict)
    """stage without an end -> seconds of its attempts, but for the running one"""
    elsewhere: frozenset[str] = frozenset()
    """stages of which a part was done on another number of ranks: their seconds say nothing"""


def measured(lines: list[dict[str, Any]], ranks: int) -> Measured:
    """What a journal tells that this process writes on, so that an open start at its end is the running attempt.

    Another attempt that was killed lasted until its last line (a checkpoint, a forecast).
    """
    took: dict[str, float] = {}
    ended: set[str] = set()
    elsewhere: set[str] = set()
    stage, began, last, now = "", 0.0, 0.0, ranks
    for line in lines:
        event, when = line["event"], datetime.fromisoformat(line["time"]).timestamp()
        if event in ("run", "resume"):
            if stage:
                took[stage] += last - began
            stage, now = "", line.get("ranks", ranks)
        elif event == "start":
            stage, began = line["stage"], when
            ended.discard(stage)
            if not line.get("resumed"):
                took[stage] = 0.0
                elsewhere.discard(stage)
            took.setdefault(stage, 0.0)
            if now != ranks:
                elsewhere.add(stage)
        elif event == "end" and stage == line["stage"]:
            took[stage] += when - began
            ended.add(stage)
            stage = ""
        last = when
    sure = {name: seconds for name, seconds in took.items() if name not in elsewhere}
    return Measured(
        {name: seconds for name, seconds in sure.items() if name in ended},
        {name: seconds for name, seconds in sure.items() if name not in ended},
        frozenset(elsewhere),
    )


@dataclass(frozen=True)
class Estimates:
    """Seconds of stages, from rates and measurements."""

    predicted_s: Mapping[str, float | None]
    """stage, in order -> seconds by the built-in rates"""
    work: Mapping[str, workload.WorkUnits]
    """stage -> what there is to do"""
    device: str = "cpu"

    def seconds(self, stage: str, measured_stages: Mapping[str, float]) -> float | None:
        """What a stage will take, when others took what was found; None if nobody knows."""
        measured_s = {name: took for name, took in measured_stages.items() if took >= SHORT_S and name != stage}
        kin = [name for name in measured_s if kind_of(name) == kind_of(stage)]
        kin = kin or [name for name in measured_s if _like(name) == _like(stage)]
        if kin and (factor := self._factor(stage, kin, measured_s)) is not None:
            return factor * sum(measured_s[name] for name in kin)
        predicted_s = self.predicted_s.get(stage)
        if predicted_s is None:
            return None
        known = [
            (took, self.predicted_s.get(name) or 0.0) for name, took in measured_s.items() if self.predicted_s.get(name)
        ]
        took, expected = sum(pair[0] for pair in known), sum(pair[1] for pair in known)
        return predicted_s * (took / expected if expected > SHORT_S else 1.0)

    def _factor(self, stage: str, kin: list[str], measured_s: Mapping[str, float]) -> float | None:
        """The stage's time over that of others, by their work."""
        if all(kind_of(name) == kind_of(stage) and self.work.get(name) == self.work.get(stage) for name in kin):
            return 1.0 / len(kin)
        for weigh in (self.predicted_s.get, self._fitted(measured_s)):
            own_weight, theirs = weigh(stage), [weigh(name) for name in kin]
            total = sum(weight or 0.0 for weight in theirs)
            if own_weight is not None and total > 0 and None not in theirs:
                return own_weight / total
        return None

    def _fitted(self, measured_s: Mapping[str, float]) -> Callable[[str], float | None]:
        """Seconds of a stage by rates that explain what was measured, where there are no others."""
        timed = [(self.work[name], took) for name, took in measured_s.items() if self.work.get(name)]
        rates = of_stages(self.device, built_in(self.device).kernels, timed)
        return lambda name: rates.seconds(kind_of(name), self.work.get(name, {}))

    def after(self, stage: str, measured_s: Mapping[str, float]) -> Ahead:
        """The stages after one."""
        names = list(self.predicted_s)
        times = {name: self.seconds(name, measured_s) for name in names[names.index(stage) + 1 :]}
        unknown = tuple(name for name, seconds in times.items() if seconds is None)
        return Ahead(sum(seconds or 0.0 for seconds in times.values()), unknown)


RemainingTime = Callable[[str, float, float], Ahead]
"""(stage, seconds since this process began it, seconds left of it) -> the stages after it"""


def remaining_stages(run: RunContext, inputs: Inputs, until: str = "") -> RemainingTime:
    """Foretells the stages after the running one, up to ``until`` if given (rank 0)."""
    names = [stage.name for stage in stages_of(run.job, run.folder)]
    names = names[: names.index(until) + 1] if until else names
    predicted = predicted_stages(run, inputs)
    estimates = Estimates({name: predicted.get(name) for name in names}, _units_of(inputs), run.comm.device())

    def after(stage: str, elapsed_s: float, left_s: float) -> Ahead:
        if stage not in names:
            return Ahead()
        so_far = measured(list(run.journal.lines) if run.journal is not None else [], run.comm.size)
        measured_s = dict(so_far.ended)
        if stage not in so_far.elsewhere:
            measured_s[stage] = so_far.begun.get(stage, 0.0) + elapsed_s + left_s
        return estimates.after(stage, measured_s)

    return after


def _units_of(inputs: Inputs) -> dict[str, workload.WorkUnits]:
    try:
        return workload.stages(problem_of(inputs), inputs.comm.size, Assumed(), inputs.comm.device())
    except Exception:  # a forecast must never end a run
        logger.debug("no plan of this run", exc_info=True)
        return {}


def _like(stage: str) -> str:
    record = record_of(stage)
    return record.like or record.kind
