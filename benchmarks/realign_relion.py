"""Real RELION with the correction in its loop: `cryoiso refine` and `cryoiso realign` with `--engine relion`.

Each set (C3, 48 px, 90 % of the views from the top; see ../shared/relion_bench/README.md) is refined from the true map
low-passed at 40 Å five times: by RELION alone; with our tau^2 in the place of its own; with the anisotropy correction
in its external-reconstruct callback; with auxiliary particles refined together with the raw ones; and with both. In
all rows the raw particles alone are scored, and reconstructed with the poses found by `cryoiso reconstruct`. As in that
folder RELION's sampling is capped at 8 degrees (oversampled; 15 before), so the correction works from 15 degrees on.

    python benchmarks/realign_relion.py [--sets f1_pref,c12_pref] [--rows relion,corrected,auxiliary,both] [--ranks 2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.relion_auxiliary import DIAMETER_A, LOWPASS_A, SYMMETRY, score_by_row

ROWS = ("relion", "uneven", "corrected", "auxiliary", "both")
WORDS = {
    "relion": "RELION alone", "uneven": "RELION alone, `tau2 = uneven`", "corrected": "+ correction in its loop",
    "auxiliary": "+ auxiliary particles",
    "both": "+ auxiliary particles and correction",
}  # fmt: skip
NEVER = 0.001
"""Angular sampling in degrees that RELION does not reach: the correction stays off."""


def auxiliaries(bench: Path, name: str, work: Path) -> Path:
    """Shards of auxiliary particles: projections of another subtype's map with white noise."""
    star, reference = bench / "sets" / name / "parts.star", bench / "maps" / "homB_48.mrc"
    common = ("--symmetry", SYMMETRY, "--project", bench)
    posed, made = work / "poses" / "particles.star", work / "auxiliary"
    if not (made / "index.json").exists():
        harness.cryoiso("refine", star, "--ref", reference, "--out", work / "poses", *common, log=work / "poses.log")
        harness.cryoiso(
            "auxiliary", "train", posed, "--ref", reference, "--out", work / "generators", *common, "--generators",
            "white-noise", "--device", "cpu", log=work / "train.log",
        )  # fmt: skip
        harness.cryoiso(
            "auxiliary", "generate", work / "generators", posed, "--out", made, "--temperature", 1.0, *common,
            log=work / "made.log",
        )  # fmt: skip
    return made


def refine(row: str, bench: Path, name: str, work: Path, ranks: int) -> dict[str, Any]:
    """One refinement, its costs and scores."""
    star, out = bench / "sets" / name / "parts.star", work / row
    shutil.rmtree(out, ignore_errors=True)
    command = "refine" if row in ("relion", "uneven") else "realign"
    options = [
        "--ref", bench / "sets" / name / "signal_map.mrc", "--out", out, "--symmetry", SYMMETRY, "--project", bench,
        "--diameter", DIAMETER_A, "--lowpass", LOWPASS_A, "--engine", "relion", "--shift-range", 7, "--invert", "no",
        "--relion", "extra=--pad 1 --maximum_angular_sampling 8",
    ]  # fmt: skip
    if row in ("auxiliary", "both"):
        options += ["--auxiliary", auxiliaries(bench, name, work)]
    if row == "uneven":
        options += ["--relion", "tau2=uneven"]
    if row not in ("relion", "uneven"):
        options += ["--start-step", NEVER if row == "auxiliary" else 15]
    mpirun = Path(sys.executable).parent / "mpirun"
    launcher = [mpirun if mpirun.exists() else "mpirun", "-n", ranks] if ranks > 1 else []
    began = time.monotonic()
    cost = harness.measure([*launcher, *harness.CRYOISO, command, star, *options], work / f"{row}.log")
    harness.cryoiso(
        "reconstruct", out / "particles.star", "--out", out / "maps", "--symmetry", SYMMETRY, "--project", bench,
        log=work / f"{row}_maps.log",
    )  # fmt: skip
    record = json.loads(
        next(f for f in (out / "refine.json", out / "engine" / "refine.json") if f.exists()).read_text()
    )
    from cryoiso.io import read_particle_file

    found = read_particle_file(out / "particles.star", str(bench), ("pose",))
    corrected = sum(bool((r.get("correction") or {}).get("applied")) for r in record["iterations"])
    return {
        **score_by_row(bench / "sets" / name, found, out / "maps"),
        "iterations": len(record["iterations"]),
        "corrected_iterations": corrected,
        "wall_s": round(time.monotonic() - began, 1),
        "cost": cost.as_dict(),
    }


def table(sets: dict[str, Any]) -> str:
    head = ("set", "", "iterations (corrected)", "median error °", "> 20°", "top views put to side", "map to truth Å",
            "CPU s")  # fmt: skip
    rows = [
        [name, WORDS[row], f"{r['iterations']} ({r['corrected_iterations']})", f"{r['median_deg']:.1f}",
         f"{100 * r['over_20']:.1f} %", f"{100 * r['top_to_side']:.1f} %", f"{r['truth_A']:.1f}",
         f"{r['cost']['cpu_s']:.0f}"]
        for name, entry in sets.items() for row in ROWS if (r := entry.get(row))
    ]  # fmt: skip
    return harness.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds relion_bench/ (default ../shared)")
    parser.add_argument("--sets", default="f1_pref,c12_pref")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--ranks", type=int, default=1, help="of this program; RELION has three of its own")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "realign_relion.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    bench = (a.shared / "relion_bench").resolve()
    if not (bench / "sets").is_dir() or not (shutil.which("relion_refine_mpi") and harness.open_mpi()):
        harness.skip(f"no particle sets in {bench}, or no relion_refine_mpi on the PATH")
        return
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"sets": {}}
    with harness.work_folder(a.work) as work:
        for name in a.sets.split(","):
            (work / name).mkdir(exist_ok=True)
            for row in a.rows.split(","):
                found = refine(row, bench, name, work / name, a.ranks)
                result["sets"].setdefault(name, {})[row] = found
                print(name, row, {k: round(found[k], 3) for k in ("median_deg", "over_20", "truth_A")}, flush=True)
                result["machine"] = harness.machine()
                harness.write_json(a.out, result)
    print(table(result["sets"]))


if __name__ == "__main__":
    main()
