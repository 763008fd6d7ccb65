"""How long a unit of work takes: built in, timed on this machine, or as an earlier run had it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryoiso.core import products
from cryoiso.core.errors import InputError, UsageError
from cryoiso.io.regular_file import read_regular_text
from cryoiso.pipeline.planning.job_size import Problem
from cryoiso.pipeline.planning.workload import Assumed, WorkUnits

CPU, GPU = "cpu", "cuda"
HOST = ("write", "prepare", "measure")
"""Kernels that no GPU computes."""
BUILT_IN: dict[str, dict[str, float]] = {
    CPU: {
        "write": 3.4e-9, "prepare": 1.8e-7, "read": 1.1e-8, "gemm": 2.0e-11, "local": 1.1e-8, "insert": 3.0e-8,
        "transform": 2.0e-8, "train_small": 1.7e-6, "generate_small": 5.8e-7, "train_paper": 1.07e-4,
        "generate_paper": 1.73e-5, "unet_small": 8.0e-6, "unet_paper": 1.05e-4, "measure": 3.0e-6,
    },
    GPU: {"unet_paper": 6.7e-8},
}  # fmt: skip
BUILT_IN[GPU] |= {kernel: BUILT_IN[CPU][kernel] for kernel in HOST}
BUILT_IN_SOURCE = {
    CPU: "built in, measured on one thread of an AMD EPYC at boxes of 48 to 64 px, 2026-11 (docs/benchmarks.md)",
    GPU: "built in (docs/benchmarks.md): the correction's training on an NVIDIA H100, and what is done on CPUs; the "
    "rest was never timed on a GPU",
}
TIMES_FASTER = {
    "read": 4.0, "gemm": 300.0, "local": 100.0, "insert": 100.0, "transform": 100.0, "train_small": 100.0,
    "generate_small": 100.0, "train_paper": 1000.0, "generate_paper": 1000.0, "unet_small": 1000.0,
}  # fmt: skip
"""A GPU against one thread: guesses of the order of magnitude. They only say how a measured time is shared among the
kernels of a stage, and what a run goes by until its own stages have told; ``plan`` prints no time made of them."""
FIT_ROUNDS = 200


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
    device: str = ""
    """CPU or GPU, where they were measured"""

    def seconds(self, kind: str, work: WorkUnits) -> float | None:
        """Of a stage; None where a kernel was never timed on such a machine."""
        if any(units and kernel not in self.kernels for kernel, units in work.items()):
            return None
        total = sum(units * self.kernels[kernel] for kernel, units in work.items() if units)
        return self.factors.get(kind, 1.0) * total


def built_in(device: str) -> Rates:
    """What was measured when this version was made; nothing of it is asserted for other machines."""
    kind = kind_of_device(device)
    return Rates({"fixed": 1.0, **BUILT_IN[kind]}, BUILT_IN_SOURCE[kind], 3.0, device=kind)


def kind_of_device(device: str) -> str:
    """CPU or GPU, of "cpu" or "cuda..."."""
    return CPU if device == CPU else GPU


def guessed(device: str) -> Rates:
    """A rate for every kernel: what was built in and, for GPUs, guesses (see ``TIMES_FASTER``)."""
    known = built_in(device)
    if device == CPU:
        return known
    guesses = {kernel: BUILT_IN[CPU][kernel] / times for kernel, times in TIMES_FASTER.items()}
    return replace(known, kernels={**guesses, **known.kernels}, spread=10.0)


def of_run(path: Path, *, cpu: bool = False) -> Rates:
    """Rates as an earlier run on such a machine wrote them.

    Kernels that had no rate when it ran (most of them on GPUs) get one from the times of its own stages.

    Args:
        path: a run folder, its timing.json, or a file that ``cryoiso benchmark`` wrote.
        cpu: take the CPU seconds of its rank 0 instead of the wall time: for runs that shared their cores with others.

    Raises:
        InputError: no such file, or nothing in it.
    """
    file = path / products.TIMING if path.is_dir() else path
    try:
        record = json.loads(read_regular_text(file))
        return _of_facts(record, "cpu_seconds" if cpu else "seconds")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            "no rates in this file",
            file=file,
            expected="timing.json of a finished run, or a file of 'cryoiso benchmark --out'",
            hint="Every run writes timing.json into its folder when it ends or is stopped.",
            code="rates-missing",
        ) from None


def _of_facts(record: dict[str, Any], what: str) -> Rates:
    if "measured" in record and what == "cpu_seconds":
        raise UsageError("--cpu: a benchmark's rates are wall times", code="options-conflict")
    if what == "cpu_seconds" and record["device"] != CPU:
        raise UsageError("--cpu: this run used GPUs, whose time is not in its CPU seconds", code="options-conflict")
    stages = [facts for facts in record["stages"].values() if tells_rates(facts, what)]
    timed = [(facts["work"], float(facts[what])) for facts in stages]
    base = of_stages(record["device"], record["kernels"], timed)
    sums: dict[str, list[float]] = {}
    for facts in stages:
        predicted = base.seconds(facts["kind"], facts["work"])
        if predicted:
            pair = sums.setdefault(facts["kind"], [0.0, 0.0])
            pair[0] += facts[what]
            pair[1] += predicted
    factors = {kind: took / predicted for kind, (took, predicted) in sums.items()}
    if "measured" in record:
        words = f"cryoiso benchmark at {record['problem']['box_px']} px, {record['date']}, {record['hardware']}"
        return replace(base, source=words, spread=2.0)
    words = f"run of {record['problem']['particles']:,} particles, {record['problem']['box_px']} px, {record['date']}, "
    words += f"{record['ranks']} rank(s) of {record['threads']} thread(s), {record['hardware']}"
    assumed = Assumed(record["iterations"] or Assumed().iterations, record["nyquist_share"] or Assumed().nyquist_share)
    return replace(base, source=words, factors=factors, assumed=assumed)


def tells_rates(facts: dict[str, Any], what: str) -> bool:
    """Whether a stage's record in timing.json is of a whole stage that was really done."""
    return bool(not facts["resumed"] and facts[what] > 0 and any(facts["work"].values()))


