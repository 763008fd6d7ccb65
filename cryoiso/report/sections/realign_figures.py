"""The picture of a refinement with the correction between its iterations; what is not known leaves gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.report.canvas import BLUE, address, by_half, from_zero, new_figure, styled
from cryoiso.report.text import number, section, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def by_iteration(rows: list[dict[str, Any]]) -> str:
    """Resolution, measured directions, loss and scale, iteration by iteration."""
    iteration = np.array([row["iteration"] for row in rows], float)
    with styled():
        figure, axes = new_figure(9.2, 5.0, nrows=2, ncols=2, sharex=True)
        (resolution, measured), (loss, scale) = axes
        _marked(resolution, iteration, rows, "resolution_A", 1.0)
        resolution.set(ylabel="resolution (Å)", title="half-map resolution (FSC 0.143)")
        from_zero(resolution)
        _marked(measured, iteration, rows, "mean_transfer", 100.0)
        measured.set(ylabel="mean of the 3DFSC (%)", ylim=(0, 103), title="measured directions")
        _spans(loss, iteration, rows, "loss", True)
        loss.set(xlabel="iteration", ylabel="loss", title="loss of the networks, first to last")
        _spans(scale, iteration, rows, "scale", False)
        if scale.has_data():
            scale.axhline(1, color="#555555", linewidth=0.7)
        scale.set(xlabel="iteration", ylabel="factor", title="factors of the shells, least to most")
        for ax in axes.flat:
            if not ax.has_data():
                ax.set_visible(False)
            ax.set_xlim(iteration.min() - 0.5, iteration.max() + 0.5)
            ax.xaxis.get_major_locator().set_params(integer=True)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(loc="best")
        return address(figure)


def _marked(ax: Axes, iteration: np.ndarray, rows: list[dict[str, Any]], key: str, factor: float) -> None:
    """A line whose points are filled where references were corrected."""
    values = np.array([np.nan if (v := number(row, key)) is None else factor * v for row in rows])
    done = np.array([bool(row.get("applied")) for row in rows])
    ax.plot(iteration, values, color=BLUE, linewidth=1.2)
    for which, face, label in ((done, BLUE, "corrected"), (~done, "white", "not corrected")):
        if np.isfinite(values[which]).any():
            ax.plot(iteration[which], values[which], "o", color=BLUE, markerfacecolor=face, markersize=5, label=label)


def _spans(ax: Axes, iteration: np.ndarray, rows: list[dict[str, Any]], key: str, directed: bool) -> None:
    """A bar from one number to the other for each half, with a dot where it ends if the order matters."""
    labels = sorted({label for row in rows for label in section(row, key)})
    for i, label in enumerate(labels):
        pairs = [(x, pair) for x, row in zip(iteration, rows) if (pair := span(section(row, key), label))]
        if not pairs:
            continue
        place = np.array([x for x, _ in pairs]) + 0.16 * (i - (len(labels) - 1) / 2)
        first, last = np.array([pair for _, pair in pairs]).T
        colour, text = by_half(label, BLUE), "one network" if label == "both" else f"half {label}"
        ax.vlines(place, first, last, color=colour, linewidth=2.5, label=text)
        ends = (last,) if directed else (first, last)
        for values in ends:
            ax.plot(place, values, "o" if directed else "_", color=colour, markersize=5 if directed else 8)
