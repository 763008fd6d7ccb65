"""``cryoiso benchmark``: the speed of a machine at a given box, loop by loop and stage by stage.

The record has the form of a run's ``timing.json``, so that ``cryoiso plan --rates`` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryoiso import __version__
from cryoiso.core import products
from cryoiso.core.config import parse_job
from cryoiso.core.errors import MissingError
from cryoiso.nets.precision import fast_bfloat16
from cryoiso.parallel.launcher import thread_count
from cryoiso.pipeline.planning.ceilings import FLOPS, LOW_FLOPS, Ceilings, demand, flops_of
from cryoiso.pipeline.planning.job_size import Problem
from cryoiso.pipeline.planning.microbenchmarks import timings
from cryoiso.pipeline.planning.rates import CPU, best_time, built_in, of_stages
from cryoiso.pipeline.planning.same_results import KernelComparison
from cryoiso.pipeline.records.environment import computes_on

NETWORKS = ("train", "generate", "unet")
DIAMETER_SHARE = 0.6
"""Of the box, where only a size matters."""
Simulate = Callable[[Path, int, int, float], None]
"""Writes particles.star and truth_map.mrc: folder, particles, box, pixel size."""
Run = Callable[[Path, Path], object]
"""Runs a job file into a folder."""


@dataclass(frozen=True)
class KernelTime:
    """One inner loop, timed."""

    name: str
    seconds_a_unit: float
    rate: float | None
    """in ``unit``"""
    unit: str
    share: float | None
    """of the machine's ceiling"""
    images_per_s: float | None = None
    """of networks: images, or sub-maps"""


def problem(box_px: int, pixel_size_A: float, workflow: str, device: str, particles: int = 1000) -> Problem:
    """The size of a job without files."""
    job = parse_job({"particles": {"file": "-"}, "reference": {"file": "-"}, "run": {"workflow": workflow}})
    return Problem(job, particles, box_px, pixel_size_A, DIAMETER_SHARE * box_px * pixel_size_A, device=device)


def kernel_times(p: Problem, device: str, best: Ceilings, limit_s: float) -> list[KernelTime]:
    """Every inner loop of the workflow, about ``limit_s`` seconds each."""
    times = []
    for name, (units, call) in timings(p, device).items():
        seconds = best_time(call, device, limit_s) / units
        need, images_per_s = demand(name, p.box_px, p.job.refine.padding), None
        if need is None and name.startswith(NETWORKS):
            need = (flops_of(call) / units, LOW_FLOPS if fast_bfloat16(device) else FLOPS)
            images_per_s = 1 / (seconds * units_of_image(name, p, device))
        rate = need[0] / seconds / 1e9 if need else None
        unit = need[1] if need else ""
        times.append(KernelTime(name, seconds, rate, unit, rate / best.of(unit) if rate else None, images_per_s))
    return times


def units_of_image(name: str, p: Problem, device: str) -> float:
    """Pixels of an image, or voxels of a sub-map."""
    from cryoiso.methods.anisotropy.settings import resolve

    return float(resolve(p.job.correct, device).cube_px ** 3 if name.startswith("unet") else p.box_px**2)


def require_same(compared: list[KernelComparison], device: str) -> None:
    """Refuse a device whose results differ from those of the reference.

    Raises:
        MissingError: with what differs, and by how much.
    """
    for comparison in compared:
        if not comparison.agrees:
            raise MissingError(
                f"{computes_on(device)} computes other numbers than it should in {comparison.kernel}: they differ by "
                f"{comparison.difference:.2g} of the largest value, {comparison.allowed:g} is allowed. Do not use "
                f"it; update "
                'its driver and torch, or set run.device = "cpu".',
                code="device-computes-wrong",
            )


def miniature(p: Problem, count: int, simulate: Simulate, run: Run) -> dict[str, Any]:
    """timing.json of a run of ``count`` simulated particles at this size, in a temporary folder."""
    with TemporaryDirectory(prefix="cryoiso-benchmark-") as name:
        folder = Path(name)
        simulate(folder / "set", count, p.box_px, p.pixel_size_A)
        (folder / "job.toml").write_text(_job_text(p))
        run(folder / "job.toml", folder / "run")
        timed: dict[str, Any] = json.loads((folder / "run" / products.TIMING).read_text())
    return timed


