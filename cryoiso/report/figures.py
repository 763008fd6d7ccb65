"""The pictures of the report, each as a data: address. Line charts are SVG, everything with many cells is PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.records import DiagnoseRecord, IterationRecord
from cryoiso.core.types import DensityMap
from cryoiso.report.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    address,
    from_zero,
    new_figure,
    picture,
    resolution_axis,
    scale_bar,
    styled,
)
from cryoiso.report.quoted import IN_THE_MASK, quoted_resolution
from cryoiso.report.text import number, section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Colormap, Normalize


def maps(items: list[tuple[str, str, DensityMap]], d: DiagnoseRecord) -> str:
    """Central slices and projections across z, y, x of each map (rows), scaled to the last one's densities."""
    volumes = _on_one_scale(items, d)
    names = [f"{what} {axis}" for what in ("slice across", "projection along") for axis in "zyx"]
    with styled():
        figure, axes = new_figure(10, 1.66 * len(items) + 0.3, nrows=len(items), ncols=6)
        volumes = [_centre(v, _extent_px(volumes[-1])) for v in volumes]
        limits = [np.percentile(image, (1, 99.8)) for image in _pictures(volumes[-1])]
        for row, ((_, label, density), volume) in enumerate(zip(items, volumes, strict=True)):
            for column, image in enumerate(_pictures(volume)):
                picture(axes[row, column], image, *limits[column])
                if row == 0:
                    axes[0, column].set_title(names[column], fontsize=8.5, fontweight="normal")
            axes[row, 0].set_ylabel(label.replace(", ", ",\n"), fontsize=9, fontweight="bold")
            if row == 0:
                scale_bar(axes[0, 0], len(volume), density.pixel_size_A)
        return address(figure, "png", 160)


def _pictures(volume: np.ndarray) -> list[np.ndarray]:
    centre = len(volume) // 2
    return [volume.take(centre, axis) for axis in range(3)] + [volume.sum(axis) for axis in range(3)]


def _on_one_scale(items: list[tuple[str, str, DensityMap]], d: DiagnoseRecord) -> list[np.ndarray]:
    """The maps in the truth's frame and on the last one's scale (units of density are arbitrary).

    The scale is the slope of map over last map, which noise in the map does not change; of maps before the run's, which
    may be unlike it, it is the ratio of their standard deviations.
    """
    from cryoiso.metrics.mapmodel import to_frame

    last = np.asarray(items[-1][2].data, np.float32)
    result = []
    for key, _, density in items:
        volume = np.asarray(density.data, np.float32)
        moved = _measured_frame(key, d) if items[-1][0] == "truth" else {}
        if moved.get("frame_rotation"):
            rotation, shift_A = np.array(moved["frame_rotation"]), np.array(moved["frame_shift_A"])
            if np.any(shift_A) or not np.allclose(rotation, np.eye(3)):
                volume = to_frame(volume, rotation, shift_A, density.pixel_size_A)
        a, b = volume - volume.mean(), last - last.mean()
        slope = float((a * b).sum()) / max(float((b * b).sum()), 1e-30)
        if key not in ("run", "true_poses", "truth"):
            slope = float(a.std() / max(b.std(), 1e-15))
        result.append(a / slope if slope > 0 else a)
    return result


def _measured_frame(key: str, d: DiagnoseRecord) -> dict[str, Any]:
    """Where `diagnose` found this map to lie against the truth: this run's (and its rounds') or the one before."""
    if key in ("true_poses", "truth"):
        return {}
    return section(d.get("before") if key == "before" else d, "map_to_truth")


