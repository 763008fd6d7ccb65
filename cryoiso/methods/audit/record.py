"""What a control gives: a number with its interval, a threshold, a verdict, a sentence and a figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

Verdict = Literal["pass", "fail", "inconclusive", "not applicable"]
GRAVITY = ("not applicable", "pass", "inconclusive", "fail")
"""From the lightest verdict to the gravest."""


@dataclass(frozen=True)
class Line:
    """A curve of a figure."""

    label: str
    x: list[float]
    y: list[float | None]
    dashed: bool = False


@dataclass(frozen=True)
class FigureData:
    """A figure as numbers: curves over a common axis, or bars with intervals where ``intervals`` are given."""

    x_label: str
    y_label: str
    lines: list[Line] = field(default_factory=list)
    intervals: list[tuple[str, float, float, float]] = field(default_factory=list)
    """label, value, low, high"""
    level: float | None = None
    """threshold, drawn as a horizontal line (vertical across bars)"""
    caption: str = ""


@dataclass(frozen=True)
class ControlRecord:
    """The result of a control."""

    name: str
    title: str
    verdict: Verdict
    sentence: str
    measure: str = ""
    """what ``number`` is"""
    number: float | None = None
    interval: tuple[float, float] | None = None
    threshold: float | None = None
    unit: str = ""
    power: str = ""
    """what this control could have seen, with this many particles"""
    details: dict[str, Any] = field(default_factory=dict)
    """further numbers"""
    figure: FigureData | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; NaN and infinity become null."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value


def gravest(verdicts: Iterable[Verdict]) -> Verdict:
    """The gravest of some verdicts.

    >>> gravest(["pass", "inconclusive", "not applicable"]), gravest([])
    ('inconclusive', 'not applicable')
    """
    return max(verdicts, key=GRAVITY.index, default="not applicable")


def at_most(interval: tuple[float, float], threshold: float) -> Verdict:
    """Whether a quantity that should be small is: pass if its whole interval is below the threshold, fail if all of it
    is above, else inconclusive.

    >>> at_most((-0.02, 0.04), 0.1), at_most((0.05, 0.2), 0.1), at_most((0.15, 0.3), 0.1)
    ('pass', 'inconclusive', 'fail')
    """
    low, high = interval
    if not (np.isfinite(low) and np.isfinite(high)):
        return "inconclusive"
    return "pass" if high <= threshold else "fail" if low > threshold else "inconclusive"


def at_least(interval: tuple[float, float], threshold: float) -> Verdict:
    """Whether a quantity that should be large is, likewise.

    >>> at_least((0.85, 0.9), 0.8), at_least((0.1, 0.9), 0.8), at_least((0.1, 0.3), 0.8)
    ('pass', 'inconclusive', 'fail')
    """
    return at_most((-interval[1], -interval[0]), -threshold)
