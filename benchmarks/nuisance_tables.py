"""Tables of nuisances.py: a line for each nuisance and row with what the answer is judged by, and the criteria."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import markdown
from benchmarks.pooling import differences, mean_error, student95
from benchmarks.views_tables import Record, of

HEAD = (
    "set", "row", "seeds", "> 20°", "rare > 20°", "median °", "rare views drawn by °", "area", "final map area",
    "answer", "CPU s",
)  # fmt: skip


def nuisance_table(records: Sequence[Record], sets: Sequence[str], rows: Sequence[str]) -> str:
    """A line for each set and row: counts summed over the seeds, means with standard errors over them."""
    lines = [
        _line(name, row, some) for name in sets for row in rows if (some := of(records, name, row))
    ]  # fmt: skip
    return markdown(HEAD, lines) if lines else ""


def _line(name: str, row: str, some: Sequence[Record]) -> list[object]:
    def of_all(hits: str, n: str) -> str:
        return " of ".join(str(sum(r["counts"][key] for r in some)) for key in (hits, n))

    return [
        name, row, len(some), of_all("n_over_20", "n"), of_all("rare_over_20", "rare"), _mean(some, "median_deg", 1),
        _plus_minus(*drift(some, "rare")), _mean(some, "truth_area", 3), _mean(some, "final_area", 3), answer(some),
        f"{np.mean([r['cpu_s'] for r in some]):.0f}",
    ]  # fmt: skip


def _mean(some: Sequence[Record], key: str, digits: int) -> str | None:
    values = [r[key] for r in some if r.get(key) is not None]
    if not values:
        return None
    mean, error = mean_error(values)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def drift(some: Sequence[Record], views: str) -> tuple[float, float] | tuple[None, None]:
    """Mean by which views are drawn away from the axis, pooled over records, and its standard error over particles."""
    parts = [r[f"drift_{views}"] for r in some if f"drift_{views}" in r]
    total, squares, n = (sum(part[k] for part in parts) for k in range(3))
    if n < 2:
        return None, None
    mean = total / n
    return mean, float(np.sqrt(max(squares / n - mean**2, 0) / (n - 1)))


def _plus_minus(mean: float | None, error: float | None) -> str | None:
    return None if mean is None else f"{mean:+.1f} ± {error:.1f}"


def answer(some: Sequence[Record]) -> str | None:
    """What an answer is judged by beside poses and maps: scales, junk, defocus and beam tilt."""
    parts = []
    if all("scale_error" in r for r in some):
        errors = ", ".join(f"{np.mean([r[key] for r in some]):.3f}" for key in ("scale_error", "scale_true_sd"))
        parts.append(f"scale error, true sd {errors}")
    if all("junk_counts" in r for r in some):
        parts.append(junk_words(summed([r["junk_counts"] for r in some])))
    if all("defocus_found_A" in r for r in some) and some[0]["defocus_given_A"] > 1:
        parts.append("defocus {:.0f} → {:.0f} Å".format(*_means(some, "defocus_given_A", "defocus_found_A")))
    if all("beam_tilt_found_mrad" in r for r in some) and some[0]["beam_tilt_given_mrad"] > 0.01:
        parts.append("tilt {:.1f} → {:.1f} mrad".format(*_means(some, "beam_tilt_given_mrad", "beam_tilt_found_mrad")))
    return "; ".join(parts) or None


def _means(some: Sequence[Record], *keys: str) -> list[float]:
    return [float(np.mean([r[key] for r in some])) for key in keys]


def summed(counts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Counts of several records; a kind that one of them lacks counts 0 there."""
    return {key: sum(c.get(key, 0) for c in counts) for key in {k for c in counts for k in c}}


