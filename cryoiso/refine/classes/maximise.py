"""From the sums of all classes to their half-maps and next references."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cryoiso.core.types import HALVES
from cryoiso.parallel.partition import root_of_half
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.refine.agreement import as_map, on_every_rank
from cryoiso.refine.classes.model import Maps
from cryoiso.refine.full_map import joined, mean_term
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.leverage import cropped, total_weight
from cryoiso.refine.references import exchange_low_resolution
from cryoiso.refine.schedule import ScheduleState, agreement_shell
from cryoiso.refine.sums import reduced

LEAST_PARTICLES = 2.0
"""Posterior weight that a class must have in both half-sets; one with less is empty from then on."""
ClassSums = list[dict[int, FourierSums]]
"""Class -> half -> sums, of the halves that a rank is root of."""


@dataclass
class ClassMaps:
    """What an iteration makes of its sums, on every rank."""

    references: Maps = field(default_factory=list)
    half_maps: Maps = field(default_factory=list)
    maps: list[np.ndarray] = field(default_factory=list)
    resolution_A: list[float | None] = field(default_factory=list)
    """Of the plain half-maps of each class, FSC 0.143; None: the class is empty."""
    total_weight: Maps = field(default_factory=list)
    """See ``leverage``; of the halves that this rank is root of until ``share_out`` gives it to all."""
    shell: int = 0
    """Highest one in which the (weighted) half-maps of any class agree."""


def reduce_classes(run: Refinement, accumulators: list[SliceAccumulator], half: int, sums: ClassSums) -> None:
    """Adds up a half-set's sums of all ranks; its root gets them (collective). Uses the accumulators up."""
    for own, accumulator in zip(sums, accumulators, strict=True):
        total = reduced(accumulator, half, run.operations, run.comm)
        if total is not None:
            own[half] = total


def make_maps(
    run: Refinement,
    sums: ClassSums,
    weight: np.ndarray,
    state: ScheduleState,
    share_to_A: float,
    kappa: float,
    change: np.ndarray,
) -> ClassMaps:
    """Half-maps, FSC, signal power and references of every class (collective).

    Args:
        sums: class -> half -> sums, of the halves that this rank is root of. Used up.
        weight: (K, 2) posterior weight of each class in each half-set.
        share_to_A: halves of a class share what is coarser, so that they stay the same class in one frame; 0: nothing.
        kappa: see ``leverage.own_response``, times the factor that the sums were multiplied by.
        change: (S,) of the noise spectra, see ``leverage.noise_change``.
    """
    class_maps = ClassMaps()
    for k, own in enumerate(sums):
        if weight[k].min() < LEAST_PARTICLES:
            _add_empty(class_maps, run.box)
        else:
            _add_class(class_maps, run, own, state, share_to_A, kappa, change)
        own.clear()
    return class_maps


def _add_class(
    class_maps: ClassMaps, run: Refinement, own: dict[int, FourierSums], state: ScheduleState, share_to_A: float,
    kappa: float, change: np.ndarray,
) -> None:  # fmt: skip
    half_maps = run.half_maps(own)
    agreed = run.compare_halves(own, half_maps, state)
    shell = min(int(run.box * run.pixel / share_to_A) if share_to_A else 0, run.limit, run.insertion_radius(state))
    if shell >= 1:
        exchange_low_resolution(own, shell, run.comm)
    class_maps.total_weight.append(
        {h: total_weight(half_sums, agreed.wiener[h], shell, kappa, change) for h, half_sums in own.items()}
    )
    resolution = run.resolution_A(agreed.plain)
    class_maps.references.append(run.next_references(own, agreed, resolution))
    class_maps.half_maps.append(half_maps)
    wiener, joined_sums = mean_term(agreed.wiener, run.comm), joined(own, run.comm)
    full = None if joined_sums is None else as_map(joined_sums.reconstruct(wiener.to(run.device)))
    class_maps.maps.append(run.comm.bcast(full, root_of_half(1, run.comm.size)))
    class_maps.resolution_A.append(resolution)
    class_maps.shell = max(class_maps.shell, agreement_shell(agreed.weighted))


def share_out(run: Refinement, class_maps: ClassMaps, radius_px: int) -> Maps:
    """Class -> half -> (W + 1/tau^2) / kappa within the radius of the next search, on every rank (collective); an empty
    class has none."""
    padding, shared_maps = run.settings.padding, []
    for own, resolution in zip(class_maps.total_weight, class_maps.resolution_A, strict=True):
        parts = {half: cropped(half_sums, padding, radius_px) for half, half_sums in own.items()}
        shared_maps.append({} if resolution is None else on_every_rank(parts, run.comm))
    return shared_maps


def _add_empty(class_maps: ClassMaps, box_px: int) -> None:
    none = np.zeros((box_px,) * 3, np.float32)
    class_maps.references.append(dict.fromkeys(HALVES, none))
    class_maps.half_maps.append(dict.fromkeys(HALVES, none))
    class_maps.maps.append(none)
    class_maps.total_weight.append({})
    class_maps.resolution_A.append(None)
