"""Training of the anisotropy correction beside the published spIsoNet: same machine, same size of network, one run.

Sub-maps a second of one optimisation step with everything that belongs to it: reading or cutting the sub-maps,
bringing them to the GPU, three passes through the network, both losses against both halves, backward, optimiser. The
networks have 64, 128, 256 and 320 channels; losses, batch (4 on one GPU, in two halves there) and sub-maps (64 px) are
the published ones; on a CPU 2 sub-maps of 32 px. Variants "completion, ..." are steps of ``cryoiso correct``'s default
method on the same half-maps, network and sub-maps: one pass for a sub-map, and the map turned, measured and filled anew
by the solvent as often as the method does it. The programs take turns within each round; medians of the rounds; the
first step (which compiles) is reported apart. On a CPU one thread and CPU time count, on a GPU wall time between
synchronisations.

On a GPU both training loops then run by themselves, without any of this file's stepping: ``train`` of this repository
and the training function of the published one.

    python benchmarks/correct_throughput.py --published CHECKOUT_OF_SPISONET [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness, spisonet

ENDLESS, SEED, DISTINCT = 10**6, 3, 32
STARTED = time.monotonic()


@dataclass
class Variant:
    """One implementation in one precision, ready to make steps."""

    name: str
    step: Callable[[], Any]
    parameters: int
    first_step_s: float
    peak_mib: float | None
    gflop_a_step: float | None


class TrainingCubes:
    """Two noisy half-maps and a filter without a cone, for both programs."""

    def __init__(self, cube: int) -> None:
        import numpy as np

        from cryoiso.methods.anisotropy.filter import missing_cone, on_grid
        from cryoiso.methods.anisotropy.submaps import GreyScale, SubMaps, particle_region
        from cryoiso.physics.phantom import phantom_map

        box = cube * 3 // 2
        rng = np.random.default_rng(SEED)
        clean = np.asarray(phantom_map(box, 192.0 / box, 12.0).data, np.float32)
        self.inside = particle_region(None, box)
        maps = [clean + clean.std() * rng.standard_normal(clean.shape).astype(np.float32) for _ in (1, 2)]
        scale = GreyScale.of(maps, self.inside)
        self.maps = [scale.normalised(m) for m in maps]
        self.transfer = missing_cone(box, 30.0)
        self.small = np.asarray(on_grid(self.transfer, cube), np.float32)
        drawn = SubMaps(self.inside, cube, SEED, "both", "axes")
        corners = [drawn.draw(i)[0] for i in range(DISTINCT)]
        self.pairs = np.stack([[drawn.cut(m, corner) for m in self.maps] for corner in corners])


def our_task(cubes: TrainingCubes, a: argparse.Namespace, name: str) -> tuple[Any, Any]:
    """The task of a correction at the published size, and its settings."""
    import numpy as np

    from cryoiso.core.config import CorrectSection
    from cryoiso.methods.anisotropy.completion import CompletionTask
    from cryoiso.methods.anisotropy.settings import resolve
    from cryoiso.methods.anisotropy.solvent import Solvent
    from cryoiso.methods.anisotropy.task import CorrectionTask

    method = "completion" if name.startswith("completion") else "published"
    section = CorrectSection(preset="paper", mode="paired", cube_px=a.cube, batch=a.batch, method=method)
    settings = resolve(section, a.place)
    if method == "completion":
        solvent = Solvent(cubes.transfer, np.ones_like(cubes.transfer), a.place)
        return CompletionTask(cubes.maps, solvent, cubes.inside, settings, SEED, device=a.place, label="both"), settings
    task = CorrectionTask(cubes.maps, cubes.transfer, cubes.inside, settings, SEED, device=a.place, label="both")
    return task, settings


def loop_settings(settings: Any, name: str, steps: int) -> Any:
    """As ``cryoiso correct`` trains, but for precision and compilation."""
    from cryoiso.train.loop import LoopSettings

    return LoopSettings(
        steps=steps, learning_rate=settings.learning_rate, schedule="constant", seed=SEED, log_every=5, clip_norm=1.0,
        amp="bf16" in name, compile="compile" in name, channels_last="channels first" not in name,
        flat_window=steps + 1,
    )  # fmt: skip


class Ours:
    """The steps of ``train.loop.train`` one by one, without its records and checkpoints."""

    def __init__(self, cubes: TrainingCubes, a: argparse.Namespace, name: str, stack: ExitStack) -> None:
        from cryoiso.parallel.ddp import TrainingGroup
        from cryoiso.train.prefetch import Prefetcher
        from cryoiso.train.step import Readback, Stepper, channels_last_of, seed_torch, try_compiled

        self.task, settings = our_task(cubes, a, name)
        self.settings = loop_settings(settings, name, ENDLESS)
        seed_torch(SEED, "parameters", 0)
        self.task.start(0)
        module = self.task.module.to(a.place)
        if self.settings.channels_last:
            module = module.to(memory_format=channels_last_of(module))
        module.train()
        self.parameters = sum(p.numel() for p in module.parameters())
        s = self.settings
        self.stepper = Stepper(module, TrainingGroup((0,), 0, a.place), s.learning_rate, s.clip_norm, s.amp)
        self.readback, self.number = Readback(self.stepper.on_gpu), 0
        prefetcher = Prefetcher(self.task.prepare, 0, ENDLESS, a.place, channels_last=s.channels_last)
        self.batches = stack.enter_context(prefetcher)
        if s.compile and not try_compiled(self.stepper, lambda m: self.task.loss(m, self.batches.get(), 0, 0)):
            raise RuntimeError("torch.compile does not work here")

    def step(self) -> None:
        from cryoiso.train.loop import learning_rate
        from cryoiso.train.step import seed_torch

        batch, number = self.batches.get(), self.number
        self.stepper.set_rate(learning_rate(self.settings, number))
        seed_torch(SEED, "step", 0, number, 0)
        numbers = self.stepper(lambda m: self.task.loss(m, batch, number, 0), 1.0, lambda: [0.0, 0.0])
        self.readback.push(number, numbers)
        list(self.readback.pop())
        self.number += 1


def clock(device: str) -> float:
    """CPU seconds of this process, or wall seconds after the GPU has finished."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(step: Callable[[], Any], device: str, least_s: float) -> float:
    """Time of one call, averaged over calls that last ``least_s`` together."""
    start, calls = clock(device), 0
    while True:
        step()
        calls += 1
        if (spent := clock(device) - start) >= least_s:
            return spent / calls


