"""What the anisotropy correction is worth, against the truth.

Single maps with an empty cone (70S ribosome; 45, 60 and 75 degrees), noisy half-maps of preferred views (haemagglutinin
seen from the top, beta-galactosidase from top or side), and the controls: an isotropic pair, and pure noise.
A half-map is what a Wiener reconstruction of views with density w(k) gives: X = (w T + sqrt(w) N) / (w + 1/SSNR).

    python benchmarks/correct.py [--cases ribosome_60 ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import harness

MODELS = harness.SHARED / "data" / "models"
BOX = 64
TARGETS = {  # file, pixel size in Å, resolution of the truth in Å, axis to align
    "ribosome": ("4v5a_70S_assembly1.cif.gz", 5.0, 11.0, ""),
    "haemagglutinin": ("ha/6wxb.pdb.gz", 3.0, 7.0, "C3"),
    "galactosidase": ("5a1a.cif.gz", 3.2, 7.5, "D2"),
}
CASES = (
    *(("ribosome", f"cone {deg}", deg) for deg in (45, 60, 75)),
    ("haemagglutinin", "top views", 0),
    ("galactosidase", "top views", 0),
    ("galactosidase", "side views", 0),
    ("haemagglutinin", "isotropic", 0),
    ("haemagglutinin", "noise", 0),
)
VIEWS, SPREAD_DEG, OTHERS = 1500, 12.0, 0.03
"""Views of a half-set, their spread about the preferred one, and the share that comes from anywhere."""
SEED = 7


def truth(name: str) -> tuple[Any, float]:
    """Map of a model and its resolution in Å."""
    from cryoiso.io.models import model_to_map

    file, pixel, resolution, symmetry = TARGETS[name]
    return model_to_map(MODELS / file, BOX, pixel, resolution, align_symmetry_axis=symmetry), resolution


def sampling(kind: str, box: int, rng: np.random.Generator) -> np.ndarray:
    """(D, D, D) how many views went through every coefficient, centred; every view is one plane, one pixel thick."""
    k = (np.indices((box,) * 3).reshape(3, -1).T - box // 2)[:, ::-1].astype(np.float32)
    if kind == "isotropic":
        views = rng.normal(size=(VIEWS, 3))
    else:
        around = rng.normal(size=(VIEWS, 3)) * np.tan(np.radians(SPREAD_DEG)) / np.sqrt(2)
        views = around + (np.array([0, 0, 1.0]) if kind == "top views" else np.array([1.0, 0, 0]))
        free = rng.random(VIEWS) < OTHERS
        views[free] = rng.normal(size=(int(free.sum()), 3))
    views = (views / np.linalg.norm(views, axis=1)[:, None]).astype(np.float32)
    weight = np.zeros(len(k), np.float32)
    for part in np.array_split(views, max(1, len(views) // 50)):
        weight += np.clip(1 - np.abs(k @ part.T), 0, None).sum(1)
    return weight.reshape((box,) * 3)


def half_maps(target: Any, kind: str, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Reconstructions of two half-sets of views with white noise."""
    from cryoiso.methods.anisotropy.filter import filtered, radii

    r = radii(BOX)
    power = np.abs(np.fft.fftshift(np.fft.fftn(target.data))) ** 2
    shell = np.rint(r).astype(int)
    spectrum = np.bincount(shell.ravel(), power.ravel()) / np.bincount(shell.ravel())
    made = {}
    sigma = 0.02 * np.abs(target.data).max() if kind != "noise" else 1.0
    for half in (1, 2):
        noise = rng.normal(size=target.data.shape).astype(np.float32)
        if kind == "noise":
            made[half] = noise
            continue
        # noise of one view, so that the half-maps of all views agree to about the truth's resolution where measured
        variance = (sigma**2) * BOX**3 * VIEWS
        weight = sampling(kind, BOX, rng)
        wiener = weight + variance / np.maximum(spectrum[shell], 1e-12)
        signal = filtered(target.data, weight / wiener)
        made[half] = (signal + filtered(noise * sigma * np.sqrt(VIEWS), np.sqrt(weight) / wiener)).astype(np.float32)
    return made


