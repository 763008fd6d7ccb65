"""What auxiliary particles cure: preferred-orientation sets of haemagglutinin, measured against the truth.

The target is H3 haemagglutinin (6WXB); the reference is another subtype (H7, 1TI8) low-passed at 10 Å and fitted into
the target's frame, as a user fits one into a map. Rows of the table:

    true poses      reconstruction with the true poses: what the images hold
    plain           `refine` from the map that the set's preferred views alone give (with their true poses) at 30 Å:
                    better than any initial model that a user could make of such data
    homologue       `refine` from the homologue at 30 Å
    white noise     the workflow `auxiliary` with projections and white noise for auxiliary particles
    VAE             the workflow `auxiliary` with generators trained on the set

All maps are of raw particles only. One scorer for all (score.py).

    python benchmarks/cure.py [--sets one_pole,...] [--rows plain,vae] [--jobs 2]
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

from benchmarks import harness, particle_sets
from benchmarks.score import score

SYMMETRY = "C3"
ROWS = ("true poses", "plain", "homologue", "white noise", "vae")
SETS: dict[str, dict[str, Any]] = {
    "one_pole": {"mode": "preferred", "fraction": 0.98, "snr-db": -15},
    "two_poles": {"mode": "preferred", "fraction": 0.98, "poles": 2, "snr-db": -15},
    "side_views": {"mode": "preferred", "fraction": 0.98, "pole-tilt": 90, "snr-db": -15},
    "one_pole_-13": {"mode": "preferred", "fraction": 0.98, "snr-db": -13},
    "one_pole_-17": {"mode": "preferred", "fraction": 0.98, "snr-db": -17},
    **{f"retained_{100 * r:.0f}": {"mode": "retained", "retained": r, "snr-db": -15} for r in (1, 0.5, 0.25, 0.1, 0)},
}


def prepare(name: str, models: Path, folder: Path) -> None:
    """Target, particles, homologue in the target's frame, and the map of the preferred views.

    Args:
        models: the folder of all models.
    """
    views = {key: value for key, value in SETS[name].items() if key != "snr-db"}
    particle_sets.prepare(particle_sets.ParticleSet(views, SETS[name]["snr-db"]), 3, models, folder)
    _preferred_views(name, folder)


def _preferred_views(name: str, folder: Path) -> None:
    """initial.mrc: what the views inside the preferred cone give with their true poses; all views for even sets."""
    import numpy as np

    from cryoiso.io import read_particle_file
    from cryoiso.io.mrc import read_map, write_map
    from cryoiso.io.star.write import write_particles

    truth = read_particle_file(folder / "truth.star", require=("pose",))
    setting = SETS[name]
    tilt = np.radians(setting.get("pole-tilt", 0))
    cosine = truth.rotation[:, 2] @ np.array([np.sin(tilt), 0, np.cos(tilt)])
    if setting.get("poles") == 2 or setting["mode"] == "retained":
        cosine = np.abs(cosine)
    edge = 45.0 if setting["mode"] == "retained" else 36.0
    some = cosine > np.cos(np.radians(edge)) if setting.get("retained", 0) < 1 else np.ones(len(truth), bool)
    write_particles(folder / "preferred.star", truth.take(some))
    out = folder / "preferred"
    star, log = folder / "preferred.star", folder / "preferred.log"
    harness.cryoiso("reconstruct", star, "--out", out, "--symmetry", SYMMETRY, log=log)
    made = read_map(out / "map.mrc")
    write_map(folder / "initial.mrc", np.asarray(made.data, np.float32), made.pixel_size_A)


def run_row(row: str, folder: Path) -> dict[str, Any]:
    """Scores of one row of one set."""
    if row == "true poses":
        out = folder / "true"
        cost = harness.cryoiso(
            "reconstruct", folder / "truth.star", "--out", out, "--symmetry", SYMMETRY, log=folder / "true.log"
        )
        star = folder / "truth.star"
    elif row in ("plain", "homologue"):
        out = folder / row
        reference = folder / ("initial.mrc" if row == "plain" else "homologue.mrc")
        cost = harness.cryoiso(
            "refine", folder / "particles.star", "--ref", reference, "--out", out, "--symmetry", SYMMETRY,
            log=folder / f"{row}.log",
        )  # fmt: skip
        star = out / "particles.star"
        raw = out / "raw"
        harness.cryoiso("reconstruct", star, "--out", raw, "--symmetry", SYMMETRY, log=folder / f"{row}_raw.log")
        out = raw
    else:
        run = folder / row.replace(" ", "_")
        shutil.rmtree(run, ignore_errors=True)
        job = _job(row, folder)
        cost = harness.cryoiso("run", job, "--out", run, log=folder / f"{run.name}.log")
        out, star = run / "result", run / "result" / "particles.star"
    scores = score(folder, star, out / "half1.mrc", out / "half2.mrc", SYMMETRY)
    return {**scores, **cost.as_dict()}


def _job(row: str, folder: Path) -> Path:
    generators = "per-half" if row == "vae" else "white-noise"
    path = folder / f"{generators}.toml"
    path.write_text(
        f'[particles]\nfile = "particles.star"\n[reference]\nfile = "homologue.mrc"\n'
        f'[sample]\nsymmetry = "{SYMMETRY}"\n'
        f'[auxiliary]\ngenerators = "{generators}"\npreset = "small"\n'
        '[run]\nworkflow = "auxiliary"\ndevice = "cpu"\n'
    )
    return path


def measure_set(name: str, rows: list[str], models: Path, work: Path) -> dict[str, Any]:
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    prepare(name, models, folder)
    found: dict[str, Any] = {"settings": SETS[name]}
    for row in rows:
        found[row] = run_row(row, folder)
        print(name, row, {k: round(found[row][k], 3) for k in ("median_deg", "over_20", "truth_A")}, flush=True)
    return found


def recovered(entry: dict[str, Any], row: str) -> float | None:
    """Share of the gap in resolution between `plain` and `true poses` that a row closes; None where there is none."""
    best, worst = entry["true poses"]["truth_A"], entry["plain"]["truth_A"]
    return (worst - entry[row]["truth_A"]) / (worst - best) if worst - best > 0.5 else None


def table(sets: dict[str, Any]) -> str:
    """Markdown: a row for each set and start."""
    head = (
        "set", "row", "median error °", "> 20°", "side views > 20°", "top > 20°", "map to truth Å", "along z Å",
        "correlation", "gap closed", "CPU s",
    )  # fmt: skip
    lines = []
    for name, entry in sets.items():
        for row in [r for r in ROWS if r in entry]:
            r = entry[row]
            share = recovered(entry, row) if row not in ("true poses", "plain") and "plain" in entry else None
            lines.append([
                name, row, f"{r['median_deg']:.1f}", f"{100 * r['over_20']:.1f} %",
                *[f"{100 * r[k]:.0f} %" if k in r else None for k in ("side_over_20", "top_over_20")],
                f"{r['truth_A']:.1f}", f"{r['truth_axial_A']:.1f}", f"{r['correlation']:.3f}",
                None if share is None else f"{100 * share:.0f} %", f"{r['cpu_s']:.0f}",
            ])  # fmt: skip
    return harness.markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/models/ha (default ../shared)")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="sets side by side, one thread each")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "cure.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    models = (a.shared / "data" / "models").resolve()
    if not (models / "ha").is_dir():
        harness.skip(f"no models in {models}; give --shared")
        return
    known = json.loads(a.out.read_text()) if a.out.exists() else {"sets": {}}
    with harness.work_folder(a.work) as work, ThreadPoolExecutor(a.jobs) as pool:
        todo = {name: pool.submit(measure_set, name, a.rows.split(","), models, work) for name in a.sets.split(",")}
        for name, future in todo.items():
            known["sets"][name] = {**known["sets"].get(name, {}), **future.result()}
            known["machine"] = harness.machine()
            harness.write_json(a.out, known)
    print(table(known["sets"]))


if __name__ == "__main__":
    main()
