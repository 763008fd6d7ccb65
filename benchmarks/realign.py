"""What misalignment correction cures: the preferred-orientation sets of cure.py, and two of RELION's comparison.

Every row but the first begins with the homologue at 30 Å; all maps are of raw particles only, touched by no network,
and all numbers are from one scorer (score.py).

    true poses      reconstruction with the true poses: what the images hold
    plain           `refine`
    kept            `realign` without a network: only the homologue's low resolution is kept (30 Å)
    realign         `realign`: references made isotropic between the iterations, one network a half-set
    paired          the same with one network for both half-sets, as published
    vae             the workflow `auxiliary`
    both            the workflow `both`: auxiliary particles and the correction between the iterations

    python benchmarks/realign.py [--sets one_pole_-13,...] [--rows plain,realign] [--jobs 2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cure, harness
from benchmarks.cure import SYMMETRY
from benchmarks.score import score

ROWS = ("true poses", "plain", "kept", "realign", "paired", "vae", "both")
SETS = ("one_pole_-13", "one_pole", "two_poles")
RELION_SETS = ("c12_pref", "f1_pref")
"""Of the folder relion_bench: 1,000 particles of -12 dB and 300 of -8 dB, white noise, 90 % top views."""
OPTIONS: dict[str, tuple[object, ...]] = {
    "kept": ("--keep-lowres", 30, "--no-correct", "--no-whitening", "--no-fsc-weighting", "--no-lowpass-references"),
    "realign": (),
    "paired": ("--mode", "paired"),
}


def prepare(name: str, shared: Path, folder: Path) -> None:
    """particles.star, truth.star, signal_map.mrc and homologue.mrc of a set."""
    if name in RELION_SETS:
        _link_relion_set(name, shared / "relion_bench", folder)
    else:
        cure.prepare(name, shared / "data" / "models", folder)


def _link_relion_set(name: str, source: Path, folder: Path) -> None:
    given = source / "sets" / name
    for file, link in (
        (given / "parts.mrcs", "parts.mrcs"),
        (given / "signal_map.mrc", "signal_map.mrc"),
        (source / "maps" / "homB_48.mrc", "homologue.mrc"),
    ):
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(file)
    for file, copy in (("parts.star", "particles.star"), ("truth.star", "truth.star")):
        (folder / copy).write_text((given / file).read_text().replace(f"sets/{name}/parts.mrcs", "parts.mrcs"))


def run_row(row: str, folder: Path) -> dict[str, Any]:
    """Scores of one row of one set, and what the corrections measured."""
    if row in ("true poses", "vae"):
        return cure.run_row(row, folder)
    if row == "plain":
        return cure.run_row("homologue", folder)
    out = folder / row
    shutil.rmtree(out, ignore_errors=True)
    if row == "both":
        cost = harness.cryoiso("run", _job(folder), "--out", out, log=folder / "both.log")
        found, log = out / "result", _last_record(out)
    else:
        cost = harness.cryoiso(
            "realign", folder / "particles.star", "--ref", folder / "homologue.mrc", "--out", out, "--symmetry",
            SYMMETRY, *OPTIONS[row], log=folder / f"{row}.log",
        )  # fmt: skip
        found, log = out / "raw", out / "refine.json"
        star = out / "particles.star"
        harness.cryoiso("reconstruct", star, "--out", found, "--symmetry", SYMMETRY, log=folder / f"{row}_raw.log")
        shutil.copy(star, found / "particles.star")
    scores = score(folder, found / "particles.star", found / "half1.mrc", found / "half2.mrc", SYMMETRY)
    records = [r["correction"] for r in json.loads(log.read_text())["iterations"]]
    measured = [r["mean_transfer"] for r in records if r["applied"]]
    return {**scores, **cost.as_dict(), "iterations": len(records), "measured_directions": measured}


def _last_record(run: Path) -> Path:
    return sorted(run.glob("[0-9][0-9]_corefine-*/engine/refine.json"))[-1]


def _job(folder: Path) -> Path:
    path = folder / "both.toml"
    path.write_text(
        f'[particles]\nfile = "particles.star"\n[reference]\nfile = "homologue.mrc"\n'
        f'[sample]\nsymmetry = "{SYMMETRY}"\n'
        f'[auxiliary]\npreset = "small"\n'
        '[correct]\npreset = "small"\n[run]\nworkflow = "both"\ndevice = "cpu"\n'
    )
    return path


def measure_set(name: str, rows: list[str], shared: Path, work: Path) -> dict[str, Any]:
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    prepare(name, shared, folder)
    found: dict[str, Any] = {"settings": cure.SETS.get(name, {"of": "relion_bench"})}
    for row in rows:
        found[row] = run_row(row, folder)
        keys = ("median_deg", "over_20", "side_over_20", "truth_A", "truth_axial_A")
        print(name, row, {k: round(found[row][k], 3) for k in keys}, flush=True)
    return found


def table(sets: dict[str, Any]) -> str:
    """Markdown: a row for each set and way."""
    head = (
        "set", "row", "median error °", "> 20°", "side views > 20°", "top > 20°", "map to truth Å", "along z Å",
        "correlation", "CPU s",
    )  # fmt: skip
    lines = []
    for name, entry in sets.items():
        for row in [r for r in ROWS if r in entry]:
            r = entry[row]
            lines.append([
                name, row, f"{r['median_deg']:.1f}", f"{100 * r['over_20']:.1f} %",
                *[f"{100 * r[k]:.0f} %" if k in r else None for k in ("side_over_20", "top_over_20")],
                f"{r['truth_A']:.1f}", f"{r['truth_axial_A']:.1f}", f"{r['correlation']:.3f}", f"{r['cpu_s']:.0f}",
            ])  # fmt: skip
    return harness.markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="data/models/ha, relion_bench (../shared)")
    parser.add_argument("--sets", default=",".join((*SETS, *RELION_SETS)))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="sets side by side, one thread each")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "realign.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    shared = a.shared.resolve()
    if not (shared / "data" / "models" / "ha").is_dir():
        harness.skip(f"no models in {shared}; give --shared")
        return
    known = json.loads(a.out.read_text()) if a.out.exists() else {"sets": {}}
    with harness.work_folder(a.work) as work, ThreadPoolExecutor(a.jobs) as pool:
        todo = {name: pool.submit(measure_set, name, a.rows.split(","), shared, work) for name in a.sets.split(",")}
        for name, future in todo.items():
            known["sets"][name] = {**known["sets"].get(name, {}), **future.result()}
            known["machine"] = harness.machine()
            harness.write_json(a.out, known)
    print(table(known["sets"]))


if __name__ == "__main__":
    main()
