"""Memory, time and files for growing particle sets, up to a million: is anything more than linear in their number?

For each size: simulate, ingest, reconstruct, one iteration of refinement, one epoch of the generators of both
half-sets (small preset), on some ranks of one thread each. Peak memory is the largest resident size of any one rank.
A million particles of 32 px need 10 GB of disk in the work folder and, on two cores, about an hour.

    python benchmarks/scale.py [--sizes 10000 100000] [--box 64] [--commands ingest,reconstruct] [--ranks 1]
    python benchmarks/scale.py --sizes 100000 1000000 --box 32 --ranks 2 --out benchmarks/results/million.json
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

EXTENT_A = 192.0
"""The phantom fits into this box."""
COMMANDS = ("ingest", "reconstruct", "refine", "train")
BATCH = 64
"""Images a training step, as many as one core likes."""


def lines(folder: Path, n: int, box: int) -> dict[str, list[Any]]:
    """The command lines of one size, on the ranks that all of them share."""
    star, reference = folder / "set/particles.star", folder / "set/truth_map.mrc"
    same = ("--symmetry", "C3")
    return {
        "ingest": ["ingest", star, folder / "shards"],
        "reconstruct": ["reconstruct", star, *same, "--out", folder / "maps"],
        "refine": [
            "refine", folder / "shards", "--ref", reference, *same, "--max-iterations", 1, "--device", "cpu",
            "--out", folder / "refined",
        ],
        "train": [
            "auxiliary", "train", star, "--ref", reference, *same, "--device", "cpu", "--preset", "small",
            "--batch", BATCH, "--steps", math.ceil(n / 2 / BATCH), "--out", folder / "generators",
        ],
    }  # fmt: skip


def run(n: int, box: int, commands: list[str], ranks: int, work: Path) -> dict[str, Any]:
    """Costs of the commands for n particles; the files are removed at the end."""
    folder = work / f"particles-{n}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    costs, files = {}, {}
    made = harness.cryoiso(
        "simulate", "phantom", folder / "set", "--n", n, "--box", box, "--pixel-size", EXTENT_A / box, "--with-poses",
        "--halves", "--snr-db", -10, log=folder / "simulate.log",
    )  # fmt: skip
    costs["simulate"] = made.as_dict()
    launcher = [mpiexec(), "-n", ranks] if ranks > 1 else []
    for name in commands:
        line = lines(folder, n, box)[name]
        cost = harness.measure([*launcher, *harness.CRYOISO, *line], folder / f"{name}.log")
        costs[name] = cost.as_dict()
        out = Path(line[-1])
        files[name] = len([f for f in out.rglob("*") if f.is_file()])
        print(f"{n:,} particles, {name}: {costs[name]}, {files[name]} files", file=sys.stderr, flush=True)
    result = {
        "costs": costs,
        "files": files,
        "stack_MB": (folder / "set/particles.mrcs").stat().st_size / 1e6,
        "star_MB": (folder / "set/particles.star").stat().st_size / 1e6,
    }
    if (folder / "shards").is_dir():
        result["shard_files"] = len(list((folder / "shards").iterdir()))
        result["shards_MB"] = sum(f.stat().st_size for f in (folder / "shards").iterdir()) / 1e6
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
        rows.append([name, f"{a['peak_mib']:,.0f}", f"{b['peak_mib']:,.0f}", f"{added:,.0f}", *times,
                     many["files"].get(name, "")])  # fmt: skip
    head = ["command", f"peak MiB a rank, {sizes[0]:,}", f"peak MiB a rank, {sizes[-1]:,}", "bytes a particle", "CPU s",
            "wall s", "particles a CPU s", "CPU grows as n to the power", "files"]  # fmt: skip
    said = f"stack {many['stack_MB']:,.0f} MB, STAR {many['star_MB']:,.0f} MB"
    if "shard_files" in many:
        said += f" -> {many['shard_files']} shard files, {many['shards_MB']:,.0f} MB"
    return harness.markdown(head, rows) + "\n\n" + said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "scale.json")
    parser.add_argument("--work", type=Path, help="folder on a disk with room (default: the temporary folder)")
    a = parser.parse_args()
    if a.ranks > 1 and mpiexec() is None:
        harness.skip("no mpiexec; one rank is used")
        a.ranks = 1
    with harness.work_folder(a.work) as work:
        harness.cryoiso("doctor", log=work / "warm.log")
        runs: dict[str, Any] = {}
        for n in sorted(a.sizes):
            runs[str(n)] = run(n, a.box, a.commands.split(","), a.ranks, work)
            facts = {"machine": harness.machine(), "box_px": a.box, "ranks": a.ranks, "runs": runs}
            harness.write_json(a.out, facts)
    print(report(sorted(a.sizes), runs))


if __name__ == "__main__":
    main()
