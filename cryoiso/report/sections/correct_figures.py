"""Pictures of the anisotropy correction, each as a data: address; what is not there leaves gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.report.canvas import (
    BLUE,
    DASHED,
    GREEN,
    GREY,
    VERMILLION,
    address,
    by_half,
    new_figure,
    picture,
    resolution_axis,
    scale_bar,
    styled,
    values_of,
)
from cryoiso.report.text import number, numbers_of, section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_PLANES = ("XY", "XZ", "YZ")
_ROWS = (("before", "before"), ("after", "after"), ("share", "share from data"))
_FOURIER = (("filter", "filter A"), ("fourier", "share of power\nfrom data"))
_NOTHING = "#E8E8E8"
"""Where a share says nothing."""
_NO_COURSES = {"step", "round", "attempt", "seconds"}
MOST_PANELS = 9


def maps(slices: dict[str, list[np.ndarray]], facts: dict[str, Any]) -> str:
    """Planes of the map before and after, and of the measured share; empty if there is no map."""
    if "after" not in slices:
        return ""
    rows = [(key, label) for key, label in _ROWS if key in slices]
    half_px = _extent_px(slices)
    shown = {key: [_middle(plane, half_px) for plane in part] for key, part in slices.items()}
    grey = np.concatenate([plane.ravel() for key in ("before", "after") for plane in shown.get(key, [])])
    low, high = np.percentile(grey, (1, 99.8))
    with styled():
        figure, axes = new_figure(7.4, 2.02 * len(rows) + 0.25, nrows=len(rows), ncols=3)
        for ax, name in zip(axes[0], _PLANES, strict=True):
            ax.set_title(name)
        for line, (key, label) in zip(axes, rows, strict=True):
            for plane, ax in enumerate(line):
                if key == "share":
                    image = _share(ax, shown, plane, (low + high) / 2)
                else:
                    picture(ax, shown[key][plane], low, high)
            line[0].set_ylabel(label, fontsize=9, fontweight="bold")
            if key == "share":
                _bar(figure, image, axes, "1: measured, 0: inferred", shrink=0.8 / len(rows), anchor=(0, 0.04))
        if (pixel := number(facts, "pixel_size_A")) is not None:
            scale_bar(axes[0, 0], len(shown["after"][0]), pixel)
        return address(figure, "png", 160)


def _extent_px(slices: dict[str, list[np.ndarray]]) -> int:
    """Half the side of a square about the centre that holds the mask; half the box without one."""
    centre = len(slices["after"][0]) // 2
    if "mask" not in slices:
        return centre
    far = max(int(np.abs(np.argwhere(plane > 0.5) - centre).max(initial=0)) for plane in slices["mask"])
    return min(max(round(1.15 * far), 4), centre) if far else centre


def _middle(plane: np.ndarray, half_px: int) -> np.ndarray:
    keep = slice(len(plane) // 2 - half_px, len(plane) // 2 + half_px)
    return plane[keep, keep]


def _share(ax: Axes, shown: dict[str, list[np.ndarray]], plane: int, level: float) -> AxesImage:
    """The share in colours inside the mask, with the outline of the density."""
    inside = shown["mask"][plane] > 0.5 if "mask" in shown else np.ones_like(shown["share"][plane], bool)
    ax.set_facecolor(_NOTHING)
    values = np.ma.masked_where(~inside, shown["share"][plane])
    image = ax.imshow(values, cmap="cividis", origin="lower", vmin=0, vmax=1, interpolation="nearest")
    density = shown["after"][plane]
    if density.min() < level < density.max():
        ax.contour(density, (level,), colors=VERMILLION, linewidths=1)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    return image


def _bar(figure: Figure, image: ScalarMappable, axes: np.ndarray, label: str, **place: Any) -> None:
    bar = figure.colorbar(image, ax=list(np.ravel(axes)), aspect=18, pad=0.02, **place)
    bar.set_ticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    bar.set_label(label, fontsize=8.5)


def fourier(slices: dict[str, list[np.ndarray]], facts: dict[str, Any]) -> str:
    """Planes of the filter, and of the share of the power that was measured, inside the circle of the correction."""
    rows = [(key, label) for key, label in _FOURIER if key in slices]
    box_px = len(slices[rows[0][0]][0])
    step_invA = 1 / (box_px * (number(facts, "pixel_size_A") or 1.0))
    limit_A = number(facts, "resolution_A")
    last = min(1 / limit_A if limit_A else np.inf, box_px // 2 * step_invA)
    where = (np.arange(box_px + 1) - box_px // 2 - 0.5) * step_invA
    k = np.arange(box_px) - box_px // 2
    outside = np.hypot(k[:, None], k) * step_invA > last
    with styled():
        figure, axes = new_figure(8.4, 2.5 * len(rows) + 0.3, nrows=len(rows), ncols=3)
        for line, (key, label) in zip(axes, rows, strict=True):
            for ax, plane, name in zip(line, slices[key], _PLANES, strict=True):
                ax.set_facecolor(_NOTHING)
                values = np.ma.masked_where(outside, plane)
                extent = (where[0], where[-1], where[0], where[-1])
                image = ax.imshow(values, extent=extent, origin="lower", cmap="cividis", vmin=0, vmax=1)
                _circle(ax, last)
                ax.set(xlim=(-1.06 * last, 1.06 * last), ylim=(-1.06 * last, 1.06 * last))
                ax.set(xticks=[-last, 0, last], yticks=[-last, 0, last])
                ax.set_xticklabels([f"{-last:.2g}", "0", f"{last:.2g}"], fontsize=8)
                ax.set_yticklabels([f"{-last:.2g}", "0", f"{last:.2g}"], fontsize=8)
                ax.set_xlabel(f"k{name[0].lower()} (1/Å)", fontsize=8.5, labelpad=0)
                ax.set_ylabel(f"k{name[1].lower()} (1/Å)", fontsize=8.5, labelpad=-4)
                ax.grid(False)
                ax.set_title(name)
            _bar(figure, image, line, label, shrink=0.85)
        return address(figure, "png", 160)


def _circle(ax: Axes, radius: float) -> None:
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(radius * np.cos(turn), radius * np.sin(turn), color=GREY, linewidth=0.9)


def curves(facts: dict[str, Any], agreement: str) -> str:
    """FSC of what went in; on axes of its own, without any threshold, the agreement of what networks made."""
    frequency = values_of(numbers_of(facts, "frequency_invA"))
    before, after = (values_of(numbers_of(facts, key)) for key in ("fsc_half_maps", agreement))
    with styled():
        figure, axes = new_figure(9.2, 3.5, ncols=2)
        left, right = axes[0]
        if len(before) == len(frequency):
            left.plot(frequency, before, color="black", label="half-maps that went in, masked")
        left.axhline(0.143, color="#555555", linewidth=0.8, linestyle=DASHED)
        left.annotate("0.143", (0, 0.143), (3, 2), textcoords="offset points", fontsize=7.5, color="#555555")
        _limit(left, facts, frequency[-1])
        left.set(ylabel="FSC")
        resolution_axis(left, frequency[-1])
        if left.get_legend_handles_labels()[0]:
            left.legend(loc="best")
        if len(after) == len(frequency):
            label = "agreement of network outputs -\nnot a resolution"
            right.plot(frequency, after, color=GREY, linestyle="--", label=label)
            right.legend(loc="best")
        right.set(ylabel="correlation of network outputs")
        right.set_title("not a resolution", loc="left", color=GREY)
        for ax in (left, right):
            ax.set(xlim=(0, frequency[-1]), ylim=(-0.1, 1.04), xlabel="spatial frequency (1/Å)")
            ax.axhline(0, color="#555555", linewidth=0.7)
        return address(figure)


def _limit(ax: Axes, facts: dict[str, Any], last_invA: float) -> None:
    """A line where the correction ended, which is a setting or a measured number, not a claim of this picture."""
    limit_A = number(facts, "resolution_A")
    if limit_A and 1 / limit_A <= last_invA * 1.001:
        ax.axvline(1 / limit_A, color=GREEN, linewidth=1, label=f"corrected up to {limit_A:.1f} Å")


def courses(facts: dict[str, Any]) -> list[str]:
    """The terms that trainings wrote down as numbers, loss first; those that stayed zero are left out."""
    names: dict[str, None] = {}
    for part in section(facts, "training").values():
        for name in part if isinstance(part, dict) else ():
            values = [v for v in numbers_of(part, name) if v is not None]
            if name not in _NO_COURSES and any(values):
                names[name] = None
    return sorted(names, key=lambda name: name != "loss")[:MOST_PANELS]


def training(facts: dict[str, Any]) -> str:
    """A panel for each term, a curve for each network."""
    names, runs = courses(facts), section(facts, "training")
    columns = 2 if len(names) == 4 else min(3, len(names))
    lines = -(-len(names) // columns)
    with styled():
        figure, axes = new_figure(3.15 * columns + 0.4, 2.5 * lines, nrows=lines, ncols=columns)
        for ax, name in zip(axes.flat, names, strict=False):
            for label, part in sorted(runs.items()):
                values = values_of(numbers_of(part, name))
                steps = values_of(numbers_of(part, "step"))
                steps = steps if len(steps) == len(values) else np.arange(1.0, len(values) + 1)
                if np.isfinite(values).any():
                    text = "one network" if label == "both" else f"half {label}"
                    style = "." if len(values) == 1 else "-"
                    ax.plot(steps, values, style, color=by_half(label, BLUE), label=text, linewidth=1.3)
            ax.set(xlabel="step", title=name.replace("_", " "))
        for ax in axes.flat[len(names) :]:
            ax.axis("off")
        axes.flat[0].legend(loc="best")
        return address(figure)
