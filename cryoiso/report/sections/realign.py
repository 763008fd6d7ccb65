"""What a refinement with the correction between its iterations wrote down about it, and words for that."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.report.records import ReportData
from cryoiso.report.run_reader import read_json, stage_folder
from cryoiso.report.sections.auxiliary import round_numbers
from cryoiso.report.text import Entry, Text, number, percent, section, span

CAPTION = (
    "Iteration by iteration: resolution of the half-maps (filled: the references were corrected afterwards; open: they "
    "were not); how much of Fourier space the half-maps measured up to there (mean of the 3DFSC); the loss of each "
    "network from its first to its last record (the dot); and by which factors shells were brought back to the grey "
    "scale of the engine's own references, from the smallest to the largest. Factors far from 1 mean that the steps "
    "before, or the network, changed the strength of a shell a lot."
)
REFERENCE_ONLY = (
    "The network's output was a reference to search with and never a result: the half-maps are what the images gave "
    "with the poses found, and no network has touched them."
)
SHARED = (
    "One network saw the maps of both half-sets (mode 'paired'). Through it the references of each half know the other "
    "half's map: the halves are not independent, and the half-map FSC is no gold standard and may be too good."
)
APART = (
    "Each half-set had a network of its own, trained on that half's map alone. The halves stay independent and the "
    "half-map FSC keeps its meaning; only FSC, 3DFSC and, where none was given, a mask are made from both."
)


def collect_realign(folder: Path) -> list[dict[str, Any]]:
    """The refinements of a run, or of the command's folder, that had a correction between their iterations.

    Returns:
        of each: ``name``, ``engine``, ``settings`` (of the correction), ``halves_share_a_network`` (None: not known),
        ``iterations`` (iteration, resolution_A, step_deg, and what the correction says of itself).
    """
    stages = [("refinement", "refine")]
    stages += [(f"co-refinement of round {n}", f"corefine-{n}") for n in round_numbers(folder)]
    refinements = [_refinement(name, stage_folder(folder, stage)) for name, stage in stages]
    return [part for part in refinements if part]


def _refinement(name: str, folder: Path) -> dict[str, Any]:
    """Of one stage; its engine may have worked in a folder of its own. Empty if nothing was to be corrected."""
    for place in (folder, folder / "engine"):
        refine = read_json(place / products.facts("refine"))
        settings = section(refine, "correction")
        records = refine.get("iterations")
        rows = [_iteration(i, r) for i, r in enumerate(records if isinstance(records, list) else [])]
        if settings or any("applied" in row for row in rows):
            return {
                "name": name,
                "engine": str(refine.get("engine") or ""),
                "settings": settings,
                "halves_share_a_network": _shared(settings),
                "iterations": rows,
            }
    return {}


def _iteration(index: int, record: Any) -> dict[str, Any]:
    known = {key: number(record, key) for key in ("iteration", "resolution_A", "step_deg")}
    known["iteration"] = index + 1 if known["iteration"] is None else known["iteration"]
    return {**known, **section(record, "correction")}


def _shared(settings: dict[str, Any]) -> bool | None:
    is_shared = settings.get("halves_share_a_network")
    return is_shared if isinstance(is_shared, bool) else None


def corrected(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The iterations whose references were corrected."""
    return [row for row in part["iterations"] if row.get("applied")]


def sentences(data: ReportData) -> list[str]:
    """For the summary at the top."""
    said = []
    for part in data.get("realign") or []:
        n, of = len(corrected(part)), len(part["iterations"])
        text = f"In the {part['name']} the references were corrected after {n} of {of} iterations"
        if n and part["settings"].get("correct") is not False:
            text += "; what the network made was searched with and is in no result"
        said.append(text + ".")
    return said


def keys(data: ReportData) -> list[tuple[str, dict[str, Any]]]:
    """(key of the figure, refinement)."""
    parts = data.get("realign") or []
    return [("realign" if i == 0 else f"realign-{i + 1}", part) for i, part in enumerate(parts)]


def entries(data: ReportData) -> list[Entry]:
    """Figures, as `cryoiso.report.figure_list` wants them."""
    from cryoiso.report.sections import realign_figures as draw

    return [
        (
            key,
            "Correction between the iterations" + (f": {part['name']}" if len(data["realign"]) > 1 else ""),
            True,
            CAPTION if corrected(part) else "",
            partial(draw.by_iteration, part["iterations"]) if corrected(part) else str,
        )
        for key, part in keys(data)
    ]


def texts(data: ReportData) -> dict[str, Text]:
    """Words and table of each refinement's section."""
    return {
        key: Text(tuple(_words(part)), HEAD, tuple(_row(row) for row in part["iterations"])) for key, part in keys(data)
    }


def _words(part: dict[str, Any]) -> list[str]:
    rows, n = part["iterations"], len(corrected(part))
    engine = f", engine '{part['engine']}'" if part["engine"] else ""
    said = [f"After {n} of {len(rows)} iterations ({part['name']}{engine}) the references of the next were corrected."]
    if not rows:
        said = ["No iteration has been written down."]
    elif n < len(rows):
        said[0] += " The table says why the others were not."
    if part["settings"].get("correct") is False:
        return [*said, "No network took part (realign.correct was off): references were only filtered and matched."]
    said.append(REFERENCE_ONLY)
    shared = part["halves_share_a_network"]
    said.append(
        "It is not written down whether the halves shared a network." if shared is None else SHARED if shared else APART
    )
    return said


HEAD = (
    *("iteration", "resolution", "corrected", "measured directions", "loss, first to last"),
    "factors of the shells, least to most",
)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    resolution, measured = number(row, "resolution_A"), number(row, "mean_transfer")
    return (
        f"{row['iteration']:g}",
        "" if resolution is None else f"{resolution:.1f} Å",
        _whether(row),
        "" if measured is None else percent(measured),
        _spans(section(row, "loss"), "{:.4g} to {:.4g}"),
        _spans(section(row, "scale"), "{:.2f} to {:.2f}"),
    )


def _whether(row: dict[str, Any]) -> str:
    if row.get("applied"):
        return "yes, going on from an earlier network" if row.get("warm") else "yes"
    if "applied" not in row:
        return "not written down"
    return f"no: {row['why_not']}" if row.get("why_not") else "no"


def _spans(parts: dict[str, Any], form: str) -> str:
    """Two numbers for each half (or for both), in words."""
    known = [(label, span(parts, label)) for label in sorted(parts)]
    return "; ".join(
        ("" if label == "both" else f"half {label}: ") + form.format(*pair) for label, pair in known if pair
    )