def makers(cubes: TrainingCubes, a: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Callable[[], Any]]:
    """Name of a variant -> what builds it; the published ones first."""
    made: dict[str, Callable[[], Any]] = {}
    if a.published is not None:
        for how in ("as it is", "bare") if a.device == "cuda" else ("as it is",):
            made[f"published, {how}"] = partial(
                spisonet.Published, a.published, folder, a.batch, a.accumulate, a.place, how
            )
    made |= {name: partial(Ours, cubes, a, name, stack) for name in a.variants}
    return made


def built(name: str, make: Callable[[], Any], a: argparse.Namespace) -> Variant:
    """A variant after its warm-up; its first step counts arithmetic where nothing is compiled."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    on_gpu = a.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    work, gflop = make(), None
    compiled = "bare" not in name if name.startswith("published") else "compile" in name
    if on_gpu and compiled:
        work.step()
    else:
        with FlopCounterMode(display=False) as counter:
            work.step()
        gflop = counter.get_total_flops() / 1e9 or None
    clock(a.device)
    first_s, peak = time.perf_counter() - start, None
    if on_gpu:
        for _ in range(3):
            work.step()
        torch.cuda.reset_peak_memory_stats()
        work.step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return Variant(name, work.step, work.parameters, first_s, peak, gflop)


def all_built(made: dict[str, Callable[[], Any]], a: argparse.Namespace) -> list[Variant]:
    """Those that can be built on this machine; the others are named loudly."""
    variants = []
    for name, make in made.items():
        if time.monotonic() - STARTED > a.within / 2:
            harness.skip(f"{name}: no time left to build it")
            continue
        try:
            variants.append(built(name, make, a))
            print(f"{name}: first step {variants[-1].first_step_s:.1f} s", file=sys.stderr, flush=True)
        except Exception as error:  # any failure of a compiler or of the other program: the rest still counts
            harness.skip(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return variants


def measured(variants: list[Variant], a: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step in each round; the variants take turns."""
    times: dict[str, list[float]] = {v.name: [] for v in variants}
    for number in range(a.rounds):
        for variant in variants:
            times[variant.name].append(seconds(variant.step, a.device, 1.5 if a.device == "cuda" else 0.0))
        print(f"round {number + 1} of {a.rounds}", file=sys.stderr, flush=True)
    return times


