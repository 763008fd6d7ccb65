"""Half-maps (or one map) in, corrected maps out: trains the networks, applies them, and keeps what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.methods.anisotropy.correction_run import BOTH, CorrectionInput, CorrectionOutput, NetworkPlan, network_file
from cryoiso.methods.anisotropy.settings import Correction
from cryoiso.parallel.abort import agree
from cryoiso.parallel.context import Context
from cryoiso.parallel.ddp import ranks_of_half, training_group
from cryoiso.parallel.group_stop import side_by_side

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Corrected:
    """What a correction gives back; maps and facts on every rank."""

    maps: dict[int, Float[np.ndarray, "box box box"]]
    """Half -> (D, D, D) float32 on the grey scale of the input. Not for a resolution."""
    inferred: dict[int, Float[np.ndarray, "box box box"]]
    """Half -> the part of it that came from the network."""
    network: dict[str, Path]
    """"both", or "1" and "2" -> network file."""
    history: dict[str, list[dict[str, Any]]]
    """Label -> records of its training."""
    facts: dict[str, Any] = field(default_factory=dict)


def correct_halves(
    halves: dict[int, DensityMap],
    fsc_filter: Float[np.ndarray, "box box box"],
    mask: Float[np.ndarray, "box box box"] | None,
    settings: Correction,
    comm: Context | None,
    folder: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    warm: dict[str, Path] | None = None,
    resolution_A: float | None = None,
) -> Corrected:
    """Trains the network(s) on these maps and corrects the maps with them (collective).

    corrected = A x + (B - A) y: x the map, B the band up to the resolution (or everything), y what the method makes of
    A x (see ``correction_run``); without ``keep_measured`` B y. Products are in Fourier space.

    Args:
        halves: half -> map; one map in mode "single". In mode "independent" a rank of two or more needs only the half
            that it corrects (``parallel.ddp.ranks_of_half``); no rank reads another.
        fsc_filter: (D, D, D) filter A in [0, 1], centred, Friedel-symmetric.
        mask: (D, D, D) in [0, 1], sub-maps are drawn where it exceeds 0.5; None: the sphere in the box.
        settings: from ``settings.resolve``.
        comm: the ranks that share the work; None: this process alone.
        folder: exists; for networks and checkpoints.
        seed: of all random numbers.
        resume: go on from checkpoints in ``folder``.
        warm: label -> network file to begin with.
        resolution_A: information finer than this is left out.

    Raises:
        InputError: maps, filter and mask do not fit together; a network file of another shape.
        Interrupted, CryoisoError: as ``train.loop.train``.
    """
    comm = comm if comm is not None else Context()
    plans = _plans(settings, tuple(sorted({h for hs in comm.allgather(tuple(halves)) for h in hs})))
    apart = len(plans) == 2 and comm.size > 1
    done: dict[str, CorrectionOutput] = {}
    for turn in [plans] if apart else [[plan] for plan in plans]:
        own_plan, ranks = turn[0], range(comm.size)
        if apart:
            which = 0 if comm.rank in ranks_of_half(1, comm.size) else 1
            own_plan, ranks = turn[which], ranks_of_half(which + 1, comm.size)
        error, job = None, None
        try:
            job = CorrectionInput.of(own_plan, halves, fsc_filter, mask, settings, seed, warm, resolution_A)
        except InputError as caught:
            error = caught
        agree(comm, error)
        assert job is not None
        with side_by_side(comm) as stop_signal, training_group(comm, ranks) as group:
            output = job.run(group, Path(folder), resume, stop_signal.received)
        done |= _from_all(comm, own_plan.label, output)
    return _joined(done, plans, settings, folder, resolution_A)


def _plans(settings: Correction, halves: tuple[int, ...]) -> list[NetworkPlan]:
    if settings.mode == "single":
        if len(halves) != 1:
            raise InputError("the mode 'single' takes one map", found=len(halves), code="option-out-of-range")
        return [NetworkPlan(BOTH, halves)]
    if settings.mode == "independent":
        return [NetworkPlan(str(h), (h,)) for h in halves]
    if halves != (1, 2):
        raise InputError(
            "the mode 'paired' needs both half-maps", expected="1 and 2", found=halves, code="option-out-of-range"
        )
    return [NetworkPlan(BOTH, halves)]


def _from_all(comm: Any, label: str, output: CorrectionOutput) -> dict[str, CorrectionOutput]:
    """The results of all groups on every rank: arrays from the first rank that has them, slab-wise."""
    labels = comm.allgather(label)
    out: dict[str, CorrectionOutput] = {}
    for name in sorted(set(labels)):
        root = labels.index(name)
        own_output = output if comm.rank == root else None
        halves = comm.bcast(None if own_output is None else tuple(own_output.maps), root)
        rest = comm.bcast(
            None if own_output is None else (own_output.history, own_output.attempts, own_output.scale), root
        )
        maps = {h: comm.bcast(None if own_output is None else own_output.maps[h], root) for h in halves}
        inferred = {h: comm.bcast(None if own_output is None else own_output.inferred[h], root) for h in halves}
        out[name] = CorrectionOutput(maps, inferred, *rest)
    return out


def _joined(
    done: dict[str, CorrectionOutput],
    plans: list[NetworkPlan],
    settings: Correction,
    folder: Path,
    resolution_A: float | None,
) -> Corrected:
    maps = {half: data for output in done.values() for half, data in output.maps.items()}
    inferred = {half: data for output in done.values() for half, data in output.inferred.items()}
    facts = {
        "settings": settings.facts(),
        "steps": settings.steps,
        "resolution_A": resolution_A,
        "networks": {
            label: {
                "halves": list(next(c.halves for c in plans if c.label == label)),
                "steps": output.history[-1]["step"] if output.history else 0,
                "loss": output.history[-1]["loss"] if output.history else None,
                "attempts": output.attempts, "grey_level": output.scale.level, "grey_spread": output.scale.spread,
            }
            for label, output in done.items()
        },
    }  # fmt: skip
    return Corrected(
        maps, inferred, {label: network_file(folder, label) for label in done},
        {label: output.history for label, output in done.items()}, facts,
    )  # fmt: skip
