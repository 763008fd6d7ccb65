"""One iteration of a refinement on 1 rank, on 1 rank of 2 threads, on 2 ranks, and on 2 ranks of two network hosts.

Each rank notes its wall and CPU time inside the command (without start-up) and how long it was inside collective calls,
where it waits for the others or exchanges data; `other` is wall time without them. On a shared machine CPU seconds
count, and waits contain the time in which another rank was not given a core. Half-maps and poses are compared with
those of one rank. Two hosts are network namespaces of this machine (--netns, needs root).

    python benchmarks/strong_scaling.py [--box 128] [--particles 1500] [--netns PATH/netns-nodes.sh]
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
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COLLECTIVES = (
    "barrier", "wait_for_all", "bcast", "gather", "allgather", "sum_to", "sum_all", "concat_all", "max_all",
    "stop_requested",
)  # fmt: skip
LAYOUTS = {"1 rank": (1, 1), "1 rank of 2 threads": (1, 2), "2 ranks": (2, 1)}
TWO_HOSTS = "2 ranks on two hosts"
EXTENT_A, DIAMETER_A, SHARPEST_PX = 335.4, 160, 2.4
"""Finest information in pixels."""


def child(folder: Path, arguments: list[str]) -> None:
    """The program, with the time of this rank in its collectives."""
    from cryoiso.cli.main import main as cryoiso
    from cryoiso.parallel.context import MpiContext, get_context

    seconds = dict.fromkeys(COLLECTIVES, 0.0)
    depth = 0

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            started, depth = time.perf_counter(), depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:  # one may be made of others
                    seconds[name] += time.perf_counter() - started

        return call

    for name in COLLECTIVES:
        setattr(MpiContext, name, timed(name, getattr(MpiContext, name)))
    comm = get_context()
    wall, cpu = time.perf_counter(), time.process_time()
    sys.argv[1:] = arguments
    try:
        cryoiso()
    finally:
        facts = {
            "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
            "in_collectives_s": sum(seconds.values()), "collectives_s": seconds,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip
        (folder / f"rank{comm.rank}.json").write_text(json.dumps(facts))


def command(box: int, data: Path, out: Path) -> list[object]:
    return [
        "refine", data / "truth.star", "--ref", data / "signal_map.mrc", "--symmetry", "C3", "--diameter", DIAMETER_A,
        "--lowpass", SHARPEST_PX * EXTENT_A / box, "--local", 3, "--max-iterations", 1, "--device", "cpu", "--out", out,
    ]  # fmt: skip


def one_layout(name: str, box: int, data: Path, work: Path) -> dict[str, Any]:
    """A row of the table."""
    from benchmarks import harness
    from benchmarks.ranks import compare, mpiexec

    ranks, threads = LAYOUTS.get(name, (2, 1))
    out = work / name.replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    timed = out.with_name(f"{out.name}-times")
    timed.mkdir(exist_ok=True)
    words: list[object] = [sys.executable, __file__, "--child", timed, *command(box, data, out)]
    log = out.with_suffix(".log")
    load = harness.machine()["load_average"]
    if name == TWO_HOSTS:
        vnode = shutil.which("vnode") or "/usr/local/bin/vnode"
        inner = [mpiexec(), "-launcher", "rsh", "-launcher-exec", vnode, "-hosts", "n1:1,n2:1", "-n", 2, *words]
        cost = harness.measure([vnode, "n1", " ".join(map(str, inner))], log, cwd=work)
    else:
        many = {key: str(threads) for key in harness.ONE_THREAD}
        cost = harness.measure([*([mpiexec(), "-n", ranks] if ranks > 1 else []), *words], log, env=many)
    times = [json.loads(path.read_text()) for path in sorted(timed.glob("rank*.json"))]
    return {**cost.as_dict(), "ranks": times, "load_average": load, **compare(out, work / "1-rank")}


def table(rows: dict[str, Any]) -> str:
    from benchmarks import harness

    def each(row: dict[str, Any], key: str) -> str:
        return ", ".join(f"{times[key]:.1f}" for times in row["ranks"])

    head = [
        "layout",
        "CPU s",
        "wall s",
        "peak MiB",
        "CPU s of each rank",
        "in collectives s",
        "load",
        "half-maps, poses",
    ]
    cells = [
        [name, f"{r['cpu_s']:.1f}", f"{r['wall_s']:.0f}", each(r, "peak_mib"),
         each(r, "cpu_s"), each(r, "in_collectives_s"), r["load_average"],
         "same bits" if r["same_bits"] else f"{max(r['half1.mrc'], r['half2.mrc']):.1e}"]
        for name, r in rows.items()
    ]  # fmt: skip
    return harness.markdown(head, cells)


def main() -> None:
    from benchmarks import harness
    from benchmarks.relion_real_size import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--particles", type=int, default=1500)
    parser.add_argument("--netns", type=Path, help="script that makes hosts out of network namespaces: up N, down N")
    parser.add_argument("--shared", type=Path, default=harness.SHARED)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "strong_scaling.json")
    parser.add_argument("--work", type=Path, help="keep the files here")
    a = parser.parse_args()
    with harness.work_folder(a.work) as work:
        data = work / f"set{a.box}"
        prepare(a.box, a.particles, a.shared, data)
        rows: dict[str, Any] = {}

        def note(name: str) -> None:
            rows[name] = one_layout(name, a.box, data, work)
            print(name, rows[name], file=sys.stderr, flush=True)
            harness.write_json(a.out, {
                "machine": harness.machine(), "box_px": a.box, "particles": a.particles, "rows": rows,
            })  # fmt: skip

        for name in LAYOUTS:
            note(name)
        if a.netns is None or os.geteuid() != 0:
            harness.skip("two hosts: give --netns, as root")
        else:
            subprocess.run(["bash", str(a.netns.resolve()), "up", "2"], check=True, stdout=subprocess.DEVNULL)
            try:
                note(TWO_HOSTS)
            finally:
                subprocess.run(["bash", str(a.netns.resolve()), "down", "2"], check=False, stdout=subprocess.DEVNULL)
    print(table(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
