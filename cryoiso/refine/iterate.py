"""The refinement loop: gold-standard halves, expectation and maximisation, resolution grown by the half-map FSC."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from cryoiso.core.protocols import HalfMaps
from cryoiso.core.records import IterationRecord
from cryoiso.core.types import HALVES, DensityMap
from cryoiso.metrics.fsc_curve import resolution_at
from cryoiso.physics.filters import lowpass
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.refine import offsets, references, schedule
from cryoiso.refine.agreement import Agreement, agreement, as_map, on_every_rank
from cryoiso.refine.corrected import corrected
from cryoiso.refine.expectation import Expectation
from cryoiso.refine.iteration_log import log_ending, log_iteration
from cryoiso.refine.model import Model
from cryoiso.refine.pose_changes import PoseChanges
from cryoiso.refine.refinement_setup import RefinementSetup
from cryoiso.refine.schedule import ScheduleState
from cryoiso.refine.search import SearchPlan


class Refinement(RefinementSetup):
    """One refinement on all ranks; ``step`` is one iteration."""

    def step(self, model: Model) -> Model:
        """One iteration: expectation and sums of each half, reduction, new references."""
        started = time.monotonic()
        self.heed_empty(model.sigma2)
        kinds = self.auxiliaries.begin(model)
        expectation = Expectation(self, model, self.plan(model.state))
        for half in HALVES:
            expectation.search_half(half, kinds)
        if self.request.correction is not None:  # it may take longer than the search
            expectation.cache.flush()
        new = self._maximise(model, expectation, started)
        if self.auxiliaries.left_out and len(kinds) == 1:
            new.keep_poses(model, ~self.raw)
        new = replace(new, junk=expectation.junk.learned(new.rotation, self.raw))
        return new if self.relaxation is None else self.relaxation.settled(new, model.rotation, self.raw, self.comm)

    def _maximise(self, model: Model, expectation: Expectation, started: float) -> Model:
        """The model after an iteration (collective).

        Args:
            started: time at which the iteration began.
        """
        rotation, shift_px, columns = expectation.poses()
        noise, views, intensity = expectation.total_noise(), expectation.view_counts(), expectation.intensity()
        seconds, sums, state = time.monotonic() - started, expectation.sums, model.state
        raw = self.half_maps(sums.raw)
        agreed = self.compare_halves(sums.raw, raw, state)
        weighed = self.auxiliaries.weigh(model, sums, agreed)
        joined_sums = sums.joined()
        everything = raw
        if self.request.correction is not None and self.auxiliaries.in_corrected_maps:
            everything = self.half_maps(joined_sums)
        self._join_halves(joined_sums, state)
        resolution = self.resolution_A(agreed.plain)
        new = self.next_references(joined_sums, agreed, resolution)
        changes = PoseChanges.of(self, model, expectation.plan, rotation, shift_px, columns)
        advanced = self._advance(state, agreed, changes, resolution)
        record = self._record(advanced, state, agreed, changes, raw, columns)
        record["seconds"] = seconds
        if self.settings.scale != "none":
            record["scale_sd"] = float(intensity.scale[self.raw].std())
        record |= weighed
        if self.comm.rank == 0:
            self._report(record, changes, advanced)
        if self.request.correction is not None:
            began = time.monotonic()
            new, record["correction"] = self._corrected(
                advanced, everything, new, agreed.plain, resolution, expectation.plan
            )
            record["seconds"] += time.monotonic() - began
        shift_A, sigma2 = -shift_px * self.particles.group_values("pixel_size_A")[:, None], noise.spectra(model.sigma2)
        return Model(
            advanced, new, sigma2, intensity, rotation, shift_A, columns, raw, views,
            total_weight=self.shares.total_weight(
                model, sigma2, joined_sums, agreed.wiener, self._joined_shell(state), advanced.radius_px, self.comm
            ),
            history=[*model.history, record],
        )  # fmt: skip

    def _advance(
        self, state: ScheduleState, agreed: Agreement, changes: PoseChanges, resolution_A: float
    ) -> ScheduleState:
        """State of the schedule for the next iteration."""
        advanced = schedule.advance(
            state, schedule.agreement_shell(agreed.weighted), changes.angle_deg,
            float(np.degrees(0.25 * resolution_A / self.diameter)), changes.spread_px, self.settings, self.box,
            self.limit, changes.uncertainty_deg,
        )  # fmt: skip
        next_deg = self.plan(advanced).levels[-1].cell_deg / 2
        return schedule.with_finer_steps(advanced, changes.step_deg, next_deg, self.settings)

    def _record(
        self, advanced: ScheduleState, state: ScheduleState, agreed: Agreement, changes: PoseChanges,
        raw: dict[int, np.ndarray], columns: dict[str, np.ndarray],
    ) -> IterationRecord:  # fmt: skip
        """What is known of an iteration when its search and its half-maps are there (collective)."""
        at_limit = offsets.at_limit(changes.residual_px, self._shift_range_px())
        return {
            "iteration": advanced.iteration,
            "resolution_A": self.resolution_A(agreed.plain),
            "resolution_unmasked_A": self.resolution_A(self._fsc(raw, None, state)),
            "resolution_weighted_A": self.resolution_A(agreed.weighted),
            "cfar": self._anisotropy(raw, state),
            "search_resolution_A": self.box * self.pixel / state.radius_px,
            "step_deg": changes.step_deg,
            "uncertainty_deg": changes.uncertainty_deg,
            "changes_deg": changes.angle_deg,
            "shift_sd_A": changes.spread_px * self.pixel,
            "at_shift_limit": at_limit / len(changes.residual_px),
            "max_probability_mean": float(columns["rlnMaxValueProbDistribution"][self.raw].mean()),
            "log_likelihood": float(columns["rlnLogLikeliContribution"][self.raw].sum()),
        }

    def _join_halves(self, sums: dict[int, FourierSums], state: ScheduleState) -> None:
        """Give both halves one frame: coarser than ``refine.join_halves_A`` they share their sums (collective)."""
        shell = self._joined_shell(state)
        if shell >= 1:
            references.exchange_low_resolution(sums, shell, self.comm)

    def _joined_shell(self, state: ScheduleState) -> int:
        joined_A = self.settings.join_halves_A
        return min(int(self.box * self.pixel / joined_A) if joined_A else 0, self.limit, self.insertion_radius(state))

    def _report(self, record: IterationRecord, changes: PoseChanges, advanced: ScheduleState) -> None:
        """Log an iteration; at the end warn of unsettled poses and of shifts at the limit of the search."""
        log_iteration(record)
        if advanced.done:
            is_control = self.request.grey_scale is not None  # of images that need not match
            log_ending(record, advanced.stalled, self.settings, expected=is_control)
            at_limit = offsets.at_limit(changes.residual_px, self._shift_range_px())
            local = self.request.local_deg is not None
            range_A = self._shift_range_px() * self.pixel
            offsets.warn_of_limit(at_limit, int(self.raw.sum()), range_A, local, self.has_offsets)

    def half_maps(self, sums: dict[int, FourierSums]) -> dict[int, np.ndarray]:
        """Half -> plain quotient within the shells that have data, on every rank (collective)."""
        own = {half: as_map(s.reconstruct()) for half, s in sums.items()}
        if self.limit < self._asked_limit:
            own = {half: references.within(volume, self.limit) for half, volume in own.items()}
        return on_every_rank(own, self.comm)

    def compare_halves(
        self, sums: dict[int, FourierSums], raw: dict[int, np.ndarray], state: ScheduleState
    ) -> Agreement:
        s = self.settings
        return agreement(
            sums, raw, lambda maps: self._fsc(maps, self.sphere, state), self.comm,
            uneven=s.regularisation == "uneven", weighted=s.weighted_fsc,
        )  # fmt: skip

    def _anisotropy(self, raw: dict[int, np.ndarray], state: ScheduleState) -> float | None:
        """cFAR of the half-maps; None where they agree in no direction (collective)."""
        value = None
        if self.comm.rank == 0:
            value = references.anisotropy(raw, self.sphere, self.pixel, self.insertion_radius(state))
            value = value if np.isfinite(value) else None
        shared: float | None = self.comm.bcast(value)
        return shared

    def next_references(
        self, sums: dict[int, FourierSums], agreed: Agreement, resolution_A: float
    ) -> dict[int, np.ndarray]:
        """Half -> next reference, on every rank (collective)."""
        own: dict[int, np.ndarray] = {}
        for half, s in sums.items():
            own[half], mask = self._flattened(as_map(s.reconstruct(agreed.wiener[half])), resolution_A)
            self.shares.note(half, mask)
        return on_every_rank(own, self.comm)

    def _corrected(
        self, state: ScheduleState, maps: dict[int, np.ndarray], references_now: dict[int, np.ndarray],
        curve: np.ndarray, resolution_A: float, plan: SearchPlan,
    ) -> tuple[dict[int, np.ndarray], dict[str, Any]]:  # fmt: skip
        """Half -> corrected reference, and the correction's record (collective)."""
        request = self.request
        assert request.correction is not None
        seen = HalfMaps(
            iteration=state.iteration, maps=maps, references=references_now, pixel_size_A=self.pixel, fsc=curve,
            resolution_A=resolution_A,
            # the last level halves the cells that it begins with, as one step of oversampling does: the size of those
            # is what others call the sampling of the search
            step_deg=plan.levels[-1].cell_deg,
            folder=request.folder / "correction", mask=None if request.mask is None else request.mask.data,
            initial=self.first_references(request.lowpass_A),
        )  # fmt: skip
        flatten = partial(self.flatten, resolution_A=resolution_A)
        return corrected(request.correction, seen, state.done, flatten, self.comm)

    def first_reference(self, initial: DensityMap, lowpass_A: float) -> np.ndarray:
        """(D, D, D) float32: the map low-passed, inside the sphere of the particle's diameter."""
        coarse = np.asarray(lowpass(torch.as_tensor(initial.data), self.pixel, lowpass_A), np.float32)
        reference: np.ndarray = coarse * self.sphere
        return reference

    def first_references(self, lowpass_A: float) -> dict[int, np.ndarray]:
        """Half -> its first reference, before any grey scale; the same array for both if there is only one."""
        half_references = self.request.half_references
        if half_references is None:
            return dict.fromkeys(HALVES, self.first_reference(self.request.reference, lowpass_A))
        return {half: self.first_reference(half_references[half], lowpass_A) for half in HALVES}

    def resolution_A(self, curve: np.ndarray) -> float:
        """Resolution at which the curve drops below 0.143, limited to that of the images."""
        resolution = resolution_at(curve, 0.143, self.box, self.pixel)
        return resolution if self.limit == self._asked_limit else max(resolution, self.box * self.pixel / self.limit)

    def flatten(self, volume: np.ndarray, resolution_A: float) -> np.ndarray:
        """Set the solvent to zero: outside the given mask, or outside one made from this half's own map."""
        return self._flattened(volume, resolution_A)[0]

    def _flattened(self, volume: np.ndarray, resolution_A: float) -> tuple[np.ndarray, np.ndarray | None]:
        mask, solvent = self.request.mask, self.settings.solvent_mask
        mask_data = None if mask is None else mask.data
        return references.flattened(volume, self.sphere, mask_data, self.pixel, resolution_A if solvent else None)
