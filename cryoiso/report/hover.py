"""What of a drawn figure can be read off with the mouse: its lines, maps of views and images, as plain numbers.

The picture stays what it is, so that a page without scripts, or on paper, shows the same; `assets/report.js` lays
values over it. Places are fractions of the picture, from its top left corner.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MOST_POINTS = 400
"""Of a line; of longer ones every other (third, ...) point."""
MOST_CELLS = 61
"""Along a side of an image; of larger ones every other (third, ...) cell."""


class Picture(str):
    """A data: address, with what can be read off the picture in ``hover`` (a list of axes; see `axes_of`), and the
    width that it was drawn for in inches (0: not known)."""

    hover: list[dict[str, Any]]
    width_in: float

    def __new__(cls, address: str, hover: list[dict[str, Any]] | None = None, width_in: float = 0.0) -> Picture:
        picture = super().__new__(cls, address)
        picture.hover, picture.width_in = hover or [], width_in
        return picture


def axes_of(figure: Any) -> list[dict[str, Any]]:
    """The axes of a drawn figure with lines, cells or an image that have values; those of pictures have none.

    Returns:
        for each: ``box`` (left, top, width, height), ``x`` and ``y`` (low, high, "log" or "linear"), ``xlabel``, and
        one of: ``lines`` (label, colour, x, y), ``cells`` (x, y, value; the nearest is meant) with ``unit``, ``image``
        (extent, rows of values).
    """
    axes = []
    for ax in figure.axes:
        if part := _cells(ax) or _image(ax) or _lines(ax):
            box = ax.get_position()
            axes.append({
                "box": [_short(v) for v in (box.x0, 1 - box.y1, box.width, box.height)],
                "x": [*map(_short, ax.get_xlim()), ax.get_xscale()],
                "y": [*map(_short, ax.get_ylim()), ax.get_yscale()],
                "xlabel": ax.get_xlabel(),
                **part,
            })  # fmt: skip
    return axes


def _lines(ax: Any) -> dict[str, Any]:
    """Lines with more than two points (thresholds have two); one without a name is named by its axis."""
    lines = []
    for line in ax.get_lines():
        x, y = (np.asarray(v, float) for v in (line.get_xdata(orig=False), line.get_ydata(orig=False)))
        if len(x) < 3 or not np.isfinite(y).any():
            continue
        step = -(-len(x) // MOST_POINTS)
        label = str(line.get_label())
        lines.append({
            "label": ax.get_ylabel() if label.startswith("_") else label, "colour": _hex(line.get_color()),
            "x": [_short(v) for v in x[::step]], "y": [_short(v) for v in y[::step]],
        })  # fmt: skip
    return {"lines": lines} if lines else {}


def _cells(ax: Any) -> dict[str, Any]:
    """Cells of a map of views."""
    from matplotlib.collections import PolyCollection

    for part in ax.collections:
        values = part.get_array() if isinstance(part, PolyCollection) else None
        if values is not None and len(values) == len(part.get_paths()) > 1:
            centres = np.array([path.vertices.mean(0) for path in part.get_paths()])
            return {
                "unit": ax.get_title(), "cells": {
                    "x": [_short(v) for v in centres[:, 0]], "y": [_short(v) for v in centres[:, 1]],
                    "value": [_short(v) for v in np.asarray(values)],
                }
            }  # fmt: skip
    return {}


def _image(ax: Any) -> dict[str, Any]:
    """An image of numbers; grey pictures of densities say nothing by their values."""
    for image in ax.images:
        values = image.get_array()
        if values is None or np.ndim(values) != 2 or image.cmap.name == "gray":
            continue
        step = -(-max(values.shape) // MOST_CELLS)
        shown: np.ndarray = np.ma.filled(np.ma.asarray(values, float), np.nan)[::step, ::step]
        if image.origin == "upper":
            shown = shown[::-1]
        return {
            "unit": ax.get_title(),
            "image": {
                "extent": [_short(v) for v in image.get_extent()],
                "values": [[_short(v) for v in row] for row in shown],
            },
        }
    return {}


def _short(value: Any) -> float | None:
    """Four digits, None for what is no number."""
    number = float(value)
    return float(f"{number:.4g}") if np.isfinite(number) else None


def _hex(colour: Any) -> str:
    from matplotlib.colors import to_hex

    return str(to_hex(colour))
