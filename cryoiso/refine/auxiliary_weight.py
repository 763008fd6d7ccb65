"""What the auxiliary particles of a refinement weigh in its references, iteration by iteration."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cryoiso.core.protocols import Communicator, RefineRequest
from cryoiso.core.records import IterationRecord
from cryoiso.refine.agreement import Agreement
from cryoiso.refine.homologue import HomologueCorrelation, confirmation, log_confirmation
from cryoiso.refine.model import Model
from cryoiso.refine.noise import weight_scale
from cryoiso.refine.schedule import ScheduleState
from cryoiso.refine.sums import HalfSums, mean_of_halves

SphereFsc = Callable[[dict[int, np.ndarray], np.ndarray | None, ScheduleState], np.ndarray]
"""(D//2+1,) FSC of half -> map inside a mask, in the shells that have data."""


class AuxiliaryWeight:
    """A fixed factor, or what the first iteration's raw particles confirm of the homologue, from then on."""

    def __init__(
        self, request: RefineRequest, comm: Communicator, sphere: np.ndarray, operations: int, fsc: SphereFsc
    ) -> None:
        """
        Args:
            sphere: (D, D, D) soft sphere of the particle's diameter.
            operations: number of rotations of the point group.
            fsc: as the refinement compares its half-maps.
        """
        self.request, self.comm = request, comm
        self.sphere, self.operations, self.fsc = sphere, operations, fsc
        self.extent_A = request.reference.box_px * request.reference.pixel_size_A
        self.present = request.auxiliary is not None
        self.measured = request.auxiliary_weight == "measured"
        self.homologue: HomologueCorrelation | None = None
        """Of the first iteration; None before, and with a fixed factor."""

    def begin(self, model: Model) -> tuple[bool, ...]:
        """Read what is known at the start of an iteration; returns whether particles are auxiliary ones, for all kinds
        that are searched."""
        self.homologue = None
        if self.measured and model.history:
            self.homologue = HomologueCorrelation.of_record(model.history[0]["homologue"])
        return (False, True) if self.present and not self.left_out else (False,)

    @property
    def left_out(self) -> bool:
        """Whether the auxiliary particles have no weight, and so need no poses."""
        return self.homologue is not None and not self.homologue.confirmed

    @property
    def in_corrected_maps(self) -> bool:
        """Whether a correction of the references sees the auxiliary particles.

        Not with a measured weight: a map without regularisation shows the homologue in full where the raw particles
        measured nothing, however little it weighs, and in both half-maps, so that their FSC takes it for measured.
        """
        return self.present and not self.measured

    def sums(self) -> HalfSums:
        """Sums of an iteration, still empty."""
        factor = self.request.auxiliary_weight
        return HalfSums(0.0 if factor == "measured" else factor)

    def weigh(self, model: Model, sums: HalfSums, agreed: Agreement) -> IterationRecord:
        """Set the factors before the sums are joined, and describe them for the record (collective)."""
        record = IterationRecord()
        if self.measured and self.homologue is None:
            self.homologue = self._measure(model, sums, agreed)
            record["homologue"] = self.homologue.record(self.extent_A)
        if self.homologue is not None:
            scale = weight_scale(model.sigma2 / model.intensity.largest_weight())
            largest = {half: self.homologue.precision_of(term, scale) for half, term in agreed.wiener.items()}
            relative = {half: largest[half] / agreed.wiener[half].double() for half in largest}
            record["homologue_precision"] = mean_of_halves(relative, self.comm)
            sums.limit_weight(largest)
        if not self.present:
            return record
        if self.measured:
            record["auxiliary_factor"] = mean_of_halves({half: sums.factor(half) for half in sums.raw}, self.comm)
        record["auxiliary_weight_share"] = sums.auxiliary_share(model.state.radius_px, self.comm)
        return record

    def _measure(self, model: Model, sums: HalfSums, agreed: Agreement) -> HomologueCorrelation:
        prior_map, state = self.request.homologue or self.request.reference, model.state
        correlation = confirmation(
            sums.raw, agreed.wiener, prior_map.data * self.sphere, state.radius_px,
            lambda a, b: self.fsc({1: a, 2: b}, self.sphere, state), self.comm, operations=self.operations,
            scale=weight_scale(model.sigma2 / model.intensity.largest_weight()),
            covered=float(np.square(self.sphere).mean()),
        )  # fmt: skip
        if self.comm.rank == 0:
            log_confirmation(correlation, self.extent_A)
        return correlation
