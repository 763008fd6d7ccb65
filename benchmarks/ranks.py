"""Half-maps on 1, 2, 3 and 4 ranks, on one host and on two: are they the same?

Reconstructs a simulated set and refines it for two iterations with each number of ranks, and compares maps and poses
with those of one process. With --netns, the same on two hosts with addresses of their own on this machine (network
namespaces; needs root).

    python benchmarks/ranks.py [--netns PATH/netns-nodes.sh]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness

BOX, PIXEL_A = 48, 4.5
LIMIT = 1e-5
"""Largest difference allowed, relative to the largest value of the map."""


def commands(data: Path) -> dict[str, list[str]]:
    """The two commands, but for --out."""
    given = str(data / "truth.star")
    return {
        "reconstruct": ["reconstruct", given, "--symmetry", "C3"],
        "refine": ["refine", str(data / "particles.star"), "--ref", str(data / "truth_map.mrc"), "--symmetry", "C3",
                   "--lowpass", "30", "--max-iterations", "2", "--device", "cpu"],
    }  # fmt: skip


def mpiexec() -> str | None:
    """The launcher of the MPI that this Python's mpi4py loads."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def compare(out: Path, reference: Path) -> dict[str, Any]:
    """Differences of the half-maps, relative to the largest value, and whether files are equal bit by bit."""
    import numpy as np

    from cryoiso.io.mrc import read_map

    result: dict[str, Any] = {}
    for name in ("half1.mrc", "half2.mrc"):
        a, b = read_map(out / name).data, read_map(reference / name).data
        result[name] = float(np.abs(a - b).max() / np.abs(b).max())
    names = [n for n in ("half1.mrc", "half2.mrc", "particles.star") if (reference / n).exists()]
    result["same_bits"] = all(_content(out / n) == _content(reference / n) for n in names)
    return result


def _content(path: Path) -> bytes:
    """A file without what may differ between equal results: the labels of an MRC header."""
    data = path.read_bytes()
    return data[:220] + data[1024:] if path.suffix == ".mrc" else data


def one_host(data: Path, work: Path, ranks: list[int]) -> dict[str, Any]:
    """Every command on every number of ranks; one rank runs without MPI."""
    launcher = mpiexec()
    results: dict[str, Any] = {}
    for label, command in commands(data).items():
        for n in ranks:
            if n > 1 and launcher is None:
                harness.skip("no mpiexec; only one rank is run")
                break
            out = work / f"{label}-{n}"
            start = [launcher, "-n", n] if n > 1 else []
            cost = harness.measure([*start, *harness.CRYOISO, *command, "--out", out], work / f"{out.name}.log")
            results[out.name] = {**compare(out, work / f"{label}-1"), **cost.as_dict()}
            print(out.name, results[out.name], file=sys.stderr, flush=True)
    return results


def two_hosts(script: Path, data: Path, work: Path) -> dict[str, Any]:
    """Every command on two ranks on each of two hosts."""
    launcher = mpiexec()
    subprocess.run(["bash", str(script), "up", "2"], check=True, stdout=subprocess.DEVNULL)
    try:
        results = {}
        for label, command in commands(data).items():
            out = work / f"{label}-two-hosts"
            vnode = shutil.which("vnode") or "/usr/local/bin/vnode"
            inner = [launcher, "-launcher", "rsh", "-launcher-exec", vnode, "-hosts", "n1:2,n2:2", "-n", "4"]
            line = " ".join(map(str, [*inner, *harness.CRYOISO, *command, "--out", out]))
            log = work / f"{out.name}.log"
            harness.measure([vnode, "n1", line], log, cwd=work)
            hosts = subprocess.run(
                [vnode, "n1", " ".join([*map(str, inner), "hostname"])], capture_output=True, text=True, check=True
            )
            results[out.name] = {**compare(out, work / f"{label}-1"), "hosts": sorted(hosts.stdout.split())}
            print(out.name, results[out.name], file=sys.stderr, flush=True)
        return results
    finally:
        subprocess.run(["bash", str(script), "down", "2"], check=False, stdout=subprocess.DEVNULL)


def report(results: dict[str, Any]) -> str:
    """A row for each run."""
    rows = []
    for name, r in results.items():
        worst = max(r["half1.mrc"], r["half2.mrc"])
        rows.append([name, f"{worst:.1e}", "yes" if r["same_bits"] else "no", "yes" if worst <= LIMIT else "NO"])
    return harness.markdown(["run", "largest difference", "same bits (maps, poses)", f"within {LIMIT:g}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--netns", type=Path, help="script that makes hosts out of network namespaces: up N, down N")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "ranks.json")
    parser.add_argument("--work", type=Path, help="keep the files here")
    a = parser.parse_args()
    with harness.work_folder(a.work) as work:
        data = work / "particles"
        harness.cryoiso(
            "simulate", "phantom", data, "--n", a.particles, "--box", BOX, "--pixel-size", PIXEL_A, "--halves",
            "--overwrite", log=work / "simulate.log",
        )  # fmt: skip
        results = one_host(data, work, sorted({1, *a.ranks}))
        if a.netns is None or os.geteuid() != 0:
            harness.skip("two hosts: give --netns, as root")
        else:
            results |= two_hosts(a.netns.resolve(), data, work)
    harness.write_json(a.out, {"machine": harness.machine(), "particles": a.particles, "runs": results})
    print(report(results))
    if any(max(r["half1.mrc"], r["half2.mrc"]) > LIMIT for r in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
