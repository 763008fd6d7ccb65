"""What EMDB's validation analysis will flag in an entry, said beforehand.

The rules are those of EMDB's program ``va`` (0.0.1.dev134, utils/Checker.py): they look at the FSC of the deposited
half-maps from the sixth shell on, and at a projection of the primary map. A flag is a question that annotators or
referees may ask, not an error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Real

SKIPPED = 5
"""Shells that are not looked at: the first ones hold few coefficients."""
WINDOW = 5
"""Shells over which the curve is smoothed, and its slope is taken."""
MINIMUM, END, PEAKS, SLOPE, EMPTY = -0.1, 0.1, 2, 0.1, 0.21
PROMINENCE = 0.1


@dataclass(frozen=True)
class Flag:
    """One check."""

    name: str
    value: float
    threshold: float
    raised: bool
    says: str
    """one sentence: what was found, and what it usually means"""


def emdb_flags(
    fsc: Float[np.ndarray, " shells"] | None, primary: Real[np.ndarray, "box box box"] | None = None
) -> list[dict[str, Any]]:
    """The flags as dictionaries of name, value, threshold, raised, says.

    Args:
        fsc: (D//2+1,) of the half-maps as they are deposited, without a mask; None or too short: not looked at.
        primary: the primary map.
    """
    flags = [] if fsc is None else _of_the_curve(np.nan_to_num(np.asarray(fsc, np.float64)[SKIPPED:]))
    if primary is not None:
        flags.append(_masked(primary))
    return [asdict(flag) for flag in flags]


def _of_the_curve(curve: np.ndarray) -> list[Flag]:
    if len(curve) <= WINDOW:
        return []
    slope = float(np.abs(curve[WINDOW - 1 : -1] - curve[:-WINDOW]).max(initial=0) / (WINDOW - 1))
    return [
        _flag(
            "FSC minimum", float(curve.min()), MINIMUM, np.less,
            "The half-maps correlate negatively at some resolution, which unlike masks, filters or a shift between "
            "them can bring about.",
        ),
        _flag(
            "FSC end", float(curve[-1]), END, np.greater,
            "The half-maps still agree at the end of the curve: the resolution is limited by the pixel size, or "
            "something is shared by both (a mask, a filter, particles).",
        ),
        _flag(
            "FSC peaks", float(_peaks(curve)), PEAKS, np.greater,
            "The curve rises again more than twice, as it does where a mask is tight or the CTF leaves shells empty.",
        ),
        _flag(
            "FSC slope", slope, SLOPE, np.greater,
            "The curve falls steeply, as it does where a map was low-passed or masked; in a small box, where a shell "
            "is a large step in resolution, it may do so by itself.",
        ),
    ]  # fmt: skip


def _flag(name: str, value: float, threshold: float, wrong: Callable[..., Any], says: str) -> Flag:
    return Flag(name, value, threshold, bool(wrong(value, threshold)), says)


def _peaks(curve: np.ndarray) -> int:
    """Local maxima of the smoothed curve that stand out."""
    from scipy.signal import find_peaks

    smooth = np.convolve(curve, np.ones(WINDOW) / WINDOW, mode="valid")
    peaks, _ = find_peaks(smooth, distance=WINDOW, prominence=PROMINENCE)
    return len(peaks)


def _masked(primary: np.ndarray) -> Flag:
    """The share of a projection (of the standard deviation along an axis) that is empty; the largest of three."""
    shares = []
    for axis in range(3):
        spread = np.asarray(primary, np.float32).std(axis=axis)
        low, high = float(spread.min()), float(spread.max())
        grey = np.floor(255 * (spread - low) / (high - low)) if high > low else np.zeros_like(spread)
        shares.append(float(np.mean(grey == 0)))
    return _flag(
        "primary map masked", max(shares), EMPTY, np.greater,
        "Much of the primary map has a constant value, as after masking; EMDB asks for a map that is not masked.",
    )  # fmt: skip


def sentences(flags: list[dict[str, Any]]) -> list[str]:
    """One for each flag that is raised."""
    return [
        f"EMDB's checks will flag '{f['name']}' ({f['value']:.3g}, limit {f['threshold']:g}): {f['says']}"
        for f in flags
        if f.get("raised")
    ]
