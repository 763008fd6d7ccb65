"""Pictures of the local resolution and of an atomic model, each as a data: address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.records import DiagnoseRecord
from cryoiso.report.canvas import (
    BLUE,
    DASHED,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    address,
    new_figure,
    resolution_axis,
    scale_bar,
    styled,
    values_of,
    without_frame,
)
from cryoiso.report.hover import Picture
from cryoiso.report.sections.correct import Slices
from cryoiso.report.surface_view import LEAST_RANGE, RESOLUTION_STOPS
from cryoiso.report.text import number, numbers_of, section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOCAL = "local"
MOST_CHAINS = 8
_PLANES = ("XY", "XZ", "YZ")
_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, SKY, GREY, "#CC79A7", "#555555")
SMOOTH = 5
"""Residues over which Q is averaged in the figure."""


def local(slices: Slices, d: DiagnoseRecord) -> Picture:
    """Planes of the local resolution inside the mask, and a bar with its percentiles."""
    from matplotlib.colors import LinearSegmentedColormap

    low, high = _range(slices, d)
    inside = [plane > 0.5 for plane in slices.get("mask", [np.ones_like(p) for p in slices[LOCAL]])]
    half_px = _extent_px(inside)
    colours = LinearSegmentedColormap.from_list("resolution", np.array(RESOLUTION_STOPS) / 255)
    with styled():
        figure, axes = new_figure(9.6, 2.75, ncols=4, width_ratios=(1, 1, 1, 0.9))
        for index, (ax, name) in enumerate(zip(axes[0], _PLANES, strict=False)):
            middle = _middle(half_px, slices[LOCAL][index])
            values = np.ma.masked_where(~inside[index][middle], slices[LOCAL][index][middle])
            image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, origin="lower", interpolation="nearest")
            if "map" in slices:
                plane = np.where(inside[index], slices["map"][index], slices["map"][index].min())[middle]
                level = float(np.percentile(plane, 90))
                if plane.min() < level < plane.max():
                    ax.contour(plane, (level,), colors="black", linewidths=0.8)
            ax.set(title=name)
            without_frame(ax)
            if index == 0:
                scale_bar(ax, len(values), number(d, "pixel_size_A") or 1.0, "black")
        figure.colorbar(image, ax=list(axes[0, :3]), shrink=0.8, pad=0.01).set_label(
            "local resolution (Å)", fontsize=8.5
        )
        _distribution(axes[0, 3], d)
        return address(figure, "png", 150)


def _distribution(ax: Axes, d: DiagnoseRecord) -> None:
    """Percentiles over the mask as a cumulative curve."""
    at = section(section(d, "local_resolution"), "percentiles_A")
    known = [(float(key), value) for key in at if (value := number(at, key)) is not None]
    ax.plot([v for _, v in known], [k for k, _ in known], "o-", color=BLUE, markersize=4)
    ax.set(xlabel="local resolution (Å)", ylabel="voxels at least as fine (%)", ylim=(0, 100))


def _range(slices: Slices, d: DiagnoseRecord) -> tuple[float, float]:
    at = section(section(d, "local_resolution"), "percentiles_A")
    low, high = number(at, "5"), number(at, "95")
    if low is None or high is None:
        every = np.concatenate([plane.ravel() for plane in slices[LOCAL]])
        low, high = (float(v) for v in np.percentile(every, (5, 95)))
    return low, max(high, LEAST_RANGE * low)


def _extent_px(inside: list[np.ndarray]) -> int:
    """Half the side of a square about the centre that holds the mask."""
    centre = len(inside[0]) // 2
    far = max(int(np.abs(np.argwhere(plane) - centre).max(initial=0)) for plane in inside)
    return min(max(round(1.1 * far), 4), centre) if far else centre


def _middle(half_px: int, plane: np.ndarray) -> tuple[slice, slice]:
    keep = slice(len(plane) // 2 - half_px, len(plane) // 2 + half_px)
    return keep, keep


def model(d: DiagnoseRecord) -> Picture:
    """FSC of map and model, and Q by residue for each chain."""
    part = section(d, "model")
    frequency = values_of(part.get("frequency_invA"))
    with styled():
        figure, axes = new_figure(9.6, 3.3, ncols=2, width_ratios=(1, 1.5))
        left, right = axes[0]
        for key, label, colour in (("fsc", "whole map", SKY), ("fsc_masked", "inside the model's mask", BLUE)):
            if len(curve := values_of(part.get(key))) == len(frequency):
                left.plot(frequency, curve, color=colour, label=label)
        left.axhline(0.5, color="#555555", linewidth=0.8, linestyle=DASHED)
        left.axhline(0, color="#555555", linewidth=0.7)
        left.set(xlim=(0, frequency[-1]), ylim=(-0.1, 1.04), xlabel="spatial frequency (1/Å)", ylabel="FSC")
        resolution_axis(left, frequency[-1])
        left.legend(loc="lower left")
        _q_lines(right, part)
        return address(figure)


def _q_lines(ax: Axes, part: dict[str, Any]) -> None:
    for (name, scores), colour in zip(by_chain(part).items(), _COLOURS, strict=False):
        ax.plot(np.arange(1, len(scores) + 1), _smooth(scores), color=colour, linewidth=1.2, label=f"chain {name}")
    mean = number(part, "q")
    if mean is not None:
        ax.axhline(mean, color="#555555", linewidth=0.8, linestyle=DASHED)
    ax.axhline(0, color="#555555", linewidth=0.7)
    ax.set(xlabel="residue, counted along the chain", ylabel="Q-score", ylim=(min(-0.1, ax.get_ylim()[0]), 1))
    ax.legend(loc="lower left", ncols=2)


def _smooth(scores: np.ndarray) -> np.ndarray:
    """Mean over ``SMOOTH`` residues, without those that have no score."""
    known, ones = np.isfinite(scores), np.ones(SMOOTH)
    total = np.convolve(np.where(known, scores, 0.0), ones, "same")
    count = np.convolve(known.astype(float), ones, "same")
    if len(scores) < SMOOTH:
        return scores
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def by_chain(model: dict[str, Any]) -> dict[str, np.ndarray]:
    """Q of the residues of each chain, in order, NaN where there is none; the first ``MOST_CHAINS`` chains."""
    table = section(model, "table")
    chains, scores = table.get("chain"), numbers_of(table, "q")
    if not isinstance(chains, list) or len(chains) != len(scores):
        return {}
    residues: dict[str, list[float]] = {}
    for name, score in zip(chains, scores, strict=True):
        residues.setdefault(str(name), []).append(np.nan if score is None else float(score))
    return {name: np.array(residues[name]) for name in list(residues)[:MOST_CHAINS]}