def _job_text(p: Problem) -> str:
    """A short run of the workflow: two iterations, and trainings of a few steps."""
    return f"""
[particles]
file = "set/particles.star"
[reference]
file = "set/truth_map.mrc"
[sample]
symmetry = "C3"
[refine]
max_iterations = 3
[auxiliary]
rounds = 1
steps = 40
[run]
workflow = "{p.job.run.workflow}"
"""


def record(
    p: Problem, device: str, best: Ceilings, kernels: list[KernelTime], same: list[KernelComparison],
    small: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """What ``--out`` and ``--json`` write."""
    rates = {**built_in(device).kernels, **{k.name: k.seconds_a_unit for k in kernels}}
    return {
        "schema": 1, "version": __version__, "date": date.today().isoformat(), "hardware": computes_on(device),
        "device": device, "ranks": 1, "hosts": 1, "threads": thread_count(),
        "problem": {
            "particles": 0, "box_px": p.box_px, "symmetry": p.job.sample.symmetry, "workflow": p.job.run.workflow,
        },
        "iterations": None, "nyquist_share": None,
        "kernels": rates,
        "stages": {},  # what a stage of so few particles takes beside its loops would be multiplied in a plan
        "miniature": {"particles": small["problem"]["particles"], "stages": small["stages"]} if small else None,
        "ceilings": {
            "memory_GB_per_s": best.memory, "products_GFLOP_per_s": best.products,
            "bfloat16_products_GFLOP_per_s": best.low_products,
        },
        "measured": {
            k.name: {"seconds_per_unit": k.seconds_a_unit, "rate": k.rate, "rate_unit": k.unit or None,
                     "share_of_ceiling": k.share, "images_per_s": k.images_per_s} for k in kernels
        },
        "compared": {c.kernel: {"difference": c.difference, "allowed": c.allowed} for c in same},
    }  # fmt: skip


def as_lines(record: dict[str, Any]) -> list[str]:
    """The record for people."""
    limits, reference = record["ceilings"], "the CPU" if record["device"] != CPU else "plain torch"
    lines = [
        f"{record['hardware']}, box {record['problem']['box_px']} px",
        f"results agree with those of {reference}: " + ", ".join(
            f"{name} to {comparison['difference']:.0e}" for name, comparison in record["compared"].items()),
        f"at best: copies {limits['memory_GB_per_s']:.1f} GB/s, products {limits['products_GFLOP_per_s']:.0f} GFLOP/s "
        f"({limits['bfloat16_products_GFLOP_per_s']:.0f} in bfloat16)",
        "",
        f"{'loop':<18}{'s a unit':>12}{'rate':>28}{'of best':>10}",
    ]  # fmt: skip
    for name, timed in record["measured"].items():
        rate = f"{timed['rate']:.3g} {timed['rate_unit']}" if timed["rate"] else "-"
        share = f"{timed['share_of_ceiling']:.0%}" if timed["share_of_ceiling"] else "-"
        images = f"  {timed['images_per_s']:.3g} images/s" if timed["images_per_s"] else ""
        lines.append(f"{name:<18}{timed['seconds_per_unit']:>12.3g}{rate:>28}{share:>10}{images}")
    return [*lines, *_of_miniature(record)]


def _of_miniature(record: dict[str, Any]) -> list[str]:
    """Each stage's time beside the sum of its inner loops: the difference does not grow with the particles."""
    small = record["miniature"]
    if small is None:
        return []
    rates = of_stages(record["device"], record["kernels"], [])
    title = f"a run of {small['particles']} particles"
    lines = ["", f"{title:<30}{'s':>8}{'CPU s':>8}{'s in loops':>12}"]
    for name, stage in small["stages"].items():
        loops = rates.seconds(stage["kind"], stage["work"])
        loops_text = "-" if loops is None else f"{loops:.1f}"
        lines.append(f"{name:<30}{stage['seconds']:>8.1f}{stage['cpu_seconds']:>8.1f}{loops_text:>12}")
    return lines
