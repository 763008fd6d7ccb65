"""3DFSC: ours beside the published program (github.com/nysbc/Anisotropy, Tan et al. 2017), on the same half-maps.

The half-maps agree beyond 0.143 up to the last shell, so that both programs fill all shells. Both are timed in a
process of their own after a small map has compiled their kernels, from maps in memory (ours) or in files (theirs,
which reads them in no time) to the 3DFSC. The program is of 2017 and runs without its GPU modules; `load` says what is
respelt for today's numba and numpy. Its work grows with the fifth power of the box, so it is not run at 400 px: what it
would take is said as an estimate.

    git clone https://github.com/nysbc/Anisotropy
    python benchmarks/fsc3d.py --program Anisotropy/ThreeDFSC/programs [--boxes 64,128] [--large 400] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

PIXEL_A = 1.0
SMALL = 32
"""Box whose 3DFSC compiles everything first."""


def write_halves(folder: Path, box: int) -> list[Path]:
    """Noise that agrees to FSC 0.5 in all shells."""
    from cryoiso.io.mrc import write_map

    rng = np.random.default_rng(box)
    signal = rng.standard_normal((box,) * 3, np.float32)
    paths = [folder / f"half{h}_{box}.mrc" for h in (1, 2)]
    for path in paths:
        if not path.exists():
            write_map(path, signal + rng.standard_normal((box,) * 3, np.float32), PIXEL_A)
    return paths


def ours(folder: Path, box: int) -> dict[str, float]:
    """Seconds of `fsc3d`, without reading; writes the volume beside the maps."""
    from cryoiso.io.mrc import read_map, write_map
    from cryoiso.metrics.directional_fsc import EXACT_SHELL, fsc3d

    for size in (SMALL, 2 * EXACT_SHELL + 8):
        fsc3d(*(read_map(p).data for p in write_halves(folder, size)))
    maps = [read_map(p).data for p in write_halves(folder, box)]
    found = []
    for _ in range(3):
        cpu, wall = time.process_time(), time.perf_counter()
        volume = fsc3d(*maps)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    write_map(folder / f"ours_{box}.mrc", volume, PIXEL_A)
    return dict(zip(("wall_s", "cpu_s"), min(found), strict=True))


def theirs(program: Path, folder: Path, box: int) -> dict[str, float]:
    """Seconds of the published program's own main(), in this process."""
    os.environ["MPLBACKEND"] = "Agg"
    sys.path.insert(0, str(program))
    published = load(program / "ThreeDFSC_ReleaseAug2017.py")
    os.chdir(folder)
    published["main"](*map(str, write_halves(folder, SMALL)), f"warm{box}", PIXEL_A, 20.0)
    paths = write_halves(folder, box)
    cpu, wall = time.process_time(), time.perf_counter()
    published["main"](*map(str, paths), f"box{box}", PIXEL_A, 20.0)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def load(source: Path) -> dict[str, Any]:
    """The program's names, after what today's numba and numpy do not take any more was put as they want it.

    That is spelling only: shapes and results as tuples, the names of number types. Everything stays compiled.
    """
    import types

    import numba

    for name in ("cuda_kernels", "cuda_functions"):
        sys.modules[name] = types.ModuleType(name)
    numba.autojit = numba.njit
    text = source.read_text()
    text = re.sub(r"np\.(zeros|empty)\(\[([^\]]*)\]", r"np.\1((\2)", text)
    text = re.sub(r"return \[([^\]]*)\]", r"return (\1)", text)
    text = re.sub(r"dtype ?= ?(int|float)\b", r"dtype=np.\1", text)
    text = re.sub(r"np\.(int|float)\b", r"np.\g<1>64", text)
    names: dict[str, Any] = {"__name__": "published", "__file__": str(source)}
    exec(compile(text, str(source), "exec"), names)
    return names


def in_a_process(kind: str, box: int, folder: Path, program: Path | None, threads: int) -> dict[str, float]:
    """Runs this script for one measurement."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    env = {**harness.environment(), **dict.fromkeys(names, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}
    words = [sys.executable, __file__, "--measure", kind, "--boxes", str(box), "--work", str(folder)]
    words += ["--program", str(program)] if program else []
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise harness.Failed(done.stderr[-2000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    return {k: round(v, 3) for k, v in json.loads(lines[-1].removeprefix("MEASURED ")).items()}


def agreement(folder: Path, box: int) -> dict[str, float]:
    """Correlation and difference of the two volumes inside the last full shell; theirs has its lines padded by two."""
    from cryoiso.io.mrc import read_map

    mine = read_map(folder / f"ours_{box}.mrc").data[1:, 1:, 1:]
    other = np.asarray(read_map(folder / f"Results_box{box}" / f"ResEMbox{box}Out.mrc").data)
    k = np.arange(1, box) - box // 2
    shell = np.rint(np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2))
    inside = (shell > 2) & (shell < box // 2 - 2) & (other != 0)
    a, b = mine[inside], other[inside]
    return {"filled": float(inside.mean()), "mean": float(a.mean()), "their_mean": float(b.mean()),
            "rms_difference": float(np.sqrt(((a - b) ** 2).mean()))}  # fmt: skip


def compare(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"threads": a.threads, "boxes": {}, "machine": harness.machine()}
    for box in (int(b) for b in a.boxes.split(",")):
        row: dict[str, Any] = {"ours": in_a_process("ours", box, work, None, a.threads)}
        if a.program:
            row["published"] = in_a_process("theirs", box, work, a.program, a.threads)
            row["times_less_cpu"] = round(row["published"]["cpu_s"] / row["ours"]["cpu_s"], 1)
            row["times_less_wall"] = round(row["published"]["wall_s"] / row["ours"]["wall_s"], 1)
            row["volumes"] = agreement(work, box)
        result["boxes"][box] = row
        print(box, json.dumps(row), flush=True)
    if a.large:
        row = {"ours": in_a_process("ours", a.large, work, None, a.threads)}
        last = max(result["boxes"])
        if a.program:
            seconds = result["boxes"][last]["published"]["cpu_s"] * (a.large / last) ** 5
            row["published_cpu_s_estimated"] = round(seconds)
        result["boxes"][a.large] = row
        print(a.large, json.dumps(row), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, help="ThreeDFSC/programs of the published program")
    parser.add_argument("--boxes", default="64,128")
    parser.add_argument("--large", type=int, default=400, help="box of a run of ours alone; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "fsc3d.json")
    parser.add_argument("--work", type=Path, help="keep the maps here")
    parser.add_argument("--measure", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.program:
        a.program = a.program.resolve()
    if a.measure:
        a.work = a.work.resolve()
        box, run = int(a.boxes), ours if a.measure == "ours" else lambda *args: theirs(a.program, *args)
        print("MEASURED " + json.dumps(run(a.work, box)), file=sys.__stdout__)  # theirs closes stdout
        return
    if not a.program:
        harness.skip("no published program; give --program")
    with harness.work_folder(a.work) as work:
        harness.write_json(a.out, compare(a, work))


if __name__ == "__main__":
    main()
