"""`cryoiso refine` beside RELION at real boxes: one whole refinement at 128 px, one local search at 256 px.

Haemagglutinin (6WXB, C3, even views, coloured noise, -10 dB), simulated; the same files, the same map low-passed to the
same resolution as the start, one scorer. CPU seconds are user and system time of all processes from start to end,
start-up included; cryoiso's kernels are compiled and cached before.

*refine*: RELION's auto-refinement with the sampling that its interface proposes (order 2, shifts of 5 pixels in steps
of 1, local searches from order 4 on) and no limit to the sampling that it goes to; one leader, one follower a half-set.
It is stopped after --limit-cpu-s CPU seconds of its three processes, and then scored by its last complete iteration.

*search*: one expectation and maximisation step of RELION's `--iter 1` around the true poses against one iteration of
`cryoiso refine --local`, both with the information to two thirds of Nyquist. RELION's is a step of a classification
with one class, since its auto-refinement cannot be ended after an iteration; its sampling is 1.8 degrees in two steps
within 3 standard deviations of 1 degree. A partial comparison: the steps between them differ.

    python benchmarks/relion_real_size.py refine [--particles 500] [--skip-relion]
    python benchmarks/relion_real_size.py search [--particles 40]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, limited
from benchmarks.score import score

EXTENT_A, DIAMETER_A, SYMMETRY, SNR_DB = 335.4, 160, "C3", -10.0
BOXES = {"refine": 128, "search": 256}
PARTICLES = {"refine": 500, "search": 40}
LOWPASS_A = 30.0
SEARCH_A = 3.5
COMMON = "--ctf --norm --scale --sym C3 --flatten_solvent --zero_mask --oversampling 1 --pad 2 --j 1 --pool 3"
COMMON += " --preread_images"
MPI = "--dont_combine_weights_via_disc"


def prepare(box: int, n: int, shared: Path, folder: Path) -> None:
    """Simulated particles with their truth, once."""
    if (folder / "signal_map.mrc").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pixel_A = EXTENT_A / box
    harness.cryoiso(
        "simulate", shared / "data/models/ha/6wxb.pdb.gz", folder, "--box", box, "--pixel-size", pixel_A,
        "--resolution", 2.1 * pixel_A, "--n", n, "--symmetry", SYMMETRY, "--noise", "coloured", "--snr-db", SNR_DB,
        "--seed", 5, "--overwrite", log=folder / "simulate.log",
    )  # fmt: skip
    (folder / "signal_map.mrc").symlink_to("truth_map.mrc")


def relion_refine(folder: Path, work: Path, seed: int, limit_cpu_s: float) -> dict[str, Any]:
    """RELION's auto-refinement, with the CPU time of each rank."""
    command = (
        f"relion_refine_mpi --o {work / 'run'} --auto_refine --split_random_halves --i particles.star "
        f"--ref signal_map.mrc --ini_high {LOWPASS_A} --ctf_corrected_ref --particle_diameter {DIAMETER_A} "
        f"{COMMON} {MPI} "
        "--healpix_order 2 --auto_local_healpix_order 4 --offset_range 5 --offset_step 2 --low_resol_join_halves 40 "
        f"--random_seed {seed}"
    )
    argv = [*(harness.open_mpi() or []), "-np", 3, *command.split()]
    job = limited.measure(argv, work / "relion.log", limit_cpu_s, folder)
    iterations = len(list(work.glob("run_it*_half1_model.star"))) - 1
    converged = (work / "run_class001.mrc").exists()
    stem = "run" if converged else f"run_it{iterations:03d}"
    halves = [work / f"{stem}_half{h}_class001{'_unfil' if converged else ''}.mrc" for h in (1, 2)]
    scores = score(folder, work / f"{stem}_data.star", *halves, SYMMETRY)
    return {
        **scores, **job.cost.as_dict(), "cpu_s_of_ranks": job.cpu_s_of_ranks, "iterations": iterations,
        "converged": converged, "stopped": job.stopped,
        "command": "mpirun -np 3 relion_refine_mpi " + command.split("run ", 1)[1],
    }  # fmt: skip


def cryoiso_refine(folder: Path, work: Path) -> dict[str, Any]:
    """The same with this program, one process and one thread."""
    return _cryoiso(folder, work, "particles.star", "--lowpass", LOWPASS_A)


def relion_search(folder: Path, work: Path, seed: int, limit_cpu_s: float) -> dict[str, Any]:
    """One step of RELION around the true poses."""
    command = (
        f"relion_refine --o {work / 'run'} --iter 1 --K 1 --tau2_fudge 1 --i truth.star --ref signal_map.mrc "
        f"--ini_high {SEARCH_A} --ctf_corrected_ref --particle_diameter {DIAMETER_A} {COMMON} --healpix_order 5 "
        f"--sigma_ang 1 --offset_range 3 --offset_step 2 --random_seed {seed}"
    )
    cost = limited.measure(command.split(), work / "relion.log", limit_cpu_s, folder).cost
    model = work / "run_it001_class001.mrc"
    scores = score(folder, work / "run_it001_data.star", model, model, SYMMETRY)
    poses = {
        key: value for key, value in scores.items() if key in ("particles", "median_deg", "over_10", "shift_median_A")
    }
    return {**poses, **cost.as_dict(), "command": "relion_refine " + command.split("run ", 1)[1]}


