"""Auxiliary particles beside real RELION: `relion_refine_mpi` on raw particles, and on raw and auxiliary particles.

The sets and RELION's start are those of refine_vs_relion.py (C3, 48 px, 90 % of the views from the top; the reference
is the true map low-passed at 40 Å, angular sampling capped at 8 degrees). Generators are trained on the raw particles
with poses from `cryoiso refine` against another subtype's map (homB), which also conditions them; white noise is that
map's projections plus white noise. Raw particles alone are scored, and reconstructed with RELION's poses by `cryoiso
reconstruct`.

    python benchmarks/relion_auxiliary.py [--set f1_pref] [--rows raw,vae,white]
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

SYMMETRY, DIAMETER_A, LOWPASS_A = "C3", 170, 40
ROWS = ("raw", "white", "vae")
TEMPERATURE = {"vae": 1.0, "white": 1.0}


def auxiliary(kind: str, bench: Path, name: str, work: Path) -> Path:
    """Raw and auxiliary particles in one STAR file."""
    star, reference = bench / "sets" / name / "parts.star", bench / "maps" / "homB_48.mrc"
    posed = work / "poses" / "particles.star"
    common = ("--symmetry", SYMMETRY, "--project", bench)
    if not posed.exists():
        harness.cryoiso("refine", star, "--ref", reference, "--out", work / "poses", *common, log=work / "poses.log")
    generators = work / f"{kind}_generators"
    flags = ("--generators", "per-half" if kind == "vae" else "white-noise", "--preset", "small")
    harness.cryoiso(
        "auxiliary", "train", posed, "--ref", reference, "--out", generators, *flags, *common, "--device", "cpu",
        log=work / f"{kind}_train.log",
    )  # fmt: skip
    made = work / f"{kind}_made"
    harness.cryoiso(
        "auxiliary", "generate", generators, posed, "--out", made, "--export", "--temperature", TEMPERATURE[kind],
        *common, log=work / f"{kind}_made.log",
    )  # fmt: skip
    return _joined(posed, made / "auxiliary.star", bench, work / f"{kind}.star")


def _joined(raw: Path, made: Path, bench: Path, out: Path) -> Path:
    """Absolute image names, no poses, halves kept; the auxiliaries have an optics group of their own."""
    import numpy as np

    from cryoiso.core.types import concatenate
    from cryoiso.io import read_particle_file
    from cryoiso.io.star.write import write_particles

    sets = [read_particle_file(raw, str(bench)), read_particle_file(made, str(made.parent))]
    for i, part in enumerate(sets):
        flags = {"cryoisoAuxiliary": np.full(len(part), i, np.int64)}
        sets[i] = type(part)(**{**vars(part), "rotation": None, "shift_A": None, "results": flags})
    both = concatenate(*sets)
    names = [f"{i + 1:06d}@{Path(s).resolve()}" for i, s in zip(both.index.tolist(), both.stack.tolist(), strict=True)]
    write_particles(out, both, names)
    return out


def relion(star: Path, bench: Path, name: str, work: Path, label: str) -> dict[str, Any]:
    """RELION's run, and the scores of the raw particles."""
    from cryoiso.io import read_particle_file
    from cryoiso.io.star.write import write_particles

    out = work / label
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = (
        f"relion_refine_mpi --o {out}/run --auto_refine --split_random_halves --i {star} "
        f"--ref sets/{name}/signal_map.mrc --ini_high {LOWPASS_A} --ctf --ctf_corrected_ref "
        f"--particle_diameter {DIAMETER_A} --flatten_solvent --zero_mask --sym {SYMMETRY} --healpix_order 2 "
        "--auto_local_healpix_order 4 --oversampling 1 --offset_range 1.5 --offset_step 1 --low_resol_join_halves 40 "
        "--norm --scale --pad 1 --j 1 --pool 10 --dont_combine_weights_via_disc --preread_images --random_seed 42 "
        "--maximum_angular_sampling 8"
    )
    harness.measure([*(harness.open_mpi() or []), "-np", 3, *command.split()], work / f"{label}.log", bench)
    found = read_particle_file(out / "run_data.star", str(bench))
    flag = found.table.get("cryoisoAuxiliary") if found.table is not None else None
    names = found.table["rlnImageName"] if found.table is not None else None
    raw = ["cryoiso_auxiliary" not in n for n in names] if flag is None else (flag.astype(int) == 0).to_numpy()
    mine = found.take(raw)
    write_particles(out / "raw.star", mine)
    harness.cryoiso(
        "reconstruct", out / "raw.star", "--out", out / "maps", "--symmetry", SYMMETRY, "--project", bench,
        log=work / f"{label}_maps.log",
    )  # fmt: skip
    true = bench / "sets" / name
    return score_by_row(true, mine, out / "maps")


def score_by_row(folder: Path, found: Any, maps: Path) -> dict[str, Any]:
    """As ``score``, with particles matched by stack and number: joined files have other names for the same images."""
    import numpy as np

    from benchmarks.score import map_scores, pose_scores
    from cryoiso.io import read_particle_file
    from cryoiso.io.mrc import read_map

    truth = read_particle_file(folder / "truth.star", require=("pose",))
    _, i, j = np.intersect1d(found.index, truth.index, return_indices=True)
    density = read_map(folder / "signal_map.mrc")
    halves = [read_map(maps / f"half{h}.mrc", density.pixel_size_A).data for h in (1, 2)]
    return {
        **pose_scores(found.rotation[i], truth.rotation[j], SYMMETRY),
        **map_scores(halves[0], halves[1], density.data, density.pixel_size_A),
    }


def table(sets: dict[str, Any]) -> str:
    head = ("set", "RELION refines", "median error °", "> 20°", "top views put to side", "map to truth Å")
    words = {"raw": "raw particles", "white": "raw + white-noise auxiliaries", "vae": "raw + VAE auxiliaries"}
    rows = [
        [name, words[row], f"{r['median_deg']:.1f}", f"{100 * r['over_20']:.1f} %", f"{100 * r['top_to_side']:.1f} %",
         f"{r['truth_A']:.1f}"]
        for name, entry in sets.items() for row in ROWS if (r := entry.get(row))
    ]  # fmt: skip
    return harness.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds relion_bench/ (default ../shared)")
    parser.add_argument("--set", default="f1_pref")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "relion_auxiliary.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    bench = (a.shared / "relion_bench").resolve()
    if not (bench / "sets").is_dir() or not (shutil.which("relion_refine_mpi") and harness.open_mpi()):
        harness.skip(f"no particle sets in {bench}, or no relion_refine_mpi on the PATH")
        return
    result: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"sets": {}}
    with harness.work_folder(a.work) as work:
        for row in a.rows.split(","):
            star = bench / "sets" / a.set / "parts.star" if row == "raw" else auxiliary(row, bench, a.set, work)
            found = relion(star, bench, a.set, work, row)
            result["sets"].setdefault(a.set, {})[row] = found
            print(row, {k: round(found[k], 3) for k in ("median_deg", "over_20", "truth_A")}, flush=True)
        result["machine"] = harness.machine()
        harness.write_json(a.out, result)
    print(table(result["sets"]))


if __name__ == "__main__":
    main()
