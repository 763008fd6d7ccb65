"""Watchdogs: what tells a training that gets nowhere, as functions of its records alone, so that all ranks agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

HEAD_STEPS = 10
"""The first steps that a training must get better than."""
SURE = 3.0
"""Differences below this many standard errors are noise."""


@dataclass(frozen=True)
class TrainingDecision:
    """What a judge says: go on; begin again with new parameters; or stop, since beginning again would not help."""

    action: Literal["go on", "restart", "stop"] = "go on"
    reason: str = ""
    """What is wrong, half a sentence: "the posterior collapsed in 14 of 15 layers"."""


def flat_loss(records: Sequence[dict[str, Any]], after: int, window: int, name: str = "loss") -> str:
    """Whether the loss has stayed where it was: no better than at first, and no longer getting better.

    Flat means, ``window`` steps after step ``after`` (and twice that after the first) or later: (1) no mean over
    ``window`` steps was ever below the mean of the first steps, (2) the second half of the last window is not below its
    first half, and (3) a line through all records does not fall; all within three standard errors. The noise of a
    record is taken from the median difference of neighbours, which a trend does not disturb.

    Args:
        records: of one attempt, each with "step" and the means over the steps since the record before.
        after: step up to which the loss itself changes (annealing).
        window: steps.
        name: of the value in the records that is to fall.

    Returns:
        The reason in words; empty if the loss is not flat or it is too early to say.
    """
    good = [r for r in records if r.get(name) is not None and np.isfinite(r[name])]
    if len(good) < 4 or good[-1]["step"] < max(after, window) + window:
        return ""
    steps = np.array([r["step"] for r in good])
    loss = np.array([r[name] for r in good], np.float64)
    head = max(1, int((steps <= HEAD_STEPS).sum()))
    level = float(loss[:head].mean())
    noise = float(np.median(np.abs(np.diff(loss)))) / (0.6745 * np.sqrt(2))
    last = np.flatnonzero(steps > steps[-1] - window)
    if len(last) < 2 or len(good) <= head:
        return ""
    width = len(last)
    best = float(np.convolve(loss[head:], np.full(min(width, len(loss) - head), 1 / width), "valid").min())
    earlier, later = loss[last[: width // 2]].mean(), loss[last[width // 2 :]].mean()
    if best < level - SURE * noise * np.sqrt(1 / head + 1 / width):
        return ""
    if later < earlier - SURE * noise * np.sqrt(4 / width):
        return ""
    centred = steps - steps.mean()
    if float(centred @ loss) < -SURE * noise * np.sqrt(float(centred @ centred)):
        return ""
    return f"the {name} is flat ({later:.4g} after {steps[-1]:,} steps, {level:.4g} at first)"
