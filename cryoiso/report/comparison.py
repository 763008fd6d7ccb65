"""Another run of the same particles beside this one: its numbers as "before", what differs, and both in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.records import DiagnoseRecord
from cryoiso.core.types import DensityMap
from cryoiso.report.records import ReportData
from cryoiso.report.run_reader import read_json, read_toml, stage_folder
from cryoiso.report.text import number, percent, section

MAP_NAMES = (products.WEIGHTED_MAP, products.MAP)
"""What is shown of a folder: the first of these that is there."""
_SETTINGS = (
    "particles",
    "reference",
    "sample",
    "micelle",
    "refine",
    "classify",
    "auxiliary",
    "realign",
    "correct",
    "reconstruct",
)
_ONLY_IN = {"auxiliary": ("auxiliary", "both"), "realign": ("realign", "both"), "correct": ("realign", "both")}
"""Sections that matter in these workflows alone."""
_OF_THE_RUN = ("workflow", "seed")


def collect_other(folder: Path, diagnose: DiagnoseRecord, job: dict[str, Any]) -> tuple[DiagnoseRecord, dict[str, Any]]:
    """What is known of the other run: its quality numbers, and ``title`` and ``settings`` (key, before, this run).

    Args:
        folder: of the other run. diagnose, job: of this run.

    Raises:
        InputError: it has not been measured, or its particles have another box, pixel size, symmetry or number.
    """
    file = stage_folder(folder, "diagnose") / products.facts("diagnose")
    other, other_job = read_json(file), read_toml(folder / products.RESOLVED)
    if not other:
        raise InputError(
            "the run to compare with has no quality numbers",
            file=folder,
            expected="NN_diagnose/",
            code="runs-not-comparable",
        )
    for key in ("box_px", "pixel_size_A", "symmetry", "particles"):
        if other.get(key) != diagnose.get(key):
            raise InputError(
                f"the run to compare with is not of the same particles ({key})", file=file,
                expected=diagnose.get(key), found=other.get(key), code="runs-not-comparable",
            )  # fmt: skip
    title = section(other_job, "run").get("title") or folder.resolve().name
    return cast(DiagnoseRecord, other), {"title": str(title), "settings": differences(other_job, job)}


def other_map(folder: Path) -> DensityMap | None:
    """The final map of the other run."""
    from cryoiso.io.mrc import read_map

    reconstruct_folder = stage_folder(folder, "reconstruct")
    path = next((p for name in MAP_NAMES if (p := reconstruct_folder / name).exists()), None)
    return None if path is None else read_map(path)


def differences(before: dict[str, Any], this: dict[str, Any]) -> list[dict[str, Any]]:
    """Settings of two jobs that differ: ``key`` (section.name), ``before``, ``this``; None for a key that is absent."""
    workflows = {section(job, "run").get("workflow", "refine") for job in (before, this)}
    rows = []
    for name in (*_SETTINGS, "run"):
        if name in _ONLY_IN and not workflows & set(_ONLY_IN[name]):
            continue
        before_part, this_part = section(before, name), section(this, name)
        for key in dict.fromkeys((*before_part, *this_part)):
            if (name != "run" or key in _OF_THE_RUN) and before_part.get(key) != this_part.get(key):
                rows.append({"key": f"{name}.{key}", "before": before_part.get(key), "this": this_part.get(key)})
    return rows


def label(data: ReportData) -> str:
    """What the figures call before; empty where no other run was given."""
    part = data.get("comparison") or {}
    return f" Before: {part['title']}." if part else ""


def settings_sentence(data: ReportData) -> list[str]:
    """Which settings differ."""
    part = data.get("comparison") or {}
    if not part:
        return []
    pairs = [f"{row['key']} = {_said(row['before'])} (here {_said(row['this'])})" for row in part["settings"]]
    return [f"Before: {part['title']}; its settings differ in {', '.join(pairs) if pairs else 'nothing'}."]


def _said(value: Any) -> str:
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def plain_sentences(data: ReportData) -> list[str]:
    """Both runs against the truth in at most five sentences, without terms of the trade; empty without a truth."""
    new: DiagnoseRecord = data["diagnose"]
    old = data["diagnose"].get("before") or DiagnoseRecord()
    known = all(section(d, "pose_errors") and section(d, "map_to_truth") for d in (old, new))
    if not data.get("comparison") or not known:
        return []
    return [_views_sentence(new), _run_sentence("Before,", old), _run_sentence("In this run,", new), *_gap(old, new),
            *_half_maps(old, new)]  # fmt: skip


def _views_sentence(d: DiagnoseRecord) -> str:
    e = section(d, "pose_errors")
    n, side = int(e["n"]), int(e["side_n"])
    text = f"Of {n:,} particles {percent(1 - side / n)} show the molecule along its axis, {side:,} from the side"
    return text + ("; only the side views tell how it is built along the axis." if side < 0.2 * n else ".")


def _run_sentence(when: str, d: DiagnoseRecord) -> str:
    e, m = section(d, "pose_errors"), section(d, "map_to_truth")
    text = f"{when} {percent(e['fraction_over_20'])} of all particles"
    if e["side_n"] and number(e, "side_over_20") is not None:
        text += f" and {round(e['side_over_20'] * e['side_n']):,} of the {e['side_n']:,} side views"
    text += " got a wrong view (by more than 20°)"
    if number(e, "fraction_opposite") is not None:
        text += f", {percent(e['fraction_opposite'])} of all particles the view from the opposite end"
    return text + f"; the map is right to {m['resolution_05_A']:.1f} Å{_along(m)}."


def _along(m: dict[str, Any]) -> str:
    """How well the map agrees along the axis: the mean FSC there, which does not hang on one shell."""
    area = number(m, "axial_area")
    return "" if area is None else f", and its detail along the axis agrees with the truth to {percent(area, 0)}"


def _gap(old: DiagnoseRecord, new: DiagnoseRecord) -> list[str]:
    ideal = section(new, "true_poses")
    if number(ideal, "resolution_05_A") is None:
        return []
    text = f"With their true views the same images give a map that is right to {ideal['resolution_05_A']:.1f} Å"
    if number(ideal, "axial_area") is not None:
        text += f" ({percent(ideal['axial_area'], 0)} along the axis)"
    parts = (section(old, "map_to_truth"), section(new, "map_to_truth"), ideal)
    areas = [number(part, "fsc_area") for part in parts]
    if any(a is None for a in areas):
        return [text + "."]
    before, this, best = (float(a or 0.0) for a in areas)
    text += f"; in all directions the agreement is {percent(before)} before, {percent(this)} in this run and "
    text += f"{percent(best)} with true views"
    if best <= before:
        return [text + ": wrong views cost nothing that could be regained."]
    share = (this - before) / (best - before)
    if share > 1:
        return [text + ": more than true views give, which is a sign of bias towards the reference."]
    gain = f"{percent(share, 0)} of" if share > 0 else "nothing of"
    text += f": this run regains {gain} what wrong views cost"
    along = [number(part, "axial_area") for part in (parts[1], ideal)]
    if along[0] is not None and along[1] is not None and along[0] > along[1] + 0.02:
        text += ", though what it has along the axis beyond the true views' map is a sign of bias towards the reference"
    return [text + "."]


def _half_maps(old: DiagnoseRecord, new: DiagnoseRecord) -> list[str]:
    claims = [number(d, "resolution_0143_A") for d in (old, new)]
    truths = [number(section(d, "map_to_truth"), "resolution_05_A") for d in (old, new)]
    if any(v is None for v in (*claims, *truths)):
        return []
    finer = [float(c or 0.0) < 0.9 * float(t or 0.0) for c, t in zip(claims, truths, strict=True)]
    text = f"The two half-maps agree to {claims[0]:.1f} Å before and to {claims[1]:.1f} Å in this run"
    if all(finer):
        return [text + ", finer than either map is right: halves share their errors, and their agreement hides them."]
    if finer[0]:
        return [text + ": before, their agreement hid how wrong the map was."]
    return [text + "."]
