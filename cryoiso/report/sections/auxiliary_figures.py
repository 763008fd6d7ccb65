"""Pictures of a run with auxiliary particles, each as a data: address; values that are not known leave gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cryoiso.report.canvas import (
    BLUE,
    DASHED,
    ORANGE,
    SKY,
    VERMILLION,
    address,
    by_half,
    new_figure,
    picture,
    resolution_axis,
    styled,
    values_of,
)
from cryoiso.report.sections.auxiliary import KNOWN_SD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_ROUNDS = (SKY, BLUE, "#004060")
"""Colours of the rounds; the last one serves all that follow."""
SAMPLE_ROWS = (("raw", "raw"), ("auxiliary", "auxiliary"), ("projections", "without\nnoise"))
SHOWN = 8


def sample_images(samples: dict[str, np.ndarray]) -> str:
    """Raw images, auxiliary ones on the same grey scale, and below each auxiliary image its noise-free projection."""
    rows = [(key, label) for key, label in SAMPLE_ROWS if key in samples]
    columns = min(SHOWN, max(len(samples[key]) for key, _ in rows))
    grey = np.percentile(samples["raw" if "raw" in samples else rows[0][0]], (0.5, 99.5))
    with styled():
        figure, axes = new_figure(10, 1.27 * len(rows), nrows=len(rows), ncols=columns)
        for row, (key, label) in enumerate(rows):
            low, high = np.percentile(samples[key], (0.2, 99.8)) if key == "projections" else grey
            for ax, image in zip(axes[row], samples[key][:columns], strict=False):
                picture(ax, image, low, high)
            for ax in axes[row, len(samples[key]) :]:
                ax.axis("off")
            axes[row, 0].set_ylabel(label, fontsize=9, fontweight="bold")
        return address(figure, "png", 160)


def _colour(index: int) -> str:
    return _ROUNDS[min(index, len(_ROUNDS) - 1)]


def with_statistics(rounds: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(round, statistics) of the rounds whose images were compared."""
    known = [(part["round"], part["generate"].get("statistics") or {}) for part in rounds]
    return [(number, s) for number, s in known if s.get("frequency_invA") and s.get("power_generated")]


def spectra(rounds: list[dict[str, Any]]) -> str:
    """Power spectra of raw and auxiliary images, their ratio, and their grey values."""
    known = with_statistics(rounds)
    last = known[-1][1]
    with styled():
        figure, axes = new_figure(10, 3.5, ncols=3)
        powers, ratios, greys = axes[0]
        for i, (number, s) in enumerate(known):
            frequency, label = values_of(s["frequency_invA"]), f"auxiliary, round {number}"
            powers.plot(frequency[1:], values_of(s["power_generated"])[1:], color=_colour(i), label=label)
            _ratio(ratios, s, _colour(i))
            _grey_values(greys, s, "generated", _colour(i), label)
        raw = values_of(last.get("power_real"))
        powers.plot(values_of(last["frequency_invA"])[1 : len(raw)], raw[1:], color="black", linestyle=":", label="raw")
        _grey_values(greys, last, "real", "black", "raw", linestyle=":")
        _name_spectra(powers, ratios, greys, last)
        return address(figure)


