"""A step of the CPU presets of both trainings, CPU seconds on one thread, for two trees in turn.

The generator: 16 images of 64 px, as ``auxiliary train`` makes a step (projections, latents, loss, backward pass,
optimiser). The correction: 4 sub-maps of 32 px of a map of 64 px with two half-maps, as ``correct`` makes it (the map
rotated, measured and filled; sub-maps one by one, so that any number of ranks gives the same bits). Each tree runs in
processes of its own with its own settings; rounds take turns; the ratios are those of the medians: of a step, and of
a training, which is a step times the steps that the preset makes. Losses of the first steps are printed beside, so that
they show whether both trees compute the same. Whether a shorter training is as good: generator_quality.py.

    python benchmarks/training_presets.py --tree before=FOLDER --tree now=FOLDER [--rounds 5]
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
from pathlib import Path
from typing import Any

BOX, EXTENT_A, SEED, WARM_UP, STEPS = 64, 192.0, 3, 2, 6
Step = Callable[[int], Any]
Course = tuple[Step, int, int]
"""A step, how many of them the preset makes, and its images or sub-maps."""


def precision(device: str) -> bool:
    """Whether the tree trains the generator in bfloat16 here."""
    try:
        from cryoiso.nets.precision import fast_bfloat16
    except ImportError:
        return device != "cpu"
    return fast_bfloat16(device)


def generator() -> Course:
    """The generator's training."""
    import numpy as np

    from cryoiso.methods.auxiliary.condition import Condition
    from cryoiso.methods.auxiliary.settings import PRESETS, network
    from cryoiso.methods.auxiliary.task import GeneratorTask
    from cryoiso.parallel.ddp import TrainingGroup
    from cryoiso.physics.phantom import phantom_map
    from cryoiso.physics.simulation import simulate
    from cryoiso.train.step import Stepper, seed_torch

    density = phantom_map(BOX, EXTENT_A / BOX, 12.0)
    source = simulate(density, 256, shift_sd_A=4.0)
    settings = PRESETS["small"]
    condition = Condition(density, np.ones(1))
    task = GeneratorTask(source, source.particles, np.arange(256), condition, network(settings, BOX), settings, SEED)
    seed_torch(SEED)
    task.start(0)
    stepper = Stepper(
        task.module.train(), TrainingGroup((0,), 0, "cpu"), settings.learning_rate, settings.clip_norm, precision("cpu")
    )

    def step(n: int) -> Any:
        return stepper(lambda m: task.loss(m, task.prepare(n), n, 0), 1.0, lambda: [0.0, 0.0])

    return step, settings.steps, settings.batch


def correction() -> Course:
    """The correction's training."""
    import numpy as np

    from cryoiso.core.config import CorrectSection
    from cryoiso.methods.anisotropy.completion import CompletionTask
    from cryoiso.methods.anisotropy.filter import missing_cone
    from cryoiso.methods.anisotropy.settings import resolve
    from cryoiso.methods.anisotropy.solvent import Solvent
    from cryoiso.methods.anisotropy.submaps import GreyScale, particle_region
    from cryoiso.parallel.ddp import TrainingGroup
    from cryoiso.physics.phantom import phantom_map
    from cryoiso.train.prefetch import part_of
    from cryoiso.train.step import Stepper, channels_last_of, seed_torch

    rng = np.random.default_rng(SEED)
    clean = np.asarray(phantom_map(BOX, EXTENT_A / BOX, 12.0).data, np.float32)
    inside = particle_region(None, BOX)
    maps = [clean + clean.std() * rng.standard_normal(clean.shape).astype(np.float32) for _ in (1, 2)]
    scale = GreyScale.of(maps, inside)
    settings = resolve(CorrectSection(preset="small", mode="paired"), "cpu")
    measured = missing_cone(BOX, 30.0)
    task = CompletionTask(
        [scale.normalised(m) for m in maps], Solvent(measured, np.ones_like(measured)), inside, settings, SEED,
        label="both",
    )  # fmt: skip
    seed_torch(SEED)
    task.start(0)
    module = task.module.to(memory_format=channels_last_of(task.module)).train()
    group = TrainingGroup((0,), 0, "cpu")
    stepper = Stepper(module, group, settings.learning_rate, 1.0, settings.bfloat16, parts=True)
    count = settings.batch

    def step(n: int) -> Any:
        batch = task.prepare(n)
        return stepper.in_parts(
            lambda m, part: task.loss(m, part_of(batch, part, part + 1, count), n, 0), [1] * count, count,
            lambda: [0.0, 0.0],
        )  # fmt: skip

    return step, settings.steps, count


