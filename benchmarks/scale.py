"""Memory and time for growing particle sets: simulate, ingest, reconstruct 10,000 and 100,000 particles of 64 px.

Peak memory is the largest resident size of the process. What a particle adds to it is metadata; images are streamed.
100,000 particles need 2.5 GB of disk in the work folder.

    python benchmarks/scale.py [--sizes 10000 100000]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

BOX, PIXEL_A = 64, 3.0


def run(n: int, work: Path) -> dict[str, Any]:
    """Costs of the three commands for n particles; the files are removed at the end."""
    folder = work / f"particles-{n}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    costs = {
        "simulate": harness.cryoiso(
            "simulate", "phantom", folder / "set", "--n", n, "--box", BOX, "--pixel-size", PIXEL_A, "--with-poses",
            "--halves", log=folder / "log",
        ),
        "ingest": harness.cryoiso("ingest", folder / "set/particles.star", folder / "shards", log=folder / "log"),
        "reconstruct": harness.cryoiso(
            "reconstruct", folder / "set/particles.star", "--symmetry", "C3", "--out", folder / "out",
            log=folder / "log",
        ),
    }  # fmt: skip
    result = {
        "costs": {name: cost.as_dict() for name, cost in costs.items()},
        "stack_MB": (folder / "set/particles.mrcs").stat().st_size / 1e6,
        "star_MB": (folder / "set/particles.star").stat().st_size / 1e6,
        "shard_files": len(list((folder / "shards").iterdir())),
        "shards_MB": sum(f.stat().st_size for f in (folder / "shards").iterdir()) / 1e6,
    }
    shutil.rmtree(folder)
    return result


def report(sizes: list[int], runs: dict[str, Any]) -> str:
    """A row for each command: peak memory of each size, what a particle adds, time."""
    few, many = runs[str(sizes[0])], runs[str(sizes[-1])]
    rows = []
    for name in few["costs"]:
        a, b = few["costs"][name], many["costs"][name]
        added = (b["peak_mib"] - a["peak_mib"]) * 2**20 / (sizes[-1] - sizes[0])
        times = [f"{b['cpu_s']:.1f}", f"{b['wall_s']:.1f}", f"{sizes[-1] / b['cpu_s']:,.0f}"]
        rows.append([name, f"{a['peak_mib']:,.0f}", f"{b['peak_mib']:,.0f}", f"{added:,.0f}", *times])
    head = ["command", f"peak MiB, {sizes[0]:,}", f"peak MiB, {sizes[-1]:,}", "bytes a particle", "CPU s", "wall s",
            "particles a CPU s"]  # fmt: skip
    files = f"stack {many['stack_MB']:,.0f} MB -> {many['shard_files']} shard files, {many['shards_MB']:,.0f} MB"
    return harness.markdown(head, rows) + "\n\n" + files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "scale.json")
    parser.add_argument("--work", type=Path, help="folder on a disk with room (default: the temporary folder)")
    a = parser.parse_args()
    with harness.work_folder(a.work) as work:
        harness.cryoiso("doctor", log=work / "warm.log")
        runs = {str(n): run(n, work) for n in sorted(a.sizes)}
    harness.write_json(a.out, {"machine": harness.machine(), "box_px": BOX, "runs": runs})
    print(report(sorted(a.sizes), runs))


if __name__ == "__main__":
    main()
