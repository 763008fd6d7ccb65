"""The figure of a CTF refinement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.report.canvas import BLUE, address, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 20_000
"""Particles drawn over the micrograph's position."""
LEAST_REACH_A = 50.0
"""Half the width of the histogram at least: no defocus is known better."""


def defocus_changes(
    change_A: np.ndarray, position_A: np.ndarray | None = None, defocus_A: np.ndarray | None = None
) -> str:
    """Histogram of changes of defocus and, with positions, defocus over the place on the micrograph.

    Args:
        change_A: (n,).
        position_A: (n, 2) from the middle of each micrograph's particles.
        defocus_A: (n,) about the mean of each micrograph.
    """
    with styled():
        columns = 1 if position_A is None else 2
        figure, axes = new_figure(3.6 * columns + 0.4, 2.9, nrows=1, ncols=columns)
        ax = axes[0, 0]
        reach_A = max(float(np.abs(change_A).max(initial=0.0)), LEAST_REACH_A)
        ax.hist(change_A, bins=61, range=(-reach_A, reach_A), color=BLUE)
        ax.set(xlabel="change of defocus (Å)", ylabel="particles", title="changes")
        if position_A is not None and defocus_A is not None:
            _over_micrograph(figure, axes[0, 1], position_A, defocus_A)
        return address(figure, "png", 160)


def _over_micrograph(figure: Figure, ax: Axes, position_A: np.ndarray, defocus_A: np.ndarray) -> None:
    step = max(1, -(-len(defocus_A) // MOST_POINTS))
    limit = max(float(np.percentile(np.abs(defocus_A), 98)), 1.0)
    x, y = position_A[::step].T / 1e3
    points = ax.scatter(x, y, c=defocus_A[::step], s=4, cmap="RdBu_r", vmin=-limit, vmax=limit, linewidths=0)
    ax.set(xlabel="x (1,000 Å)", ylabel="y (1,000 Å)", title="defocus over the micrograph", aspect="equal")
    bar = figure.colorbar(points, ax=ax, shrink=0.8)
    bar.set_label("defocus about the mean (Å)", fontsize=8.5)
