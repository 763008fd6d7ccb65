"""What a particle costs in the native refinement at real boxes: CPU seconds, accuracy and memory, for one or two trees.

For each box a simulated set of haemagglutinin (C3, even views, coloured noise) is searched once at the full resolution,
globally from the map alone and locally around its true poses, in processes of one thread. Times are CPU seconds of that
process, taken around the search and the sums of the particles and around all that an iteration does once, so that a few
hundred particles tell what a particle costs. The reference is the map that the images were made of, on their grey
scale, so that the test of the reference and the fit of its grey scale are left out. Trees take turns, first one set
with all of them, then the next.

    python benchmarks/real_size.py [--work FOLDER] [--boxes 48 128 256] [--tree NAME=PATH ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXTENT_A = 335.4
DIAMETER_A = 160
SETS = {48: (2.2, 400, -12.0), 128: (2.4, 200, -10.0), 256: (2.67, 120, -10.0)}
"""Box -> finest information in pixels, particles, signal-to-noise ratio in dB. 256 px: 3.5 Å."""
SEARCHES = {"global": (), "15 A": ("--shift-range", 15), "local": ("--local", 3)}
"""Options of the refinements: a first iteration, where shifts are searched in a tenth of the box; a later one, where
they are known to lie within 15 Å; a local one."""
TIMED = ("search", "sums", "iteration")


def prepare(box: int, data: Path, folder: Path) -> None:
    from benchmarks import harness

    if (folder / "signal_map.mrc").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _, n, snr_db = SETS[box]
    pixel_A = EXTENT_A / box
    harness.cryoiso(
        "simulate", data / "models/ha/6wxb.pdb.gz", folder, "--box", box, "--pixel-size", pixel_A, "--resolution",
        2.1 * pixel_A, "--n", n, "--symmetry", "C3", "--noise", "coloured", "--snr-db", snr_db, "--seed", 5,
        "--overwrite", log=folder / "simulate.log",
    )  # fmt: skip
    (folder / "signal_map.mrc").symlink_to("truth_map.mrc")


def refine(tree: Path, box: int, search: str, folder: Path, out: Path) -> dict[str, Any]:
    """One iteration by the program in ``tree``: seconds, peak memory and accuracy."""
    from benchmarks import harness
    from benchmarks.score import score

    pixels = SETS[box][0]
    particles = folder / ("truth.star" if search == "local" else "particles.star")
    arguments = [
        "refine", particles, "--ref", folder / "signal_map.mrc", "--symmetry", "C3", "--lowpass",
        pixels * EXTENT_A / box, "--diameter", DIAMETER_A, "--max-iterations", 1, "--device", "cpu", *SEARCHES[search],
        "--out", out,
    ]  # fmt: skip
    out.parent.mkdir(exist_ok=True)
    counted = out.with_suffix(".json")
    log = out.with_suffix(".log")
    cost = harness.measure(
        [sys.executable, __file__, "--child", counted, *arguments], log, tree, {"PYTHONPATH": str(tree)}
    )
    n, seconds = SETS[box][1], json.loads(counted.read_text())
    result = score(folder, out / "particles.star", out / "half1.mrc", out / "half2.mrc")
    each = seconds["search"] + seconds["sums"]
    return {
        "search_ms": round(1000 * seconds["search"] / n, 2),
        "sums_ms": round(1000 * seconds["sums"] / n, 2),
        "once_s": round(seconds["iteration"] - each, 2),
        "peak_mib": round(cost.peak_mib),
        "median_deg": round(result["median_deg"], 3),
        "over_10": result["over_10"],
        "truth_A": round(result["truth_A"], 2),
        "truth_area": round(result["truth_area"], 4),
    }


def child(counted: Path, arguments: list[str]) -> None:
    """The program, with CPU seconds of the search, of the sums and of the whole iteration."""
    from cryoiso.cli.main import main as cryoiso
    from cryoiso.refine import expectation, initial_model, iterate, search

    # the reference is the signal of the images itself
    initial_model.require_match = lambda *_args, **_keys: None
    initial_model.grey_scale = lambda *_args, **_keys: 1.0
    empty = expectation.SliceAccumulator.empty

    def touched(*args: Any, **kwargs: Any) -> Any:
        """Pages of the grid are handed out once in an iteration, whatever the number of particles."""
        accumulator = empty(*args, **kwargs)
        accumulator.clear()
        return accumulator

    seconds = dict.fromkeys(TIMED, 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.process_time() - started

        return call

    search.Searcher.search = timed("search", search.Searcher.search)  # type: ignore[method-assign]
    expectation.SliceAccumulator.empty = touched  # type: ignore[method-assign]
    expectation.accumulate = timed("sums", expectation.accumulate)
    iterate.Refinement.step = timed("iteration", iterate.Refinement.step)  # type: ignore[method-assign]
    sys.argv[1:] = arguments
    try:
        cryoiso()
    finally:
        counted.write_text(json.dumps(seconds))


def main() -> None:
    from benchmarks import harness

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=sorted(SETS), choices=sorted(SETS))
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=PATH", help="source trees to compare")
    parser.add_argument("--compiled", action="store_true", help="kernels are compiled and kept already")
    parser.add_argument("--shared", type=Path, default=harness.SHARED)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "real_size.json")
    options = parser.parse_args()
    trees = dict(one.split("=", 1) for one in options.tree) or {"now": str(harness.REPO)}
    rows: list[dict[str, Any]] = []
    with harness.work_folder(options.work) as work:
        for name, path in (
            () if options.compiled else trees.items()
        ):  # kernels are compiled, and kept for the runs that count
            prepare(min(SETS), options.shared / "data", work / f"set{min(SETS)}")
            out = work / f"{name}-first"
            shutil.rmtree(out, ignore_errors=True)
            for search in options.searches:
                refine(Path(path), min(SETS), search, work / f"set{min(SETS)}", out / search)
        for box in options.boxes:
            prepare(box, options.shared / "data", work / f"set{box}")
            for search in options.searches:
                for name, path in trees.items():
                    out = work / f"{name}-{box}-{search.replace(' ', '')}"
                    shutil.rmtree(out, ignore_errors=True)
                    found = refine(Path(path), box, search, work / f"set{box}", out)
                    rows.append({"box": box, "particles": SETS[box][1], "search": search, "tree": name, **found})
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    harness.write_json(options.out, {"machine": harness.machine(), "rows": rows})
    print(harness.markdown(list(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        # the trees' own packages, not those of this file's
        sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parents[1]]
        sys.path.insert(0, os.environ["PYTHONPATH"])
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
