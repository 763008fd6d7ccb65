"""What all pictures of the report share: colours, style, and how a figure becomes a data: address."""

from __future__ import annotations

import base64
import io
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.report.hover import Picture, axes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREEN, VERMILLION, ORANGE, SKY, GREY = "#0072B2", "#009E73", "#D55E00", "#E69F00", "#56B4E9", "#8A8A8A"
"""Okabe and Ito's colours, which colour-blind people tell apart. Blue is this run, green the true poses, vermillion
what was before the correction."""
DASHED = (0, (4, 3))
_HALVES = {"1": BLUE, "2": ORANGE}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": True,  # a pale ground: lines and their labels do not run through its words
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fancybox": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "cryoiso",
    "svg.fonttype": "path",
    "figure.facecolor": "white",
}
_TICKS_A = (
    *(100, 50, 30, 20, 15, 12, 10, 8, 7, 6, 5, 4.5, 4, 3.5, 3),
    *(2.8, 2.6, 2.4, 2.2, 2, 1.8, 1.6, 1.4, 1.2, 1),
)


def new_figure(width_in: float, height_in: float, **layout: Any) -> tuple[Figure, np.ndarray]:
    """A figure with its axes (rows, columns), made without pyplot, so that nothing global changes."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = matplotlib.figure.Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(squeeze=False, **layout)


def styled() -> AbstractContextManager[None]:
    """The context in which a figure is made and saved."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def address(figure: Figure, kind: str = "svg", dpi: int = 150) -> Picture:
    """The figure as a data: address, the same bytes every time, with the values that can be read off it."""
    stream = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(stream, format=kind, dpi=dpi, metadata=metadata)
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    text = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:{mime};base64,{text}", axes_of(figure), figure.get_figwidth())


def decoded(data_address: str) -> bytes:
    """The bytes of the file that ``address`` holds."""
    return base64.b64decode(data_address.partition(",")[2])


def picture(ax: Axes, image: np.ndarray, low: float, high: float) -> None:
    """A grey picture without ticks or frame."""
    ax.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=high, interpolation="bilinear")
    without_frame(ax)


def without_frame(ax: Axes) -> None:
    """No ticks, grid or frame: what is left is the picture."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)


def by_half(label: str, other: str = GREY) -> str:
    """The colour of half "1" or "2"; another one for what belongs to neither."""
    return _HALVES.get(label, other)


def values_of(numbers: Any) -> np.ndarray:
    """Numbers as floats, NaN for null."""
    return np.array(numbers if numbers is not None else [], np.float64)


def scale_bar(ax: Axes, box_px: int, pixel_size_A: float, colour: str = "white") -> None:
    """A bar of a round length in the corner of a picture."""
    box_A = box_px * pixel_size_A
    length_A = next((n for n in (200, 100, 50, 20, 10, 5) if n < 0.4 * box_A), 2)
    x0, y0 = 0.06 * box_px, 0.07 * box_px
    ax.plot([x0, x0 + length_A / pixel_size_A], [y0, y0], color=colour, linewidth=2.5, solid_capstyle="butt")
    ax.text(x0, y0 + 0.04 * box_px, f"{length_A} Å", color=colour, fontsize=7.5)


def from_zero(ax: Axes) -> None:
    """An axis from zero to a little above the lines, however flat they are."""
    tops = [
        float(np.nanmax(y)) for line in ax.get_lines() if np.isfinite(y := np.asarray(line.get_ydata(), float)).any()
    ]
    ax.set_ylim(0, 1.08 * max(tops, default=1.0) or 1.0)


def resolution_axis(ax: Axes, last_invA: float) -> None:
    """Resolution in Å above an axis of spatial frequency."""
    upper = ax.secondary_xaxis("top")
    kept: list[float] = []
    for r in _TICKS_A:
        apart = not kept or 1 / r - 1 / kept[-1] > 0.065 * last_invA
        if apart and 0.05 * last_invA < 1 / r <= last_invA * 1.001:
            kept.append(r)
    upper.set_xticks([1 / r for r in kept], [f"{r:g}" for r in kept], fontsize=8)
    upper.set_xlabel("resolution (Å)", fontsize=8.5)
