"""`cryoiso refine` beside RELION's auto-refinement: same files, same reference, same starting low-pass, one scorer.

The sets are C3 particles of 48 px and 4.5 Å/px with known truth, made by relion_project (see their README). RELION runs
as one leader and one follower a half, its angular sampling capped at 8 degrees to stay short; both programs start from
the true map low-passed at 40 Å. CPU seconds are user and system time of all processes from start to end.

    python benchmarks/refine_vs_relion.py [--sets c12_uniform,f1_pref] [--skip-relion]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.score import score

SETS = ("c12_uniform", "f1_uniform", "c12_pref", "d1", "f1_pref", "c14_pref")
SYMMETRY, DIAMETER_A, LOWPASS_A = "C3", 170, 40
PROTOTYPE = {
    "c14_pref": {"median_deg": 3.7, "over_20": 0.071, "truth_A": 15.4, "cpu_s": 81},
    "d1": {"median_deg": 2.7, "over_20": 0.047, "truth_A": 14.4, "cpu_s": 62},
}
"""What the plain torch prototype reached with the same reference (README of the sets); it was not run on the others."""
TIMED = '#!/bin/bash\nTIMEFORMAT="%U %S"\n{ time "$@" 2>&3; } 3>&2 2>"$TIMES.$OMPI_COMM_WORLD_RANK"\n'


def relion(bench: Path, name: str, work: Path, seed: int) -> dict[str, Any]:
    """RELION's run of one set, with the CPU time of each rank."""
    out = work / "run"
    wrapper = work / "timed.sh"
    wrapper.write_text(TIMED)
    wrapper.chmod(0o755)
    command = (
        f"relion_refine_mpi --o {out} --auto_refine --split_random_halves --i sets/{name}/parts.star "
        f"--ref sets/{name}/signal_map.mrc --ini_high {LOWPASS_A} --ctf --ctf_corrected_ref "
        f"--particle_diameter {DIAMETER_A} --flatten_solvent --zero_mask --sym {SYMMETRY} --healpix_order 2 "
        "--auto_local_healpix_order 4 --oversampling 1 --offset_range 1.5 --offset_step 1 --low_resol_join_halves 40 "
        f"--norm --scale --pad 1 --j 1 --pool 10 --dont_combine_weights_via_disc --preread_images --random_seed {seed} "
        "--maximum_angular_sampling 8"
    )
    start = harness.open_mpi() or []
    argv = [*start, "-np", 3, str(wrapper), *command.split()]
    cost = harness.measure(argv, work / "relion.log", bench, {"TIMES": str(work / "cpu")})
    ranks = [sum(map(float, (work / f"cpu.{r}").read_text().split()[-2:])) for r in range(3)]
    halves = [work / f"run_half{h}_class001_unfil.mrc" for h in (1, 2)]
    scores = score(bench / "sets" / name, work / "run_data.star", *halves, SYMMETRY)
    return {**scores, **cost.as_dict(), "cpu_s_of_ranks": ranks, "command": "mpirun -np 3 " + command.split(" --o ")[0]}


def cryoiso(bench: Path, name: str, work: Path, repeats: int) -> dict[str, Any]:
    """cryoiso's run of one set, one process, one thread."""
    folder = Path("sets") / name

    def once() -> harness.Cost:
        shutil.rmtree(work / "out", ignore_errors=True)
        return harness.cryoiso(
            "refine", folder / "parts.star", "--ref", folder / "signal_map.mrc", "--out", work / "out",
            "--symmetry", SYMMETRY, "--lowpass", LOWPASS_A, "--diameter", DIAMETER_A,
            log=work / "cryoiso.log", cwd=bench,
        )  # fmt: skip

    cost = harness.repeat(repeats, once)
    out = work / "out"
    scores = score(bench / folder, out / "particles.star", out / "half1.mrc", out / "half2.mrc", SYMMETRY)
    iterations = json.loads((out / "refine.json").read_text())["iterations"]
    return {**scores, **cost.as_dict(), "iterations": len(iterations)}


def compare(a: argparse.Namespace, bench: Path, work: Path) -> dict[str, Any]:
    """All sets, one after the other, each program once (cryoiso ``--repeats`` times, it is short)."""
    result = json.loads(a.out.read_text()) if a.out.exists() else {"sets": {}}
    result["machine"] = harness.machine()
    harness.cryoiso("doctor", log=work / "warm.log")
    for name in a.sets.split(","):
        entry = result["sets"].setdefault(name, {})
        for program in ("relion", "cryoiso"):
            folder = work / f"{name}-{program}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if program == "relion" and not a.skip_relion:
                entry[program] = {**relion(bench, name, folder, a.seed), "date": result["machine"]["date"]}
            elif program == "cryoiso":
                entry[program] = {**cryoiso(bench, name, folder, a.repeats), "date": result["machine"]["date"]}
            if program in entry:
                print(name, program, _line(entry[program]), file=sys.stderr, flush=True)
        harness.write_json(a.out, result)
    return result


def _line(r: dict[str, Any]) -> str:
    return f"median {r['median_deg']:.1f}, > 20 deg {r['over_20']:.1%}, {r['truth_A']:.1f} Å, {r['cpu_s']:.1f} CPU s"


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each set and program."""
    head = (
        "set", "program", "median error °", "> 20°", "top to side", "side > 20°", "map to truth Å", "half-maps Å",
        "CPU s", "ratio",
    )  # fmt: skip
    rows = []
    for name, entry in result["sets"].items():
        ours = entry.get("cryoiso", {})
        for program, r in (("RELION", entry.get("relion")), ("cryoiso", ours), ("prototype", PROTOTYPE.get(name))):
            if r:
                ratio = r["cpu_s"] / ours["cpu_s"] if program == "RELION" and ours else None
                rows.append([name, program, *_cells(r), f"{r['cpu_s']:.1f}", ratio and f"{ratio:.1f}"])
    return harness.markdown(head, rows)


def _cells(r: dict[str, Any]) -> list[str | None]:
    def percent(key: str) -> str | None:
        return f"{100 * r[key]:.1f} %" if key in r else None

    half = f"{r['half_masked_A']:.1f}" if "half_masked_A" in r else None
    return [
        f"{r['median_deg']:.1f}", percent("over_20"), percent("top_to_side"), percent("side_over_20"),
        f"{r['truth_A']:.1f}", half,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds relion_bench/ (default ../shared)")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--skip-relion", action="store_true", help="keep RELION's numbers that --out already has")
    parser.add_argument("--repeats", type=int, default=2, help="runs of cryoiso; the cheapest counts")
    parser.add_argument("--seed", type=int, default=42, help="RELION's")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "refine_vs_relion.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    bench = (a.shared / "relion_bench").resolve()
    if not (bench / "sets").is_dir():
        harness.skip(f"no particle sets in {bench}; give --shared")
        return
    if not a.skip_relion and not (shutil.which("relion_refine_mpi") and harness.open_mpi()):
        harness.skip("RELION's runs: relion_refine_mpi or its mpirun is not on the PATH")
        a.skip_relion = True
    with harness.work_folder(a.work) as work:
        print(table(compare(a, bench, work)))


if __name__ == "__main__":
    main()
