"""The training loop: steps, records, checkpoints, watchdogs with bounded restarts, and stopping on a signal.

Every decision follows from numbers that are the same on all ranks of a group, so the ranks never part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cryoiso.core import products
from cryoiso.core.errors import CryoisoError, Interrupted
from cryoiso.core.log import BY_ANY_RANK, logger
from cryoiso.io import checkpoint
from cryoiso.parallel import signals
from cryoiso.parallel.ddp import TrainingGroup
from cryoiso.parallel.group_stop import group_wide
from cryoiso.parallel.partition import chunk_bounds, owned_rows
from cryoiso.train import state as states
from cryoiso.train import throughput
from cryoiso.train.decision import TrainingDecision, flat_loss
from cryoiso.train.prefetch import Prefetcher, part_of
from cryoiso.train.step import Readback, Stepper, channels_last_of, seed_torch, training_mode, try_compiled
from cryoiso.train.timer import ThroughputTimer

CHECKPOINT = Path("checkpoint") / "state.npz"
WARM_UP = 20


@dataclass(frozen=True)
class LoopSettings:
    """How to train; ``checkpoint_s`` alone has no influence on the result."""

    steps: int
    learning_rate: float
    """Of Adam, at its highest."""
    seed: int = 0
    log_every: int = 10
    clip_norm: float = 0.0
    """Longest gradient; 0: any."""
    amp: bool = False
    """bfloat16 autocast: on GPUs, and on CPUs that are fast at it. The first rank's choice when the training begins."""
    compile: bool = False
    channels_last: bool = False
    checkpoint_s: float = 120.0
    max_restarts: int = 2
    bad_steps: int = 3
    """So many steps in a row that are not finite end an attempt."""
    flat_window: int = 0
    """Steps over which a loss that does not fall counts as flat; 0: a tenth of all, at least 20."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: up over the first steps, then down to zero at the last."""
    micro_batch: int = 0
    """Gradients of so many images at a time; 0: of all that a rank has. With 1, the result is the same bits on one CPU
    rank, two, four, ... if all have the same number of images. ``TrainingTask.loss`` must then treat each
    image alone and know of it by the batch only."""


