"""Quality and CPU time of trained generators (small preset), for two trees, paired by seed.

Each seed trains a generator on 1,500 images of a set with the true poses, by the tree's own preset, and looks at it on
500 other images of the set:

bound      negative evidence lower bound of these images, nats per pixel (posterior noise from fixed keys)
transfer   error of the transfer t(k) (``methods.auxiliary.transfer``) of images generated at their poses at temperature
           1 against that of the images themselves: root mean square over the shells in which the latter is known to
           0.05, less than that error by chance
spectrum   root mean square over the shells of the difference of both power spectra of x - c, in dB
variance   of the generated images over that of the images

Sets: the invented phantom, 64 px, white noise, -10 dB, the reference is the truth; haemagglutinin, 64 px, coloured
noise (`ice`: real background), -12 dB, the reference another subtype; beta-galactosidase, 48 px, white noise, -14 dB, a
twisted reference.

    python benchmarks/generator_quality.py --tree before=FOLDER --tree now=FOLDER --work FOLDER [--seeds 3,4,5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TRAINED, HELD_OUT, BLOCK = 1500, 500, 50
SETS = ("phantom", "haemagglutinin", "ice", "galactosidase")
KNOWN_TO = 0.05
"""Shells whose transfer in the images has a larger standard deviation are not compared."""


def data(name: str, work: Path) -> tuple[Any, Any]:
    """Images in memory with true poses, and the reference."""
    import numpy as np

    from cryoiso.io.sources import ArraySource

    if name == "phantom":
        from cryoiso.physics.phantom import phantom_map
        from cryoiso.physics.simulation import simulate

        density = phantom_map(64, 3.0, 12.0)
        source = simulate(density, 3 * (TRAINED + HELD_OUT), snr_db=-10, shift_sd_A=4.0, seed=1)
        return ArraySource(source.read(np.arange(len(source.particles))), source.particles), source.volume
    from cryoiso.io import read_particle_file
    from cryoiso.io.mrc import read_map
    from cryoiso.io.sources import StackSource

    stack = StackSource(read_particle_file(work / name / "truth.star"))
    images = stack.read(np.arange(len(stack.particles)))
    return ArraySource(images, stack.particles), read_map(work / name / "homologue.mrc")


def prepare(name: str, work: Path) -> None:
    """Simulates a set unless it is there."""
    from benchmarks import harness
    from benchmarks.nuisance_sets import REAL_NOISE
    from benchmarks.particle_sets import ParticleSet
    from benchmarks.particle_sets import prepare as simulate_set

    n, even = 3 * (TRAINED + HELD_OUT), {"mode": "uniform"}
    sets = {
        "haemagglutinin": ParticleSet(even, -12, box=64, pixel_A=3.4, particles=n),
        "ice": ParticleSet(even, -12, box=64, pixel_A=3.4, particles=n, nuisances={"noise-from": REAL_NOISE}),
        "galactosidase": ParticleSet(
            even, -14, "8bk7.cif.gz", None, 0.3, symmetry="D2", box=48, pixel_A=5.0, particles=n, noise="white"
        ),
    }
    if name in sets and not (work / name / "homologue.mrc").exists():
        simulate_set(sets[name], 3, harness.SHARED / "data" / "models", work / name)


def loop_settings(settings: Any, seed: int) -> Any:
    """How the tree trains a generator on a CPU."""
    from cryoiso.methods.auxiliary import training
    from cryoiso.train.loop import LoopSettings

    if hasattr(training, "loop_settings"):
        return training.loop_settings(settings, seed, "cpu")
    # trees before 2026-12
    fast = getattr(training, "fast_bfloat16", lambda device: False)
    return LoopSettings(
        steps=settings.steps, learning_rate=settings.learning_rate, schedule=settings.schedule, seed=seed,
        log_every=max(1, settings.steps // 200), clip_norm=settings.clip_norm, amp=fast("cpu"), channels_last=True,
    )  # fmt: skip


def trained(name: str, seed: int, work: Path, changes: dict[str, Any]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """A generator, images, condition and held-out rows, and what the training cost."""
    from dataclasses import replace

    import numpy as np

    from cryoiso.methods.auxiliary.condition import Condition, fit_scale
    from cryoiso.methods.auxiliary.generator import Generator
    from cryoiso.methods.auxiliary.settings import PRESETS, network
    from cryoiso.methods.auxiliary.task import GeneratorTask
    from cryoiso.parallel.context import get_context
    from cryoiso.parallel.ddp import TrainingGroup
    from cryoiso.train.loop import train

    source, reference = data(name, work)
    shuffled = np.random.default_rng(0).permutation(len(source.particles))
    first = seed % 3 * (TRAINED + HELD_OUT)
    rows, held = (np.sort(r) for r in np.split(shuffled[first : first + TRAINED + HELD_OUT], [TRAINED]))
    scale = fit_scale(source, source.particles, rows, reference, get_context(), seed)
    settings = replace(PRESETS["small"], **changes.get("settings", {}))
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.get("network", {}).items()}
    config = replace(network(settings, source.box_px), **own)
    condition = Condition(reference, scale)
    task = GeneratorTask(source, source.particles, rows, condition, config, settings, seed, label="generator1")
    loop = replace(loop_settings(settings, seed), **changes.get("loop", {}))
    folder = work / f"training-{os.getpid()}"
    start = time.process_time()
    outcome = train(task, TrainingGroup((0,), 0, "cpu"), loop, folder)
    spent = time.process_time() - start
    generator = Generator(task.module.eval(), reference, scale, settings.likelihood_sd, {})  # type: ignore[arg-type]
    bounds = [r["bound"] for r in outcome.history]
    facts = {"cpu_s": spent, "steps": settings.steps, "batch": settings.batch, "attempts": outcome.attempts,
             "course": [round(bounds[i * (len(bounds) - 1) // 12], 4) for i in range(13)]}  # fmt: skip
    return generator, source, condition, held, facts


def quality(generator: Any, source: Any, condition: Any, held: Any) -> dict[str, Any]:
    """The numbers of the module's docstring, and curves by shell."""
    import numpy as np
    import torch

    from cryoiso.methods.auxiliary.generator import normal_numbers
    from cryoiso.methods.auxiliary.transfer import shell_terms, transfer
    from cryoiso.nets.losses import negative_elbo
    from cryoiso.physics.filters import power_spectrum

    particles, parts = source.particles, np.split(held, np.arange(BLOCK, len(held), BLOCK))
    bounds, own, other, power, seen = [], [], [], [[], []], [0.0, 0.0]  # type: ignore[var-annotated]
    for rows in parts:
        images, clean = source.read(rows), condition.images(particles, rows)
        keys = [f"held out/{i}" for i in rows]
        noise = normal_numbers(keys, generator.network.config.latent_size, "cpu")
        with torch.no_grad():
            out = generator.network(torch.from_numpy(images)[:, None], clean, condition.poses(particles, rows), noise)
        terms = negative_elbo(out, torch.from_numpy(images)[:, None], generator.likelihood_sd, 1.0)
        bounds.append(float(terms.loss))
        made = generator.images(condition, particles, rows, 1.0, 7)[0].numpy()
        projection = clean[:, 0].numpy()
        for i, x in enumerate((images, made)):
            power[i].append(np.asarray(power_spectrum(x - projection), np.float64))
            seen[i] += float(x.var(dtype=np.float64)) / len(parts)
        own.append(shell_terms(images, projection))
        other.append(shell_terms(made, projection))
    (goal, goal_sd), (value, sd) = transfer(np.concatenate(own)), transfer(np.concatenate(other))
    known = np.isfinite(goal) & (np.nan_to_num(goal_sd, nan=1.0) < KNOWN_TO)
    known[0] = False
    chance = np.hypot(sd, goal_sd)[known]
    spectra = [np.concatenate(p).mean(0)[1:] for p in power]
    decibel = 10 * np.log10(spectra[1] / spectra[0])
    return {
        "bound": statistics.fmean(bounds),
        "transfer": float(np.sqrt(np.square(value - goal)[known].mean())),
        "transfer_by_chance": float(np.sqrt(np.square(chance).mean())),
        "spectrum_dB": float(np.sqrt(np.square(decibel).mean())),
        "variance": seen[1] / seen[0],
        "curves": {
            "transfer_of_images": [round(float(v), 3) for v in goal[1:]],
            "transfer": [round(float(v), 3) for v in value[1:]],
            "dB": [round(float(v), 2) for v in decibel],
        },
    }


