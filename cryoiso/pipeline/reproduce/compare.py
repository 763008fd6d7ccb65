"""How much two files of a kind differ, in numbers that mean something for the kind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import CryoisoError

ROUNDING = 1e-4
"""Relative difference of arrays up to which sums in another order, or another device, are the likely reason."""
POSE_DEG, POSE_A = 0.01, 0.01
"""Poses nearer than this are the same pose."""
TEXT = (".json", ".star", ".toml", ".txt", ".md", ".xml", ".csv", "")


@dataclass(frozen=True)
class FileDifference:
    """One file that is not the same twice."""

    file: str
    words: str
    rounding: bool = False
    """whether the difference is no larger than rounding makes it"""
    numbers: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"file": self.file, "words": self.words, "rounding": self.rounding, **self.numbers}


def compare_files(
    name: str, old: Path | None, new: Path | None, symmetry: str, names: dict[str, str] | None = None
) -> FileDifference | None:
    """What differs between a file and its second making; None if only the folder's own name does.

    Args:
        name: what to call it.
        old, new: None where no such file.
        symmetry: point group that poses are compared modulo.
        names: old folder -> new folder; where a text differs by nothing else it counts as the same.
    """
    if old is None or new is None:
        return FileDifference(name, "was not there before" if old is None else "was not made again")
    if not old.is_file():
        return FileDifference(name, "is gone from the run; its hash differs from the one made now")
    if old.suffix in TEXT and names and _same_text(old, new, names):
        return None
    kinds = {".mrc": _maps, ".star": _poses, ".json": _json, ".npz": _arrays, ".h5": _datasets}
    kind = kinds.get(old.suffix)
    try:
        return kind(name, old, new, symmetry) if kind else FileDifference(name, "has other bytes")
    except (CryoisoError, ValueError, OSError, KeyError) as error:
        return FileDifference(name, f"has other bytes, and could not be compared further: {error}")


def _same_text(old: Path, new: Path, names: dict[str, str]) -> bool:
    text = old.read_bytes()
    for before, after in names.items():
        text = text.replace(before.encode(), after.encode())
    return text == new.read_bytes()


def _maps(name: str, old: Path, new: Path, symmetry: str) -> FileDifference:
    """Relative difference, and the FSC of both."""
    from cryoiso.io.mrc import read_raw_map
    from cryoiso.metrics.fsc_curve import fsc

    a, b = (np.array(read_raw_map(path)[0], np.float64) for path in (old, new))
    if a.shape != b.shape:
        return FileDifference(name, f"has another size: {a.shape} before, {b.shape} now")
    relative = _relative(a, b)
    numbers: dict[str, Any] = {"relative_difference": relative}
    words = f"differs by {relative:.2g} of its standard deviation (rms)"
    if len(set(a.shape)) == 1 and a.std() > 0 and b.std() > 0:
        curve = fsc(a.astype(np.float32), b.astype(np.float32))
        numbers |= {"fsc": [round(float(v), 9) for v in curve], "fsc_lowest": float(np.nanmin(curve))}
        words += f", FSC at least {np.floor(1e6 * np.nanmin(curve)) / 1e6:.6f} in every shell"
    return FileDifference(name, words, relative < ROUNDING, numbers)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference over the standard deviation (of the value, where all are alike)."""
    if a.size == 0:
        return 0.0
    scale = float(a.std()) or float(np.abs(a).max()) or 1.0
    return float(np.sqrt(np.mean(np.square(a - b)))) / scale