class TrainingTask(Protocol):
    """What is trained. ``parallel.partition.owned_rows(batch, 1, index, size)`` shares out the images of a step."""

    module: nn.Module
    """With the parameters that ``start`` made; on any device."""
    batch: int
    """Images a step, of all ranks of the group together."""
    watched: str
    """The term, or "loss", that the flat-loss watchdog goes by: a scalar, the same function at every step."""

    def start(self, attempt: int) -> None:
        """Makes ``module`` anew; torch's generator has been seeded by (seed, attempt)."""
        ...

    def prepare(self, step: int) -> Any:
        """This rank's share of a step's batch, a pure function of the step (no torch.randn without a generator).

        Called in a thread of its own. Tensors in it (in tuples, lists, dicts, dataclasses) are moved to the device.
        """
        ...

    def loss(self, module: nn.Module, batch: Any, step: int, attempt: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to be minimised, and terms to be recorded (scalars or vectors): means over the batch's images.

        Nothing here should wait for the GPU (.item(), torch.tensor(..., device=...)); terms may be on the CPU.
        """
        ...

    def annealed_at(self, attempt: int) -> int:
        """The step from which on ``loss`` is the same function; 0 if it always is. No loss is called flat before."""
        ...

    def judge(self, history: Sequence[dict[str, Any]]) -> TrainingDecision:
        """What to do after these records of the present attempt; the same on every rank for the same records."""
        ...

    def configuration(self) -> dict[str, Any]:
        """Plain values that, beside the settings, decide the result; a checkpoint of others is refused."""
        ...


@dataclass(frozen=True)
class TrainOutcome:
    """How a training ended; the trained module is the task's.

    ``history``: a record each ``log_every`` steps and attempt: step, attempt, loss and the task's terms (means over
    the good steps since the last record; None if there was none), gradient_norm, skipped (steps).
    """

    history: list[dict[str, Any]]
    step: int
    attempts: int


def train(
    task: TrainingTask,
    group: TrainingGroup,
    settings: LoopSettings,
    folder: Path,
    *,
    stop: Callable[[], bool] | None = None,
    resume: bool = False,
    on_progress: Callable[[int, str], None] | None = None,
) -> TrainOutcome:
    """Trains ``task.module`` (collective over the group).

    The same settings give the same parameters on CPUs with the same number of ranks, whether or not the training was
    interrupted; on other numbers of ranks they differ by rounding (but see ``LoopSettings.micro_batch``).

    Args:
        folder: for checkpoint/ and timing.json, which the group's first rank writes.
        stop: asked at every step; true on any rank of the group stops all of it. Default: a signal was received.
        resume: go on from the checkpoint in ``folder``, if there is one.
        on_progress: called at every record with the steps done and a few words (``ProgressLine.update``).

    Raises:
        Interrupted: ``stop`` said so; the checkpoint is on the disk (on all ranks of the group).
        CryoisoError: the watchdogs gave up (on all ranks of the group).
        InputError: the checkpoint is of another configuration.
    """
    with training_mode(group.device):
        run = _TrainingRun(
            task, group, settings, Path(folder), stop or (lambda: bool(signals.stop_signal())), on_progress
        )
        return run.go(resume)


class _TrainingRun:
    def __init__(
        self,
        task: TrainingTask,
        group: TrainingGroup,
        settings: LoopSettings,
        folder: Path,
        stop: Callable[[], bool],
        on_progress: Callable[[int, str], None] | None,
    ) -> None:
        self.task, self.group, self.settings, self.folder = task, group, settings, folder
        self.stop, self.on_progress = stop, on_progress
        self.progress = states.TrainingProgress()
        self.rows = owned_rows(task.batch, 1, group.index, group.size)
        self.parts = chunk_bounds(len(self.rows), settings.micro_batch) if settings.micro_batch else []
        self.configuration = {**asdict(settings), **task.configuration(), "batch": task.batch}
        del self.configuration["checkpoint_s"], self.configuration["amp"]  # the latter is in the progress
        self.saved = time.monotonic()
        self.timer = ThroughputTimer(folder / products.TIMING, task.batch, group.size)

    def go(self, resume: bool) -> TrainOutcome:
        arrays = self._load() if resume else None
        if not resume and self.group.is_first:  # else a later resumption would find that of an earlier training
            checkpoint.remove(self.folder / CHECKPOINT)
        if arrays is None:
            self.progress.bfloat16 = bool(self.group.share(self.settings.amp))
            if self.group.is_first:
                self.timer.path.unlink(missing_ok=True)
        while True:
            if not self.progress.reason:
                self._attempt(arrays)
            if not self.progress.reason:
                break
            self._give_up_or_restart()
            arrays = None
        return TrainOutcome(self.progress.history, self.progress.step, self.progress.attempt + 1)

    def _load(self) -> dict[str, np.ndarray] | None:
        saved = states.load(self.folder / CHECKPOINT, self.configuration) if self.group.is_first else None
        progress = self.group.share(None if saved is None else asdict(saved[1]))
        if progress is None:
            return None
        arrays = self.group.share_arrays({} if saved is None else saved[0])
        self.progress = states.TrainingProgress(**progress)
        self.timer.resume(self.progress)
        if self.group.is_first:
            logger.info("training goes on after step %d of attempt %d", self.progress.step, self.progress.attempt + 1)
            if self.progress.bfloat16 != self.settings.amp:
                words = "training goes on in %s, as it began on another kind of device"
                logger.info(words, "bfloat16" if self.progress.bfloat16 else "float32")
        return arrays

    def _give_up_or_restart(self) -> None:
        done, reason = self.progress.attempt + 1, self.progress.reason
        if self.progress.hopeless or self.progress.attempt >= self.settings.max_restarts:
            times = "once" if done == 1 else f"{done} times"
            raise group_wide(
                CryoisoError(
                    f"training was tried {times} and failed: {reason}. Check that particles, poses and reference "
                    "belong together, or lower the learning rate.",
                    code="training-diverged",
                )
            )
        if self.group.is_first:
            words = "training in %s begins again with new parameters (attempt %d): %s"
            logger.warning(words, self.folder, done + 1, reason, extra=BY_ANY_RANK)
        self.progress.next_attempt()

    def _attempt(self, arrays: dict[str, np.ndarray] | None) -> None:
        """Trains until all steps are done or ``progress.reason`` says why not."""
        settings, p = self.settings, self.progress
        stepper = self._begin(arrays)
        if p.step >= settings.steps:
            return
        readback = Readback(stepper.on_gpu)
        with Prefetcher(
            self.task.prepare, p.step, settings.steps, self.group.device, channels_last=settings.channels_last
        ) as batches:
            batch = batches.get()
            if self.group.is_first:
                self._count(stepper, batch)
            if settings.compile:
                try_compiled(stepper, lambda module: self._loss(module, batch, p.step))
            for step in range(p.step, settings.steps):
                readback.push(step, self._step(stepper, batch, step))
                wanted = [self._digest(*numbers, stepper) for numbers in readback.pop()]
                save, leave = any(w[0] for w in wanted), any(w[1] for w in wanted)
                if save or leave or step + 1 == settings.steps:
                    for numbers in readback.pop(everything=True):
                        self._digest(*numbers, stepper)
                if save or leave:
                    self._save(stepper, leave)
                if p.reason:
                    return
                if step + 1 < settings.steps:
                    batch = batches.get()
        self._save(stepper, False)

    def _begin(self, arrays: dict[str, np.ndarray] | None) -> Stepper:
        settings, p = self.settings, self.progress
        seed_torch(settings.seed, "parameters", p.attempt)
        self.task.start(p.attempt)
        module = self.task.module.to(self.group.device)
        if settings.channels_last:
            module = module.to(memory_format=channels_last_of(module))  # type: ignore[call-overload]
        module.train()
        stepper = Stepper(
            module, self.group, settings.learning_rate, settings.clip_norm, p.bfloat16, parts=bool(self.parts)
        )
        if arrays is not None:
            states.restore(arrays, module, stepper.optimiser)
        return stepper

    def _step(self, stepper: Stepper, batch: Any, step: int) -> Tensor:
        stepper.set_rate(learning_rate(self.settings, step))
        if not self.parts:
            share = len(self.rows) / self.task.batch
            return stepper(lambda module: self._loss(module, batch, step), share, self._flags)
        sizes = [stop - start for start, stop in self.parts]
        return stepper.in_parts(
            lambda module, part: self._loss(module, batch, step, part), sizes, self.task.batch, self._flags
        )

    def _loss(self, module: nn.Module, batch: Any, step: int, part: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Of this rank's images, or of one part of them; random numbers of a part are the same on whatever rank."""
        attempt = self.progress.attempt
        if self.parts:
            start, stop = self.parts[part]
            seed_torch(self.settings.seed, "image", attempt, step, self.rows.start + start)
            batch = part_of(batch, start, stop, len(self.rows))
        else:
            seed_torch(self.settings.seed, "step", attempt, step, self.group.index)
        return self.task.loss(module, batch, step, attempt)

    def _count(self, stepper: Stepper, batch: Any) -> None:
        """Arithmetic of a step, for the timer; before anything is compiled."""
        module, step = stepper.in_autocast(stepper.module), self.progress.step
        images = self.parts[0][1] - self.parts[0][0] if self.parts else len(self.rows)
        flop = throughput.training_flop(lambda: self._loss(module, batch, step))
        self.timer.device(flop / images, throughput.product_tflops(self.group.device, self.progress.bfloat16))

    def _flags(self) -> list[float]:
        """Is a checkpoint due, and shall we stop?"""
        due = self.group.is_first and time.monotonic() - self.saved >= self.settings.checkpoint_s
        return [float(due), float(self.stop())]

    def _digest(self, step: int, numbers: list[float], stepper: Stepper) -> tuple[bool, bool]:
        """Takes note of one step; returns whether a checkpoint is due and whether to leave."""
        p = self.progress
        save, leave, *values, bad = numbers
        p.step = step + 1
        if bad:
            p.skipped += 1
            p.bad_in_row += 1
            self._suspect_parameters(stepper.module)
        else:
            p.bad_in_row = 0
            p.counted += 1
            p.sums = [a + b for a, b in zip(p.sums or [0.0] * len(values), values, strict=True)]
        if p.step % self.settings.log_every == 0 or p.step == self.settings.steps:
            self._record(stepper.layout)
        return bool(save), bool(leave)

    def _suspect_parameters(self, module: nn.Module) -> None:
        """After a step that was not finite: is it the parameters', or has it happened too often?"""
        p = self.progress
        if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
            p.reason = p.reason or f"a parameter is not finite after step {p.step:,}"
        elif p.bad_in_row >= self.settings.bad_steps:
            p.reason = p.reason or f"loss or gradient were not finite in {p.bad_in_row} steps up to {p.step:,}"

    def _record(self, layout: dict[str, tuple[int, ...]]) -> None:
        """Ends a stretch of steps: its record, the watchdogs, progress."""
        p = self.progress
        means = [value / p.counted for value in p.sums] if p.counted else None
        p.history.append({"step": p.step, "attempt": p.attempt, **_named(means, layout), "skipped": p.skipped})
        p.sums, p.counted, p.skipped = [], 0, 0
        rate = self.timer.note(p)
        loss = p.history[-1]["loss"]
        words = f"loss {'not finite' if loss is None else format(loss, '.4g')}, {rate}"
        if self.on_progress is not None:
            self.on_progress(p.step, words)
        if self.group.is_first:
            logger.debug("attempt %d, step %d: %s", p.attempt + 1, p.step, words)
        self._judge()

    def _judge(self) -> None:
        p, settings = self.progress, self.settings
        records = p.records()
        window = settings.flat_window or max(20, settings.steps // 10)
        reason = flat_loss(records, self.task.annealed_at(p.attempt), window, self.task.watched)
        verdict = self.task.judge(records)
        if verdict.action != "go on":
            p.reason, p.hopeless = p.reason or verdict.reason, verdict.action == "stop"
        else:
            p.reason = p.reason or reason

    def _save(self, stepper: Stepper, leave: bool) -> None:
        """Writes the checkpoint; raises Interrupted, once it is on the disk, if the group is to leave."""
        if self.group.is_first:
            path = self.folder / CHECKPOINT
            states.save(path, stepper.module, stepper.optimiser, self.progress, self.configuration)
            self.timer.write()
        self.saved = time.monotonic()
        if leave:
            self.group.barrier()
            step = self.progress.step
            raise group_wide(Interrupted(f"training was stopped after step {step:,}"))


def learning_rate(settings: LoopSettings, step: int) -> float:
    """The learning rate of a step: constant, or WARM_UP steps up and half a cosine down to zero."""
    if settings.schedule == "constant":
        return settings.learning_rate
    down = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * min(1.0, (step + 1) / WARM_UP) * down


def _named(means: list[float] | None, layout: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Loss, terms and norm of the gradient by name."""
    if means is None:
        return {"loss": None, **dict.fromkeys(layout), "gradient_norm": None}
    out: dict[str, Any] = {"loss": means[0]}
    at = 1
    for name, shape in layout.items():
        size = int(np.prod(shape))
        out[name] = means[at] if shape == () else means[at : at + size]
        at += size
    return {**out, "gradient_norm": means[at]}
