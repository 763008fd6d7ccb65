"""Memory, time and files for growing particle sets, up to a million: is anything more than linear in their number?

For each size: simulate, ingest, reconstruct, one iteration of refinement (local or global search), one epoch of the
generators of both half-sets (small preset), on some ranks of one thread each. Peak memory is the largest resident size
of any one rank. With --distinct, so many images are simulated and each of them stands in the particle file again and
again, with a name, micrograph and uid of its own (repeated_set.py). Files are removed as soon as they are not needed:
a million particles of 64 px need 9 GB of disk in the work folder.

    python benchmarks/scale.py [--sizes 10000 100000] [--box 64] [--commands ingest,reconstruct] [--ranks 1]
    python benchmarks/scale.py --sizes 100000 1000000 --distinct 20000 --commands ingest,local,reconstruct --lowpass 12
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.ranks import mpiexec
from benchmarks.repeated_set import repeat, simulate

EXTENT_A = 192.0
"""The phantom fits into this box."""
COMMANDS = ("ingest", "local", "refine", "reconstruct", "train")
BATCH = 64
"""Images a training step, as many as one core likes."""


def lines(folder: Path, n: int, lowpass_A: float) -> dict[str, list[Any]]:
    """The command lines of one size, on the ranks that all of them share; the last word is what they write.

    Refinements find the shards that `ingest` has left in their folder, and read the whole particle file.
    """
    star, reference = folder / "set/particles.star", folder / "small/truth_map.mrc"
    same = ("--symmetry", "C3")
    refine = [
        "refine", star, "--ref", reference, *same, "--lowpass", lowpass_A, "--max-iterations", 1, "--device", "cpu",
    ]  # fmt: skip
    return {
        "ingest": ["ingest", star, folder / "refined/shards"],
        "local": [*refine, "--local", 3, "--shift-range", 6, "--out", folder / "refined"],
        "refine": [*refine, "--out", folder / "refined"],
        "reconstruct": ["reconstruct", star, *same, "--out", folder / "maps"],
        "train": [
            "auxiliary", "train", star, "--ref", reference, *same, "--device", "cpu", "--preset", "small",
            "--batch", BATCH, "--steps", math.ceil(n / 2 / BATCH), "--out", folder / "generators",
        ],
    }  # fmt: skip


def run(n: int, a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Costs of the commands for n particles; the files are removed at the end."""
    folder = work / f"particles-{n}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    distinct = min(a.distinct or n, n)
    costs = {"simulate": simulate(distinct, a.box, EXTENT_A / a.box, folder / "small").as_dict()}
    star = repeat(folder / "small", n // distinct, folder / "set")
    launcher = [mpiexec(), "-n", a.ranks] if a.ranks > 1 else []
    result: dict[str, Any] = {
        "costs": costs, "outputs": {}, "distinct": distinct,
        "stack_MB": (folder / "small/particles.mrcs").stat().st_size / 1e6 * n / distinct,
        "star_MB": star.stat().st_size / 1e6,
    }  # fmt: skip
    for name in a.commands.split(","):
        line = lines(folder, n, a.lowpass)[name]
        load = harness.machine()["load_average"]
        cost = harness.measure([*launcher, *harness.CRYOISO, *line], folder / f"{name}.log")
        costs[name] = {**cost.as_dict(), "load_average": load}
        files = [f for f in Path(line[-1]).rglob("*") if f.is_file() and (name == "ingest" or "shards" not in f.parts)]
        result["outputs"][name] = {"files": len(files), "MB": round(sum(f.stat().st_size for f in files) / 1e6, 1)}
        print(f"{n:,} particles, {name}: {costs[name]}, {result['outputs'][name]}", file=sys.stderr, flush=True)
        if name in ("reconstruct", "train"):
            shutil.rmtree(line[-1])
    shutil.rmtree(folder)
    return result


def report(sizes: list[int], runs: dict[str, Any]) -> str:
    """A row for each command: peak memory of each size, what a particle adds, time, and the exponent of the time."""
    few, many = runs[str(sizes[0])], runs[str(sizes[-1])]
    rows = []
    for name in few["costs"]:
        a, b = few["costs"][name], many["costs"][name]
        added = (b["peak_mib"] - a["peak_mib"]) * 2**20 / max(sizes[-1] - sizes[0], 1)
        power = math.log(b["cpu_s"] / a["cpu_s"]) / math.log(sizes[-1] / sizes[0]) if sizes[-1] > sizes[0] else 1.0
        times = [f"{b['cpu_s']:.1f}", f"{b['wall_s']:.1f}", f"{sizes[-1] / b['cpu_s']:,.0f}", f"{power:.2f}"]
        written = many["outputs"].get(name, {})
        rows.append([name, f"{a['peak_mib']:,.0f}", f"{b['peak_mib']:,.0f}", f"{added:,.0f}", *times,
                     written.get("files"), written.get("MB")])  # fmt: skip
    head = ["command", f"peak MiB a rank, {sizes[0]:,}", f"peak MiB a rank, {sizes[-1]:,}", "bytes a particle", "CPU s",
            "wall s", "particles a CPU s", "CPU grows as n to the power", "files",
            "MB"]  # fmt: skip
    return harness.markdown(head, rows) + f"\n\nstack {many['stack_MB']:,.0f} MB, STAR {many['star_MB']:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--distinct", type=int, help="images that are simulated (default: all)")
    parser.add_argument("--lowpass", type=float, default=30.0, help="resolution of refinements, Å")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "scale.json")
    parser.add_argument("--work", type=Path, help="folder on a disk with room (default: the temporary folder)")
    a = parser.parse_args()
    if a.ranks > 1 and mpiexec() is None:
        harness.skip("no mpiexec; one rank is used")
        a.ranks = 1
    with harness.work_folder(a.work) as work:
        runs: dict[str, Any] = {}
        for n in sorted(a.sizes):
            runs[str(n)] = run(n, a, work)
            facts = {
                "machine": harness.machine(), "box_px": a.box, "ranks": a.ranks, "lowpass_A": a.lowpass, "runs": runs,
            }  # fmt: skip
            harness.write_json(a.out, facts)
    print(report(sorted(a.sizes), runs))


if __name__ == "__main__":
    main()