def junk_words(counts: dict[str, float]) -> str:
    """Precision and recall among all images, and the particles called junk by view."""
    junk = {view: counts[f"{view}_junk"] for view in ("rare", "frequent")}
    hits = {view: counts[f"{view}_junk_called"] for view in ("rare", "frequent")}
    lost = ", ".join(
        f"{counts[f'{view}_particles_called']:.0f} of {counts[f'{view}_particles']:.0f} {view}" for view in junk
    )
    if not sum(junk.values()):
        return f"lost {lost}"
    kinds = ", ".join(
        f"{kind} {counts[f'{kind}_called']:.0f}/{counts[kind]:.0f}"
        for kind in ("broken", "empty", "pair", "other")
        if kind in counts
    )
    found = ", ".join(f"{hits[view]:.0f} of {junk[view]:.0f} put to {view} views" for view in junk)
    called = counts["called"]
    precision = sum(hits.values()) / called if called else float("nan")
    return f"precision {precision:.2f}; found {found} ({kinds}); lost {lost}"


COMPARED = (
    ("scale", "scale particle", "scale", "plain"),
    ("ice_by_view", "scale particle", "ice_by_view", "plain"),
    ("ice_by_view", "scale particle", "ice_by_view", "known"),
    ("plain", "scale particle", "plain", "plain"),
    ("bfactor", "scale particle", "bfactor", "plain"),
    ("wide_neighbours", "plain", "wide_plain", "plain"),
    ("wide_neighbours", "mask noise", "wide_neighbours", "plain"),
    ("wide_plain", "mask noise", "wide_plain", "plain"),
    ("touching", "plain", "plain", "plain"),
    ("touching", "mask noise", "touching", "plain"),
    ("plain", "mask noise", "plain", "plain"),
    ("plain", "junk", "plain", "plain"),
    ("junk_20", "plain", "plain", "plain"),
    ("junk_20", "junk", "plain", "plain"),
    ("junk_20", "junk", "junk_20", "plain"),
    ("junk_20", "junk", "junk_20", "known"),
    ("all", "all answers", "all", "plain"),
    ("all", "all answers", "all", "known"),
)
"""Set and row, and those that they are compared with."""


def criteria(records: Sequence[Record], bases: Sequence[str]) -> str:
    """What the answers are to reach, for each protein: differences to the clean set, to no answer or to the truth told,
    seed by seed, with Student's 95 % interval of their mean."""
    lines = [_compared(records, base, *names) for base in bases for names in COMPARED]
    head = (
        "compared",
        "with",
        "seeds",
        "> 20°, points",
        "rare > 20°, points",
        "median °",
        "rare views drawn by °",
        "area, %",
        "final map, %",
    )
    return markdown(head, [line for line in lines if line]) if any(lines) else ""


def _compared(
    records: Sequence[Record], base: str, name: str, row: str, other: str, other_row: str
) -> list[object] | None:
    one, two = (
        {r["seed"]: r for r in of(records, f"{base}_{some}", which)}
        for some, which in ((other, other_row), (name, row))
    )
    seeds = sorted(set(one) & set(two))
    if not seeds:
        return None

    def points(hits: str, n: str) -> str:
        return _difference(*({s: 100 * d[s]["counts"][hits] / d[s]["counts"][n] for s in seeds} for d in (one, two)), 1)

    def percent(key: str) -> str:
        return _difference({s: 100.0 for s in seeds}, {s: 100 * two[s][key] / one[s][key] for s in seeds}, 1)

    medians = ({s: d[s]["median_deg"] for s in seeds} for d in (one, two))
    return [
        f"{base}_{name}, {row}", f"{base}_{other}, {other_row}", len(seeds), points("n_over_20", "n"),
        points("rare_over_20", "rare"), _difference(*medians, 2), _moved(one, two, seeds), percent("truth_area"),
        percent("final_area"),
    ]  # fmt: skip


def _moved(one: dict[int, Record], two: dict[int, Record], seeds: Sequence[int]) -> str | None:
    """Change of the mean by which rare views are drawn, and its standard error over particles."""
    (a, error_a), (b, error_b) = (drift([some[s] for s in seeds], "rare") for some in (one, two))
    if a is None or b is None or error_a is None or error_b is None:
        return None
    return f"{b - a:+.1f} ± {np.hypot(error_a, error_b):.1f}"


def _difference(one: dict[int, float], other: dict[int, float], digits: int) -> str:
    values = differences(one, other)
    interval = student95(values)
    limits = "" if interval is None else f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]"
    return f"{mean_error(values)[0]:+.{digits}f}{limits}"
