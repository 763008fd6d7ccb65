"""One network from its maps to the corrected maps: what each method trains on, and what it makes of the result.

``completion`` (the default), in rounds, with S the solvent constraint of ``solvent`` and f the network:

    w = A x + (B - A) f(S[A x]), a few steps;   y = S[A w] from y = w on, many steps

First f is the identity; in each round it is trained to restore rotated copies of the last y.

``published``: the losses of the publication train f on sub-maps of A x, and y = f(A x).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError, Interrupted
from cryoiso.core.log import ProgressLine
from cryoiso.core.types import DensityMap
from cryoiso.methods.anisotropy import network as networks
from cryoiso.methods.anisotropy.completion import CompletionTask
from cryoiso.methods.anisotropy.filter import band, checked, filtered
from cryoiso.methods.anisotropy.predict import predict
from cryoiso.methods.anisotropy.settings import Correction
from cryoiso.methods.anisotropy.solvent import Solvent, noise_amplitude, on_device
from cryoiso.methods.anisotropy.submaps import GreyScale, particle_region
from cryoiso.methods.anisotropy.task import CorrectionTask
from cryoiso.nets.unet import Unet3d
from cryoiso.parallel.ddp import TrainingGroup
from cryoiso.parallel.group_stop import group_wide
from cryoiso.train.loop import LoopSettings, TrainOutcome, train

RECORDS = 100
"""Records of a training, for its curves."""
BOTH = "both"
ESTIMATE_STEPS = 100
"""Of the solvent constraint, for an estimate of the map from what a network made; more change little."""


@dataclass(frozen=True)
class NetworkPlan:
    """One network to be trained, and the halves that it sees and corrects."""

    label: str
    halves: tuple[int, ...]


@dataclass(frozen=True)
class CorrectionOutput:
    """Result of a network."""

    maps: dict[int, np.ndarray]
    inferred: dict[int, np.ndarray]
    history: list[dict[str, Any]]
    attempts: int
    scale: GreyScale


@dataclass(frozen=True)
class CorrectionInput:
    """One network with everything that it works on."""

    plan: NetworkPlan
    data: dict[int, np.ndarray]
    fsc_filter: np.ndarray
    band_mask: np.ndarray
    particle_mask: np.ndarray
    settings: Correction
    seed: int
    warm: dict[str, np.ndarray] | None
    pixel_size_A: float

    @classmethod
    def of(
        cls, plan: NetworkPlan, halves: dict[int, DensityMap], fsc_filter: np.ndarray, mask: np.ndarray | None,
        settings: Correction, seed: int, warm: dict[str, Path] | None, resolution_A: float | None,
    ) -> CorrectionInput:  # fmt: skip
        """Checks and prepares; every rank of the network's group gets the same."""
        maps = {half: halves[half] for half in plan.halves}
        box, pixel = next(iter(maps.values())).box_px, next(iter(maps.values())).pixel_size_A
        for half, half_map in maps.items():
            if half_map.box_px != box:
                raise InputError(
                    f"half-map {half} has another box", expected=box, found=half_map.box_px, code="box-mismatch"
                )
        band_mask = band(box, pixel, resolution_A)
        file = (warm or {}).get(plan.label)
        return cls(
            plan, {half: np.asarray(half_map.data, np.float32) for half, half_map in maps.items()},
            checked(fsc_filter, box) * band_mask, band_mask, particle_region(mask, box), settings, seed,
            None if file is None else networks.matching_weights(file, settings.network), pixel,
        )  # fmt: skip

    def run(self, group: TrainingGroup, folder: Path, resume: bool, stop: Callable[[], bool]) -> CorrectionOutput:
        """Trains and applies the network (collective over the group)."""
        seen = {half: filtered(data, self.fsc_filter) for half, data in self.data.items()}
        scale = GreyScale.of(list(seen.values()), self.particle_mask)
        method = self._by_completion if self.settings.method == "completion" else self._as_published
        network, results, outcomes = method(scale, group, folder, _Trainer(self, group, folder, resume, stop))
        maps, inferred = {}, {}
        for half, (corrected, part) in results.items():
            inferred[half] = (part * scale.spread).astype(np.float32)
            maps[half] = seen[half] + inferred[half] if self.settings.keep_measured else scale.restored(corrected)
        if group.is_first:
            networks.save(network_file(folder, self.plan.label), network, self._facts(scale, outcomes))
        group.barrier()
        return CorrectionOutput(maps, inferred, _joined(outcomes), outcomes[-1].attempts, scale)

    def _by_completion(
        self, scale: GreyScale, group: TrainingGroup, folder: Path, trainer: _Trainer
    ) -> tuple[Any, dict[int, tuple[np.ndarray, np.ndarray]], list[TrainOutcome]]:
        """Network, half -> (corrected map, the network's part of it), outcomes of the rounds."""
        settings, device, box, heed = self.settings, group.device, len(self.fsc_filter), trainer.heed
        solvent = Solvent(self.fsc_filter, self.band_mask, device)
        x = {half: scale.normalised(data) for half, data in self.data.items()}
        measured = {half: solvent.measured(on_device(data, device)) for half, data in x.items()}
        start = {half: solvent.filled(volume, box, settings.solvent_steps, heed) for half, volume in measured.items()}
        # no training: nobody looks at the first estimate
        estimate = self._estimates(solvent, measured, start, heed) if settings.steps else start
        noise = None
        if settings.mode == "independent":  # paired, the other half-map has noise of its own; one map's is not known
            noise = [noise_amplitude(data, self.fsc_filter) for data in x.values()]
        weights, outcomes = self.warm, []
        # a given network has learnt what the first round teaches: it is applied, and one round follows
        first = 1 if self.warm is None or settings.steps == 0 else 0
        last = settings.rounds if settings.steps and self.warm is None else 1
        for number in range(first, last + 1):
            task = CompletionTask(
                [volume.cpu().numpy() for volume in estimate.values()], solvent, self.particle_mask, settings,
                self.seed,
                noise=noise, device=device, index=group.index, size=group.size,
                label=f"{self.plan.label}, round {number}", warm=weights,
            )  # fmt: skip
            outcomes.append(trainer(task, settings.steps_a_round if number else 0, number, last))
            network = cast(Unet3d, task.module.eval())
            predicted = {}
            for half, volume in start.items():
                change = predict(network, volume.cpu().numpy(), tile_px(settings, box), group, settings.bfloat16, heed)
                predicted[half] = on_device(change, device)
            estimate = self._estimates(solvent, measured, predicted, heed)
            weights = {name: value.detach().cpu().numpy().copy() for name, value in network.state_dict().items()}
        return network, {h: self._parts(solvent, volume.clamp(min=0)) for h, volume in estimate.items()}, outcomes

    @staticmethod
    def _estimates(
        solvent: Solvent, measured: dict[int, Tensor], predicted: dict[int, Tensor], heed: Callable[[], None]
    ) -> dict[int, Tensor]:
        """Half -> w, and what the solvent constraint makes of it."""
        estimates = {}
        for half, volume in measured.items():
            joined = solvent.joined(volume, predicted[half])
            # held to A w: held to A x, it would forget what the network made of weak data
            held = solvent.measured(joined)
            estimates[half] = solvent.filled(held, joined.shape[-1], ESTIMATE_STEPS, heed, joined)
        return estimates

    def _parts(self, solvent: Solvent, predicted: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return filtered(predicted.cpu().numpy(), self.band_mask), solvent.inferred(predicted).cpu().numpy()

    def _as_published(
        self, scale: GreyScale, group: TrainingGroup, folder: Path, trainer: _Trainer
    ) -> tuple[Any, dict[int, tuple[np.ndarray, np.ndarray]], list[TrainOutcome]]:
        """As :meth:`_by_completion`."""
        settings = self.settings
        filtered_maps = {half: scale.normalised(filtered(data, self.fsc_filter)) for half, data in self.data.items()}
        task = CorrectionTask(
            list(filtered_maps.values()), self.fsc_filter, self.particle_mask, settings, self.seed, device=group.device,
            index=group.index, size=group.size, label=self.plan.label, warm=self.warm,
        )  # fmt: skip
        outcome = trainer(task, settings.steps, 1, 1)
        network = cast(Unet3d, task.module.eval())
        results = {}
        for half, data in filtered_maps.items():
            predicted = predict(network, data, tile_px(settings, len(data)), group, settings.bfloat16, trainer.heed)
            results[half] = filtered(predicted, self.band_mask), filtered(predicted, self.band_mask - self.fsc_filter)
        return network, results, [outcome]

    def _facts(self, scale: GreyScale, outcomes: list[TrainOutcome]) -> dict[str, Any]:
        return {
            "label": self.plan.label,
            "halves": list(self.plan.halves),
            "settings": self.settings.facts(),
            "seed": self.seed,
            "pixel_size_A": self.pixel_size_A,
            "grey_level": scale.level,
            "grey_spread": scale.spread,
            "steps": sum(outcome.step for outcome in outcomes),
            "warm": self.warm is not None,
        }


def network_file(folder: Path, label: str) -> Path:
    """Where the network of a label lies."""
    return Path(folder) / ("network.npz" if label == BOTH else f"network{label}.npz")


def tile_px(settings: Correction, box_px: int) -> int:
    """Edge of the tiles of a prediction: half as large again as the sub-maps, but no larger than the box needs."""
    multiple = settings.network.multiple
    wanted = min(settings.cube_px * 3 // 2, box_px * 4 // 3)
    return max(settings.cube_px, -(-wanted // multiple) * multiple)


@dataclass(frozen=True)
class _Trainer:
    """Trains a task; each round has a folder of its own for checkpoints."""

    job: CorrectionInput
    group: TrainingGroup
    folder: Path
    resume: bool
    stop: Callable[[], bool]

    def heed(self) -> None:
        """Stops the whole group if a rank of it was told to (collective over the group).

        Raises:
            Interrupted: one was; what was trained is in the checkpoints.
        """
        if float(self.group.all_sum(torch.tensor([float(self.stop())]))):
            raise group_wide(Interrupted("stopped by a signal while correcting maps"))

    def __call__(self, task: Any, steps: int, number: int, rounds: int) -> TrainOutcome:
        settings, label, group = self.job.settings, self.job.plan.label, self.group
        if steps == 0:  # the network that was given is applied as it is
            task.start(0)
            task.module.to(group.device)
            return TrainOutcome([], 0, 0)
        loop = LoopSettings(
            steps=steps, learning_rate=settings.learning_rate, schedule=settings.schedule, seed=self.job.seed,
            log_every=max(1, settings.steps // RECORDS), clip_norm=1.0, amp=settings.bfloat16,
            compile=group.device != "cpu", channels_last=True, flat_window=steps + 1,
            micro_batch=0 if group.device != "cpu" else 1,  # the same bits on one rank, two and four
        )  # fmt: skip
        name = "the anisotropy network" + ("" if label == BOTH else f" of half {label}")
        name += f", round {number} of {rounds}" if rounds > 1 else ""
        folder = self.folder / (f"training_{label}" + (f"_{number}" if number > 1 else ""))
        line = ProgressLine(f"training {name}", steps, active=group.is_first)
        if group.is_first:
            with suppress(FileExistsError):
                folder.mkdir()
        outcome = train(task, group, loop, folder, stop=self.stop, resume=self.resume, on_progress=line.update)
        last = outcome.history[-1]["loss"]
        line.close(f"{outcome.step:,} steps, loss {last:.4f}" if last is not None else "")
        return outcome


def _joined(outcomes: list[TrainOutcome]) -> list[dict[str, Any]]:
    """Records of all rounds, steps counted on."""
    records, before = [], 0
    for number, outcome in enumerate((outcome for outcome in outcomes if outcome.history), 1):
        records += [{**record, "step": record["step"] + before, "round": number} for record in outcome.history]
        before += outcome.step
    return records
