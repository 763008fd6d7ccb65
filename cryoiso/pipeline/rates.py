"""How long a unit of work takes: built in, timed on this machine, or as an earlier run had it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryoiso.core.errors import InputError
from cryoiso.pipeline.estimate import Problem
from cryoiso.pipeline.layout import TIMING
from cryoiso.pipeline.workload import Assumed, Work

CPU, GPU = "cpu", "cuda"
BUILT_IN: dict[str, dict[str, float]] = {
    CPU: {
        "write": 3.4e-9, "read": 1.1e-8, "gemm": 2.0e-11, "local": 5.3e-8, "insert": 3.0e-8, "transform": 2.0e-8,
        "train_small": 3.5e-6, "generate_small": 5.8e-7, "train_paper": 1.07e-4, "generate_paper": 1.73e-5,
        "unet_small": 8.0e-6, "measure": 3.0e-6,
    },
    GPU: {"unet_paper": 6.7e-8},
}  # fmt: skip
BUILT_IN_SOURCE = {
    CPU: "built in, measured on one thread of an AMD EPYC at boxes of 48 to 64 px, 2026-11 (docs/benchmarks.md)",
    GPU: "built in, measured on an NVIDIA H100, 2026-11 (docs/benchmarks.md): the correction's training only",
}


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of each kernel on one rank, and by how much whole stages differ from the sum."""

    kernels: dict[str, float]
    source: str
    spread: float
    """Times may be off by this factor either way."""
    factors: dict[str, float] = field(default_factory=dict)
    """Kind of stage -> measured over predicted."""
    assumed: Assumed = field(default_factory=Assumed)

    def seconds(self, kind: str, work: Work) -> float | None:
        """Of a stage; None where a kernel was never timed on such a machine."""
        if any(units and kernel not in self.kernels for kernel, units in work.items()):
            return None
        total = sum(units * self.kernels[kernel] for kernel, units in work.items() if units)
        return self.factors.get(kind, 1.0) * total


def built_in(device: str) -> Rates:
    """What was measured when this version was made; nothing of it is asserted for other machines."""
    kind = CPU if device == "cpu" else GPU
    return Rates({"fixed": 1.0, **BUILT_IN[kind]}, BUILT_IN_SOURCE[kind], 3.0)


def of_run(path: Path, *, cpu: bool = False) -> Rates:
    """Rates as an earlier run on such a machine wrote them.

    Args:
        path: a run folder, or its timing.json.
        cpu: take the CPU seconds of its rank 0 instead of the wall time: for runs that shared their cores with others.

    Raises:
        InputError: no such file, or nothing in it.
    """
    file = path / TIMING if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        stages = found["stages"]
        base = Rates({"fixed": 1.0, **found["kernels"]}, "", 1.5)
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError("no rates here", file=file, expected="timing.json of a finished run",
                         hint="Every run writes it into its folder when it ends or is stopped.") from None  # fmt: skip
    sums: dict[str, list[float]] = {}
    for facts in stages.values():
        predicted = base.seconds(facts["kind"], facts["work"])
        if predicted and not facts["resumed"]:
            pair = sums.setdefault(facts["kind"], [0.0, 0.0])
            pair[0] += facts["cpu_seconds" if cpu else "seconds"]
            pair[1] += predicted
    factors = {kind: took / predicted for kind, (took, predicted) in sums.items() if predicted > 0}
    words = f"run of {found['problem']['particles']:,} particles, {found['problem']['box_px']} px, {found['date']}, "
    words += f"{found['ranks']} rank(s) of {found['threads']} thread(s), {found['hardware']}"
    assumed = Assumed(found["iterations"] or Assumed().iterations, found["nyquist_share"] or Assumed().nyquist_share)
    return replace(base, source=words, factors=factors, assumed=assumed)


def measure(p: Problem, device: str, *, limit_s: float = 1.0) -> Rates:
    """Times the kernels on this machine at the job's size, about ``limit_s`` seconds each.

    What is not timed here (writing, measuring maps) keeps the built-in rate where there is one.
    """
    from cryoiso.pipeline.kernels import timings
    from cryoiso.pipeline.origin import computes_on

    kernels = {**built_in(device).kernels}
    for name, (units, call) in timings(p, device).items():
        kernels[name] = best_time(call, device, limit_s) / units
    return Rates(kernels, f"measured on this machine: {computes_on(device)}", 2.0)


def best_time(call: Callable[[], Any], device: str, limit_s: float) -> float:
    """The shortest of some repetitions, the first (compilation, memory) left out."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    taken = 0.0
    found: list[float] = []
    while not found or (taken < limit_s and len(found) < 20):
        found.append(once())
        taken += found[-1]
    return min(found, default=first)
