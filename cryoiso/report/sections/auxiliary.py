"""What a run with auxiliary particles left in its folder: its rounds, what was before them, and words for both."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.errors import InputError
from cryoiso.core.records import DiagnoseRecord
from cryoiso.core.types import DensityMap
from cryoiso.io.regular_file import open_regular
from cryoiso.report.canvas import values_of
from cryoiso.report.records import ReportData
from cryoiso.report.run_reader import read_json, stage_folder
from cryoiso.report.text import number, numbers_of, percent

_FILES = (
    ("train", "train", products.facts("train")),
    ("timing", "train", products.TIMING),
    ("generate", "generate", products.facts("generate")),
    ("corefine", "corefine", products.facts("corefine")),
)
HALVES = ("1", "2")
RESOLUTIONS_A = (30.0, 20.0, 15.0, 10.0)
"""Where the transfer of a generator is told."""
KNOWN_SD = 0.25
"""Shells whose transfer is known no better than this are left out."""


def collect_rounds(folder: Path) -> dict[str, Any]:
    """Everything said about auxiliary particles; empty for a run without them.

    Returns:
        ``rounds``: round, train, timing, generate, corefine (each as in its file, empty if there is none), by number;
        ``local``: the balanced subset and its refinement.

    Raises:
        InputError: a file that is not what its name says.
    """
    rounds: list[dict[str, Any]] = []
    for round_ in round_numbers(folder):
        parts = {key: read_json(stage_folder(folder, f"{stage}-{round_}") / name) for key, stage, name in _FILES}
        if any(parts.values()):
            rounds.append({"round": round_, **parts})
    local = read_json(stage_folder(folder, "local") / products.facts("local"))
    return {"rounds": rounds, "local": local} if rounds or local else {}


def round_numbers(folder: Path) -> list[int]:
    """The rounds that have a folder NN_stage-round."""
    stages = {stage for _, stage, _ in _FILES}
    names = [p.name[3:].rpartition("-") for p in folder.glob("[0-9][0-9]_*-*")]
    return sorted({int(number) for stage, _, number in names if stage in stages and number.isdecimal()})


def before(data: ReportData) -> DiagnoseRecord:
    """What `diagnose` found before the correction, or of the run to compare with.

    Where the truth is not known, the views of the first co-refinement.
    """
    known = data["diagnose"].get("before") or DiagnoseRecord()
    rounds = (data.get("auxiliary") or {}).get("rounds") or []
    views = (rounds[0]["corefine"].get("views") or {}) if rounds else {}
    if known or not views.get("before"):
        return known
    return {"views": {"estimated": views["before"], "cells_per_ring": views.get("cells_per_ring")}}


def collect_samples(folder: Path, data: ReportData) -> dict[str, np.ndarray]:
    """Images to show of the last round that has some: raw, auxiliary and projections, each (n, D, D); or nothing.

    Raises:
        InputError: the file cannot be read.
    """
    for part in reversed((data.get("auxiliary") or {}).get("rounds") or []):
        path = stage_folder(folder, f"generate-{part['round']}") / products.SAMPLES
        if not path.exists():
            continue
        try:
            with open_regular(path) as stream, np.load(stream) as file:
                arrays = {k: np.nan_to_num(file[k]) for k in ("raw", "auxiliary", "projections") if k in file.files}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"samples cannot be read: {error}", file=path, code="file-unreadable") from None
        return {k: v for k, v in arrays.items() if v.ndim == 3 and len(v)}
    return {}


def collect_before_maps(folder: Path, data: ReportData) -> list[tuple[str, str, DensityMap]]:
    """(key, label, map) of the map before the correction and of the raw particles after each round, for looking at."""
    from cryoiso.io.mrc import read_map
    from cryoiso.physics.filters import lowpass

    if not data.get("auxiliary"):
        return []
    first = _before_map(folder)
    maps = [] if first is None else [("before", "before", first)]
    for part in data["auxiliary"]["rounds"]:
        path = stage_folder(folder, f"corefine-{part['round']}") / products.RAW_MAP
        if path.exists():
            density = read_map(path)
            resolution_A = part["corefine"].get("resolution_A")
            if resolution_A:
                smooth = lowpass(np.asarray(density.data, np.float32), density.pixel_size_A, resolution_A)
                density = DensityMap(smooth, density.pixel_size_A)
            maps.append((f"round-{part['round']}", f"after round {part['round']}", density))
    return maps


def _before_map(folder: Path) -> DensityMap | None:
    """The initial reconstruction, or else the mean of the initial half-maps, weighted by their FSC."""
    from cryoiso.io.mrc import read_map
    from cryoiso.metrics.fsc_curve import fsc
    from cryoiso.physics.filters import apply_radial

    initial_folder = stage_folder(folder, "reconstruct") / products.INITIAL_POSES
    for name in (products.WEIGHTED_MAP, products.MAP):
        if (initial_folder / name).exists():
            return read_map(initial_folder / name)
    paths = [stage_folder(folder, "refine") / products.half_map(half) for half in HALVES]
    if not all(path.exists() for path in paths):
        return None
    first, second = (read_map(path) for path in paths)
    curve = fsc(first.data, second.data)
    below = np.flatnonzero(curve < 0.143)
    curve = np.where(np.arange(len(curve)) < (below[0] if len(below) else len(curve)), np.clip(curve, 0, 1), 0.0)
    mean = 0.5 * (np.asarray(first.data, np.float32) + np.asarray(second.data, np.float32))
    return DensityMap(apply_radial(mean, np.sqrt(2 * curve / (1 + curve))), first.pixel_size_A)


def sentences(data: ReportData) -> list[str]:
    """Numbers before and after, how far particles moved, and how alike the images are, in words."""
    parts = data.get("auxiliary") or {}
    if not parts:
        return []
    result = [] if data.get("comparison") else [*_before_truth(before(data)), *_before_views(data)]
    moved = [
        f"{percent(m['over_20'])} in round {r['round']}"
        for r in parts["rounds"]
        if (m := r["corefine"].get("moved") or {}).get("over_20") is not None
    ]
    if moved:
        result.append(f"Particles moved by more than 20°: {', '.join(moved)}.")
    result += [*_confirmed(parts["rounds"]), *_alike(parts["rounds"]), *_passed_on(parts["rounds"])]
    local = parts.get("local") or {}
    if local.get("kept") is not None and local.get("dropped") is not None:
        text = f"The balanced subset keeps {local['kept']:,} of {local['kept'] + local['dropped']:,} particles"
        if local.get("cap") is not None and local.get("cells") is not None:
            text += f" (at most {local['cap']:,} of a half-set from each of {local['cells']:,} directions)"
        result.append(text + ".")
    return result


def _before_truth(d: DiagnoseRecord) -> list[str]:
    to_truth, errors = d.get("map_to_truth") or {}, d.get("pose_errors") or {}
    texts = []
    if to_truth.get("resolution_05_A") is not None:
        texts.append(f"the map reached {to_truth['resolution_05_A']:.1f} Å against the truth")
        if to_truth.get("axial_A") is not None and to_truth.get("equatorial_A") is not None:
            texts[-1] += f" ({to_truth['axial_A']:.1f} Å along z, {to_truth['equatorial_A']:.1f} Å across it)"
    if errors.get("median_deg") is not None:
        text = f"poses were wrong by {errors['median_deg']:.1f}° (median)"
        if errors.get("fraction_over_20") is not None:
            text += f", {percent(errors['fraction_over_20'])} of them by more than 20°"
        if errors.get("side_n") and errors.get("side_over_20") is not None:
            text += f", and {percent(errors['side_over_20'])} of the {errors['side_n']:,} side views"
        texts.append(text)
    return [f"Before the auxiliary particles {'; '.join(texts)}."] if texts else []


def views_before_and_after(data: ReportData) -> tuple[dict[str, Any], dict[str, Any]]:
    """Estimated views before auxiliary particles and at the end (or after the last co-refinement), with cells_per_ring.

    Empty where they are not known.
    """
    rounds = (data.get("auxiliary") or {}).get("rounds") or []
    first, *last = (before(data).get("views"), data["diagnose"].get("views"))
    last += [part["corefine"].get("views") for part in reversed(rounds)]
    return _of_kind([first], "estimated"), _of_kind(last, "estimated", "after")


def _of_kind(distributions: list[dict[str, Any] | None], *kinds: str) -> dict[str, Any]:
    for views in distributions:
        for kind in kinds:
            if views and views.get(kind) and views.get("cells_per_ring"):
                return {**views[kind], "cells_per_ring": views["cells_per_ring"]}
    return {}


def _before_views(data: ReportData) -> list[str]:
    first, last = views_before_and_after(data)
    if any(v.get(k) is None for v in (first, last) for k in ("top_fraction", "entropy")):
        return []
    return [
        f"{percent(first['top_fraction'])} of the views lay within 36° of z before and "
        f"{percent(last['top_fraction'])} do after (19.1 % if views were even); "
        f"view entropy {first['entropy']:.2f} before and {last['entropy']:.2f} after, of 1."
    ]


def _confirmed(rounds: list[dict[str, Any]]) -> list[str]:
    """Whether the raw particles of each round confirmed the homologue."""
    texts = []
    for part in rounds:
        homologue = part["corefine"].get("homologue") or {}
        deviation, first_A = number(homologue, "deviation"), number(homologue, "first_A")
        if deviation is None or first_A is None:
            continue
        seen = f"beyond {first_A:.0f} Å, {deviation:.1f} standard deviations above noise"
        if homologue.get("confirmed"):
            rho = [r for r in numbers_of(homologue, "rho") if r]
            texts.append(
                f"In round {part['round']} the raw particles alone confirmed the homologue ({seen}; correlation at "
                f"least {max(rho, default=0):.2f}), and auxiliary particles were weighed by that."
            )
        else:
            unmade = part["generate"].get("skipped")
            outcome = (
                "no auxiliary particles were made" if unmade else "auxiliary particles were left out of the references"
            )
            texts.append(
                f"In round {part['round']} the raw particles did not confirm the homologue ({seen}): {outcome}, "
                "so this was a refinement of the raw particles alone."
            )
    return texts


def _alike(rounds: list[dict[str, Any]]) -> list[str]:
    known = [(r["round"], s) for r in rounds if (s := r["generate"].get("statistics") or {})]
    if not known:
        return []
    round_, s = known[-1]
    texts = []
    if s.get("kl_nats") is not None:
        texts.append(f"their grey values differ by {s['kl_nats']:.3f} nats (KL)")
        if s.get("kl_real_nats") is not None:
            texts[-1] += f", those of two raw images by {s['kl_real_nats']:.3f}"
    largest = (s.get("finer") or {}).get("largest")
    if largest is not None and s.get("beyond_A") is not None:
        texts.append(
            f"their power spectrum is off by {_off(largest)} at most in any shell beyond {s['beyond_A']:.0f} Å"
        )
    return [f"Auxiliary images of round {round_} against raw ones: {'; '.join(texts)}."] if texts else []


def _passed_on(rounds: list[dict[str, Any]]) -> list[str]:
    """What the generator of the last round leaves of the reference."""
    for part in reversed(rounds):
        known = [(resolution_A, value) for resolution_A, value in transfer_at(part["generate"]) if value is not None]
        if known:
            values = ", ".join(f"{value:.2f} at {resolution_A:.0f} Å" for resolution_A, value in known)
            return [
                f"Auxiliary images of round {part['round']} hold this share of the projections of the reference that "
                f"they were made from: {values} (1: all of it, as a projection with noise does)."
            ]
    return []


def transfer_at(spectra: dict[str, Any]) -> list[tuple[float, float | None]]:
    """(resolution in Å, transfer of a round's generators there, mean of the halves), None where it is not known."""
    known = spectra.get("transfer") or {}
    frequency, curves = values_of(known.get("frequency_invA")), []
    for half in (known.get("halves") or {}).values():
        curve, sd = values_of(half.get("value")), values_of(half.get("sd"))
        if len(curve) == len(sd) == len(frequency):
            curves.append(np.where(sd < KNOWN_SD, curve, np.nan))
    points: list[tuple[float, float | None]] = []
    for resolution_A in RESOLUTIONS_A:
        value: float | None = None
        if curves and len(frequency) and frequency[0] <= 1 / resolution_A <= frequency[-1]:
            at = [float(np.interp(1 / resolution_A, frequency, curve)) for curve in curves]
            value = float(np.mean(at)) if np.isfinite(at).all() else None
        points.append((resolution_A, value))
    return points


def _off(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f} %"


def number_rows(data: ReportData) -> list[tuple[str, str, Any, str]]:
    """Rows of the table of numbers: group, label, value (None if not known), unit."""
    parts = data.get("auxiliary") or {}
    rows = [row for part in parts.get("rounds") or [] for row in _round_rows(part)]
    local = parts.get("local") or {}
    group = "Balanced subset"
    rows += [
        (group, "particles kept", local.get("kept"), ""),
        (group, "particles dropped", local.get("dropped"), ""),
        (group, "most particles of one direction, in each half-set", local.get("cap"), ""),
        (group, "top views among the dropped", _times(100, local.get("dropped_fraction_top")), "%"),
        (group, "moved by more than 20°", _times(100, (local.get("moved") or {}).get("over_20")), "%"),
    ]
    return rows


def _round_rows(part: dict[str, Any]) -> list[tuple[str, str, Any, str]]:
    group = f"Auxiliary particles, round {part['round']}"
    generation, fitted = part["generate"], part["corefine"]
    s, moved = generation.get("statistics") or {}, fitted.get("moved") or {}
    counts = [n for n in (generation.get("counts") or {}).values() if n is not None]
    largest = (s.get("finer") or {}).get("largest")
    beyond = f"{s['beyond_A']:.0f} Å" if s.get("beyond_A") is not None else "coarse shells"
    speeds = [(h, (part["timing"].get(h) or {}).get("images_per_s")) for h in HALVES]
    return [
        *[(group, f"training, half {half}", speed, "images/s") for half, speed in speeds],
        (group, "auxiliary particles", _first_known(fitted.get("auxiliary"), sum(counts) or None), ""),
        (group, "raw particles refined with them", fitted.get("raw"), ""),
        (group, "weight of the auxiliaries in the references", _times(100, fitted.get("auxiliary_weight_share")), "%"),
        (group, "homologue in the raw particles, above noise", (fitted.get("homologue") or {}).get("deviation"), "sd"),
        (group, "KL of grey values, auxiliary from raw", s.get("kl_nats"), "nats"),
        (group, "KL of grey values between raw images", s.get("kl_real_nats"), "nats"),
        (group, "SNR of auxiliary images (image over background)", s.get("snr_generated_dB"), "dB"),
        (group, "SNR of raw images (image over background)", s.get("snr_real_dB"), "dB"),
        *[(group, f"transfer of the generator at {at:.0f} Å", value, "") for at, value in transfer_at(generation)],
        (group, f"power of a shell beyond {beyond}, largest deviation", _shell(largest), "%"),
        (group, "raw particles moved, median", moved.get("median_deg"), "°"),
        (group, "raw particles moved by more than 10°", _times(100, moved.get("over_10")), "%"),
        (group, "raw particles moved by more than 20°", _times(100, moved.get("over_20")), "%"),
        (group, "raw particles moved by more than 30°", _times(100, moved.get("over_30")), "%"),
        (group, "error of the auxiliaries' refined poses, median", fitted.get("auxiliary_error_deg"), "°"),
        (group, "resolution", fitted.get("resolution_A"), "Å"),
    ]


def _first_known(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _shell(log_ratio: float | None) -> float | None:
    return None if log_ratio is None else 100 * math.expm1(log_ratio)
