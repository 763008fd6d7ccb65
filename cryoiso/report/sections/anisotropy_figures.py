"""Pictures of directional numbers, each as a data: address; values that are not known leave gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.records import DiagnoseRecord
from cryoiso.report.canvas import (
    BLUE,
    DASHED,
    GREY,
    ORANGE,
    SKY,
    address,
    new_figure,
    resolution_axis,
    styled,
    values_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.image import AxesImage


def by_direction(d: DiagnoseRecord) -> str:
    """Band of the conical FSC with the occupancy, and a histogram of the resolution by direction."""
    part, frequency = d["directional"], values_of(d["frequency_invA"])
    mean, sd, low, high = (values_of(part.get(f"cfsc_{k}")) for k in ("mean", "sd", "min", "max"))
    with styled():
        figure, axes = new_figure(9.2, 3.5, ncols=2, width_ratios=(2, 1))
        left, right = axes[0]
        if len(low) == len(high) == len(frequency):
            left.fill_between(frequency, low, high, color=SKY, alpha=0.25, linewidth=0, label="extremes")
        if len(sd) == len(frequency):
            left.fill_between(frequency, mean - sd, mean + sd, color=BLUE, alpha=0.3, linewidth=0, label="one s.d.")
        left.plot(frequency, mean, color=BLUE, label="mean of the directions")
        if len(fso := values_of(part.get("fso"))) == len(frequency):
            left.plot(frequency, fso, color=ORANGE, label="occupancy (FSO)")
        left.axhline(0, color="#555555", linewidth=0.7)
        left.axhline(0.143, color="#555555", linewidth=0.8, linestyle=DASHED)
        left.set(xlim=(0, frequency[-1]), ylim=(-0.3, 1.04), xlabel="spatial frequency (1/Å)", ylabel="FSC, FSO")
        resolution_axis(left, frequency[-1])
        left.legend(loc="lower left")
        resolution = values_of(part.get("resolution_A"))
        right.hist(resolution, bins=24, color=BLUE, alpha=0.75)
        right.set(xlabel="resolution (Å)", ylabel="directions", title=_span(part))
        return address(figure)


def _span(part: dict[str, Any]) -> str:
    low, high = part.get("resolution_min_A"), part.get("resolution_max_A")
    return "" if low is None or high is None else f"{low:.1f} to {high:.1f} Å"


def spheres(d: DiagnoseRecord) -> str:
    """Half spheres in Lambert's equal-area projection: resolution, and sampling by the (estimated, true) views."""
    from matplotlib.colors import LogNorm

    from cryoiso.metrics.sampling import fibonacci_half_sphere

    part, sampling = d["directional"], d.get("sampling") or {}
    shown = [("estimated views", sampling.get("estimated")), ("true views", sampling.get("true"))]
    maps = [(label, s["map"], s["points"]) for label, s in shown if s and s.get("map") and s.get("points")]
    with styled():
        figure, axes = new_figure(3.4 * (1 + len(maps)), 3.0, ncols=1 + len(maps))
        image = _half_sphere(axes[0, 0], values_of(part["axes"]), values_of(part["resolution_A"]), "viridis_r", None)
        axes[0, 0].set_title("resolution by direction", fontsize=9)
        figure.colorbar(image, ax=axes[0, 0], shrink=0.75, pad=0.02).set_label("resolution (Å)", fontsize=8.5)
        for ax, (label, values, points) in zip(axes[0, 1:], maps, strict=True):
            norm = LogNorm(0.03, 10, clip=True)
            image = _half_sphere(ax, fibonacci_half_sphere(points, 0.0), values_of(values), "cividis", norm)
            ax.set_title(f"sampling by the {label}", fontsize=9)
            bar = figure.colorbar(image, ax=ax, shrink=0.75, pad=0.02, extend="both")
            bar.set_ticks([0.03, 0.1, 0.3, 1, 3, 10], labels=["0.03", "0.1", "0.3", "1", "3", "10"])
            bar.ax.minorticks_off()
            bar.set_label("relative to the mean", fontsize=8.5)
        return address(figure, "png", 160)


def _half_sphere(ax: Axes, axes: np.ndarray, values: np.ndarray, cmap: str, norm: Normalize | None) -> AxesImage:
    """A disc whose pixels take the value of the nearest axis; radius sqrt(1 - z), 1 at the rim."""
    from scipy.spatial import cKDTree

    x, y = np.meshgrid(*2 * (np.linspace(-1, 1, 241),))
    r2 = x**2 + y**2
    z = 1 - np.minimum(r2, 1)
    across = np.sqrt(np.maximum(2 - r2, 0))  # sin / radius
    points = np.stack([x * across, y * across, z], -1)
    nearest = cKDTree(np.concatenate([axes, -axes])).query(points)[1] % len(axes)
    image = np.ma.masked_where(r2 > 1, np.ma.masked_invalid(values[nearest]))
    shown = ax.imshow(image, extent=(-1, 1, -1, 1), origin="lower", cmap=cmap, norm=norm, interpolation="nearest")
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color=GREY, linewidth=0.8)
    ax.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal")
    ax.axis("off")
    return shown


def fsc3d_slices(slices: dict[str, Any]) -> str:
    """The planes through the origin perpendicular to x, y and z, with lines at 0.143 and 0.5."""
    last = slices["last_invA"]
    planes = [(name, across, values_of(slices.get(name))) for name, across in (("x", "yz"), ("y", "xz"), ("z", "xy"))]
    with styled():
        figure, axes = new_figure(9.6, 3.1, ncols=3)
        for ax, (name, across, plane) in zip(axes[0], planes, strict=True):
            edge = last * (1 + 1 / max(len(plane) - 1, 1))
            image = ax.imshow(plane, extent=(-edge, edge, -edge, edge), origin="lower", cmap="cividis", vmin=0, vmax=1)
            place = np.linspace(-last, last, len(plane))
            ax.contour(place, place, plane, (0.143, 0.5), colors=("white", "black"), linewidths=0.9)
            ax.set(title=f"across {name}", xlabel=f"{across[0]} (1/Å)", ylabel=f"{across[1]} (1/Å)")
            ax.grid(False)
        figure.colorbar(image, ax=list(axes[0]), shrink=0.8, pad=0.01).set_label("3DFSC", fontsize=8.5)
        return address(figure, "png", 160)