def score(found: np.ndarray, target: Any, mask: np.ndarray, poor: np.ndarray, resolution_A: float) -> dict[str, float]:
    """Correlation in the mask, and mean FSC to the truth in the badly and the well measured part of Fourier space."""
    a, b = (np.fft.fftshift(np.fft.fftn(x * mask)) for x in (found, target.data))
    r = np.rint(np.linalg.norm(np.indices((BOX,) * 3) - BOX // 2, axis=0)).astype(int)
    last = int(BOX * target.pixel_size_A / resolution_A)
    result = {}
    for name, where in (("poor", poor), ("good", ~poor)):
        sums = [
            np.bincount(r[where], w[where], minlength=BOX)[1 : last + 1]
            for w in ((a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2)
        ]
        some = sums[2] > 0
        curve = np.divide(sums[0], np.sqrt(sums[1] * sums[2]), out=np.zeros(last), where=some & (sums[1] > 0))
        result[f"fsc_{name}"] = float(curve[some].mean()) if some.any() else float("nan")
    inside = mask > 0.5
    return {**result, "correlation": float(np.corrcoef(found[inside], target.data[inside])[0, 1])}


def run(name: str, kind: str, cone: float, folder: Path, mode: str, options: list[str]) -> dict[str, Any]:
    """One case: maps on disk, the command, the scores before and after."""
    from cryoiso.io.mrc import read_map, write_map
    from cryoiso.methods.anisotropy.filter import filtered, missing_cone
    from cryoiso.metrics.fsc import fsc
    from cryoiso.metrics.mapmodel import truth_mask

    target, resolution = truth(name)
    mask = np.asarray(truth_mask(target.data, target.pixel_size_A), np.float32)
    rng = np.random.default_rng(SEED)
    folder.mkdir(parents=True)
    write_map(folder / "mask.mrc", mask, target.pixel_size_A)
    if cone:
        maps = {1: filtered(target.data, missing_cone(BOX, cone))}
        command = ["--missing-cone", str(cone)]
    else:
        maps = half_maps(target, kind, rng)
        command = ["--mode", mode]
    for half, data in maps.items():
        write_map(folder / f"half{half}.mrc", data, target.pixel_size_A)
    started = time.monotonic()
    cost = harness.cryoiso(
        "correct", *(folder / f"half{h}.mrc" for h in maps), "--mask", folder / "mask.mrc", "--out", folder / "out",
        *command, *options, log=folder / "log.txt",
    )  # fmt: skip
    made = {h: read_map(folder / "out" / f"corrected_half{h}.mrc").data for h in maps} if len(maps) == 2 else {}
    facts = json.loads((folder / "out" / "correct.json").read_text())
    poor = read_map(folder / "out" / "filter.mrc").data < 0.5
    limit_A = max(resolution, facts["resolution_A"])
    before = sum(maps.values()) / len(maps)
    after = read_map(folder / "out" / "corrected_map.mrc").data
    result = {
        "case": f"{name}, {kind}", "mode": facts["mode"], "resolution_A": facts["resolution_A"],
        "filter_mean": facts["filter_mean"], "cpu_s": cost.cpu_s, "wall_s": time.monotonic() - started,
        "likeness": float(np.corrcoef(before[mask > 0.5], after[mask > 0.5])[0, 1]),
    }  # fmt: skip
    if kind == "noise":
        curve = fsc(made[1], made[2], mask)[2:]
        shell = np.rint(np.linalg.norm(np.indices((BOX,) * 3) - BOX // 2, axis=0)).astype(int)
        voxels = np.bincount(shell.ravel())[2 : 2 + len(curve)] / 2 * float((mask**2).mean())
        return {**result, "fsc_in_units_of_its_sd": float(np.abs(curve * np.sqrt(voxels)).max()),
                "fsc_mean": float(curve.mean()), "fsc_mean_sd": float(1 / np.sqrt(voxels.sum()))}  # fmt: skip
    result["before"] = score(before, target, mask, poor, limit_A)
    result["after"] = score(after, target, mask, poor, limit_A)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", help="e.g. ribosome:cone_60; default: all")
    parser.add_argument("--mode", default="independent", help="of cases with half-maps")
    parser.add_argument("--options", default="", help="further options of 'cryoiso correct'")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "correct.json")
    args = parser.parse_args()
    if not MODELS.is_dir():
        harness.skip(f"no models at {MODELS}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, kind, cone) in enumerate(CASES):
            if args.cases and f"{name}:{kind.replace(' ', '_')}" not in args.cases:
                continue
            rows.append(run(name, kind, cone, Path(folder) / str(i), args.mode, args.options.split()))
            print(json.dumps(rows[-1]), flush=True)
            harness.write_json(args.out, {"machine": harness.machine(), "box_px": BOX, "rows": rows})


if __name__ == "__main__":
    main()
