"""What of the map came from data: volumes, directions and controls that say it, joined in one section."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.types import DensityMap
from cryoiso.report.quoted import judged, quoted_resolution
from cryoiso.report.records import ReportData
from cryoiso.report.run_reader import read_json, stage_folder
from cryoiso.report.sections.correct import share_words
from cryoiso.report.surface import contour_level
from cryoiso.report.surface_view import LEAST_RANGE, RESOLUTION_STOPS, Surface, still
from cryoiso.report.text import Entry, Text, number, numbers_of, percent, section

KEY = "measured"
CAPTION = (
    "The surface of {map} at the contour level to begin with ({level:.3g}), which turns: drag it, enlarge it with the "
    "wheel, stop it with a click. {colours}"
)
SHARE_COLOURS = (
    "Blue: the local power came from data; orange: it was inferred by the correction. Do not build into orange parts "
    "without other evidence."
)
LOCAL_COLOURS = "Colours: local resolution of the half-maps (blue: fine)."
NO_COLOURS = "No network touched this map, and its local resolution was not measured: one colour."
HALF = 0.5
"""Share of measured power; where less was measured, most of the density is inferred."""


def collect_surface(folder: Path) -> Surface | None:
    """The surface that the section shows: of the corrected map with the measured share, else of the weighted map with
    the local resolution; None where there is no map.

    Raises:
        InputError: a map cannot be read.
    """
    corrected, reconstruct_folder = stage_folder(folder, "correct"), stage_folder(folder, "reconstruct")
    mask = _read(reconstruct_folder / products.MASK)
    pair = _read(corrected / products.CORRECTED_MAP), _read(corrected / products.MEASURED)
    if pair[0] is not None and pair[1] is not None and pair[0].box_px == pair[1].box_px:
        return _surface(pair[0], mask if mask is not None else _read(corrected / products.MASK), pair[1].data)
    density = _read(reconstruct_folder / products.WEIGHTED_MAP) or _read(reconstruct_folder / products.MAP)
    if density is None:
        return None
    local = _read(stage_folder(folder, "diagnose") / products.LOCAL_RESOLUTION)
    if local is None or local.box_px != density.box_px:
        return _surface(density, mask, None)
    inside = local.data[mask.data > 0.5] if mask is not None and mask.box_px == local.box_px else local.data.ravel()
    low, high = np.percentile(inside, (2, 98)) if inside.size else (0.0, 1.0)
    high = max(high, LEAST_RANGE * low)
    words = (f"{low:.1f} Å", f"{high:.1f} Å")
    return _surface(density, mask, local.data, (float(low), float(high)), RESOLUTION_STOPS, words)


def _read(path: Path) -> DensityMap | None:
    from cryoiso.io.mrc import read_map

    return read_map(path) if path.exists() else None


def _surface(density: DensityMap, mask: DensityMap | None, values: np.ndarray | None, *more: Any) -> Surface:
    inside = mask.data if mask is not None and mask.box_px == density.box_px else None
    return Surface(density, contour_level(density, inside), inside, values, *more)


def collect_shares(folder: Path) -> dict[str, Any]:
    """Percentiles of the measured share inside the mask, and of the volume where less than half was measured."""
    correct_folder = stage_folder(folder, "correct")
    share, mask = _read(correct_folder / products.MEASURED), _read(correct_folder / products.MASK)
    if share is None:
        return {}
    inside = share.data[mask.data > 0.5] if mask is not None and mask.box_px == share.box_px else share.data.ravel()
    if not inside.size:
        return {}
    names = ("p5", "p50", "p95")
    percentiles = {name: float(v) for name, v in zip(names, np.percentile(inside, (5, 50, 95)), strict=True)}
    return {**percentiles, "below_half": float(np.mean(inside < HALF))}


def collect_controls(folder: Path) -> list[dict[str, Any]]:
    """The controls of an audit, where there was one."""
    controls = read_json(folder / products.AUDIT).get("controls")
    return [control for control in controls if isinstance(control, dict)] if isinstance(controls, list) else []


def entry(data: ReportData, surface: Surface | None) -> Entry:
    """The section, as `cryoiso.report.figure_list` wants it."""
    draw: Callable[[], str] = (lambda: "") if surface is None else (lambda: still(surface))
    present = surface is not None or bool(data.get("measured"))
    return (KEY, "What of this map came from data", present, caption(data, surface), draw)


def caption(data: ReportData, surface: Surface | None) -> str:
    if surface is None:
        return ""
    corrected = bool(data.get("correct"))
    colours = NO_COLOURS if surface.values is None else SHARE_COLOURS if corrected else LOCAL_COLOURS
    return CAPTION.format(map="the corrected map" if corrected else "the map", level=surface.level, colours=colours)


def text(data: ReportData) -> Text:
    """Sentences and table."""
    return Text(tuple(_sentences(data)), (), tuple(row for row in _rows(data) if row[1]))


def _sentences(data: ReportData) -> list[str]:
    facts, shares = data.get("correct") or {}, section(data.get("measured"), "shares")
    if not facts:
        said = ["All of this map came from data: no network made any part of it."]
    else:
        said = [
            "The half-maps and the weighted map came from data alone; the corrected map was completed by a network."
        ]
        mean, below = number(facts, "measured_share_mean"), number(shares, "below_half")
        if mean is not None:
            part = "" if below is None else f"; in {percent(below)} of its volume less than half was"
            said.append(f"Inside the mask {share_words(mean)} of the corrected map's local power was measured{part}.")
    if _auxiliaries(data):
        said.append("Auxiliary images helped to find poses; none of them is in any map.")
    reach = _reach(data)
    if reach is not None and reach > 0.9995:
        said.append("All directions of Fourier space were measured to the resolution of the map (within one tenth).")
    elif reach is not None:
        said.append(
            f"{percent(reach)} of the directions of Fourier space were measured to the resolution of the map (within "
            "one tenth); in the others its detail is coarser."
        )
    return said


def _rows(data: ReportData) -> list[tuple[str, str]]:
    d, facts = data["diagnose"], data.get("correct") or {}
    (by_direction, unmasked), seen = judged(d), section(section(d, "sampling"), "estimated")
    of = ", without the mask" if unmasked else ""
    shares, local = section(data.get("measured"), "shares"), section(section(d, "local_resolution"), "percentiles_A")
    empty, cfar = number(seen, "empty_fraction"), number(by_direction, "cfar")
    low, high = number(by_direction, "resolution_min_A"), number(by_direction, "resolution_max_A")
    mask_share = number(section(section(d, "directional"), "mask"), "share")
    rows = [
        (f"resolution of the half-maps (FSC 0.143{of})", _length(quoted_resolution(d)[0])),
        (f"by direction{of}", "" if low is None or high is None else f"{low:.1f} to {high:.1f} Å"),
        (f"cFAR (1: all directions alike){of}", "" if cfar is None else f"{cfar:.2f}"),
        ("directions that no view sampled", "" if empty is None else percent(empty)),
        ("agreement of the half-maps that comes from the mask", "" if mask_share is None else percent(mask_share)),
        ("local resolution in the mask, 5th percentile, median, 95th", _three(local, ("5", "50", "95"), " Å", 1)),
        ("Fourier space that was measured, by the filter of the correction", _share(number(facts, "filter_mean"))),
        ("measured share of the corrected map in the mask, 5th percentile, median, 95th",
         _three(shares, ("p5", "p50", "p95"), "", 2)),
        ("volume in the mask where most was inferred", _share(number(shares, "below_half"))),
    ]  # fmt: skip
    return rows + _omega_rows(data)


def _omega_rows(data: ReportData) -> list[tuple[str, str]]:
    """The controls that measured Omega: the share of density in a region left out of the reference that is not from
    data."""
    rows = []
    for control in (data.get("measured") or {}).get("controls") or []:
        if not section(section(control, "details"), "omega"):
            continue
        value, ends = number(control, "number"), numbers_of(control, "interval")
        interval = f" ({ends[0]:.3g} to {ends[1]:.3g})" if len(ends) == 2 and None not in ends else ""
        if value is not None:
            unit = f" {control['unit']}" if control.get("unit") else ""
            said = f"{value:.3g}{unit}{interval}: {control.get('verdict')}"
            rows.append(("template bias Omega, region left out of the reference (control)", said))
    return rows


def _auxiliaries(data: ReportData) -> bool:
    return bool(section(data, "auxiliary").get("rounds"))


def _reach(data: ReportData) -> float | None:
    """Share of the directions whose resolution is within a tenth of the map's; None where the mask makes it."""
    d = data["diagnose"]
    if judged(d)[1]:
        return None
    resolution_A = number(d, "resolution_0143_A")
    each = [v for v in numbers_of(section(d, "directional"), "resolution_A") if v is not None]
    return float(np.mean(np.array(each) <= 1.1 * resolution_A)) if resolution_A and each else None


def _length(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} Å" if value < 3 else f"{value:.1f} Å"


def _share(value: float | None) -> str:
    return "" if value is None else share_words(value)


def _three(part: dict[str, Any], keys: tuple[str, str, str], unit: str, digits: int) -> str:
    values = [number(part, key) for key in keys]
    return "" if None in values else ", ".join(f"{v:.{digits}f}" for v in values) + unit
