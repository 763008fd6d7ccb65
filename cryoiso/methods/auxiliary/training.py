"""Trains the generators of both half-sets: side by side where there are ranks enough, else one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryoiso.core.log import ProgressLine
from cryoiso.core.progress import board
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import DensityMap, Particles
from cryoiso.methods.auxiliary.condition import Condition, fit_scale
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.methods.auxiliary.settings import Training, network
from cryoiso.methods.auxiliary.task import GeneratorTask
from cryoiso.nets.precision import fast_bfloat16
from cryoiso.parallel.ddp import ranks_of_half, training_group
from cryoiso.parallel.group_stop import side_by_side
from cryoiso.train.loop import LoopSettings, TrainOutcome, train

RECORDS = 200
"""Records of a training, for its curves."""


@dataclass(frozen=True)
class GeneratorTraining:
    """One generator to be trained: on which particles, with which reference."""

    label: str
    """"1", "2", or "both"."""
    rows: np.ndarray
    reference: DensityMap
    folder: Path
    """of its checkpoint; made by the caller"""
    file: Path
    """where the generator goes"""
    facts: dict[str, Any]


def train_generators(
    trainings: list[GeneratorTraining],
    source: ImageSource,
    particles: Particles,
    settings: Training,
    comm: Any,
    *,
    seed: int,
    resume: bool,
    on_checkpoint: Callable[[str, int], None] | None = None,
) -> dict[str, TrainOutcome]:
    """Trains and saves generators (collective).

    Two on two ranks or more are trained side by side by half of the ranks each; otherwise each one takes
    all ranks.

    Args:
        trainings: one, or one a half-set.
        source: images, row for row those of ``particles``.
        particles: with poses.

    Returns:
        label -> its history, on every rank.

    Raises:
        Interrupted, CryoisoError: as ``train.loop.train``.
    """
    scales = {c.label: fit_scale(source, particles, c.rows, c.reference, comm, seed) for c in trainings}
    apart = len(trainings) == 2 and comm.size > 1
    outcomes: dict[str, TrainOutcome] = {}
    turns = [trainings] if apart else [[c] for c in trainings]
    for number, turn in enumerate(turns):
        board.expect(number, len(turns))
        training, ranks = turn[0], range(comm.size)
        if apart:
            which = 0 if comm.rank in ranks_of_half(1, comm.size) else 1
            training, ranks = turn[which], ranks_of_half(which + 1, comm.size)
        with side_by_side(comm) as stop_signal, training_group(comm, ranks) as group:
            own_outcome = _train_one(
                training, source, particles, scales[training.label], settings, group, seed, resume, stop_signal.received
            )
            if on_checkpoint and group.is_first:
                on_checkpoint(training.label, own_outcome.step)
        for label, outcome in comm.allgather((training.label, own_outcome)):
            outcomes[label] = outcome
    return outcomes


def _train_one(
    training: GeneratorTraining,
    source: ImageSource,
    particles: Particles,
    scale: np.ndarray,
    settings: Training,
    group: Any,
    seed: int,
    resume: bool,
    stop: Callable[[], bool],
) -> TrainOutcome:
    config = network(settings, source.box_px)
    condition = Condition(training.reference, scale, group.device)
    task = GeneratorTask(
        source, particles, training.rows, condition, config, settings, seed,
        index=group.index, size=group.size, label=training.file.stem,
    )  # fmt: skip
    loop = loop_settings(settings, seed, group.device)
    name = "generator" if training.label == "both" else f"generator of half {training.label}"
    line = ProgressLine(f"training the {name}", settings.steps, active=group.is_first)

    def progress(done: int, words: str) -> None:
        line.update(done, words)

    with few_threads(settings.preset):
        outcome = train(task, group, loop, training.folder, stop=stop, resume=resume, on_progress=progress)
    if group.is_first:
        generator = Generator(task.module, training.reference, scale, settings.likelihood_sd, training.facts)  # type: ignore[arg-type]
        generator.save(training.file)
        bound = outcome.history[-1].get("bound")
        line.close(f"{outcome.step:,} steps, bound {bound:.4f} nats per pixel" if bound is not None else "")
    group.barrier()
    return outcome


def loop_settings(settings: Training, seed: int, device: str) -> LoopSettings:
    """How the loop trains a generator on a device."""
    return LoopSettings(
        steps=settings.steps, learning_rate=settings.learning_rate, schedule=settings.schedule, seed=seed,
        log_every=max(1, settings.steps // RECORDS), clip_norm=settings.clip_norm,
        amp=fast_bfloat16(device), compile=device != "cpu", channels_last=True,
        # without annealing an even bound is no failure: GeneratorTask.judge looks whether it has risen
        flat_window=0 if settings.kl_anneal_fraction else settings.steps + 1,
    )  # fmt: skip


@contextmanager
def few_threads(preset: str) -> Iterator[None]:
    """One thread for small networks: more would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if preset == "small" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def curves(outcome: TrainOutcome) -> dict[str, Any]:
    """The history of the last attempt as columns, for JSON."""
    records = [r for r in outcome.history if r["attempt"] == outcome.attempts - 1]
    names = {
        "steps": "step", "loss": "loss", "reconstruction": "reconstruction", "bound": "bound",
        "mean_square_error": "mean_square_error", "kl_weight": "kl_weight", "kl_per_layer": "kl_per_layer",
    }  # fmt: skip
    columns = {column: [_rounded(r.get(name)) for r in records] for column, name in names.items()}
    return {**columns, "attempts": outcome.attempts}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
