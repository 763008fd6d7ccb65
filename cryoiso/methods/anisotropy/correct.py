"""Half-maps (or one map) in, corrected maps out: trains the networks, applies them, and keeps what was measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.log import ProgressLine
from cryoiso.core.types import DensityMap
from cryoiso.methods.anisotropy import network as networks
from cryoiso.methods.anisotropy.filter import band, checked, filtered
from cryoiso.methods.anisotropy.predict import predict
from cryoiso.methods.anisotropy.settings import Correction
from cryoiso.methods.anisotropy.submaps import GreyScale, particle_region
from cryoiso.methods.anisotropy.task import CorrectionTask
from cryoiso.parallel.abort import agree
from cryoiso.parallel.bell import side_by_side
from cryoiso.parallel.ddp import TrainingGroup, ranks_of_half, training_group
from cryoiso.train.loop import LoopSettings, TrainOutcome, train

RECORDS = 100
"""Records of a training, for its curves."""
BOTH = "both"
PERCEPTION_PX = 48
"""Tiles are at least this much larger than nothing: see ``tile_px``."""


@dataclass(frozen=True)
class Corrected:
    """What a correction gives back; maps and facts on every rank."""

    maps: dict[int, np.ndarray]
    """Half -> (D, D, D) float32 on the grey scale of the input. Not for a resolution."""
    inferred: dict[int, np.ndarray]
    """Half -> the part of it that came from the network."""
    network: dict[str, Path]
    """"both", or "1" and "2" -> network file."""
    history: dict[str, list[dict[str, Any]]]
    """Label -> records of its training."""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Course:
    """One network to be trained, and the halves that it sees and corrects."""

    label: str
    halves: tuple[int, ...]


def correct_halves(
    halves: dict[int, DensityMap],
    transfer: np.ndarray,
    mask: np.ndarray | None,
    settings: Correction,
    comm: Any,
    folder: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    warm: dict[str, Path] | None = None,
    resolution_A: float | None = None,
) -> Corrected:
    """Trains the network(s) on these maps and corrects the maps with them (collective).

    corrected = A x + (B - A) f(A x): x the map, f the network, B the band up to the resolution (or everything); without
    ``keep_measured`` B f(A x). Products are in Fourier space.

    Args:
        halves: half -> map; one map in mode "single". In mode "independent" a rank of two or more needs only the half
            that it corrects (``parallel.ddp.ranks_of_half``); no rank reads another.
        transfer: (D, D, D) filter A in [0, 1], centred, Friedel-symmetric.
        mask: (D, D, D) in [0, 1], sub-maps are drawn where it exceeds 0.5; None: the sphere in the box.
        settings: from ``settings.resolve``.
        folder: exists; for networks and checkpoints.
        seed: of all random numbers.
        resume: go on from checkpoints in ``folder``.
        warm: label -> network file to begin with.
        resolution_A: information finer than this is left out.

    Raises:
        InputError: maps, filter and mask do not fit together; a network file of another shape.
        Interrupted, CryoisoError: as ``train.loop.train``.
    """
    courses = _courses(settings, tuple(sorted({h for hs in comm.allgather(tuple(halves)) for h in hs})))
    apart = len(courses) == 2 and comm.size > 1
    done: dict[str, _Done] = {}
    for turn in [courses] if apart else [[course] for course in courses]:
        mine, ranks = turn[0], range(comm.size)
        if apart:
            which = 0 if comm.rank in ranks_of_half(1, comm.size) else 1
            mine, ranks = turn[which], ranks_of_half(which + 1, comm.size)
        error, job = None, None
        try:
            job = _Job.of(mine, halves, transfer, mask, settings, seed, warm, resolution_A)
        except InputError as caught:
            error = caught
        agree(comm, error)
        assert job is not None
        with side_by_side(comm) as bell, training_group(comm, ranks) as group:
            found = job.run(group, Path(folder), resume, bell.heard)
        done |= _from_all(comm, mine.label, found)
    return _joined(done, courses, settings, folder, resolution_A)


def _courses(settings: Correction, halves: tuple[int, ...]) -> list[_Course]:
    if settings.mode == "single":
        if len(halves) != 1:
            raise InputError("the mode 'single' takes one map", found=len(halves))
        return [_Course(BOTH, halves)]
    if settings.mode == "independent":
        return [_Course(str(h), (h,)) for h in halves]
    if halves != (1, 2):
        raise InputError("the mode 'paired' needs both half-maps", expected="1 and 2", found=halves)
    return [_Course(BOTH, halves)]


@dataclass(frozen=True)
class _Done:
    maps: dict[int, np.ndarray]
    inferred: dict[int, np.ndarray]
    outcome: TrainOutcome
    scale: GreyScale


@dataclass(frozen=True)
class _Job:
    """One course with everything that it works on."""

    course: _Course
    data: dict[int, np.ndarray]
    transfer: np.ndarray
    reach: np.ndarray
    inside: np.ndarray
    settings: Correction
    seed: int
    warm: dict[str, np.ndarray] | None
    pixel_size_A: float

    @classmethod
    def of(
        cls, course: _Course, halves: dict[int, DensityMap], transfer: np.ndarray, mask: np.ndarray | None,
        settings: Correction, seed: int, warm: dict[str, Path] | None, resolution_A: float | None,
    ) -> _Job:  # fmt: skip
        """Checks and prepares; every rank of the course's group gets the same."""
        maps = {half: halves[half] for half in course.halves}
        box, pixel = next(iter(maps.values())).box_px, next(iter(maps.values())).pixel_size_A
        for half, one in maps.items():
            if one.box_px != box:
                raise InputError(f"half-map {half} has another box", expected=box, found=one.box_px)
        reach = band(box, pixel, resolution_A)
        file = (warm or {}).get(course.label)
        return cls(
            course, {half: np.asarray(one.data, np.float32) for half, one in maps.items()},
            checked(transfer, box) * reach, reach, particle_region(mask, box), settings, seed,
            None if file is None else networks.matching_weights(file, settings.network), pixel,
        )  # fmt: skip

    def run(self, group: TrainingGroup, folder: Path, resume: bool, stop: Callable[[], bool]) -> _Done:
        """Trains and applies the network (collective over the group)."""
        seen = {half: filtered(data, self.transfer) for half, data in self.data.items()}
        scale = GreyScale.of(list(seen.values()), self.inside)
        given = {half: scale.normalised(data) for half, data in seen.items()}
        settings, label = self.settings, self.course.label
        task = CorrectionTask(
            list(given.values()), self.transfer, self.inside, settings, self.seed,
            device=group.device, index=group.index, size=group.size, label=label, warm=self.warm,
        )  # fmt: skip
        outcome = _train(task, settings, group, folder / f"training_{label}", resume, stop, self.seed, label)
        network = task.module.eval()
        maps, inferred = {}, {}
        for half, data in given.items():
            made = predict(network, data, tile_px(settings, data.shape[0]), group, settings.bfloat16)  # type: ignore[arg-type]
            maps[half], inferred[half] = self._combined(self.data[half], scale.restored(made))
        if group.is_first:
            networks.save(network_file(folder, label), network, self._facts(scale, outcome))  # type: ignore[arg-type]
        group.barrier()
        return _Done(maps, inferred, outcome, scale)

    def _combined(self, data: np.ndarray, made: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corrected map, and the network's part of it."""
        rest = self.reach - self.transfer
        if self.settings.keep_measured:
            inferred = filtered(made, rest)
            return filtered(data, self.transfer) + inferred, inferred
        return filtered(made, self.reach), filtered(made, rest)

    def _facts(self, scale: GreyScale, outcome: TrainOutcome) -> dict[str, Any]:
        return {
            "label": self.course.label,
            "halves": list(self.course.halves),
            "settings": self.settings.facts(),
            "seed": self.seed,
            "pixel_size_A": self.pixel_size_A,
            "grey_level": scale.level,
            "grey_spread": scale.spread,
            "steps": outcome.step,
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


def _train(
    task: CorrectionTask, settings: Correction, group: TrainingGroup, folder: Path, resume: bool,
    stop: Callable[[], bool], seed: int, label: str,
) -> TrainOutcome:  # fmt: skip
    if settings.steps == 0:  # the network that was given is applied as it is
        task.start(0)
        task.module.to(group.device)
        return TrainOutcome([], 0, 0)
    on_gpu = group.device != "cpu"
    loop = LoopSettings(
        steps=settings.steps, learning_rate=settings.learning_rate, schedule=settings.schedule, seed=seed,
        log_every=max(1, settings.steps // RECORDS), clip_norm=1.0, amp=settings.bfloat16, compile=on_gpu,
        channels_last=True, flat_window=settings.steps + 1,
    )  # fmt: skip
    name = "the anisotropy network" + ("" if label == BOTH else f" of half {label}")
    line = ProgressLine(f"training {name}", settings.steps, active=group.is_first)
    if group.is_first:
        with suppress(FileExistsError):
            folder.mkdir()
    outcome = train(task, group, loop, folder, stop=stop, resume=resume, on_progress=line.update)
    last = outcome.history[-1]["loss"]
    line.close(f"{outcome.step:,} steps, loss {last:.4f}" if last is not None else "")
    return outcome


def _from_all(comm: Any, label: str, found: _Done) -> dict[str, _Done]:
    """The results of all groups on every rank: arrays from the first rank that has them, slab-wise."""
    labels = comm.allgather(label)
    out: dict[str, _Done] = {}
    for name in sorted(set(labels)):
        root = labels.index(name)
        mine = found if comm.rank == root else None
        halves = comm.bcast(None if mine is None else tuple(mine.maps), root)
        rest = comm.bcast(None if mine is None else (mine.outcome, mine.scale), root)
        maps = {h: comm.bcast(None if mine is None else mine.maps[h], root) for h in halves}
        inferred = {h: comm.bcast(None if mine is None else mine.inferred[h], root) for h in halves}
        out[name] = _Done(maps, inferred, *rest)
    return out


def _joined(
    done: dict[str, _Done], courses: list[_Course], settings: Correction, folder: Path, resolution_A: float | None
) -> Corrected:
    maps = {half: data for one in done.values() for half, data in one.maps.items()}
    inferred = {half: data for one in done.values() for half, data in one.inferred.items()}
    facts = {
        "settings": settings.facts(),
        "steps": settings.steps,
        "resolution_A": resolution_A,
        "networks": {
            label: {"halves": list(next(c.halves for c in courses if c.label == label)), "steps": one.outcome.step,
                    "attempts": one.outcome.attempts, "loss": (one.outcome.history or [{}])[-1].get("loss"),
                    "grey_level": one.scale.level, "grey_spread": one.scale.spread}
            for label, one in done.items()
        },
    }  # fmt: skip
    return Corrected(
        maps, inferred, {label: network_file(folder, label) for label in done},
        {label: one.outcome.history for label, one in done.items()}, facts,
    )  # fmt: skip