def cryoiso_search(folder: Path, work: Path) -> dict[str, Any]:
    """One local iteration of this program."""
    found = _cryoiso(folder, work, "truth.star", "--lowpass", SEARCH_A, "--local", 3, "--max-iterations", 1)
    return {key: value for key, value in found.items() if not key.startswith(("truth", "half", "side", "top", "spin"))}


def _cryoiso(folder: Path, work: Path, particles: str, *options: object) -> dict[str, Any]:
    arguments = [
        "refine", particles, "--ref", "signal_map.mrc", "--out", work / "out", "--symmetry", SYMMETRY, "--diameter",
        DIAMETER_A, "--device", "cpu", *options,
    ]  # fmt: skip
    cost = harness.cryoiso(*arguments, log=work / "cryoiso.log", cwd=folder)  # type: ignore[arg-type]
    out = work / "out"
    scores = score(folder, out / "particles.star", out / "half1.mrc", out / "half2.mrc", SYMMETRY)
    iterations = json.loads((out / "refine.json").read_text())["iterations"]
    words = " ".join(str(word) for word in ("refine", particles, *arguments[2:4], *arguments[6:]))
    return {**scores, **cost.as_dict(), "iterations": len(iterations), "command": f"cryoiso {words}"}


PROGRAMS = {
    "refine": {"relion": relion_refine, "cryoiso": cryoiso_refine},
    "search": {"relion": relion_search, "cryoiso": cryoiso_search},
}


def run(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both programs on one set; what is done is written at once."""
    result = json.loads(a.out.read_text()) if a.out.exists() else {}
    n = a.particles or PARTICLES[a.what]
    box = BOXES[a.what]
    folder = work / f"set{box}-{n}"
    prepare(box, n, a.shared, folder)
    harness.cryoiso("doctor", log=work / "warm.log")
    entry = result.setdefault(a.what, {})
    entry["set"] = {
        "box_px": box, "pixel_A": EXTENT_A / box, "particles": n, "snr_db": SNR_DB, "machine": harness.machine(),
    }  # fmt: skip
    for name, program in PROGRAMS[a.what].items():
        if name in a.skip:
            continue
        place = work / f"{a.what}-{name}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        arguments = (a.seed, a.limit_cpu_s) if name == "relion" else ()
        entry[name] = {**program(folder, place, *arguments), "load_average": harness.machine()["load_average"]}  # type: ignore[operator]
        print(name, json.dumps(entry[name]), file=sys.stderr, flush=True)
        harness.write_json(a.out, result)
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each comparison and program."""
    head = (
        "what",
        "program",
        "particles",
        "median error °",
        "> 10°",
        "map to truth Å",
        "half-maps Å",
        "CPU s",
        "ratio",
    )
    rows = []
    for what, entry in result.items():
        for program in ("relion", "cryoiso"):
            r = entry.get(program)
            if r is None:
                continue
            ratio = r["cpu_s"] / entry["cryoiso"]["cpu_s"] if program == "relion" and "cryoiso" in entry else None
            rows.append([
                f"{what}, {entry['set']['box_px']} px", program, r["particles"], f"{r['median_deg']:.2f}",
                f"{100 * r['over_10']:.1f} %", r.get("truth_A") and f"{r['truth_A']:.2f}",
                r.get("half_masked_A") and f"{r['half_masked_A']:.2f}", f"{r['cpu_s']:.1f}", ratio and f"{ratio:.1f}",
            ])  # fmt: skip
    return harness.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(BOXES))
    parser.add_argument("--particles", type=int)
    parser.add_argument("--shared", type=Path, default=harness.SHARED, help="holds data/models (default ../shared)")
    parser.add_argument("--skip", nargs="*", default=(), choices=("relion", "cryoiso"), help="keep what --out has")
    parser.add_argument("--seed", type=int, default=42, help="RELION's")
    parser.add_argument("--limit-cpu-s", type=float, default=math.inf, help="end RELION after so many CPU seconds")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "relion_real_size.json")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    a = parser.parse_args()
    if "relion" not in a.skip and not (shutil.which("relion_refine_mpi") and harness.open_mpi()):
        harness.skip("RELION's runs: relion_refine_mpi or its mpirun is not on the PATH")
        a.skip = (*a.skip, "relion")
    with harness.work_folder(a.work) as work:
        print(table(run(a, work)))


if __name__ == "__main__":
    main()
