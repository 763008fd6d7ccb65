"""Scale and noise level of the images, as a refinement estimated them (``intensity`` of refine.json)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryoiso.report.records import ReportData
from cryoiso.report.text import Entry, number, section

CAPTION = (
    "Mean scale of the signal (left) and mean noise level (right) of the particles in each cone of views, against the "
    "angle between the cone's axis and z; bars are standard errors of the mean, areas the number of particles. Scales "
    "that depend on the view come from ice of different thickness, or from particles that do not belong to their cone."
)
COLUMNS = ("particles", "scale", "scale_error", "noise")
LEAST_PARTICLES = 5
"""A cone with fewer is not counted in the sentence."""


def estimated(data: ReportData) -> dict[str, Any]:
    """``angle_deg`` and each of COLUMNS (cones,) float64, ``kind``, ``scale_sd``, ``noise_sd``, ``micrographs``.

    Empty where the refinement estimated no intensities, or its record is incomplete.
    """
    part = section(section(data, "refine"), "intensity")
    cones = part.get("by_view")
    spread = {key: number(part, key) for key in ("scale_sd", "noise_sd")}
    if not isinstance(cones, list) or not cones or None in spread.values():
        return {}
    rows = []
    for cone in cones:
        axis = cone.get("axis") if isinstance(cone, dict) else None
        values = [number(cone, name) for name in COLUMNS] if isinstance(cone, dict) else []
        if not isinstance(axis, list) or len(axis) != 3 or number({"z": axis[2]}, "z") is None or None in values:
            return {}
        rows.append([float(np.degrees(np.arccos(np.clip(axis[2], -1, 1)))), *values])
    table = np.array(rows, np.float64).T
    columns: dict[str, Any] = dict(zip(("angle_deg", *COLUMNS), table, strict=True))
    return {**columns, **spread, "kind": part.get("scale"), "micrographs": number(part, "micrographs")}


def sentences(data: ReportData) -> list[str]:
    """Spread of the scales, and how far their means differ between views."""
    part = estimated(data)
    if not part:
        return []
    count = part["micrographs"]
    group = "optics group" if count is None else f"micrograph ({count:,.0f} of them)"
    unit = "each image, near those of its " if part["kind"] == "particle" else "each "
    text = f"Scale and noise level were estimated for {unit}{group}: standard deviations of "
    text += f"{part['scale_sd']:.2f} and {part['noise_sd']:.2f} about 1"
    enough = part["particles"] >= LEAST_PARTICLES
    if enough.sum() > 1:
        scales = part["scale"][enough]
        text += f"; mean scales of the views between {scales.min():.2f} and {scales.max():.2f}"
    return [text + "."]


def entries(data: ReportData) -> list[Entry]:
    """The figure, as `cryoiso.report.figure_list` wants it."""
    part = estimated(data)
    return [("intensity", "Intensities by view", True, CAPTION, lambda: _figure(part))] if part else []


def _figure(part: dict[str, Any]) -> str:
    from cryoiso.report.canvas import BLUE, ORANGE, address, new_figure, styled

    size = 12 + 160 * part["particles"] / part["particles"].max()
    with styled():
        figure, axes = new_figure(7.6, 2.9, ncols=2)
        for ax, name, label, colour in (
            (axes[0, 0], "scale", "scale of the signal", BLUE), (axes[0, 1], "noise", "noise level", ORANGE),
        ):  # fmt: skip
            ax.axhline(1, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
            ax.scatter(part["angle_deg"], part[name], s=size, color=colour, alpha=0.5, linewidths=0)
            ax.set(xlabel="angle of the view to z (degrees)", ylabel=label, xlim=(-5, 185))
            ax.set_xticks(range(0, 181, 30))
        axes[0, 0].errorbar(part["angle_deg"], part["scale"], part["scale_error"], fmt="none", color=BLUE, linewidth=1)
        return address(figure)
