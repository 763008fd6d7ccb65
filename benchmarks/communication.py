"""What the ranks exchange, how long it takes and what it needs: the basis of docs/scaling.md.

Measures, on 1, 2 and 4 ranks of one host and, with --netns, on 2 x 2 ranks of two network hosts: the reduction of the
back-projection sums of one half-map (64-bit fixed point, as a refinement makes them for this box with padding 2), the
broadcast of a map, the exchange of a million poses, and the question whether anybody was told to stop. The sums are
compared with what they must be. Then a model with one constant is fitted to the reductions:

    seconds = 2 (R - 1) / R * bytes / rate * max(1, R / cores)        rate: bytes a second that one rank sends and adds

(each rank sends and receives the array about twice; what a core cannot do at the same time waits).

    python benchmarks/communication.py [--boxes 64 128 256] [--netns PATH/netns-nodes.sh]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.ranks import mpiexec

REPEATS = 3
POSES = 1_000_000
PADDING = 2


def worker(boxes: list[int], out: Path) -> None:
    """Runs on every rank; rank 0 writes what it found."""
    import numpy as np

    from cryoiso.parallel.context import get_context

    comm = get_context()
    before = _peak_mib()
    found: dict[str, Any] = {"ranks": comm.size, "hosts": len(comm.nodes), "library": comm.library(), "boxes": {}}
    for box in boxes:
        grid = _sums(box)
        facts: dict[str, Any] = {"padded_px": box * PADDING, "bytes": grid.nbytes}
        facts["reduce_s"] = _timed(comm, lambda grid=grid: _reduced(comm, grid), lambda grid=grid: _filled(comm, grid))
        facts["peak_mib_a_rank"] = max(comm.allgather(_peak_mib()))
        volume = np.full((box,) * 3, comm.rank, np.float32)
        facts["bcast_map_s"] = _timed(comm, lambda volume=volume: comm.bcast(volume, 0))
        found["boxes"][str(box)] = facts
        del grid, volume
    share = np.zeros((POSES // comm.size, 14))
    found["poses"] = {"bytes": share.nbytes * comm.size, "s": _timed(comm, lambda: comm.concat_all(share))}
    found["stop_requested_us"] = 1e6 * _timed(comm, lambda: [comm.stop_requested() for _ in range(100)]) / 100
    found["peak_mib_before"] = before
    if comm.rank == 0:
        out.write_text(json.dumps(found))


def _sums(box: int) -> Any:
    """The grid of a half-set's sums, as the back-projection of this box makes it; its memory has been touched."""
    from cryoiso.physics.backproject import SliceAccumulator

    grid = SliceAccumulator.empty(box, padding=PADDING).grid.numpy()
    grid.fill(0)
    return grid


def _filled(comm: Any, grid: Any) -> None:
    """What is summed: rank + 1; a sum that is there already must be R (R + 1) / 2 everywhere."""
    right = comm.size * (comm.size + 1) // 2
    if comm.rank == 0 and grid.flat[0] and not grid.min() == grid.max() == right:
        raise SystemExit("the sum over ranks is wrong")
    grid.fill(comm.rank + 1)


def _reduced(comm: Any, grid: Any) -> None:
    comm.sum_to(grid, 0)


def _timed(comm: Any, work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
    """The fastest of some repetitions; each takes as long as its slowest rank."""
    best = float("inf")
    for _ in range(REPEATS):
        prepare()
        comm.barrier()
        began = time.perf_counter()
        work()
        best = min(best, comm.max_all(time.perf_counter() - began))
    return best


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(launcher: list[Any], boxes: list[int], work: Path, name: str, wrap: list[str] | None = None) -> dict:
    """What the workers of one launch found."""
    out = work / f"{name}.json"
    words = [*launcher, sys.executable, Path(__file__).resolve(), "--worker", out, "--boxes", *boxes]
    line = list(map(str, words)) if wrap is None else [*wrap, " ".join(map(str, words))]
    harness.measure(line, work / f"{name}.log", cwd=work)
    found = json.loads(out.read_text())
    print(name, found, file=sys.stderr, flush=True)
    return found


def two_hosts(script: Path, boxes: list[int], work: Path) -> dict[str, Any]:
    """Two ranks on each of two hosts with addresses of their own."""
    vnode = shutil.which("vnode") or "/usr/local/bin/vnode"
    subprocess.run(["bash", str(script), "up", "2"], check=True, stdout=subprocess.DEVNULL)
    try:
        launcher = [mpiexec(), "-launcher", "rsh", "-launcher-exec", vnode, "-hosts", "n1:2,n2:2", "-n", "4"]
        return measured(launcher, boxes, work, "two-hosts", [vnode, "n1"])
    finally:
        subprocess.run(["bash", str(script), "down", "2"], check=False, stdout=subprocess.DEVNULL)


def fitted(runs: dict[str, Any], cores: int) -> dict[str, float]:
    """Bytes a second by run, by least squares over its boxes, and how far off the model is at the worst."""
    rates = {}
    for name, run in runs.items():
        ranks = run["ranks"]
        if ranks == 1:
            continue
        work = [2 * (ranks - 1) / ranks * max(1.0, ranks / cores) * b["bytes"] for b in run["boxes"].values()]
        seconds = [b["reduce_s"] for b in run["boxes"].values()]
        rates[name] = sum(w * w for w in work) / sum(w * s for w, s in zip(work, seconds, strict=True))
    return rates


def table(runs: dict[str, Any]) -> str:
    head = ["", "padded grid", "sums of a half", "reduce s", "GB/s", "peak MiB a rank", "broadcast of the map s"]
    rows = [
        [name, f"{b['padded_px']}³", f"{b['bytes'] / 1e9:.2f} GB", f"{b['reduce_s']:.3f}",
         f"{b['bytes'] / b['reduce_s'] / 1e9:.2f}", f"{b['peak_mib_a_rank']:,.0f}", f"{b['bcast_map_s']:.4f}"]
        for name, run in runs.items() for b in run["boxes"].values()
    ]  # fmt: skip
    return harness.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--netns", type=Path, help="script that makes hosts out of network namespaces: up N, down N")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "communication.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker is not None:
        worker(a.boxes, a.worker)
        return
    runs: dict[str, Any] = {}
    with harness.work_folder(None) as work:
        for n in a.ranks:
            if n > 1 and mpiexec() is None:
                harness.skip("no mpiexec; only one rank is run")
                break
            runs[f"{n} ranks"] = measured([mpiexec(), "-n", n] if n > 1 else [], a.boxes, work, f"ranks-{n}")
        if a.netns is None or os.geteuid() != 0:
            harness.skip("two hosts: give --netns, as root")
        else:
            runs["2 x 2 ranks, two hosts"] = two_hosts(a.netns.resolve(), a.boxes, work)
    machine = harness.machine()
    rates = fitted(runs, machine["cores"])
    harness.write_json(a.out, {"machine": machine, "runs": runs, "bytes_a_second": rates})
    print(table(runs))
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.2f} GB/s a rank")


if __name__ == "__main__":
    main()