def of_stages(device: str, kernels: dict[str, float], timed: list[tuple[WorkUnits, float]]) -> Rates:
    """Rates that were known, and of every other kernel in the stages one that the stages' seconds are explained by.

    A stage has several kernels and one time, so the times alone do not tell how they share it. The fit begins with
    ``guessed`` rates and moves those that were not known, each by the geometric mean of measured over predicted of the
    stages it works in, weighted by its share of them (multiplicative algebraic reconstruction: Gordon, Bender & Herman
    1970). One stage alone keeps their proportions. A kernel that no stage used stays without a rate.

    Args:
        device: "cpu" or "cuda...".
        kernels: known rates, which stay as they are.
        timed: work and seconds of stages.
    """
    host = {kernel: BUILT_IN[CPU][kernel] for kernel in HOST}
    known = {"fixed": 1.0, **(host if device != CPU else BUILT_IN[CPU]), **kernels}
    start = guessed(device).kernels
    free = {k: start[k] for work, _ in timed for k, units in work.items() if units and k not in known and k in start}
    for _ in range(FIT_ROUNDS if free else 0):
        pull = {kernel: [0.0, 0.0] for kernel in free}
        rates = {**known, **free}
        for work, seconds in timed:
            parts = {k: units * rates.get(k, 0.0) for k, units in work.items() if units}
            total = sum(parts.values())
            for kernel in free.keys() & parts.keys():
                share = parts[kernel] / total
                pull[kernel][0] += share * math.log(seconds / total)
                pull[kernel][1] += share
        free = {k: rate * math.exp(pull[k][0] / max(pull[k][1], 1e-300)) for k, rate in free.items()}
    return Rates({**known, **free}, "", 2.0 if free else 1.5, device=kind_of_device(device))


def measure(p: Problem, device: str, *, limit_s: float = 1.0) -> Rates:
    """Times the kernels on this machine at the job's size, about ``limit_s`` seconds each.

    Not in it: the disks, and what the kernels wait for between each other.
    """
    from cryoiso.pipeline.planning.microbenchmarks import timings
    from cryoiso.pipeline.records.environment import computes_on

    kernels = {**built_in(device).kernels}
    for name, (units, call) in timings(p, device).items():
        kernels[name] = best_time(call, device, limit_s) / units
    return Rates(kernels, f"measured on this machine: {computes_on(device)}", 2.0, device=kind_of_device(device))


def best_time(call: Callable[[], Any], device: str, limit_s: float) -> float:
    """The shortest of some repetitions, the first (compilation, memory) left out."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        call()
        if device != CPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    taken = 0.0
    times: list[float] = []
    while not times or (taken < limit_s and len(times) < 20):
        times.append(once())
        taken += times[-1]
    return min(times, default=first)
