"""What a refinement works on: particles and their batches, search plan, limits of resolution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from cryoiso.core.errors import Interrupted
from cryoiso.core.identity import Identity
from cryoiso.core.log import ProgressLine
from cryoiso.core.progress import board
from cryoiso.core.protocols import Communicator, RefineRequest
from cryoiso.core.types import HALVES
from cryoiso.metrics.view_cones import ViewCones
from cryoiso.parallel.partition import owned_chunks
from cryoiso.physics.symmetry import point_group
from cryoiso.refine import offsets, references, schedule
from cryoiso.refine.auxiliary_weight import AuxiliaryWeight
from cryoiso.refine.batches import Batch, BatchReader, room_for_batches
from cryoiso.refine.identity import of_request
from cryoiso.refine.junk import CONE_DEG
from cryoiso.refine.noise import empty_between, last_shell
from cryoiso.refine.reference_shares import ReferenceShares
from cryoiso.refine.relaxation import Relaxation
from cryoiso.refine.schedule import ScheduleState
from cryoiso.refine.search import PriorPoses, SearchPlan
from cryoiso.refine.search_cache import SearchCache
from cryoiso.refine.view_density import ViewPrior, view_grid


class RefinementSetup:
    """A refinement's particles, settings and limits, the same on all ranks, and this rank's batches."""

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
        identity = of_request(self.request, self.diameter) if self.comm.rank == 0 else None
        return dict(self.comm.bcast(identity))

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
        chunks = owned_chunks(len(plan), self.comm.rank, self.comm.size)
        most = max(len(owned_chunks(len(plan), r, self.comm.size)) for r in range(self.comm.size))
        return [plan[i] for i in chunks], most

    def plan(self, state: ScheduleState) -> SearchPlan:
        """The search plan of this iteration, on this rank's device."""
        plan = schedule.search_plan(
            state, self.settings, self.rotations, self.box, self.pixel, self.diameter, self.request.local_deg
        )
        return replace(plan, shifts_px=plan.shifts_px.to(self.device))

    def prior_poses(self, rows: np.ndarray, iteration: int = 0) -> PriorPoses | None:
        """Starting point of the search for these particles: in a local search their poses, in a global one their
        offsets; None without either."""
        centre = self.centre_px[rows]
        if self.request.local_deg is not None:
            poses = self._tensor(self.particles.require_poses()[0][rows])
            near = PriorPoses(poses, self._tensor(centre))
            return near if self.relaxation is None else self.relaxation.of(near, self.particles.uid[rows], iteration)
        if not self.has_offsets:
            return None
        return PriorPoses(None, self._tensor(centre))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)

    def _shift_range_px(self) -> float:
        """Largest distance of a shift from the centre of its search, whatever the spread of the others."""
        return schedule.shift_range_px(self.settings, self.box, self.pixel, self.diameter, self.request.local_deg)

    def insertion_radius(self, state: ScheduleState) -> int:
        """Radius of the back-projection, beyond the search radius so that the FSC can extend."""
        return min(self.limit, int(1.5 * state.radius_px) + 6)

    def batches(self, half: int, auxiliary: bool, radius: int, iteration: int, kept: SearchCache) -> Iterator[Batch]:
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

    def heed(self, kept: SearchCache | None = None) -> None:
        """Stop on all ranks if any received a stop signal (collective); search results are saved first.

        Raises:
            Interrupted: a rank received one.
        """
        if self.comm.stop_requested():
            if kept is not None:
                kept.flush()
            raise Interrupted("stopped by a signal; what was found so far is kept")

    def _fsc(self, maps: dict[int, np.ndarray], mask: np.ndarray | None, state: ScheduleState) -> np.ndarray:
        """(D//2+1,) between the half-maps, in the shells with data.

        Beyond the inserted data the maps are empty, and a mask would correlate its own leakage there; between shells
        with data the curve is linear.
        """
        curve, shells = references.half_map_fsc(maps, mask), np.arange(self.box // 2 + 1)
        if len(self.empty):
            full = np.setdiff1d(shells[1:], self.empty)
            curve[self.empty] = np.interp(self.empty, full, curve[full])
        return np.where(shells <= self.insertion_radius(state), curve, 0.0)
