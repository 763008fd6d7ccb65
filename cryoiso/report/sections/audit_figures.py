"""Pictures of the controls, drawn from the numbers that their records hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryoiso.report.canvas import BLUE, DASHED, GREEN, GREY, ORANGE, VERMILLION, address, new_figure, styled, values_of
from cryoiso.report.text import number, numbers_of

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE)


def draw_control(figure: dict[str, Any]) -> str:
    """The data: address of a control's figure: curves, or values with their intervals."""
    with styled():
        if figure.get("intervals"):
            return _intervals(figure)
        canvas, axes = new_figure(7.0, 3.2)
        ax = axes[0, 0]
        for i, line in enumerate(_objects(figure, "lines")):
            style = DASHED if line.get("dashed") else "-"
            x, y = values_of(numbers_of(line, "x")), values_of(numbers_of(line, "y"))
            ax.plot(x, y, color=COLOURS[i % len(COLOURS)], linestyle=style, label=str(line.get("label")))
        level = number(figure, "level")
        if level is not None:
            ax.axhline(level, color=GREY, linewidth=1)
        ax.set(xlabel=str(figure.get("x_label")), ylabel=str(figure.get("y_label")))
        ax.legend()
        return address(canvas)


def _intervals(figure: dict[str, Any]) -> str:
    rows = [row for row in figure["intervals"] if isinstance(row, list) and len(row) == 4]
    canvas, axes = new_figure(7.0, 1.0 + 0.45 * len(rows))
    ax = axes[0, 0]
    for place, (_, value, low, high) in enumerate(rows):
        low, value, high = (np.nan if v is None else float(v) for v in (low, value, high))
        ax.plot([low, high], [place, place], color=BLUE, linewidth=3, alpha=0.5)
        ax.plot([value], [place], "o", color=BLUE)
    level = number(figure, "level")
    if level is not None:
        ax.axvline(level, color=VERMILLION, linewidth=1)
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6), xlabel=str(figure.get("x_label")))
    ax.set_yticklabels([str(row[0]) for row in rows])
    return address(canvas)


def _objects(figure: dict[str, Any], key: str) -> list[dict[str, Any]]:
    objects = figure.get(key)
    return [item for item in objects if isinstance(item, dict)] if isinstance(objects, list) else []
