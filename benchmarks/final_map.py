"""The maps of `cryoiso reconstruct` against the truth, with true poses: map.mrc (mean of the half-maps) beside
map_weighted.mrc (every Fourier coefficient weighted by how well it was measured).

    python benchmarks/final_map.py FOLDER [FOLDER ...] [--project FOLDER]

Each folder holds truth.star and signal_map.mrc (C3, as the sets of `refine_vs_relion.py` and `views.py`). Scores: mean
over all shells of the FSC with the truth inside a soft mask of it, where that falls below 0.5, and the correlation of
both maps inside that mask.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.score import soft_mask

NAMES = ("map.mrc", "map_weighted.mrc")


def scores(found: np.ndarray, truth: np.ndarray, pixel_size_A: float) -> dict[str, float]:
    """Mean FSC, resolution and correlation of one map."""
    from cryoiso.metrics.fsc_curve import fsc, resolution_at

    mask = np.asarray(soft_mask(truth, pixel_size_A), np.float32)
    curve = fsc(found, truth, mask)
    return {
        "mean_fsc": round(float(curve[1:].mean()), 4),
        "truth_A": round(resolution_at(curve, 0.5, len(truth), pixel_size_A), 2),
        "correlation": round(float(np.corrcoef((found * mask).ravel(), (truth * mask).ravel())[0, 1]), 4),
    }


def one(folder: Path, project: Path | None, work: Path) -> dict[str, Any]:
    """Both maps of a set."""
    from cryoiso.io.mrc import read_map

    out = work / folder.name
    cost = harness.cryoiso(
        "reconstruct", folder / "truth.star", "--out", out, "--symmetry", "C3", "--project", project or folder,
        "--invert", "no", log=work / f"{folder.name}.log",
    )  # fmt: skip
    truth = read_map(folder / "signal_map.mrc")
    made = {
        name: scores(read_map(out / name, truth.pixel_size_A).data, truth.data, truth.pixel_size_A) for name in NAMES
    }
    return {**made, "cost": cost.as_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--project", type=Path, help="where the image names of truth.star start (default: each folder)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "final_map.json")
    a = parser.parse_args()
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"sets": {}}
    result["machine"] = harness.machine()
    with harness.work_folder(None) as work:
        for folder in a.folders:
            found = one(folder.resolve(), a.project, work)
            result["sets"][folder.name] = found
            print(folder.name, {name: found[name] for name in NAMES}, flush=True)
            harness.write_json(a.out, result)
    rows = [
        [name, file, f"{r['mean_fsc']:.2f}", f"{r['truth_A']:.1f}", f"{r['correlation']:.3f}"]
        for name, entry in result["sets"].items() for file in NAMES for r in (entry[file],)
    ]  # fmt: skip
    print(harness.markdown(("set", "map", "mean FSC", "FSC 0.5 Å", "correlation"), rows))


if __name__ == "__main__":
    main()
