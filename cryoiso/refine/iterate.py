"""The refinement loop: gold-standard halves, expectation and maximisation, resolution grown by the half-map FSC."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from cryoiso.core.errors import Interrupted
from cryoiso.core.identity import Identity
from cryoiso.core.log import ProgressLine, logger
from cryoiso.core.progress import board
from cryoiso.core.protocols import Communicator, HalfMaps, RefineRequest
from cryoiso.core.records import IterationRecord
from cryoiso.core.types import HALVES, DensityMap
from cryoiso.metrics.fsc_curve import resolution_at
from cryoiso.metrics.view_cones import ViewCones
from cryoiso.parallel.partition import owned_chunks
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.filters import lowpass
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group
from cryoiso.refine import offsets, references, schedule
from cryoiso.refine.agreement import Agreement, agreement, as_map, on_every_rank
from cryoiso.refine.auxiliary_weight import AuxiliaryWeight
from cryoiso.refine.batches import Batch, BatchReader, room_for_batches
from cryoiso.refine.corrected import corrected
from cryoiso.refine.identity import of_iteration, of_request
from cryoiso.refine.image_mask import ImageMask
from cryoiso.refine.intensity import ImageTerms, Intensity
from cryoiso.refine.iteration_log import log_iteration
from cryoiso.refine.junk import CONE_DEG, JunkSearch
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.maximise import NoiseSums, accumulate
from cryoiso.refine.model import Model, best_of
from cryoiso.refine.noise import empty_between, last_shell, weight_scale
from cryoiso.refine.reference_shares import ReferenceShares
from cryoiso.refine.relaxation import Relaxation
from cryoiso.refine.schedule import State
from cryoiso.refine.search import Given, Searcher, SearchPlan
from cryoiso.refine.search_cache import KeptSearches
from cryoiso.refine.sums import HalfSums, gathered, reduced
from cryoiso.refine.view_density import ViewCounts, ViewPrior, prior_of, view_grid


class Refinement:
    """One refinement on all ranks; ``step`` is one iteration."""

    def __init__(self, request: RefineRequest, comm: Communicator, device: str, diameter_A: float) -> None:
        self.request, self.comm, self.device = request, comm, device
        self.settings = request.settings
        self.particles = request.source.particles
        self.box = request.source.box_px
        self.pixel = request.reference.pixel_size_A
        self.diameter = diameter_A
        self.reader = BatchReader(
            request.source, self.particles, self.pixel, device, memory_bytes=room_for_batches(device),
            apart=request.auxiliary,
        )  # fmt: skip
        self.raw = np.ones(len(self.particles), bool) if request.auxiliary is None else ~request.auxiliary
        """(N,) bool: the particles that steer the refinement and make its half-maps"""
        self.operations = point_group(request.symmetry)
        order = self.settings.healpix_order
        if request.local_deg is None:
            self.rotations = schedule.global_grid(order, request.symmetry).to(device)
        else:
            self.rotations = schedule.local_grid(order, request.local_deg).to(device)
            self.particles.require_poses()
        self.relaxation = Relaxation.of_request(request)
        centre_px = offsets.given_centres_px(self.particles)
        self.has_offsets = centre_px is not None
        self.centre_px = np.zeros((len(self.particles), 2)) if centre_px is None else centre_px
        """(N, 2) where each image's content sits as far as is known before the search"""
        limit = (self.box - 1) // 2
        if self.settings.max_resolution_A:
            limit = min(limit, int(self.box * self.pixel / self.settings.max_resolution_A))
        self.limit = self._asked_limit = limit
        """Largest radius that is searched and back-projected; the second one as the settings have it."""
        self.empty = np.zeros(0, np.int64)
        """shells up to it in which no image has power"""
        self.sphere = references.spherical(self.box, self.pixel, self.diameter)
        self.auxiliaries = AuxiliaryWeight(request, comm, self.sphere, len(self.operations), self._fsc)
        self.cells = ViewPrior.of(np.zeros(len(view_grid())), device)
        support = self.sphere if request.mask is None else self.sphere * request.mask.data
        self.shares = ReferenceShares(request, diameter_A, limit, support, device)

    @cached_property
    def cones(self) -> ViewCones:
        """Viewing cones within which images without a particle are found."""
        return ViewCones.with_step(CONE_DEG, self.request.symmetry)

    @cached_property
    def identity(self) -> Identity:
        """Identity of the refinement's inputs, the same on every rank (collective at the first call)."""
        made = of_request(self.request, self.diameter) if self.comm.rank == 0 else None
        return dict(self.comm.bcast(made))

    def heed_empty(self, sigma2: np.ndarray) -> None:
        """Limit the resolution to the last shell in which the images have power."""
        raw = self.particles if self.raw.all() else self.particles.take(self.raw)
        self.limit = last_shell(sigma2, raw, self.pixel, self._asked_limit)
        self.empty = empty_between(sigma2, raw, self.pixel, self.limit)

    def owned(self, half: int, auxiliary: bool | None = None) -> tuple[list[np.ndarray], int]:
        """This rank's batches of a half, and the largest number on any rank; on request of raw or auxiliary particles
        alone."""
        plan = self.reader.plan((half,))
        if auxiliary is not None:
            plan = [rows for rows in plan if self.raw[rows[0]] != auxiliary]
        mine = owned_chunks(len(plan), self.comm.rank, self.comm.size)
        most = max(len(owned_chunks(len(plan), r, self.comm.size)) for r in range(self.comm.size))
        return [plan[i] for i in mine], most

    def plan(self, state: State) -> SearchPlan:
        """The search plan of this iteration, on this rank's device."""
        plan = schedule.search_plan(
            state, self.settings, self.rotations, self.box, self.pixel, self.diameter, self.request.local_deg
        )
        return replace(plan, shifts_px=plan.shifts_px.to(self.device))

    def given(self, rows: np.ndarray, iteration: int = 0) -> Given | None:
        """Starting point of the search for these particles: in a local search their poses, in a global one their
        offsets; None without either."""
        centre = self.centre_px[rows]
        if self.request.local_deg is not None:
            poses = self._tensor(self.particles.require_poses()[0][rows])
            near = Given(poses, self._tensor(centre))
            return near if self.relaxation is None else self.relaxation.of(near, self.particles.uid[rows], iteration)
        if not self.has_offsets:
            return None
        return Given(None, self._tensor(centre))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)

    def _shift_range_px(self) -> float:
        """Largest distance of a shift from the centre of its search, whatever the spread of the others."""
        return schedule.shift_range_px(self.settings, self.box, self.pixel, self.diameter, self.request.local_deg)

    def insertion_radius(self, state: State) -> int:
        """Radius of the back-projection, beyond the search radius so that the FSC can extend."""
        return min(self.limit, int(1.5 * state.radius_px) + 6)

    def step(self, model: Model) -> Model:
        """One iteration: expectation and sums of each half, reduction, new references."""
        started, state = time.monotonic(), model.state
        self.heed_empty(model.sigma2)
        kinds = self.auxiliaries.begin(model)
        scale = weight_scale(model.sigma2 / model.intensity.largest_weight())
        plan, radius = self.plan(state), self.insertion_radius(state)
        noise = NoiseSums.empty(*model.sigma2.shape)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        images = ImageTerms(self.settings.scale, model.sigma2)
        junk = JunkSearch(self.cones if self.settings.junk else None, model.junk, plan, model.intensity)
        sums = self.auxiliaries.sums()
        views = {half: ViewCounts.empty() for half in HALVES}
        kept = self._kept(model, plan)
        mask = ImageMask.of_iteration(self.request, self.particles, model, self.centre_px, self.diameter)
        for half in HALVES:
            volume = FourierVolume.from_volume(
                torch.as_tensor(model.references[half], device=self.device), self.settings.padding, state.radius_px
            )
            searcher = Searcher(plan, volume)
            prior = prior_of(model.views, half, self.request.symmetry, self.settings, self.device)
            images.own = self.shares.of(model, half)
            for auxiliary in kinds:  # their sums are separate
                searcher.views = None if auxiliary else prior  # auxiliaries are made even
                junk.begin(None if auxiliary else model.references[half], self.pixel, volume)
                accumulator = SliceAccumulator.empty(self.box, radius, self.settings.padding, self.device)
                for batch in map(model.intensity.of, self.batches(half, auxiliary, radius, state.iteration, kept)):
                    scored = batch if mask is None else mask.of(batch)
                    white, given = whiten(scored, model.sigma2), self.given(batch.rows, state.iteration)
                    posterior = kept.get(batch.rows, self.device)
                    if posterior is None:
                        posterior = searcher.search(scored, white, given)
                        kept.put(batch.rows, posterior)
                    posterior = junk.weighed(scored, white, posterior, given)
                    whole = white if scored is batch else whiten(batch, model.sigma2)
                    accumulate(batch, whole, posterior, volume, accumulator, noise, scale, images, scored)
                    if not auxiliary:
                        views[half].add(posterior.rotation, posterior.weight, self.cells)
                    found.append((batch.rows, best_of(posterior)))
                sums.put(half, auxiliary, reduced(accumulator, half, self.operations, self.comm))
        if self.request.correction is not None:  # it may take longer than the search
            kept.flush()
        rotation, shift_px, columns = gathered(found, len(self.particles), self.comm)
        columns |= junk.columns(self.raw, self.comm)
        noise = NoiseSums(self.comm.sum_all(noise.power), self.comm.sum_all(noise.count))
        counts = {half: self.comm.sum_all(views[half].counts) for half in HALVES}
        intensity = images.estimate(model.intensity, self.particles, self.raw, self.comm)
        seconds = time.monotonic() - started
        new = self._maximise(model, sums, noise, intensity, counts, rotation, shift_px, columns, plan, seconds)
        if self.auxiliaries.left_out and len(kinds) == 1:
            new.keep_poses(model, ~self.raw)
        new = replace(new, junk=junk.learned(rotation, self.raw))
        return new if self.relaxation is None else self.relaxation.settled(new, model.rotation, self.raw, self.comm)

    def _kept(self, model: Model, plan: SearchPlan) -> KeptSearches:
        """Store for this iteration's search results (collective)."""
        if self.request.folder is None:
            return KeptSearches(None)
        identity = of_iteration(self.request, self.identity, model, plan, self.centre_px)
        kept = KeptSearches.of(self.request.folder / "checkpoint", identity, self.comm)
        if len(kept) and self.comm.rank == 0:
            batches = len(self.reader.plan(HALVES))
            logger.info("iteration %d: %d of %d batches were searched before the interruption",
                        model.state.iteration + 1, len(kept), batches)  # fmt: skip
        return kept

    def batches(self, half: int, auxiliary: bool, radius: int, iteration: int, kept: KeptSearches) -> Iterator[Batch]:
        batches, most = self.owned(half, auxiliary)
        keep = self.reader.preload_radius(radius, batches)
        searched = 1 if self.raw.all() or self.auxiliaries.left_out else 2
        board.expect(iteration, schedule.expected_iterations(iteration, self.settings), lines=len(HALVES) * searched)
        label = f"iteration {iteration + 1}, half {half}" + (", auxiliary particles" if auxiliary else "")
        line = ProgressLine(label, most, active=self.comm.rank == 0)
        read = self.reader.in_order(batches, max(keep, radius))
        for i in range(most):
            self.heed(kept)
            if i < len(batches):
                yield self.reader._cut(next(read), radius)
            line.update(i + 1)
        line.close()

    def heed(self, kept: KeptSearches | None = None) -> None:
        """Stop on all ranks if any received a stop signal (collective); search results are saved first.

        Raises:
            Interrupted: a rank received one.
        """
        if self.comm.stop_requested():
            if kept is not None:
                kept.flush()
            raise Interrupted("stopped by a signal; what was found so far is kept")

    def _maximise(
        self, model: Model, sums: HalfSums, noise: NoiseSums, intensity: Intensity, views: dict[int, np.ndarray],
        rotation: np.ndarray, shift_px: np.ndarray, columns: dict[str, np.ndarray], plan: SearchPlan, seconds: float,
    ) -> Model:  # fmt: skip
        comm, state = self.comm, model.state
        raw = self.half_maps(sums.raw)
        agreed = self.compare_halves(sums.raw, raw, state)
        weighed = self.auxiliaries.weigh(model, sums, agreed)
        whole = sums.joined()
        everything = raw
        if self.request.correction is not None and self.auxiliaries.in_corrected_maps:
            everything = self.half_maps(whole)
        self._join_halves(whole, state)
        resolution = self.resolution_A(agreed.plain)
        new = self.next_references(whole, agreed, resolution)
        changes_deg = float(np.median(angular_distance_deg(
            model.rotation[self.raw], rotation[self.raw], self.operations
        )))  # fmt: skip
        residual_px = (shift_px - self.centre_px)[self.raw]
        spread_px = float(np.sqrt(np.mean(np.square(residual_px)) + 1e-12))
        step_deg = plan.levels[-1].cell_deg / 2
        uncertainty_deg = max(float(np.median(columns["cryoisoPoseSpread"][self.raw])), step_deg / 2)
        advanced = schedule.advance(
            state, schedule.agreement_shell(agreed.weighted), changes_deg,
            float(np.degrees(0.25 * resolution / self.diameter)), spread_px, self.settings, self.box, self.limit,
            uncertainty_deg,
        )  # fmt: skip
        next_deg = self.plan(advanced).levels[-1].cell_deg / 2
        advanced = schedule.with_finer_steps(advanced, step_deg, next_deg, self.settings)
        at_limit = offsets.at_limit(residual_px, self._shift_range_px())
        record: IterationRecord = {
            "iteration": advanced.iteration,
            "resolution_A": resolution,
            "resolution_unmasked_A": self.resolution_A(self._fsc(raw, None, state)),
            "resolution_weighted_A": self.resolution_A(agreed.weighted),
            "cfar": self._anisotropy(raw, state),
            "search_resolution_A": self.box * self.pixel / state.radius_px,
            "step_deg": step_deg,
            "uncertainty_deg": uncertainty_deg,
            "changes_deg": changes_deg,
            "shift_sd_A": spread_px * self.pixel,
            "at_shift_limit": at_limit / len(residual_px),
            "max_probability_mean": float(columns["rlnMaxValueProbDistribution"][self.raw].mean()),
            "log_likelihood": float(columns["rlnLogLikeliContribution"][self.raw].sum()),
            "seconds": seconds,
        }
        if self.settings.scale != "none":
            record["scale_sd"] = float(intensity.scale[self.raw].std())
        record |= weighed
        if comm.rank == 0:
            self._report(record, at_limit, advanced.done)
        if self.request.correction is not None:
            began = time.monotonic()
            new, record["correction"] = self._corrected(advanced, everything, new, agreed.plain, resolution, plan)
            record["seconds"] += time.monotonic() - began
        shift_A, sigma2 = -shift_px * self.particles.group_values("pixel_size_A")[:, None], noise.spectra(model.sigma2)
        return Model(
            advanced, new, sigma2, intensity, rotation, shift_A, columns, raw, views,
            total_weight=self.shares.total_weight(
                model, sigma2, whole, agreed.wiener, self._joined_shell(state), advanced.radius_px, comm
            ),
            history=[*model.history, record],
        )  # fmt: skip

    def _join_halves(self, sums: dict[int, FourierSums], state: State) -> None:
        """Give both halves one frame: coarser than ``refine.join_halves_A`` they share their sums (collective)."""
        shell = self._joined_shell(state)
        if shell >= 1:
            references.exchange_low_resolution(sums, shell, self.comm)

    def _joined_shell(self, state: State) -> int:
        joined_A = self.settings.join_halves_A
        return min(int(self.box * self.pixel / joined_A) if joined_A else 0, self.limit, self.insertion_radius(state))

    def _report(self, record: IterationRecord, at_limit: int, last: bool) -> None:
        """Log an iteration; at the end warn of shifts at the limit of the search."""
        log_iteration(record)
        if last:
            local = self.request.local_deg is not None
            range_A = self._shift_range_px() * self.pixel
            offsets.warn_of_limit(at_limit, int(self.raw.sum()), range_A, local, self.has_offsets)

    def half_maps(self, sums: dict[int, FourierSums]) -> dict[int, np.ndarray]:
        """Half -> plain quotient within the shells that have data, on every rank (collective)."""
        own = {half: as_map(s.reconstruct()) for half, s in sums.items()}
        if self.limit < self._asked_limit:
            own = {half: references.within(volume, self.limit) for half, volume in own.items()}
        return on_every_rank(own, self.comm)

    def compare_halves(self, sums: dict[int, FourierSums], raw: dict[int, np.ndarray], state: State) -> Agreement:
        s = self.settings
        return agreement(
            sums, raw, lambda maps: self._fsc(maps, self.sphere, state), self.comm,
            uneven=s.regularisation == "uneven", weighted=s.weighted_fsc,
        )  # fmt: skip

    def _anisotropy(self, raw: dict[int, np.ndarray], state: State) -> float | None:
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
        self, state: State, maps: dict[int, np.ndarray], references_now: dict[int, np.ndarray], curve: np.ndarray,
        resolution_A: float, plan: SearchPlan,
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

    def first_reference(self, given: DensityMap, lowpass_A: float) -> np.ndarray:
        """(D, D, D) float32: the map low-passed, inside the sphere of the particle's diameter."""
        coarse = np.asarray(lowpass(torch.as_tensor(given.data), self.pixel, lowpass_A), np.float32)
        reference: np.ndarray = coarse * self.sphere
        return reference

    def first_references(self, lowpass_A: float) -> dict[int, np.ndarray]:
        """Half -> its first reference, before any grey scale; the same array for both if there is only one."""
        given = self.request.half_references
        if given is None:
            return dict.fromkeys(HALVES, self.first_reference(self.request.reference, lowpass_A))
        return {half: self.first_reference(given[half], lowpass_A) for half in HALVES}

    def _fsc(self, maps: dict[int, np.ndarray], mask: np.ndarray | None, state: State) -> np.ndarray:
        """(D//2+1,) between the half-maps, in the shells with data.

        Beyond the inserted data the maps are empty, and a mask would correlate its own leakage there; between shells
        with data the curve is linear.
        """
        curve, shells = references.half_map_fsc(maps, mask), np.arange(self.box // 2 + 1)
        if len(self.empty):
            full = np.setdiff1d(shells[1:], self.empty)
            curve[self.empty] = np.interp(self.empty, full, curve[full])
        return np.where(shells <= self.insertion_radius(state), curve, 0.0)

    def resolution_A(self, curve: np.ndarray) -> float:
        """Resolution at which the curve drops below 0.143, limited to that of the images."""
        resolution = resolution_at(curve, 0.143, self.box, self.pixel)
        return resolution if self.limit == self._asked_limit else max(resolution, self.box * self.pixel / self.limit)

    def flatten(self, volume: np.ndarray, resolution_A: float) -> np.ndarray:
        """Set the solvent to zero: outside the given mask, or outside one made from this half's own map."""
        return self._flattened(volume, resolution_A)[0]

    def _flattened(self, volume: np.ndarray, resolution_A: float) -> tuple[np.ndarray, np.ndarray | None]:
        mask, solvent = self.request.mask, self.settings.solvent_mask
        given = None if mask is None else mask.data
        return references.flattened(volume, self.sphere, given, self.pixel, resolution_A if solvent else None)