def _poses(name: str, old: Path, new: Path, symmetry: str) -> FileDifference:
    """Number of particles with another pose, matched by their identity."""
    from cryoiso.io import read_particle_file
    from cryoiso.metrics.pose_error import pose_errors

    a, b = (read_particle_file(path, "", ("pose",)) for path in (old, new))
    _, rows, theirs = np.intersect1d(a.uid, b.uid, return_indices=True)
    numbers: dict[str, Any] = {"particles": [len(a), len(b)], "in_both": len(rows)}
    if not len(rows) or not np.array_equal(np.sort(a.uid), np.sort(b.uid)):
        return FileDifference(name, f"holds other particles: {len(a)} before, {len(b)} now, {len(rows)} in both",
                          numbers=numbers)  # fmt: skip
    (rotation_a, shift_a), (rotation_b, shift_b) = a.require_poses(old), b.require_poses(new)
    turned = pose_errors(rotation_a[rows], rotation_b[theirs], symmetry, align="none").errors_deg
    moved = np.linalg.norm(shift_a[rows] - shift_b[theirs], axis=1)
    count = int(((turned > POSE_DEG) | (moved > POSE_A)).sum())
    numbers |= {
        "different_poses": count, "angle_deg": {"median": float(np.median(turned)), "largest": float(turned.max())},
        "shift_A": {"median": float(np.median(moved)), "largest": float(moved.max())},
    }  # fmt: skip
    words = f"{count:,} of {len(rows):,} particles have another pose (by more than {POSE_DEG:g}° or {POSE_A:g} Å)"
    words += f"; at most {turned.max():.3g}° and {moved.max():.3g} Å" if count else "; other columns differ"
    return FileDifference(name, words, count == 0, numbers)


def _json(name: str, old: Path, new: Path, symmetry: str) -> FileDifference:
    differences: list[tuple[str, float | None]] = []
    _walk("", json.loads(old.read_text(encoding="utf-8")), json.loads(new.read_text(encoding="utf-8")), differences)
    shown = ", ".join(f"{key} (by {by:.2g} of its value)" if by is not None else key for key, by in differences[:4])
    more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
    largest = max((by for _, by in differences if by is not None), default=0.0)
    rounding = all(by is not None for _, by in differences) and largest < ROUNDING
    return FileDifference(
        name, f"other values: {shown}{more}", rounding, {"values": len(differences), "largest": largest}
    )


def _walk(key: str, a: Any, b: Any, differences: list[tuple[str, float | None]]) -> None:
    """Collects the keys under which two JSON values differ, with the relative difference of numbers."""
    if a == b:
        return
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for part in a:
            _walk(f"{key}.{part}" if key else part, a[part], b[part], differences)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b)):
            _walk(f"{key}[{number}]", x, y, differences)
    elif all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b)):
        differences.append((key, abs(a - b) / max(abs(a), abs(b))))
    else:
        differences.append((key, None))


def _arrays(name: str, old: Path, new: Path, symmetry: str) -> FileDifference:
    with np.load(old, allow_pickle=False) as a, np.load(new, allow_pickle=False) as b:
        return _named(name, {k: a[k] for k in a.files}, {k: b[k] for k in b.files})


def _datasets(name: str, old: Path, new: Path, symmetry: str) -> FileDifference:
    from cryoiso.io.shardcheck import open_shard, plain_dataset

    with open_shard(old) as a, open_shard(new) as b:
        before_and_after: list[dict[str, np.ndarray]] = [
            {k: plain_dataset(f, k, path)[()] for k in f} for f, path in ((a, old), (b, new))
        ]
        facts = [{k: str(v) for k, v in f.attrs.items()} for f in (a, b)]
    difference = _named(name, *before_and_after)
    changed = sorted(k for k in facts[0].keys() | facts[1].keys() if facts[0].get(k) != facts[1].get(k))
    if not changed:
        return difference
    return FileDifference(
        name, f"{difference.words}; other attributes: {', '.join(changed)}", False, difference.numbers
    )


def _named(name: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> FileDifference:
    """Which of several arrays differ, and by how much at most."""
    if a.keys() != b.keys():
        return FileDifference(name, f"holds other arrays: {', '.join(sorted(a.keys() ^ b.keys()))}")
    worst, changed = 0.0, []
    for key in sorted(a):
        if a[key].shape == b[key].shape and a[key].dtype.kind in "fiub" and b[key].dtype.kind in "fiub":
            by = _relative(a[key].astype(np.float64), b[key].astype(np.float64))
        else:
            by = 0.0 if np.array_equal(a[key], b[key]) else np.inf
        if by > 0:
            changed.append(key)
            worst = max(worst, by)
    if not changed:
        return FileDifference(name, "has other bytes, but the same arrays", True)
    words = f"arrays differ: {', '.join(changed[:4])}" + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    numbers = {"arrays": changed, "relative_difference": worst if np.isfinite(worst) else None}
    words += f", by up to {worst:.2g} of their standard deviation" if np.isfinite(worst) else ""
    return FileDifference(name, words, worst < ROUNDING, numbers)