TRAININGS = {"generator": generator, "correction": correction}


def child(name: str) -> None:
    """Prints CPU ms of a step and the losses."""
    import torch

    from cryoiso.train.step import training_mode

    torch.set_num_threads(1)
    with training_mode("cpu"):
        step, steps, images = TRAININGS[name]()
        losses = [float(step(n)[2]) for n in range(WARM_UP)]
        start = time.process_time()
        losses += [float(step(WARM_UP + n)[2]) for n in range(STEPS)]
        spent = time.process_time() - start
    print(json.dumps({"ms": 1e3 * spent / STEPS, "steps": steps, "images": images, "losses": losses}))


def measured(trees: dict[str, Path], names: list[str], rounds: int) -> dict[str, Any]:
    """Training -> tree -> ms of each round, steps, images a step and losses; trees take turns."""
    from benchmarks import harness

    found: dict[str, Any] = {name: {tree: {"ms": []} for tree in trees} for name in names}
    for _ in range(rounds):
        for name in names:
            for tree, path in trees.items():
                env = {**harness.environment(), "PYTHONPATH": str(path)}
                words = [sys.executable, __file__, "--child", name]
                done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=path, check=True)
                told = json.loads(done.stdout.strip().splitlines()[-1])
                found[name][tree]["ms"].append(round(told["ms"], 1))
                found[name][tree] |= {key: told[key] for key in ("steps", "images", "losses")}
                print(name, tree, round(told["ms"], 1), file=sys.stderr, flush=True)
    return found


def main() -> None:
    from benchmarks import harness

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="append", required=True, metavar="NAME=PATH", help="the first one is the base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trainings", default=",".join(TRAININGS))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "training_presets.json")
    a = parser.parse_args()
    trees = {name: Path(path).resolve() for name, path in (one.split("=", 1) for one in a.tree)}
    found = measured(trees, a.trainings.split(","), a.rounds)
    rows = []
    for name, of_trees in found.items():
        for one in of_trees.values():
            one["median_ms"] = statistics.median(one["ms"])
            one["training_cpu_s"] = one["steps"] * one["median_ms"] / 1e3
        base = of_trees[next(iter(trees))]
        for tree, one in of_trees.items():
            for key in ("median_ms", "training_cpu_s"):
                one[f"times_base_{key}"] = base[key] / one[key]
            ends = f"{one['median_ms']:.0f} ({min(one['ms']):.0f} to {max(one['ms']):.0f})"
            whole = f"{one['training_cpu_s']:.1f} ({one['steps']} steps of {one['images']})"
            ratios = (f"{one[f'times_base_{key}']:.2f}" for key in ("median_ms", "training_cpu_s"))
            first, *_, last = (f"{loss:.4f}" for loss in one["losses"])
            rows.append([name, tree, ends, whole, *ratios, first, last])
    harness.write_json(a.out, {"machine": harness.machine(), "rounds": a.rounds, "trainings": found})
    head = ["training", "tree", "CPU ms a step", "CPU s a training", "times, step", "times, training", "first loss"]
    print(harness.markdown([*head, "last loss"], rows))


if __name__ == "__main__":
    # a child takes the package of its tree, not that of this file
    if sys.argv[1:2] == ["--child"]:
        sys.path.insert(0, os.environ["PYTHONPATH"])
        child(sys.argv[2])
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        main()