def child(name: str, seed: int, work: Path, changes: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    generator, source, condition, held, facts = trained(name, seed, work, changes)
    print(json.dumps(facts | quality(generator, source, condition, held)))


def measured(a: argparse.Namespace, trees: dict[str, Path]) -> list[dict[str, Any]]:
    """A record for each set, seed and tree; trees take turns."""
    from benchmarks import harness

    records: list[dict[str, Any]] = json.loads(a.out.read_text())["records"] if a.out.exists() else []
    done = {(r["set"], r["seed"], r["tree"]) for r in records}
    for seed in (int(word) for word in a.seeds.split(",")):
        for name in a.sets.split(","):
            prepare(name, a.work)
            for tree, path in trees.items():
                if (name, seed, tree) in done:
                    continue
                env = {**harness.environment(), "PYTHONPATH": str(path)}
                words = [sys.executable, __file__, "--child", name, str(seed), str(a.work)]
                child_run = subprocess.run(words, capture_output=True, text=True, env=env, cwd=path, check=True)
                record = json.loads(child_run.stdout.strip().splitlines()[-1])
                records.append({"set": name, "seed": seed, "tree": tree, **record})
                harness.write_json(a.out, {"machine": harness.machine(), "records": records})
                print(name, seed, tree, round(record["bound"], 4), file=sys.stderr, flush=True)
    return records


NUMBERS = {"cpu_s": ".1f", "bound": ".4f", "transfer": ".3f", "spectrum_dB": ".3f", "variance": ".3f"}


def table(records: list[dict[str, Any]], trees: list[str]) -> str:
    """Means over the seeds, and the differences of each tree to the first, paired by seed, with 95 % intervals."""
    from benchmarks import harness
    from benchmarks.pooling import differences, student95

    rows = []
    for name in dict.fromkeys(r["set"] for r in records):
        for tree in trees:
            own = {r["seed"]: r for r in records if r["set"] == name and r["tree"] == tree}
            base = {r["seed"]: r for r in records if r["set"] == name and r["tree"] == trees[0]}
            seeds = sorted(own.keys() & base.keys())
            cells = []
            for key, digits in NUMBERS.items():
                cell = format(statistics.fmean(own[s][key] for s in seeds), digits)
                change = differences(*({s: r[key] for s, r in some.items()} for some in (base, own)))
                interval = None if tree == trees[0] or key == "cpu_s" else student95(change)
                if interval is not None:
                    mean, *ends = (format(value, "+" + digits) for value in (statistics.fmean(change), *interval))
                    cell += f" ({mean} [{', '.join(ends)}])"
                cells.append(cell)
            rows.append([name, tree, str(len(seeds)), *cells])
    return harness.markdown(["set", "tree", "seeds", *NUMBERS], rows)


def main() -> None:
    from benchmarks import harness

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="append", required=True, metavar="NAME=PATH", help="the first one is the base")
    parser.add_argument("--seeds", default="3,4,5", help="their images differ if three follow one another")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "generator_quality.json")
    a = parser.parse_args()
    trees = {name: Path(path).resolve() for name, path in (one.split("=", 1) for one in a.tree)}
    print(table(measured(a, trees), list(trees)))


if __name__ == "__main__":
    # a child takes the package of its tree, not that of this file
    if sys.argv[1:2] == ["--child"]:
        sys.path.insert(0, os.environ.get("PYTHONPATH", "").split(os.pathsep)[0])
        child(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), json.loads(sys.argv[5]) if len(sys.argv) > 5 else {})
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        main()
