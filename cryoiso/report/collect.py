"""Gathers what a run folder says about its run into one dictionary; every file may be absent."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any, cast

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.records import DiagnoseRecord, JournalLine, ReferenceRecord, RefineRecord
from cryoiso.core.types import DensityMap
from cryoiso.report import comparison
from cryoiso.report.quoted import WITHOUT_A_MASK, quoted_resolution
from cryoiso.report.records import ReportData, StageTime
from cryoiso.report.run_reader import read_journal, read_json, read_toml, stage_folder
from cryoiso.report.sections import (
    anisotropy,
    audit,
    auxiliary,
    classes,
    correct,
    intensity,
    map_quality,
    measured,
    realign,
    view_density,
)
from cryoiso.report.sharing import name_of
from cryoiso.report.text import number, percent, section

MAPS = (("run", "this run", "."), ("true_poses", "same images, true poses", products.TRUE_POSES))
"""Key, label, and folder beside the final reconstruction."""

STACKS_LISTED = 5
"""More stacks than this are not listed one by one under where the numbers come from."""


def collect(folder: Path, before: Path | None = None) -> ReportData:
    """Everything that the report shows.

    Args:
        before: folder of another run of the same particles to compare with.

    Returns:
        ``title``, ``summary`` (sentences), ``numbers`` (rows of label, value, unit, and ``true_poses`` beside it where
        known; in a run with auxiliary particles, or beside another run, also ``before``), ``comparison`` (title,
        settings that differ, sentences; only beside another run), ``auxiliary`` (see ``report.sections.auxiliary``;
        only in such a run), ``classify`` (classify.json; likewise), ``correct`` and ``realign`` (see the modules of
        these names; only where there was such a correction), ``iterations``, ``diagnose`` (as in
        ``methods.assess.measure``), ``stages`` (name, seconds), ``provenance`` (label, text), ``job`` (the resolved
        job).

    Raises:
        InputError: no run in this folder, a file that is not what its name says, or another run that is not of the same
            particles.
    """
    job, manifest = read_toml(folder / products.RESOLVED), read_json(folder / products.MANIFEST)
    journal = read_journal(folder / products.JOURNAL)
    diagnose, ingest, reference, refine, reconstruct = (
        read_json(stage_folder(folder, name) / products.facts(name))
        for name in ("diagnose", "ingest", "reference", "refine", "reconstruct")
    )
    corrected, loops = correct.collect_correct(folder), realign.collect_realign(folder)
    if not (job or manifest or diagnose or journal or refine or corrected or loops):
        hint = "Give the folder that 'cryoiso run' wrote, or 'cryoiso refine', 'realign' or 'correct'."
        raise InputError(
            "no run in this folder",
            file=folder,
            expected="resolved.toml or journal.jsonl",
            hint=hint,
            code="run-missing",
        )
    data: ReportData = {
        "schema": 1,
        "title": job.get("run", {}).get("title") or folder.resolve().name,
        "summary": [],
        "numbers": [],
        "iterations": refine.get("iterations") or [],
        "diagnose": cast(DiagnoseRecord, diagnose),
        "ingest": ingest,
        "reference": cast(ReferenceRecord, reference),
        "refine": cast(RefineRecord, {k: v for k, v in refine.items() if k != "iterations"}),
        "reconstruct": reconstruct,
        "stages": stage_times(journal),
        "job": job,
    }
    if classified := read_json(stage_folder(folder, "classify") / products.facts("classify")):
        data["classify"] = classified
    if rounds := auxiliary.collect_rounds(folder):
        data["auxiliary"] = rounds
    if before is not None:
        other, data["comparison"] = comparison.collect_other(before, data["diagnose"], job)
        data["diagnose"]["before"] = other
        data["comparison"]["sentences"] = comparison.plain_sentences(data)
    if audited := audit.collect_audit(folder):
        data["audit"] = audited
    if corrected:
        data["correct"] = corrected
    if loops:
        data["realign"] = loops
    shares, controls = measured.collect_shares(folder), measured.collect_controls(folder)
    if shares or controls:
        data["measured"] = {"shares": shares, "controls": controls}
    data["provenance"] = provenance(manifest, job)
    data["summary"] = summary(data)
    data["numbers"] = numbers(data)
    return data


def collect_maps(folder: Path, data: ReportData, before: Path | None = None) -> list[tuple[str, str, DensityMap]]:
    """(key, label, map) of the maps before the run's, the run's, the one from true poses and the true one.

    Those that exist on one grid, the run's if it is there.
    """
    from cryoiso.io.mrc import read_map

    truth = data["job"].get("truth", {}).get("map") or ""
    reconstruct_folder = stage_folder(folder, "reconstruct")
    sources = [
        (
            key,
            label,
            next(
                (p for n in comparison.MAP_NAMES if (p := reconstruct_folder / name / n).exists()),
                reconstruct_folder / name / comparison.MAP_NAMES[0],
            ),
        )
        for key, label, name in MAPS
    ]
    if truth:
        sources.append(("truth", "the truth", folder / truth))
    maps = [(key, label, read_map(path)) for key, label, path in sources if path.exists()]
    earlier = auxiliary.collect_before_maps(folder, data)
    if before is not None and (other := comparison.other_map(before)) is not None:
        earlier = [("before", "before", other), *(item for item in earlier if item[0] != "before")]
    maps = [*earlier, *maps]
    box_px = next((m.box_px for key, _, m in maps if key == "run"), maps[0][2].box_px if maps else 0)
    return [item for item in maps if item[2].box_px == box_px]


def stage_times(journal: list[JournalLine]) -> list[StageTime]:
    """Seconds of each finished stage in the order they ended; the last time counts if a stage ran again."""
    times = {line["stage"]: line.get("seconds") for line in journal if line.get("event") == "end" and line.get("stage")}
    return [{"stage": stage, "seconds": seconds} for stage, seconds in times.items()]


def summary(data: ReportData) -> list[str]:
    """The headline, in sentences made of numbers only."""
    d = data["diagnose"]
    sentences = []
    n, resolution = d.get("particles"), d.get("resolution_0143_A")
    if resolution is not None:
        of = f" from {n:,} particles" if n else ""
        symmetry = f" with {d['symmetry']} symmetry" if d.get("symmetry") else ""
        quoted_A, criterion = quoted_resolution(d)
        if criterion == WITHOUT_A_MASK and quoted_A is not None:
            agreement = f"{_at(quoted_A, d)} without a mask (FSC 0.143); the {_at(resolution, d)} inside the mask come "
            agreement += "largely from the mask"
        else:
            agreement = f"{_at(resolution, d)} (FSC 0.143, corrected for the mask)"
        sentences.append(f"The two half-maps{of}{symmetry} agree to {agreement}.")
    sentences = [*(data.get("comparison") or {}).get("sentences", []), *comparison.settings_sentence(data), *sentences]
    sentences += audit.sentences(data.get("audit") or {})
    sentences += _truth_sentences(d) + anisotropy.sentences(d) + auxiliary.sentences(data)
    sentences += view_density.sentences(data) + intensity.sentences(data) + classes.sentences(data)
    views = d.get("views", {}).get("estimated") or {}
    has_both = all(auxiliary.views_before_and_after(data))
    if views.get("top_fraction") is not None and not d.get("pose_errors") and not has_both:
        sentences.append(
            f"{percent(views['top_fraction'])} of the views lie within 36° of z (19.1 % if views were even); "
            f"view entropy {views['entropy']:.2f} of 1."
        )
    sentences += realign.sentences(data) + correct.sentences(data) + map_quality.sentences(d)
    return [*sentences, *d.get("notes", [])]


def _truth_sentences(d: DiagnoseRecord) -> list[str]:
    sentences = []
    to_truth, ideal, errors = d.get("map_to_truth") or {}, d.get("true_poses") or {}, d.get("pose_errors") or {}
    if to_truth.get("resolution_05_A") is not None:
        text = f"Against the known truth the map reaches {_at(to_truth['resolution_05_A'], d)} (FSC 0.5)"
        if ideal.get("resolution_05_A") is not None:
            text += f", where the same images with their true poses reach {_at(ideal['resolution_05_A'], d)}"
        sentences.append(text + ".")
        if to_truth.get("axial_A") is not None and to_truth.get("equatorial_A") is not None:
            sentences.append(
                f"Its resolution is {to_truth['axial_A']:.1f} Å along z and {to_truth['equatorial_A']:.1f} Å across it."
            )
    if errors.get("median_deg") is not None:
        text = f"Poses are wrong by {errors['median_deg']:.1f}° (median)"
        text += f", {percent(errors['fraction_over_20'])} of them by more than 20°"
        if errors.get("side_n") and errors.get("side_over_20") is not None:
            text += f", and {percent(errors['side_over_20'])} of the {errors['side_n']:,} side views"
        moved = [
            f"{percent(errors[key])} of the {kind}"
            for key, kind in (
                ("top_to_side", "top views were put to the side"),
                ("side_to_top", "side views to the top"),
            )
            if errors.get(key) is not None
        ]
        sentences.append(text + ("; " + " and ".join(moved) if moved else "") + ".")
    return sentences


def _at(resolution_A: float, d: DiagnoseRecord) -> str:
    """A resolution in words; said to be the end of the curve where it is."""
    at_end = bool(d.get("frequency_invA")) and resolution_A * d["frequency_invA"][-1] < 1.001
    return f"{resolution_A:.1f} Å" + (" or better (the pixel size ends the curve)" if at_end else "")


def numbers(data: ReportData) -> list[dict[str, Any]]:
    """Rows of the table: group, label, value, unit, and in ``true_poses`` the same number for the true poses.

    In a run with auxiliary particles also ``before``: the same number before them, or of the run to compare with.
    """
    names = ("group", "label", "value", "unit", "true_poses")
    rows = [dict(zip(names, row, strict=True)) for row in _rows(data["diagnose"])]
    if first := auxiliary.before(data):
        for row, old in zip(rows, _rows(first), strict=True):
            row["before"] = old[2]
    if data.get("auxiliary"):
        rows += [dict(zip(names, (*row, None), strict=True)) for row in auxiliary.number_rows(data)]
    return [row for row in rows if row["value"] is not None or row.get("before") is not None]


def _rows(d: DiagnoseRecord) -> list[tuple[str, str, Any, str, Any]]:
    """All rows of what `diagnose` measures, with None for what it did not."""
    to_truth, ideal = d.get("map_to_truth") or {}, d.get("true_poses") or {}
    errors, views = d.get("pose_errors") or {}, d.get("views") or {}
    seen, true = views.get("estimated") or {}, views.get("true") or {}
    rows: list[tuple[str, str, Any, str, Any]] = [
        ("Data", "particles", d.get("particles"), "", None),
        ("Data", "particles in half 1 and half 2", _pair(d.get("half_counts")), "", None),
        ("Data", "box", d.get("box_px"), "px", None),
        ("Data", "pixel size", d.get("pixel_size_A"), "Å", None),
        ("Half-maps", "resolution, FSC 0.143, corrected for the mask", d.get("resolution_0143_A"), "Å", None),
        ("Half-maps", "resolution, FSC 0.143, masked", d.get("resolution_0143_masked_A"), "Å", None),
        ("Half-maps", "resolution, FSC 0.143, unmasked", d.get("resolution_0143_unmasked_A"), "Å", None),
        ("Half-maps", "resolution, FSC 0.5, corrected for the mask", d.get("resolution_05_A"), "Å", None),
    ]
    rows += anisotropy.number_rows(d) + map_quality.number_rows(d)
    for key, label, unit in (
        ("resolution_05_A", "resolution, FSC 0.5, all directions", "Å"),
        ("axial_A", "resolution along z (cone of 20°)", "Å"),
        ("equatorial_A", "resolution across z (belt of 20°)", "Å"),
        ("fsc_area", "mean FSC up to the pixel size, all directions", ""),
        ("axial_area", "mean FSC along z", ""),
        ("equatorial_area", "mean FSC across z", ""),
        ("correlation", "correlation inside the mask", ""),
    ):
        rows.append(("Map against truth", label, to_truth.get(key), unit, ideal.get(key)))
    for key, label, unit in _ERROR_ROWS:
        value = errors.get(key)
        rows.append(("Pose errors", label, 100 * value if unit == "%" and value is not None else value, unit, None))
    for key, label, scale, unit in _VIEW_ROWS:
        pair = [None if v.get(key) is None else scale * v[key] for v in (seen, true)]
        rows.append(("Views", label, pair[0], unit, pair[1]))
    for key, label, unit in (
        ("max_probability", "probability of the best pose, mean", ""),
        ("entropy_nats", "entropy over poses, mean", "nats"),
    ):
        rows.append(("Posterior", label, (d.get("posterior") or {}).get(key, {}).get("mean"), unit, None))
    return rows


_ERROR_ROWS = (
    ("median_deg", "median", "°"),
    ("p90_deg", "90th percentile", "°"),
    ("fraction_over_10", "above 10°", "%"),
    ("fraction_over_20", "above 20°", "%"),
    ("direction_median_deg", "direction of view, median", "°"),
    ("fraction_opposite", "seen from the opposite end (view wrong by more than 150°)", "%"),
    ("inplane_median_deg", "in the image plane, median", "°"),
    ("shift_median_A", "shift, median", "Å"),
    ("top_n", "true top views (within 36° of z)", ""),
    ("top_median_deg", "top views, median", "°"),
    ("top_over_20", "top views above 20°", "%"),
    ("top_to_side", "top views put to the side", "%"),
    ("side_n", "true side views", ""),
    ("side_median_deg", "side views, median", "°"),
    ("side_over_20", "side views above 20°", "%"),
    ("side_to_top", "side views put to the top", "%"),
    ("mirrored_median_deg", "median if the map had the other hand", "°"),
)
_VIEW_ROWS = (
    ("top_fraction", "top views (within 36° of z; 19.1 % if even)", 100, "%"),
    ("entropy", "entropy of the view distribution (1 = even)", 1, ""),
    ("peak_over_mean", "fullest direction over the mean", 1, "times"),
    ("empty_fraction", "directions never seen", 100, "%"),
)


def _command(words: list[Any]) -> list[str]:
    """A command line without folders; `python -m cryoiso.cli.main` is the program cryoiso."""
    names = list(map(name_of, words))
    return ["cryoiso", *names[1:]] if names and names[0] in ("main.py", "__main__.py") else names


def _pair(counts: list[int] | None) -> str | None:
    return None if not counts or not any(counts) else f"{counts[0]:,} and {counts[1]:,}"


def _list(part: dict[str, Any], key: str) -> list[Any]:
    """The list under a key; empty where there is none."""
    value = part.get(key)
    return value if isinstance(value, list) else []


def provenance(manifest: dict[str, Any], job: dict[str, Any]) -> list[tuple[str, str]]:
    """What made this, as (label, text): program, seed, inputs, and how it was started (the last time)."""
    rows = [("cryoiso", str(manifest.get("cryoiso", ""))), ("seed", str(job.get("run", {}).get("seed", "")))]
    starts = [start for start in _list(manifest, "starts") if isinstance(start, dict)]
    start = starts[-1] if starts else {}
    rows.append(("started", str(start.get("time", "")) + (f" ({len(starts)} starts)" if len(starts) > 1 else "")))
    rows.append(("command", shlex.join(_command(_list(start, "command")))))
    machine = [rank for rank in _list(start, "machine") if isinstance(rank, dict)]
    places = Counter((str(m.get("host", "")), str(m.get("device", ""))) for m in machine)
    where = "; ".join(f"{n} on {host} ({device})" for (host, device), n in sorted(places.items()))
    rows.append(("ranks", f"{start.get('ranks', len(machine) or '')}" + (f": {where}" if where else "")))
    rows.append(("MPI", str(start.get("mpi") or "")))
    rows.append(("packages", ", ".join(f"{k} {v}" for k, v in section(start, "packages").items())))
    inputs = {p: f if isinstance(f, dict) else {} for p, f in section(manifest, "inputs").items()}
    stacks = [facts for facts in inputs.values() if facts.get("kind") == "stack"]
    if len(stacks) > STACKS_LISTED:
        size = sum(number(facts, "bytes") or 0 for facts in stacks) / 2**30
        rows.append(("stacks", f"{len(stacks):,}, {size:.3g} GiB; their hashes are in manifest.json"))
        inputs = {path: facts for path, facts in inputs.items() if facts.get("kind") != "stack"}
    for path, facts in inputs.items():
        digest = str(facts.get("sha256", ""))
        rows.append(("input", name_of(path) + (f" (sha256 {digest[:16]}...)" if digest else "")))
    return [row for row in rows if row[1]]
