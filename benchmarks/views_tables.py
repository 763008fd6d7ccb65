"""Tables of views.py: records of several seeds, pooled, in Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import markdown
from benchmarks.pooling import differences, mean_error, pooled, student95, wilson

Record = dict[str, Any]
SHARES = {
    "> 20°": ("n_over_20", "n"),
    "rare > 20°": ("rare_over_20", "rare"),
    "rare put to frequent": ("rare_to_frequent", "rare"),
    "frequent > 20°": ("frequent_over_20", "frequent"),
    "frequent put to rare": ("frequent_to_rare", "frequent"),
    "frequent upside down": ("frequent_upside_down", "frequent"),
}
"""Heading: count, and of how many."""
MEANS = {
    "median °": ("median_deg", 1),
    "map to truth Å": ("truth_A", 1),
    "area": ("truth_area", 3),
    "area axial": ("truth_axial_area", 3),
    "area equatorial": ("truth_equatorial_area", 3),
    "correlation": ("correlation", 3),
    "half-maps Å": ("half_masked_A", 1),
    "final map area": ("final_area", 3),
}
"""Heading: score, and its digits."""
NOISE = {
    "correlation with reference": ("correlation", 3),
    "agreement Å": ("agreement_05_A", 1),
    "claimed by the engine Å": ("claimed_A", 1),
    "half-maps, unmasked Å": ("half_unmasked_A", 1),
    "half-maps, masked Å": ("half_masked_A", 1),
}
PARTS = {
    "part in the reference": ("part_in_reference", 2),
    "part in the result": ("part_in_result", 2),
    "correlation in the part": ("correlation_in_part", 2),
}


def tables(
    records: Sequence[Record], sets: Sequence[str], rows: Sequence[str], pairs: Sequence[tuple[str, ...]],
    controls: set[str],
) -> list[str]:  # fmt: skip
    """The tables of sets, of pairs of rows, and of controls; those that have no record are left out."""
    plain = [name for name in sets if name not in controls]
    noise = [name for name in sets if name in controls and name.startswith("noise")]
    parts = [name for name in sets if name in controls and not name.startswith("noise")]
    made = [
        set_table(records, plain, rows),
        pair_table(records, [*plain, *noise], pairs),
        mean_table(records, noise, rows, NOISE),
        mean_table(records, parts, rows, PARTS),
    ]
    return [table for table in made if table]


def of(records: Sequence[Record], name: str, row: str) -> list[Record]:
    return [r for r in records if r["set"] == name and r["row"] == row]


def set_table(records: Sequence[Record], sets: Sequence[str], rows: Sequence[str]) -> str:
    """A line for each set and row: shares pooled over the seeds, means with standard errors over them."""
    head = ("set", "row", "seeds", "n", "rare", *SHARES, *MEANS, "CPU s")
    lines = []
    for name in sets:
        for row in rows:
            some = of(records, name, row)
            if not some:
                continue
            counts = [r["counts"] for r in some]
            numbers = [sum(c[key] for c in counts) if key in counts[0] else None for key in ("n", "rare")]
            shares = [share(pooled(counts, *keys)) for keys in SHARES.values()]
            lines.append([name, row, len(some), *numbers, *shares, *_means(some, MEANS), _mean(some, "cpu_s", 0)])
    return markdown(head, lines) if lines else ""


def mean_table(
    records: Sequence[Record], sets: Sequence[str], rows: Sequence[str], columns: dict[str, tuple[str, int]]
) -> str:
    """A line for each control and row."""
    lines = [
        [name, row, len(some), *_means(some, columns), _mean(some, "cpu_s", 0)]
        for name in sets
        for row in rows
        if (some := of(records, name, row))
    ]
    return markdown(("control", "row", "seeds", *columns, "CPU s"), lines) if lines else ""


def pair_table(records: Sequence[Record], sets: Sequence[str], pairs: Sequence[tuple[str, ...]]) -> str:
    """Differences of two rows over the seeds that both have: the mean and its 95 % interval."""
    head = ("set", "rows", "seeds", *(f"{name}, points" for name in SHARES), *MEANS, "CPU s")
    lines = []
    for name in sets:
        for one, other in pairs:
            a, b = ({r["seed"]: r for r in of(records, name, row)} for row in (one, other))
            seeds = set(a) & set(b)
            if not seeds:
                continue
            cells = []
            for keys in SHARES.values():
                shares = [{seed: _share(r, keys) for seed, r in x.items()} for x in (a, b)]
                cells.append(_difference(*shares, 1))
            for key, digits in (*MEANS.values(), ("cpu_s", 0)):
                cells.append(_difference(*[{s: r.get(key) for s, r in x.items()} for x in (a, b)], digits))
            lines.append([name, f"{other} - {one}", len(seeds), *cells])
    return markdown(head, lines) if lines else ""


def share(counted: tuple[int, int] | None) -> str | None:
    """A share in percent with its 95 % interval."""
    if counted is None:
        return None
    low, high = (100 * end for end in wilson(*counted))
    return f"{100 * counted[0] / counted[1]:.1f} % ({low:.1f}-{high:.1f})"


def _share(record: Record, keys: tuple[str, str]) -> float | None:
    hits, of_all = (record.get("counts", {}).get(key) for key in keys)
    return 100 * hits / of_all if of_all and hits is not None else None


def _means(some: Sequence[Record], columns: dict[str, tuple[str, int]]) -> list[str | None]:
    return [_with_error([r.get(key) for r in some], digits) for key, digits in columns.values()]


def _mean(some: Sequence[Record], key: str, digits: int) -> str:
    return f"{mean_error([r[key] for r in some])[0]:.{digits}f}"


def _with_error(values: Sequence[float | None], digits: int) -> str | None:
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return None
    mean, error = mean_error(known)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _difference(one: dict[int, float | None], other: dict[int, float | None], digits: int) -> str | None:
    values = differences(*[{seed: v for seed, v in x.items() if v is not None} for x in (one, other)])
    if not values:
        return None
    ends = student95(values)
    interval = "" if ends is None else f" ({ends[0]:+.{digits}f} to {ends[1]:+.{digits}f})"
    return f"{mean_error(values)[0]:+.{digits}f}{interval}"


def line(record: Record) -> str:
    """A record in one line."""
    keys = ("truth_A", "truth_area", "correlation", "half_masked_A", "claimed_A", "part_in_result", "cpu_s")
    facts = [f"{key} {record[key]:.3g}" for key in keys if record.get(key) is not None]
    counts = record.get("counts", {})
    shares = [f"{name} {counts[a]}/{counts[b]}" for name, (a, b) in SHARES.items() if counts.get(b)]
    return f"{record['set']} {record['seed']} {record['row']}: " + ", ".join([*shares, *facts])