def losses(name: str) -> str:
    """Variants of one kind need the same arithmetic."""
    return next((kind for kind in ("published", "completion") if name.startswith(kind)), "ours")


def row_of(v: Variant, times: list[float], work: dict[str, float], reference: float | None, batch: int) -> dict:
    """What is reported of a variant."""
    s = statistics.median(times)
    gflop = work.get(losses(v.name))
    return {
        "variant": v.name, "parameters": v.parameters, "step_ms": 1e3 * s, "rounds_ms": [1e3 * t for t in times],
        "sub_maps_per_s": batch / s, "times_published": None if reference is None else reference / s,
        "gflop_a_sub_map": None if gflop is None else gflop / batch,
        "tflops": None if gflop is None else gflop / s / 1e3,
        "peak_mib": v.peak_mib, "first_step_s": v.first_step_s,
    }  # fmt: skip


def rows_of(variants: list[Variant], times: dict[str, list[float]], batch: int) -> list[dict[str, Any]]:
    work: dict[str, float] = {}
    for v in variants:
        if v.gflop_a_step is not None:
            work.setdefault(losses(v.name), v.gflop_a_step)
    first = next((v.name for v in variants if v.name.startswith("published")), None)
    reference = statistics.median(times[first]) if first is not None else None
    return [row_of(v, times[v.name], work, reference, batch) for v in variants]


