"""Classes of the particles, as a run found and selected them (classify.json)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryoiso.report.records import ReportData
from cryoiso.report.text import Entry, number, section

CAPTION = (
    "Particles of each class in the cones of views, against the angle between the cone's axis and z: bars are the "
    "classes' shares of a ring of cones, above them its number of particles. Conformations have the same shares in all "
    "views; a class that has one direction alone comes from views or poses, not from conformation."
)
RING_DEG = 30.0
"""Cones whose axes are in one ring are shown as one bar."""


def found(data: ReportData) -> dict[str, Any]:
    """``share`` (rings, classes), ``particles`` (rings,), ``names`` of the classes, ``selected``, ``of``,
    ``classes``; empty where the run has no complete record of a classification."""
    part = section(data, "classify")
    classes, cones = part.get("classes"), part.get("cones")
    chosen = section(part, "selected")
    if not isinstance(classes, list) or not isinstance(cones, list) or not cones or not classes:
        return {}
    names = [str(class_record.get("number")) for class_record in classes if isinstance(class_record, dict)]
    rings: dict[int, list[list[float]]] = {}
    for cone in cones:
        angle, values = number(cone, "tilt_deg"), [number(cone, name) for name in ("particles", *names)]
        if angle is None or None in values:
            return {}
        rings.setdefault(int(min(angle, 179.9) // RING_DEG), []).append([float(v or 0) for v in values])
    order = sorted(rings)
    table = np.array([np.sum(rings[i], 0) for i in order])
    total = np.maximum(table[:, 0], 1e-9)
    return {
        "ring": order, "particles": table[:, 0], "share": table[:, 1:] / total[:, None], "names": names,
        "classes": classes, "selected": chosen.get("classes") or [], "kept": number(chosen, "particles"),
        "of": number(chosen, "of"), "junk": section(part, "junk"),
    }  # fmt: skip


def sentences(data: ReportData) -> list[str]:
    """Sizes of the classes, and with which of them the run went on."""
    part = found(data)
    if not part:
        return []
    sizes = ", ".join(
        f"class {class_record.get('number')} {100 * (number(class_record, 'occupancy') or 0):.0f} %"
        for class_record in part["classes"]
    )
    text = f"The particles were sorted into {len(part['names'])} classes ({sizes})"
    share = number(part["junk"], "share")
    if share is not None:
        text += f", {100 * share:.0f} % showed no particle"
    if part["kept"] is not None and part["of"]:
        chosen = " and ".join(str(n) for n in part["selected"])
        text += f"; the run went on with class {chosen}, {part['kept']:,.0f} of {part['of']:,.0f} particles"
    return [text + "."]


def entries(data: ReportData) -> list[Entry]:
    """The figure, as `cryoiso.report.figure_list` wants it."""
    part = found(data)
    return [("classes", "Classes by view", True, CAPTION, lambda: _figure(part))] if part else []


def _figure(part: dict[str, Any]) -> str:
    from cryoiso.report.canvas import BLUE, GREEN, ORANGE, SKY, VERMILLION, address, new_figure, styled

    colours = (BLUE, ORANGE, GREEN, SKY, VERMILLION)
    with styled():
        figure, axes = new_figure(7.6, 3.1)
        ax, bottom = axes[0, 0], np.zeros(len(part["ring"]))
        place = np.arange(len(part["ring"]))
        for k, name in enumerate(part["names"]):
            kept = int(name) in part["selected"]
            ax.bar(
                place, part["share"][:, k], bottom=bottom, width=0.75, label=f"class {name}" + ", selected" * kept,
                color=colours[k % len(colours)], edgecolor="white", linewidth=0.6, alpha=1.0 if kept else 0.55,
            )  # fmt: skip
            bottom += part["share"][:, k]
        if part["junk"]:
            ax.bar(place, np.maximum(1 - bottom, 0), bottom=bottom, width=0.75, label="no particle", color="#BBBBBB")
        for x, count in zip(place, part["particles"], strict=True):
            ax.text(x, 1.02, f"{count:,.0f}", ha="center", va="bottom", fontsize=8)
        labels = [f"{RING_DEG * i:.0f}-{RING_DEG * (i + 1):.0f}" for i in part["ring"]]
        ax.set(xlabel="angle of the view to z (degrees)", ylabel="share of the particles", ylim=(0, 1.12))
        ax.set_xticks(place, labels)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return address(figure)
