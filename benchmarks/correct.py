"""What the anisotropy correction is worth, against the truth.

Single maps with an empty cone in Fourier space (70S ribosome, half angle 45, 60 and 75 degrees), half-maps of simulated
particles with preferred views and their true poses (haemagglutinin from the top, beta-galactosidase from top or side),
and two controls: half-maps of even views, and pure noise, which is corrected up to 2.3 pixels with a filter that knows
nothing of it (a cone of 45 degrees, and 0.5 elsewhere). Masks are those that the command makes itself. Rows:

    before      the map that goes in (the mean of the half-maps), low-passed where the half-map FSC falls below 0.143
    solvent     `cryoiso correct --epochs 0`: no network, only that density is not below the solvent
    corrected   `cryoiso correct`
    published   `cryoiso correct --method published`: the published losses

    python benchmarks/correct.py [--cases ribosome_60 ...] [--box 64] [--device cuda --preset paper]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import harness

TARGETS = {  # file, extent of the box in Å, point group
    "ribosome": ("4v5a_70S_assembly1.cif.gz", 320.0, "C1"),
    "ha": ("ha/6wxb.pdb.gz", 192.0, "C3"),
    "galactosidase": ("8bk7.cif.gz", 204.8, "D2"),
}
TOP = ("--mode", "preferred", "--fraction", 0.97, "--cone", 36)
CASES: dict[str, tuple[str, Any]] = {  # target, and half angle of the cone or how to simulate
    **{f"ribosome_{deg}": ("ribosome", float(deg)) for deg in (45, 60, 75)},
    "ha_top": ("ha", (*TOP, "--poles", 1)),
    "galactosidase_top": ("galactosidase", (*TOP, "--poles", 2)),
    "galactosidase_side": ("galactosidase", (*TOP, "--poles", 2, "--pole-tilt", 90)),
    "ha_even": ("ha", ("--mode", "uniform")),
    "noise": ("ha", "noise"),
}
ROWS: dict[str, tuple[object, ...]] = {
    "solvent": ("--epochs", 0), "corrected": (), "published": ("--method", "published"),
}  # fmt: skip
PARTICLES, SNR_DB, SEED = 3000, -10, 7
RESOLUTION_PX = 2.3
"""Of the truth; 2 is Nyquist."""

FEW_SHELLS = 5
"""Shells in which the shape of the mask alone decides."""


def prepare(case: str, box: int, models: Path, folder: Path) -> None:
    """truth.mrc, and map.mrc or half1.mrc and half2.mrc; nothing if they are there."""
    from cryoiso.io.models import model_to_map
    from cryoiso.io.mrc import read_map, write_map
    from cryoiso.methods.anisotropy.filter import filtered, missing_cone

    target, kind = CASES[case]
    file, extent_A, symmetry = TARGETS[target]
    pixel = extent_A / box
    if (folder / "truth.mrc").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(kind, float):
        truth = model_to_map(models / file, box, pixel, RESOLUTION_PX * pixel)
        write_map(folder / "map.mrc", filtered(truth.data, missing_cone(box, kind)), pixel)
    elif kind == "noise":
        truth = model_to_map(models / file, box, pixel, RESOLUTION_PX * pixel, align_symmetry_axis=symmetry)
        for half in (1, 2):
            noise = np.random.default_rng((SEED, half)).normal(size=(box,) * 3).astype(np.float32)
            write_map(folder / f"half{half}.mrc", noise, pixel)
        cone = 0.5 * missing_cone(box, 45.0)
        cone[(box // 2,) * 3] = 1.0
        write_map(folder / "given_filter.mrc", cone.astype(np.float32), pixel)
    else:
        particles = folder / "particles"
        harness.cryoiso(
            "simulate", models / file, particles, "--n", PARTICLES, "--box", box, "--pixel-size", pixel, "--resolution",
            RESOLUTION_PX * pixel, "--symmetry", symmetry, "--snr-db", SNR_DB, "--seed", SEED, "--halves",
            "--with-poses", *kind, log=folder / "simulate.log",
        )  # fmt: skip
        harness.cryoiso(
            "reconstruct", particles / "particles.star", "--out", folder, "--symmetry", symmetry,
            log=folder / "reconstruct.log",
        )  # fmt: skip
        truth = read_map(particles / "truth_map.mrc")
        shutil.rmtree(particles)
    write_map(folder / "truth.mrc", truth.data, pixel)


def score(found: np.ndarray, truth: np.ndarray, mask: np.ndarray, poor: np.ndarray, last: int) -> dict[str, float]:
    """Correlation in the mask, and mean FSC to the truth of the shells up to ``last``, in the badly measured part of
    Fourier space (A < 0.5) and in the rest."""
    a, b = (np.fft.fftshift(np.fft.fftn(x * mask)) for x in (found, truth))
    size = len(truth)
    shell = np.rint(np.linalg.norm(np.indices(truth.shape) - size // 2, axis=0)).astype(int)
    result = {}
    for name, where in (("poor", poor), ("good", ~poor)):
        sums = [
            np.bincount(shell[where], w[where], minlength=size)[1 : last + 1]
            for w in ((a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2)
        ]
        some = (sums[1] > 0) & (sums[2] > 0)
        values = sums[0][some] / np.sqrt(sums[1][some] * sums[2][some])
        result[f"fsc_{name}"] = float(values.mean()) if some.any() else float("nan")
    inside = mask > 0.5
    return {**result, "correlation": float(np.corrcoef(found[inside], truth[inside])[0, 1])}


def correct(case: str, row: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """One run of the command and its scores; also those of what went in."""
    from cryoiso.io.mrc import read_map
    from cryoiso.methods.anisotropy.filter import band, filtered
    from cryoiso.metrics.mapmodel import truth_mask

    kind = CASES[case][1]
    given = [folder / "map.mrc"] if isinstance(kind, float) else [folder / f"half{h}.mrc" for h in (1, 2)]
    cone = ["--missing-cone", kind] if isinstance(kind, float) else []
    if kind == "noise":
        pixel = TARGETS[CASES[case][0]][1] / read_map(folder / "truth.mrc").box_px
        cone = ["--filter", folder / "given_filter.mrc", "--resolution", RESOLUTION_PX * pixel]
    out = folder / row
    shutil.rmtree(out, ignore_errors=True)
    cost = harness.cryoiso("correct", *given, "--out", out, *cone, *ROWS[row], *options, log=folder / f"{row}.log")
    facts = json.loads((out / "correct.json").read_text())
    maps = [read_map(path) for path in given]
    box, pixel = maps[0].box_px, maps[0].pixel_size_A
    raw = np.mean([one.data for one in maps], axis=0)
    limit_A = facts["resolution_A"]
    before = filtered(raw, band(box, pixel, None if isinstance(kind, float) else limit_A))
    after, truth = read_map(out / "corrected_map.mrc").data, read_map(folder / "truth.mrc").data
    mask = np.asarray(truth_mask(truth, pixel), np.float32)
    poor = read_map(out / "filter.mrc").data < 0.5
    network = next(iter(facts["networks"].values()))
    result: dict[str, Any] = {
        "mode": facts["mode"], "resolution_A": limit_A, "filter_mean": facts["filter_mean"],
        "cost": cost.as_dict(), "steps": network["steps"], "preset": facts["settings"]["preset"],
    }  # fmt: skip
    if kind == "noise":
        return {**result, **_agreement(out, mask)}
    last = int(box * pixel / max(RESOLUTION_PX * pixel, limit_A))
    likeness = float(np.corrcoef(before[mask > 0.5], after[mask > 0.5])[0, 1])
    return {**result, "likeness": likeness, "before": score(before, truth, mask, poor, last),
            "after": score(after, truth, mask, poor, last)}  # fmt: skip


def _agreement(out: Path, mask: np.ndarray) -> dict[str, Any]:
    """FSC of the corrected halves: first shells, and the rest in standard deviations of independent noise's."""
    from cryoiso.io.mrc import read_map
    from cryoiso.metrics.fsc_curve import fsc

    whole = fsc(*(read_map(out / f"corrected_half{half}.mrc").data for half in (1, 2)), mask)
    start, stop = FEW_SHELLS + 1, int(len(mask) / RESOLUTION_PX)
    curve = np.nan_to_num(whole[start:stop])
    shell = np.rint(np.linalg.norm(np.indices(mask.shape) - len(mask) // 2, axis=0)).astype(int)
    # a mask makes neighbours alike, so that fewer coefficients of a shell are independent
    voxels = np.bincount(shell.ravel())[start:stop] / 2 * float((mask**2).mean())
    return {
        "first_shells": [round(float(v), 3) for v in whole[1:start]],
        "worst_of_the_rest_in_sd": float(np.abs(curve * np.sqrt(voxels)).max()),
        "mean_of_the_rest": float(curve.mean()),
        "sd_of_that_mean": float(np.sqrt((1 / voxels).sum()) / len(curve)),
    }  # fmt: skip


def table(cases: dict[str, Any]) -> str:
    """Scores before and after."""
    head = ("case", "", "FSC to the truth, badly measured part", "the rest", "correlation", "CPU s")
    lines: list[tuple[Any, ...]] = []
    for case, rows in cases.items():
        some = next((r for r in rows.values() if "before" in r), None)
        if some:
            lines.append((case, "before", *(f"{v:.3f}" for v in some["before"].values()), None))
            lines += [
                (case, row, *(f"{v:.3f}" for v in r["after"].values()), f"{r['cost']['cpu_s']:.0f}")
                for row, r in rows.items()
            ]
    return harness.markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=["solvent", "corrected"])
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--mode", default="independent", help="of cases with half-maps")
    parser.add_argument("--options", default="", help="further options of 'cryoiso correct'")
    parser.add_argument("--prepare", action="store_true", help="only make the maps")
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/models (default ../shared)")
    parser.add_argument("--work", type=Path, help="keep, or find, the maps here")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "correct.json")
    a = parser.parse_args()
    before = json.loads(a.out.read_text()) if a.out.exists() else {}
    # rows of other calls stay, if they are of this size
    result: dict[str, Any] = {"cases": before.get("cases", {}) if before.get("box_px") == a.box else {}}
    with harness.work_folder(a.work) as work:
        for case in a.cases:
            folder = work / f"{case}-{a.box}"
            if not (a.shared / "data" / "models").is_dir() and not (folder / "truth.mrc").exists():
                harness.skip(f"{case}: no atomic models in {a.shared}")
                continue
            prepare(case, a.box, a.shared / "data" / "models", folder)
            for row in () if a.prepare else a.rows:
                options = [*a.options.split(), *([] if isinstance(CASES[case][1], float) else ["--mode", a.mode])]
                result["cases"].setdefault(case, {})[row] = found = correct(case, row, folder, options)
                print(case, row, json.dumps(found), flush=True)
                harness.write_json(a.out, {"machine": harness.machine(), "box_px": a.box, **result})
    print(table(result["cases"]))


if __name__ == "__main__":
    main()
