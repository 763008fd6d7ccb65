"""What the report says about the density of views that a refinement learned (``view_density`` of refine.json)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryoiso.report.records import ReportData
from cryoiso.report.text import Entry, number, numbers_of, percent, section

CAPTION = (
    "Density of views as the refinement learned it from the posteriors, over that of even views; each half-set learned "
    "its own, and both should look alike. Views from the two ends of an axis stand in the same place of the two discs."
)
TOP_COSINE = float(np.cos(np.radians(36)))
LEAST = 0.01
"""Densities below this are alike."""


def learned(data: ReportData) -> dict[str, Any]:
    """``cells`` of each ring, ``half1`` and ``half2`` (cells,) densities, ``used``, ``axis_odds``, ``polarity_floor``.

    Empty where the refinement wrote none, or none of as many cells as its step makes.
    """
    from cryoiso.metrics.orientation import ViewGrid

    part = section(section(data, "refine"), "view_density")
    step = number(part, "step_deg")
    if step is None or not 1 <= step <= 90:
        return {}
    grid = ViewGrid.with_step(step)
    figure: dict[str, Any] = {"cells": grid.cells}
    for half in ("half1", "half2"):
        values = numbers_of(part, half)
        if len(values) != len(grid) or any(v is None or not v >= 0 for v in values):
            return {}
        figure[half] = np.array(values, np.float64)
    figure |= {key: number(part, key) for key in ("axis_odds", "polarity_floor")}
    return {**figure, "used": part.get("used") is not False}


def sentences(data: ReportData) -> list[str]:
    """What was learned and what it was used for, in numbers."""
    part = learned(data)
    if not part:
        return []
    from cryoiso.metrics.orientation import ViewGrid

    grid = ViewGrid(part["cells"])
    centres = grid.centres()
    mean = (part["half1"] + part["half2"]) / 2
    peak = int(mean.argmax())
    opposite = float(mean[int(grid.index(-centres[peak : peak + 1])[0])])
    top = float(mean[np.abs(centres[:, 2]) > TOP_COSINE].sum() / mean.sum())
    text = f"The refinement learned the density of views: the fullest direction {mean[peak]:.1f} times as often as if "
    text += f"views were even, its opposite {opposite:.2f} times, {100 * top:.0f} % within 36° of z"
    logs = np.log(np.maximum(part["half1"], LEAST)), np.log(np.maximum(part["half2"], LEAST))
    if min(x.std() for x in logs) > 1e-9:
        text += f"; the two half-sets' densities correlate by {np.corrcoef(*logs)[0, 1]:.2f}"
    return [text + _use(part)]


def _use(part: dict[str, Any]) -> str:
    axis, end = part["axis_odds"], part["polarity_floor"]
    if axis is None or end is None:
        return "."
    parts = [f"how often an axis is seen (favoured {axis:g} times at most)"] * (axis > 1)
    parts += [f"from which end it is seen ({percent(end, 0)} even views mixed in)"] * (end < 1)
    if not part["used"] or not parts:
        return ". The search made no use of it."
    return f". The search made use of {' and '.join(parts)}."


def entries(data: ReportData) -> list[Entry]:
    """The figure, as `cryoiso.report.figure_list` wants it."""
    from cryoiso.report import figures as draw

    part = learned(data)
    if not part:
        return []
    kinds = [(f"half-set {h}", {"counts": part[f"half{h}"]}, part["cells"]) for h in (1, 2)]
    return [("view-density", "Learned density of views", True, CAPTION, lambda: draw.view_discs(kinds))]
