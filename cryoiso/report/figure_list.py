"""Which figures a report has, with the words that go with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cryoiso.core.records import DiagnoseRecord, IterationRecord
from cryoiso.core.types import DensityMap
from cryoiso.report import comparison
from cryoiso.report.canvas import values_of
from cryoiso.report.quoted import mask_warning
from cryoiso.report.records import ReportData
from cryoiso.report.sections import (
    anisotropy,
    audit,
    classes,
    correct,
    intensity,
    map_quality,
    measured,
    realign,
    view_density,
)
from cryoiso.report.sections.auxiliary import before, views_before_and_after
from cryoiso.report.surface_view import Surface, turning
from cryoiso.report.text import Entry, Text, number

FSC = (
    "Fourier shell correlation of the two half-maps, which share no particle. The resolution is read where the "
    "corrected curve crosses 0.143, or the unmasked one where the mask makes the agreement. The randomised curve is "
    "what the mask alone makes; it should be near zero. A corrected curve that does not come down to zero at the "
    "right-hand end warns of halves that are not independent."
)
TRUTH = (
    "The map against the known truth, read where the non-increasing curve nearest to it falls below 0.5 (one noisy "
    "shell does not move that); on the right only along z (the symmetry axis, if there is one) and "
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
BEFORE = " Before: the refinement without auxiliary particles."
BEFORE_ERRORS = (
    "Angle between estimated and true pose, modulo symmetry and the frame of the map, before and in this run, for top "
    "and side views apart, each as a share of its own kind. What lies beyond 20° (dashed line) are particles that "
    "found a wrong view: that hump should be gone."
)
SAMPLES = (
    "Raw particles, auxiliary ones on the same grey scale, and under each auxiliary image what it shows without noise. "
    "The first two rows should look like one data set. They are shown at temperature 1; with a lower "
    "auxiliary.temperature the particles that were refined had less noise."
)
SPECTRA = (
    "Power spectra of raw and auxiliary images; their ratio (with two standard errors; the grey band is 10 % either "
    "way, where it matters most); and their grey values. The raw curves are dotted. At low resolution the ratio "
    "need not be one: raw particles are seen from the preferred side, auxiliary ones from all sides."
)
TRANSFER = (
    "How much of the reference's projection (with CTF, on the images' grey scale) the auxiliary images hold, by "
    "spatial frequency: 1 is all of it, as a projection with noise has; less means that the generator does not trust "
    "the reference there. Bands are two standard deviations; half-set 2 is dashed."
)
TRAINING = (
    "Loss{annealing} and reconstruction error; below, the KL divergence of each latent layer{unweighted}, from the "
    "coarsest layer on. A layer that is dark to the end has collapsed: it carries nothing."
)
MOVED = (
    "By how much each round turned the poses of the raw particles, modulo symmetry. Beyond the dashed line (20°) are "
    "particles that found another view; in the last round there should be few."
)


@dataclass(frozen=True)
class Figure:
    """One figure of the report."""

    key: str
    title: str
    caption: str
    """What it is and what to look for."""
    image: str
    """data: address of the picture; empty if there is none."""
    text: Text = field(default_factory=Text)
    surface: dict[str, Any] | None = None
    """a surface that turns in place of the picture, see `cryoiso.report.surface_view`"""


def figures(
    data: ReportData,
    maps: list[tuple[str, str, DensityMap]],
    samples: dict[str, np.ndarray] | None = None,
    slices: correct.Slices | None = None,
    surface: Surface | None = None,
    local: correct.Slices | None = None,
) -> list[Figure]:
    """All figures for which the run has the data, in the order of the report."""
    from cryoiso.report import figures as draw

    d = data["diagnose"]
    first = before(data)
    controls = data.get("audit") or {}
    known: list[Entry] = [
        *audit.entries(controls),
        ("maps", "Maps", maps, _maps_caption(maps, _before(data)), lambda: draw.maps(maps, d)),
        measured.entry(data, surface),
        (
            "fsc",
            "Half-map agreement",
            d.get("fsc_unmasked"),
            " ".join((FSC, *mask_warning(d))),
            lambda: draw.half_map_fsc(d),
        ),
        (
            "truth",
            "Map against truth",
            d.get("map_to_truth"),
            TRUTH + _before(data) * bool(first.get("map_to_truth")),
            lambda: draw.truth_fsc(d),
        ),
        *anisotropy.entries(d),
        *map_quality.entries(d, local or {}),
        *correct.entries(data, slices or {}),
        _views(data, first),
        _errors(data, first),
        *view_density.entries(data),
        *intensity.entries(data),
        *classes.entries(data),
        *_auxiliary(data, samples or {}),
        (
            "iterations",
            "Course of the refinement",
            data["iterations"],
            "Resolution of the half-maps, and the angles of the search, iteration by iteration"
            + _course(data["iterations"])
            + (", in the refinement before there were auxiliary particles." if data.get("auxiliary") else "."),
            lambda: draw.iterations(data["iterations"]),
        ),
        *realign.entries(data),
        ("posterior", "Certainty of the poses", d.get("posterior"), POSTERIOR, lambda: draw.posterior(d)),
    ]
    texts = {
        **correct.texts(data), **realign.texts(data), **map_quality.texts(d), measured.KEY: measured.text(data),
        audit.KEY: audit.text(controls),
    }  # fmt: skip
    turned = {} if surface is None else {measured.KEY: turning(surface)}
    return [
        Figure(key, title, caption, make(), texts.get(key, Text()), turned.get(key))
        for key, title, present, caption, make in known
        if present
    ]


def _course(rows: list[IterationRecord]) -> str:
    """What more the course shows, where the refinement wrote it."""
    text = ""
    if any(number(row, "resolution_weighted_A") is not None for row in rows):
        text += "; weighted: by the FSC that counts directions as they were measured, which steers the search"
    if any(number(row, "cfar") is not None for row in rows):
        text += "; cFAR: least over largest agreement of a direction, 1 if all agree alike"
    return text


def _views(data: ReportData, first: DiagnoseRecord) -> Entry:
    """Views of this run and the true ones, with those before it where they are known."""
    from cryoiso.report import figures as draw

    part = data["diagnose"].get("views") or {}
    caption = VIEWS + TRUE_VIEWS * bool(part.get("true"))
    old, new = views_before_and_after(data)
    if not (old.get("counts") and new.get("counts")):
        return ("views", "Views", part.get("estimated"), caption, lambda: draw.views(data["diagnose"]))
    kinds = [(label, v, v["cells_per_ring"]) for label, v in (("before", old), ("this run", new))]
    kinds += [("true", part["true"], part["cells_per_ring"])] if part.get("true") else []
    return ("views", "Views before and after", True, caption + _before(data), lambda: draw.view_discs(kinds))


def _errors(data: ReportData, first: DiagnoseRecord) -> Entry:
    from cryoiso.report import figures as draw
    from cryoiso.report.sections import auxiliary_figures as draw_auxiliary

    d = data["diagnose"]
    current, old = d.get("pose_errors") or {}, first.get("pose_errors") or {}
    if not (current.get("histogram") and old.get("histogram")):
        return ("errors", "Pose errors", current.get("histogram"), ERRORS, lambda: draw.pose_errors(d))
    title = "Pose errors before and after"
    return (
        "errors-before",
        title,
        True,
        BEFORE_ERRORS + _before(data),
        lambda: draw_auxiliary.pose_errors(old, current),
    )


def _auxiliary(data: ReportData, samples: dict[str, np.ndarray]) -> list[Entry]:
    """Figures of the images, of their training and of what they did to the poses."""
    from cryoiso.report.sections import auxiliary_figures as draw

    parts = data.get("auxiliary") or {}
    rounds, local = parts.get("rounds") or [], parts.get("local") or {}
    trained = any(part["train"].get("halves") for part in rounds)
    moved = [p.get("moved") or {} for p in (*(r["corefine"] for r in rounds), local)]
    histograms = any(sum((m.get("histogram") or {}).get("counts") or []) for m in moved)
    return [
        ("samples", "Raw and auxiliary images", samples, SAMPLES, lambda: draw.sample_images(samples)),
        ("spectra", "How alike they are", draw.with_statistics(rounds), SPECTRA, lambda: draw.spectra(rounds)),
        (
            "transfer",
            "What they hold of the reference",
            draw.with_transfer(rounds),
            TRANSFER,
            lambda: draw.transfer(rounds),
        ),
        ("training", "Training", trained, _training_caption(rounds), lambda: draw.training(rounds)),
        ("moved", "How far particles moved", histograms, MOVED, lambda: draw.moved(rounds, local)),
    ]


def _training_caption(rounds: list[dict[str, Any]]) -> str:
    """Of the curves; with the annealing where the weight of the KL term was below 1."""
    halves = [half for part in rounds for half in (part["train"].get("halves") or {}).values()]
    annealed = any((values_of(half.get("kl_weight")) < 1).any() for half in halves)
    words = {
        "annealing": " (with the weight of the KL term, which grows until the dashed line)" if annealed else "",
        "unweighted": " without its weight" if annealed else "",
    }
    return TRAINING.format(**words) + _speeds(rounds)


def _speeds(rounds: list[dict[str, Any]]) -> str:
    """Images per second, and restarts, as far as they are known."""
    texts = []
    for part in rounds:
        for half, run in sorted((part["train"].get("halves") or {}).items()):
            said = []
            speed = (part["timing"].get(half) or {}).get("images_per_s")
            if speed is not None:
                said.append(f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s")
            if (run.get("attempts") or 1) > 1:
                said.append(f"attempt {run['attempts']}")
            if said:
                texts.append(f"round {part['round']}, half {half}: {', '.join(said)}")
    return f" In this run: {'; '.join(texts)}." if texts else ""


def _before(data: ReportData) -> str:
    """What "before" is in the figures."""
    return comparison.label(data) or BEFORE


def _maps_caption(maps: list[tuple[str, str, DensityMap]], before: str) -> str:
    text = "Central slices (left) and projections (right) across z, y and x, all rows on one grey scale; "
    text += "each map is weighted by how well its half-sets measured it."
    keys = {key for key, _, _ in maps}
    if "before" in keys and "run" in keys:
        text += before + " "
        if any(key.startswith("round-") for key in keys):
            text += "After a round: raw particles alone, in the poses that they found among auxiliary ones. "
        text += "What was smeared or stretched before should be so no more."
    elif len(maps) > 1:
        text += " Compare the rows: smeared or stretched density in the first row only comes from wrong poses."
    return text