def _extent_px(volume: np.ndarray) -> int:
    """Half the side of a cube about the centre that holds what stands out in the projections; at most half the box."""
    centre = len(volume) // 2
    far = 0
    for image in _pictures(volume)[3:]:
        where = np.argwhere(image - np.median(image) > 0.1 * float(image.max() - np.median(image)))
        far = max(far, int(np.abs(where - centre).max(initial=0)))
    return min(max(round(1.2 * far), len(volume) // 5), centre)


def _centre(volume: np.ndarray, extent_px: int) -> np.ndarray:
    keep = slice(len(volume) // 2 - extent_px, len(volume) // 2 + extent_px)
    return volume[keep, keep, keep]


def half_map_fsc(d: DiagnoseRecord) -> str:
    """FSC curves of the half-maps, with the resolution that may be quoted."""
    resolution_A, criterion = quoted_resolution(d)
    curves = [
        (d.get("fsc_unmasked"), "unmasked", SKY, "-", 1.4),
        (d.get("fsc_masked"), "masked", BLUE, "--", 1.4),
        (d.get("fsc_randomised"), "masked, phases randomised", GREY, ":", 1.6),
        (d.get("fsc_corrected"), "corrected for the mask", "black", "-", 2.0),
    ]
    with styled():
        figure, axes = new_figure(6.4, 3.7)
        ax = axes[0, 0]
        for curve, label, colour, line, width in curves:
            if curve:
                ax.plot(d["frequency_invA"], curve, line, color=colour, label=label, linewidth=width)
        _fsc_axes(ax, d["frequency_invA"], (0.143, 0.5))
        _mark(ax, resolution_A, 0.143, "black" if criterion == IN_THE_MASK else SKY)
        ax.legend(loc="best")
        return address(figure)


def truth_fsc(d: DiagnoseRecord) -> str:
    """FSC against the truth of the run's map, of the map before it and of the one from true poses, where known.

    On the right along z and across it.
    """
    curves = (
        (section(d.get("before"), "map_to_truth"), "before", VERMILLION),
        (d.get("map_to_truth"), "this run", BLUE),
        (d.get("true_poses"), "true poses", GREEN),
    )
    with styled():
        figure, axes = new_figure(9.2, 3.7, ncols=2, sharey=True)
        axes[0, 0].set_xlim(0, d["frequency_invA"][-1])
        for part, label, colour in curves:
            if not part or not part.get("fsc"):
                continue
            resolution = part.get("resolution_05_A")
            text = f"{label}: {resolution:.1f} Å" if resolution else label
            axes[0, 0].plot(d["frequency_invA"], part["fsc"], color=colour, label=text)
            _mark(axes[0, 0], resolution, 0.5, colour, text=False)
            for kind, line, name in (("axial", "-", "along z"), ("equatorial", "--", "across z")):
                if part.get(kind):
                    text = f"{label}, {name}: {part[f'{kind}_A']:.1f} Å"
                    axes[0, 1].plot(d["frequency_invA"], part[kind], line, color=colour, label=text)
        for ax, title in zip(axes[0], ("all directions", "by direction"), strict=True):
            _fsc_axes(ax, d["frequency_invA"], (0.5,))
            ax.set_title(title, loc="left", pad=4)
            ax.legend(loc="best")
        if len(lines := axes[0, 1].get_legend_handles_labels()[0]) > 4:  # no room among the curves
            axes[0, 1].get_legend().remove()
            figure.legend(handles=lines, loc="outside lower right", ncols=3)
        axes[0, 1].set_ylabel("")
        return address(figure)


def _fsc_axes(ax: Axes, frequency_invA: list[float], thresholds: tuple[float, ...]) -> None:
    """Frequency below, resolution in Å above, thresholds as thin lines."""
    last = frequency_invA[-1]
    ax.set(xlim=(0, last), ylim=(-0.1, 1.04), xlabel="spatial frequency (1/Å)", ylabel="FSC")
    ax.axhline(0, color="#555555", linewidth=0.7)
    for value in thresholds:
        ax.axhline(value, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        ax.annotate(f"{value:g}", (0, value), (3, 2), textcoords="offset points", fontsize=7.5, color="#555555")
    resolution_axis(ax, last)


def _mark(ax: Axes, resolution_A: float | None, threshold: float, colour: str, text: bool = True) -> None:
    if not resolution_A or 1 / resolution_A > 0.999 * ax.get_xlim()[1]:
        return  # the curve never comes down to the threshold
    ax.plot([1 / resolution_A], [threshold], "o", color=colour, markersize=5, clip_on=False, zorder=5)
    if text:
        ax.annotate(
            f"{resolution_A:.1f} Å",
            (1 / resolution_A, threshold),
            (6, 6),
            textcoords="offset points",
            fontweight="bold",
        )


def views(d: DiagnoseRecord) -> str:
    """View densities, estimated and, where known, true."""
    part = d["views"]
    return view_discs([(k, part[k], part["cells_per_ring"]) for k in ("estimated", "true") if part.get(k)])


def view_discs(kinds: list[tuple[str, dict[str, Any], list[int]]]) -> str:
    """Densities of views on two equal-area discs each, looking from +z and from -z.

    Args:
        kinds: label, distribution (``counts`` of its cells), cells of each ring. Three and more stand in columns.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    density = [np.array(part["counts"]) / max(float(np.mean(part["counts"])), 1e-9) for _, part, _ in kinds]
    top = max(4.0, *(float(np.percentile(v, 99.8)) for v in density))
    norm = LogNorm(0.1, top, clip=True)
    with styled():
        rows = 1 if len(kinds) < 3 else 2
        columns = 2 * len(kinds) // rows
        figure, axes = new_figure(2.45 * columns + 0.6, 3.0 if rows == 1 else 5.2, nrows=rows, ncols=columns)
        places = axes.reshape(-1, 2) if rows == 1 else axes.T
        for (label, _, cells), values, pair in zip(kinds, density, places, strict=True):
            for ax, sign in zip(pair, (1, -1), strict=True):
                shown = _hemisphere(ax, cells, values, sign, norm, colormaps["cividis"])
                ax.set_title(f"{label}, {'upper' if sign > 0 else 'lower'} half", fontsize=9)
        bar = figure.colorbar(shown, ax=list(axes.flat), shrink=0.75 / rows, aspect=18, pad=0.01, extend="both")
        ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100) if t <= top]
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
        bar.ax.minorticks_off()
        bar.set_label("views relative to even spread", fontsize=8.5)
        return address(figure, "png", 160)


def _hemisphere(
    ax: Axes, cells_per_ring: list[int], density: np.ndarray, sign: int, norm: Normalize, cmap: Colormap
) -> PolyCollection:
    """One disc in Lambert's equal-area projection: radius sqrt(1 - |z|), 1 at the rim."""
    from matplotlib.collections import PolyCollection

    from cryoiso.metrics.orientation import ViewGrid

    borders = ViewGrid(np.array(cells_per_ring)).borders()
    low, high = (borders[:, 2], borders[:, 3]) if sign > 0 else (-borders[:, 3], -borders[:, 2])
    here = high > 1e-9
    turn = np.linspace(0, 1, 9)
    azimuth = np.radians(borders[here, :1] + (borders[here, 1:2] - borders[here, :1]) * turn)
    outer = np.sqrt(1 - np.maximum(low[here], 0))[:, None]
    inner = np.sqrt(np.maximum(1 - high[here], 0))[:, None]
    x = np.concatenate([outer * np.cos(azimuth), (inner * np.cos(azimuth))[:, ::-1]], axis=1)
    y = np.concatenate([outer * np.sin(azimuth), (inner * np.sin(azimuth))[:, ::-1]], axis=1)
    cells = PolyCollection(list(np.stack([x, y], axis=2)), array=density[here], norm=norm, cmap=cmap, edgecolors="face")
    cells.set_linewidth(0.2)
    ax.add_collection(cells)
    circle = np.linspace(0, 2 * np.pi, 200)
    cut = np.sqrt(1 - np.cos(np.radians(36)))
    ax.plot(cut * np.cos(circle), cut * np.sin(circle), "--", color="white", linewidth=1)
    ax.plot(np.cos(circle), np.sin(circle), color="#555555", linewidth=0.8)
    ax.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal")
    ax.axis("off")
    return cells


def pose_errors(d: DiagnoseRecord) -> str:
    """Histogram of pose errors on a logarithmic axis, top and side views apart."""
    histogram = d["pose_errors"]["histogram"]
    edges = np.array(histogram["edges_deg"])
    edges[0] = edges[1] ** 2 / edges[2]
    with styled():
        figure, axes = new_figure(6.4, 3.3)
        ax = axes[0, 0]
        for key, label, colour in (("side", "side views", BLUE), ("top", "top views", ORANGE)):
            counts = np.array(histogram.get(key) or [])
            if counts.sum() == 0:
                continue
            median = d["pose_errors"].get(f"{key}_median_deg")
            text = f"{label} (n = {counts.sum():,}" + (f", median {median:.1f}°)" if median is not None else ")")
            ax.stairs(100 * counts / counts.sum(), edges, fill=True, color=colour, alpha=0.3)
            ax.stairs(100 * counts / counts.sum(), edges, color=colour, label=text, linewidth=1.6)
        ax.axvline(20, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set(xscale="log", xlim=(edges[0], 180), xlabel="pose error (degrees)", ylabel="share of the kind (%)")
        ticks = [0.3, 1, 2, 5, 10, 20, 50, 180]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.legend(loc="upper left")
        return address(figure)


def iterations(rows: list[IterationRecord]) -> str:
    """Resolution by iteration, the angular step with the change of the poses, and cFAR where it is known."""
    steps = [row.get("iteration", i + 1) for i, row in enumerate(rows)]

    def column(*names: str) -> np.ndarray:
        values = [next((v for n in names if (v := number(row, n)) is not None), np.nan) for row in rows]
        return np.array(values, float)

    with styled():
        with_cfar = bool(np.isfinite(column("cfar")).any())
        figure, axes = new_figure(9.2, 3.0, ncols=2 + with_cfar)
        left, right = axes[0, :2]
        left.plot(steps, column("resolution_A"), "o-", color=BLUE, markersize=4, label="all alike")
        if np.isfinite(column("resolution_weighted_A")).any():
            left.plot(steps, column("resolution_weighted_A"), "s-", color=SKY, markersize=4, label="weighted")
            left.legend(loc="best")
        left.set(xlabel="iteration", ylabel="resolution (Å)", title="half-map resolution (FSC 0.143)")
        from_zero(left)
        if with_cfar:
            axes[0, 2].plot(steps, column("cfar"), "o-", color=BLUE, markersize=4)
            axes[0, 2].set(xlabel="iteration", ylabel="cFAR", title="evenness of directions", ylim=(0, 1.02))
        series = [
            (column("step_deg"), "step of the search", BLUE, "s-"),
            (column("changes_deg", "change_deg"), "change of the poses", ORANGE, "o-"),
        ]
        for values, label, colour, style in series:
            if np.isfinite(values).any():
                right.plot(steps, values, style, color=colour, markersize=4, label=label)
        right.set(xlabel="iteration", ylabel="degrees", title="angles")
        from_zero(right)
        if right.get_legend_handles_labels()[0]:
            right.legend(loc="upper right")
        for ax in axes[0]:
            ax.xaxis.get_major_locator().set_params(integer=True)
        return address(figure)


def posterior(d: DiagnoseRecord) -> str:
    """Histograms of the probability of the best pose and of the entropy over poses."""
    names = {
        "max_probability": "probability of the best pose",
        "entropy_nats": "entropy over poses (nats)",
    }
    present = [k for k in names if k in d["posterior"]]
    with styled():
        figure, axes = new_figure(4.6 * len(present), 2.8, ncols=len(present))
        for ax, key in zip(axes[0], present, strict=True):
            part = d["posterior"][key]
            ax.stairs(part["counts"], part["edges"], fill=True, color=BLUE, alpha=0.75)
            ax.axvline(part["mean"], color="black", linewidth=1, linestyle=(0, (4, 3)))
            ax.set(xlabel=names[key], ylabel="particles")
            right_of_it = part["mean"] < sum(ax.get_xlim()) / 2
            ax.annotate(
                f"mean {part['mean']:.2f}", (part["mean"], 1), (4 if right_of_it else -4, -10),
                ("data", "axes fraction"), "offset points", ha="left" if right_of_it else "right",
            )  # fmt: skip
        return address(figure)