def largest_mib() -> float:
    """Of this process so far; ru_maxrss would also tell of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return next(float(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def peak_of_process(name: str, a: argparse.Namespace) -> float | None:
    """Largest resident size (MiB) of a process that makes one step of this variant and nothing else."""
    command = [sys.executable, __file__, "--device", "cpu", "--cube", a.cube, "--batch", a.batch, "--accumulate",
               a.accumulate, "--only", name, *(["--published", a.published] if a.published else [])]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=harness.environment())
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def loops(cubes: TrainingCubes, a: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """Sub-maps a second of both training loops as they are."""
    from cryoiso.core.products import TIMING
    from cryoiso.parallel.ddp import TrainingGroup
    from cryoiso.train.loop import train

    task, settings = our_task(cubes, a, name)
    train(task, TrainingGroup((0,), 0, a.place), loop_settings(settings, name, 60), folder / "ours")
    notes = json.loads((folder / "ours" / TIMING).read_text())["notes"]
    ours = statistics.median(note["images_per_s"] for note in notes[2:])
    found: dict[str, Any] = {"ours": {"variant": name, "sub_maps_per_s": ours}}
    if a.published is not None:
        words = [sys.executable, spisonet.__file__, a.published, folder, "--batch", a.batch,
                 "--accumulate", a.accumulate, "--steps", 60]  # fmt: skip
        left = STARTED + a.within - time.monotonic()
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=left)
        if done.returncode:
            raise RuntimeError("the published loop: " + (done.stderr.strip().splitlines() or ["?"])[-1])
        told = json.loads(done.stdout.strip().splitlines()[-1])
        rate = a.batch / statistics.median(told["step_s"][10:])
        found["published"] = {"sub_maps_per_s": rate, "first_step_s": told["first_step_s"]}
        found["ratio"] = ours / rate
    return found


def report(result: dict[str, Any]) -> str:
    """Markdown table, and what the loops did by themselves."""
    head = ["variant", "M parameters", "GFLOP a sub-map", "ms a step", "sub-maps/s", "times published", "TFLOP/s",
            "peak MiB", "first step s"]  # fmt: skip
    lines = []
    for r in result["rows"]:
        formats = {"parameters": "", "gflop_a_sub_map": ",.0f", "step_ms": ",.0f", "sub_maps_per_s": ".4g",
                   "times_published": ".2f", "tflops": ".3g", "peak_mib": ",.0f", "first_step_s": ".0f"}  # fmt: skip
        cells = [None if r[key] is None else format(r[key], how) for key, how in formats.items()]
        cells[0] = f"{r['parameters'] / 1e6:.2f}"
        lines.append([r["variant"], *cells])
    tables = [harness.markdown(head, lines)]
    if result.get("loops"):
        tables.append("training loops by themselves: " + json.dumps(result["loops"]))
    return "\n\n".join(tables)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="folder of a checkout of spIsoNet 1.0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cube", type=int, help="edge of the sub-maps, default 64 on a GPU and 32 on a CPU")
    parser.add_argument("--batch", type=int, help="sub-maps a step, default 4 on a GPU and 2 on a CPU")
    parser.add_argument("--accumulate", type=int, help="micro-steps of the published program, default 2, CPU 1")
    parser.add_argument(
        "--variants", nargs="*", help="ours: float32 or bf16, also with 'compile', 'channels first', 'completion'"
    )
    parser.add_argument("--rounds", type=int, help="default 4 on a GPU and 2 on a CPU")
    parser.add_argument("--within", type=float, default=1e9, help="seconds: leaves out what would begin too late")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/correct_throughput_DEVICE.json")
    a = parser.parse_args()
    on_gpu = a.device == "cuda"
    if a.variants is None:
        gpu = ["bf16", "completion, bf16", "bf16, compile", "float32", "float32, compile"]
        a.variants = gpu if on_gpu else ["float32", "completion, float32"]
    a.cube, a.batch = a.cube or (64 if on_gpu else 32), a.batch or (4 if on_gpu else 2)
    a.accumulate, a.rounds = a.accumulate or (2 if on_gpu else 1), a.rounds or (4 if on_gpu else 2)
    a.place = "cuda:0" if on_gpu else "cpu"
    a.out = (a.out or harness.RESULTS / f"correct_throughput_{a.device}.json").resolve()
    if a.published is None:
        harness.skip("no published code to compare with; give --published")
    else:
        a.published = a.published.resolve()
    return a


def main() -> None:
    a = arguments()
    if a.device == "cpu":
        os.environ.update(harness.ONE_THREAD)
    import torch

    from cryoiso.train.step import training_mode

    if a.device == "cpu":
        torch.set_num_threads(1)
    with harness.work_folder(None) as work, ExitStack() as stack:
        # TF32 and tuned convolutions for both: the published program sets the same
        stack.enter_context(training_mode(a.place))
        cubes = TrainingCubes(a.cube)
        if a.published is not None:
            spisonet.write_sub_maps(work, cubes.pairs, cubes.small)
        made = makers(cubes, a, work, stack)
        if a.only is not None:
            made[a.only]().step()
            print(largest_mib())
            return
        measure_all(cubes, a, work, made)


def measure_all(cubes: TrainingCubes, a: argparse.Namespace, work: Path, made: dict[str, Callable[[], Any]]) -> None:
    """Steps in turn, then (GPU) both loops; what is known is written after each part."""
    import torch

    device = torch.cuda.get_device_name() if a.device == "cuda" else "one CPU thread"
    result: dict[str, Any] = {
        "machine": harness.machine(), "device": device, "cube_px": a.cube, "batch": a.batch, "accumulate": a.accumulate,
    }  # fmt: skip
    variants = all_built(made, a)
    result["rows"] = rows_of(variants, measured(variants, a), a.batch)
    harness.write_json(a.out, result)
    if a.device == "cpu":
        for row in result["rows"]:
            row["peak_mib"] = peak_of_process(row["variant"], a)
    elif variants and time.monotonic() - STARTED < 0.75 * a.within:
        try:
            variants.clear()
            torch.cuda.empty_cache()
            result["loops"] = loops(cubes, a, work, a.variants[0])
        except Exception as error:  # the table above is worth having without it
            harness.skip(f"training loops by themselves: {type(error).__name__}: {error}")
    harness.write_json(a.out, result)
    print(report(result))


if __name__ == "__main__":
    main()
