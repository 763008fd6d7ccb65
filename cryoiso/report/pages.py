"""Which figures a report has, with the words that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cryoiso.core.types import DensityMap

FSC = (
    "Fourier shell correlation of the two half-maps, which share no particle. The resolution is read where the "
    "corrected curve crosses 0.143. The randomised curve is what the mask alone makes; it should be near zero. A "
    "corrected curve that does not come down to zero at the right-hand end warns of halves that are not independent."
)
TRUTH = (
    "The map against the known truth, read at 0.5; on the right only along z (the symmetry axis, if there is one) and "
    "only across it: where those two part, the map is anisotropic. Where this run falls short of the curve with true "
    "poses, poses are to blame, not images. Half-maps can agree far beyond this curve, because they share their errors."
)
VIEWS = (
    "Viewing directions on the two hemispheres, in equal areas: z is at the centre of each disc (top views, inside the "
    "dashed circle), side views at its rim. The colour says how many times more views than if they were spread evenly."
)
TRUE_VIEWS = " Estimated and true views should look alike; views gathered where the truth has none are misassigned."
ERRORS = (
    "Angle between estimated and true pose, modulo symmetry and the frame of the map, for top and side views apart, "
    "each as a share of its own kind. A second hump beyond 20° (dashed line) is particles that found a wrong view."
)
POSTERIOR = (
    "How sure the refinement is of each pose. Many particles at low probability, or of high entropy, mean noisy images "
    "or a reference that does not fit."
)


@dataclass(frozen=True)
class Figure:
    """One figure of the report."""

    key: str
    title: str
    caption: str
    """What it is and what to look for."""
    image: str
    """data: address of the picture."""


def figures(data: dict[str, Any], maps: list[tuple[str, str, DensityMap]]) -> list[Figure]:
    """All figures for which the run has the data, in the order of the report."""
    from cryoiso.report import figures as draw

    d = data["diagnose"]
    views = d.get("views") or {}
    known = [
        ("maps", "Maps", maps, _maps_caption(maps), lambda: draw.maps(maps, d)),
        ("fsc", "Half-map agreement", d.get("fsc_unmasked"), FSC, lambda: draw.half_map_fsc(d)),
        ("truth", "Map against truth", d.get("map_to_truth"), TRUTH, lambda: draw.truth_fsc(d)),
        ("views", "Views", views.get("estimated"), VIEWS + TRUE_VIEWS * bool(views.get("true")), lambda: draw.views(d)),
        (
            "errors",
            "Pose errors",
            (d.get("pose_errors") or {}).get("histogram"),
            ERRORS,
            lambda: draw.pose_errors(d),
        ),
        (
            "iterations",
            "Course of the refinement",
            data["iterations"],
            "Resolution of the half-maps, and the angles of the search, iteration by iteration.",
            lambda: draw.iterations(data["iterations"]),
        ),
        ("posterior", "Certainty of the poses", d.get("posterior"), POSTERIOR, lambda: draw.posterior(d)),
    ]
    return [Figure(key, title, caption, make()) for key, title, present, caption, make in known if present]


def _maps_caption(maps: list[tuple[str, str, DensityMap]]) -> str:
    text = "Central slices (left) and projections (right) across z, y and x, all rows on one grey scale; "
    text += "each map is weighted by the agreement of its half-maps."
    if len(maps) > 1:
        text += " Compare the rows: smeared or stretched density in the first row only comes from wrong poses."
    return text
