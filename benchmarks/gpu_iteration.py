"""One iteration of the native refinement at real size, on a GPU (or, smaller, on a CPU).

Particles are repeated from a pool of simulated ones, so that making them costs little. An iteration of a few tells how
many fit the time; the same few are profiled: the share of the time in which the device computes, and in which kernels.

    python benchmarks/gpu_iteration.py --box 256 --pixel-size 1.06 --resolution 3.0 --seconds 120 --out iteration.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryoiso.core.config import RefineSection
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap, Particles
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_of_box
from cryoiso.physics.simulation import simulate
from cryoiso.pipeline.records.environment import computes_on
from cryoiso.refine.initial_model import initial_model
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.model import Model

POOL, FEW = 256, 1024
MOST = 130_000


class Repeated:
    """An ``ImageSource`` whose particles are those of a pool, again and again."""

    def __init__(self, images: np.ndarray, particles: Particles, count: int) -> None:
        rows = np.arange(count) % len(images)
        self._images, self._rows = images, rows
        self.particles = replace(
            particles.take(rows),
            uid=np.arange(count, dtype=np.uint64),
            half=(np.arange(count) // 2 % 2 + 1).astype(np.int8),
        )
        self.box_px = images.shape[1]
        self.chunks = [np.arange(i, min(i + 4096, count)) for i in range(0, count, 4096)]

    def read(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._images[self._rows[rows]], np.float32)


def pool(box_px: int, pixel_size_A: float, count: int) -> tuple[np.ndarray, Particles, DensityMap]:
    truth = phantom_of_box(box_px, pixel_size_A, 2.2)
    source = simulate(truth, count, snr_db=-10.0, shift_sd_A=4.0, seed=1)
    images = np.concatenate([np.asarray(block, np.float16) for block in source.blocks()])
    return images, source.particles, source.volume


def prepared(source: Repeated, truth: DensityMap, device: str, resolution_A: float) -> tuple[Refinement, Model]:
    """A refinement whose references are the truth, in the middle of its course."""
    settings = RefineSection(max_resolution_A=None)
    request = RefineRequest(source, truth, "C1", Path("unused"), settings, seed=1, lowpass_A=30.0)
    request = replace(request, folder=None)
    extent = truth.box_px * truth.pixel_size_A
    run = Refinement(request, Context(), device, 0.6 * extent)
    model = initial_model(run, 30.0)
    radius = min(int(extent / resolution_A), run.limit)
    state = replace(model.state, iteration=3, radius_px=radius, best_shell=radius, shift_sd_px=4.0 / truth.pixel_size_A)
    return run, replace(model, state=state, references={half: truth.data for half in (1, 2)})


def timed(run: Refinement, model: Model, device: str) -> float:
    start = time.perf_counter()
    run.step(model)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def profiled(run: Refinement, model: Model, device: str) -> dict[str, Any]:
    """Share of the time with a kernel on the device, and the kernels with the most time."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] if device == "cpu" else [ProfilerActivity.CUDA]
    with profile(activities=kinds) as found:
        seconds = timed(run, model, device)
    events = found.key_averages()
    spent = {e.key: float(e.self_cpu_time_total if device == "cpu" else e.self_device_time_total) / 1e6 for e in events}
    top = sorted(spent.items(), key=lambda item: -item[1])[:15]
    return {"seconds": seconds, "busy": sum(spent.values()) / seconds, "kernels": {k[:90]: round(s, 4) for k, s in top}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--pixel-size", type=float, default=1.06)
    parser.add_argument("--resolution", type=float, default=3.0, help="of the search [Å]")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the large iteration")
    parser.add_argument("--few", type=int, default=FEW)
    parser.add_argument("--most", type=int, default=MOST)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    images, particles, truth = pool(a.box, a.pixel_size, min(POOL, a.few))
    record: dict[str, Any] = {
        "date": date.today().isoformat(), "hardware": computes_on(a.device), "torch": torch.__version__,
        "box_px": a.box, "pixel_size_A": a.pixel_size, "resolution_A": a.resolution,
    }  # fmt: skip
    run, model = prepared(Repeated(images, particles, a.few), truth, a.device, a.resolution)
    timed(run, model, a.device)  # kernels are compiled, coefficients stay
    few = timed(run, model, a.device)
    record["few"] = {"particles": a.few, "seconds": few, "profile": profiled(run, model, a.device)}
    a.out.write_text(json.dumps(record, indent=1))
    # the maps' part does not grow: what the particles take is between nothing and all of it
    count = int(min(a.most, a.few * max(1.0, a.seconds / few)))
    if count > a.few:
        del run, model
        run, model = prepared(Repeated(images, particles, count), truth, a.device, a.resolution)
        record["first"] = {"particles": count, "seconds": timed(run, model, a.device)}
        a.out.write_text(json.dumps(record, indent=1))
        record["again"] = {"particles": count, "seconds": timed(run, model, a.device), "what": "coefficients kept"}
    if a.device != "cpu":
        record["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    a.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