def with_transfer(rounds: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(round, transfer) of the rounds in which it was measured."""
    known = [(part["round"], part["generate"].get("transfer") or {}) for part in rounds]
    return [(number, t) for number, t in known if t.get("frequency_invA") and t.get("halves")]


def transfer(rounds: list[dict[str, Any]]) -> str:
    """How much of the reference each generator passes on, with two standard deviations, where that is known to 0.25."""
    known = with_transfer(rounds)
    with styled():
        figure, axes = new_figure(6.4, 3.3)
        ax, end, lows, highs = axes[0, 0], 0.0, [0.0], [1.1]
        for i, (number, t) in enumerate(known):
            frequency = values_of(t["frequency_invA"])
            for half, part in sorted(t["halves"].items()):
                value, sd = values_of(part.get("value")), values_of(part.get("sd"))
                if len(value) != len(frequency) or len(sd) != len(frequency):
                    continue
                shown = np.isfinite(value) & (sd < KNOWN_SD)
                value = np.where(shown, value, np.nan)
                style = "-" if half != "2" else DASHED
                ax.plot(frequency, value, color=_colour(i), linestyle=style, label=f"round {number}, half {half}")
                ax.fill_between(frequency, value - 2 * sd, value + 2 * sd, color=_colour(i), alpha=0.15, linewidth=0)
                if shown.any():
                    end = max(end, float(frequency[shown].max()))
                    lows.append(float(value[shown].min()) - 0.1)
                    highs.append(float(value[shown].max()) + 0.1)
        ax.axhline(1, color="#555555", linewidth=0.7)
        end = end or float(values_of(known[-1][1]["frequency_invA"])[-1])
        ax.set(xlim=(0, end), ylim=(max(min(lows), -1), min(max(highs), 3)))
        ax.set(xlabel="spatial frequency (1/Å)", ylabel="share of the reference\nin auxiliary images")
        resolution_axis(ax, end)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best")
        return address(figure)


def _ratio(ax: Axes, s: dict[str, Any], colour: str) -> None:
    frequency, ratio = values_of(s["frequency_invA"]), values_of(s.get("log_ratio"))
    if len(ratio) != len(frequency):
        return
    ax.plot(frequency[1:], np.exp(ratio[1:]), color=colour)
    sd = values_of(s.get("log_ratio_sd"))
    if len(sd) == len(ratio):
        low, high = np.exp(ratio - 2 * sd), np.exp(ratio + 2 * sd)
        ax.fill_between(frequency[1:], low[1:], high[1:], color=colour, alpha=0.25, linewidth=0)


def _grey_values(ax: Axes, s: dict[str, Any], key: str, colour: str, label: str, **style: Any) -> None:
    part = s.get("histogram") or {}
    shares, edges = values_of(part.get(key)), values_of(part.get("edges"))
    if len(shares) and len(edges) == len(shares) + 1:
        density = shares / np.diff(edges)
        ax.stairs(np.where(density > 0, density, np.nan), edges, color=colour, label=label, linewidth=1.5, **style)


def _name_spectra(powers: Axes, ratios: Axes, greys: Axes, last: dict[str, Any]) -> None:
    end = last["frequency_invA"][-1]
    for ax in (powers, ratios):
        ax.set(xlim=(0, end), xlabel="spatial frequency (1/Å)")
        cast("MaxNLocator", ax.xaxis.get_major_locator()).set_params(nbins=4)
        resolution_axis(ax, end)
    powers.set(yscale="log", ylabel="power (1 = white noise of variance 1)")
    _plain_ticks(powers, [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)])
    powers.legend(loc="upper right")
    start = 1 / last["beyond_A"] if last.get("beyond_A") else 0
    ratios.fill_between([start, end], 1 / 1.1, 1.1, color="#DDDDDD", linewidth=0, zorder=0)
    ratios.axhline(1, color="#555555", linewidth=0.7)
    shown = np.exp(values_of(last.get("log_ratio"))[1:])
    shown = np.abs(np.log(shown[np.isfinite(shown) & (shown > 0)]))
    top = float(np.clip(1.15 * np.exp(shown.max(initial=0)), 1.6, 10))
    ratios.set(ylabel="power, auxiliary over raw", yscale="log", ylim=(1 / top, top))
    _plain_ticks(ratios, [0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2] if top < 2 else [0.1, 0.2, 0.5, 1, 2, 5, 10])
    greys.set(yscale="log", xlabel="grey value (background sd)", ylabel="density")
    if greys.get_legend_handles_labels()[0]:
        greys.legend(loc="lower center")


def _plain_ticks(ax: Axes, ticks: list[float]) -> None:
    """Those of the ticks that lie within a logarithmic axis, written as people do."""
    low, high = ax.get_ylim()
    kept = [t for t in ticks if low <= t <= high]
    ax.set_yticks(kept, [f"{t:g}" for t in kept])
    ax.minorticks_off()


def training(rounds: list[dict[str, Any]]) -> str:
    """Loss and reconstruction error by step, of every half and round; KL of each latent layer of the last round."""
    known = [part for part in rounds if part["train"].get("halves")]
    last = known[-1]["train"]["halves"]
    maps = [half for half in sorted(last) if _layers(last[half])[0].size]
    with styled():
        figure, axes = new_figure(10, 5.6 if maps else 2.9, nrows=2 if maps else 1, ncols=2)
        for i, part in enumerate(known):
            style = "-" if i == len(known) - 1 else (0, (4, 2)) if i == len(known) - 2 else ":"
            for half, run in sorted(part["train"]["halves"].items()):
                label = f"round {part['round']}, half {half}"
                for ax, key in zip(axes[0], ("loss", "reconstruction"), strict=True):
                    _curve(ax, run, key, style, by_half(half), label)
        _name_curves(axes[0], last)
        if maps:
            _layer_maps(figure, axes[1], {half: last[half] for half in maps}, known[-1]["round"])
        return address(figure, "png", 160)


def _curve(ax: Axes, run: dict[str, Any], key: str, style: Any, colour: str, label: str) -> None:
    steps, values = values_of(run.get("steps")), values_of(run.get(key))
    n = min(len(steps), len(values))
    if np.isfinite(values[:n]).any():
        ax.plot(steps[:n], values[:n], linestyle=style, color=colour, label=label, linewidth=1.4)


def _name_curves(axes: np.ndarray, halves: dict[str, Any]) -> None:
    for ax, title in zip(axes, ("loss", "reconstruction error"), strict=True):
        ax.set(xlabel="step", title=title)
        for run in halves.values():
            steps, weight = values_of(run.get("steps")), values_of(run.get("kl_weight"))
            full = np.flatnonzero(weight >= 1 - 1e-9) if len(weight) == len(steps) else np.zeros(0, int)
            if len(full) and steps[full[0]] > steps[0]:
                ax.axvline(steps[full[0]], color="#555555", linewidth=0.8, linestyle=DASHED)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="upper right")
    lines = [np.asarray(line.get_ydata()) for line in axes[0].get_lines() if len(line.get_ydata()) > 2]
    settled = np.concatenate([y[len(y) // 10 :] for y in lines]) if lines else np.array([])
    settled = settled[np.isfinite(settled)]
    if len(settled):  # the first steps are far off and would flatten all the rest
        low, high = float(settled.min()), float(np.percentile(settled, 98))
        axes[0].set_ylim(low - 0.06 * (high - low) - 1e-9, high + 0.06 * (high - low) + 1e-9)
    errors = [np.asarray(line.get_ydata()) for line in axes[1].get_lines() if len(line.get_ydata()) > 2]
    if errors and all(np.nanmin(y) > 0 for y in errors):
        axes[1].set_yscale("log")


def _layers(run: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and KL (n, layers) of one training, as far as both are there."""
    rows = [r for r in run.get("kl_per_layer") or [] if r]
    steps = values_of(run.get("steps"))
    if not rows or len({len(r) for r in rows}) != 1:
        return np.zeros(0), np.zeros((0, 0))
    n = min(len(rows), len(steps))
    return steps[:n], np.array(rows[:n], np.float64)


def _layer_maps(figure: Figure, axes: np.ndarray, halves: dict[str, Any], number: int) -> None:
    from matplotlib.colors import LogNorm

    known = {half: _layers(run) for half, run in halves.items()}
    values = np.concatenate([kl[np.isfinite(kl) & (kl > 0)] for _, kl in known.values()])
    top = float(values.max()) if len(values) else 1.0
    norm = LogNorm(max(top / 1e4, float(values.min()) if len(values) else 0), top * 1.0001, clip=True)
    for ax, (half, (steps, kl)) in zip(axes, known.items(), strict=False):
        layers = np.arange(kl.shape[1] + 1) + 0.5
        shown = ax.pcolormesh(_borders(steps), layers, kl.T, norm=norm, cmap="cividis", rasterized=True)
        ax.set(xlabel="step", ylabel="latent layer", title=f"KL of each layer, round {number}, half {half}")
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.invert_yaxis()
        ax.grid(False)
    for ax in axes[len(known) :]:
        ax.axis("off")
    bar = figure.colorbar(shown, ax=list(axes), shrink=0.9, aspect=18, pad=0.01)
    bar.set_label("KL (nats per pixel)", fontsize=8.5)


def _borders(centres: np.ndarray) -> np.ndarray:
    """n + 1 borders of n cells."""
    if len(centres) < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = 0.5 * (centres[1:] + centres[:-1])
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def moved(rounds: list[dict[str, Any]], local: dict[str, Any]) -> str:
    """How far the poses of raw particles went in each round, as shares of the particles."""
    known = [(f"round {p['round']}", _colour(i), p["corefine"].get("moved") or {}) for i, p in enumerate(rounds)]
    known.append(("local refinement", ORANGE, (local or {}).get("moved") or {}))
    with styled():
        figure, axes = new_figure(6.4, 3.3)
        ax = axes[0, 0]
        for label, colour, part in known:
            histogram = part.get("histogram") or {}
            edges, counts = values_of(histogram.get("edges_deg")), values_of(histogram.get("counts"))
            if len(counts) == 0 or len(edges) != len(counts) + 1 or not counts.sum() > 0:
                continue
            text = label + (f": median {part['median_deg']:.1f}°" if part.get("median_deg") is not None else "")
            edges = _angle_axis(ax, edges)
            ax.stairs(100 * counts / counts.sum(), edges, fill=True, color=colour, alpha=0.25)
            ax.stairs(100 * counts / counts.sum(), edges, color=colour, label=text, linewidth=1.6)
        ax.axvline(20, color="#555555", linewidth=0.8, linestyle=DASHED)
        ax.set(xlabel="moved by (degrees)", ylabel="share of the particles (%)")
        ax.legend(loc="best")
        return address(figure)


def _angle_axis(ax: Axes, edges_deg: np.ndarray) -> np.ndarray:
    """A logarithmic axis if the edges grow geometrically; gives the edges to draw, of which none is 0 then."""
    edges = edges_deg.copy()
    if len(edges) > 4 and edges[1] > 0 and np.isclose(edges[-1] / edges[-2], edges[-2] / edges[-3], rtol=1e-3):
        edges[0] = max(edges[0], edges[1] ** 2 / edges[2])
        ax.set(xscale="log", xlim=(edges[0], edges[-1]))
        ticks = [t for t in (0.3, 1, 2, 5, 10, 20, 50, 180) if edges[0] <= t <= edges[-1] * 1.001]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    else:
        ax.set(xscale="linear", xlim=(edges[0], edges[-1]))
    return edges


def pose_errors(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Pose errors before and after, one over the other: top views on the left, side views on the right."""
    with styled():
        figure, axes = new_figure(10, 3.3, ncols=2, sharey=True)
        for ax, (kind, title) in zip(axes[0], (("top", "top views"), ("side", "side views")), strict=True):
            for label, colour, errors in (("before", VERMILLION, before), ("this run", BLUE, after)):
                histogram = errors["histogram"]
                counts = values_of(histogram.get(kind))
                if len(counts) == 0 or not counts.sum() > 0:
                    continue
                edges = _angle_axis(ax, values_of(histogram["edges_deg"]))
                text = label
                if errors.get(f"{kind}_over_20") is not None:
                    text += f": {100 * errors[f'{kind}_over_20']:.1f} % above 20°"
                ax.stairs(100 * counts / counts.sum(), edges, fill=True, color=colour, alpha=0.25)
                ax.stairs(100 * counts / counts.sum(), edges, color=colour, label=text, linewidth=1.6)
            ax.axvline(20, color="#555555", linewidth=0.8, linestyle=DASHED)
            ax.set(xlabel="pose error (degrees)")
            ax.set_title(title, loc="left")
            if ax.get_legend_handles_labels()[0]:
                ax.legend(loc="best")
        axes[0, 0].set_ylabel("share of the kind (%)")
        return address(figure)
