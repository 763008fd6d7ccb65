"""Relaxation of a pseudo-symmetry: of each given pose all symmetry copies are searched, and maps are made without it.

Of a particle whose copies are only nearly alike, a refinement with the symmetry finds the poses modulo the group, but
averages the copies. Here a local search in C1 looks around A S for every operation S of the group, so a particle's
posterior is over registers as well.

A reference that has the symmetry exactly tells no register from another: every posterior would be even over the copies
and every next reference symmetric again. So with such a reference each particle takes one register at random in the
first iteration; the maps then differ from the symmetric one by chance, and the next iterations amplify what the images
confirm. The result's register is one of the equivalent ones, and each half-set may find another: after an iteration the
second half is brought to the register in which its map correlates best with that of the first. That choice is all
that passes between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.errors import UsageError
from cryoiso.core.protocols import Communicator, RefineRequest
from cryoiso.core.rng import shuffle_keys
from cryoiso.physics.filters import lowpass
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.resample import place_map
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import normalise_name, point_group
from cryoiso.refine.model import Model
from cryoiso.refine.search import PriorPoses
from cryoiso.refine.view_density import view_grid

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SYMMETRIC = 0.99
"""Least correlation of the first reference with its copies at which it counts as symmetric."""
UNSETTLED = 0.02
"""A refinement goes on while more than this share of the particles changes register."""


@dataclass(frozen=True)
class Relaxation:
    """How registers are searched."""

    operations: Float[np.ndarray, "g 3 3"]
    """(G, 3, 3) the identity first"""
    at_random: bool
    """whether the first iteration draws a register for each particle"""
    half: Int[np.ndarray, " n"]
    """(N,) half-set of each particle"""
    pixel_size_A: float
    seed: int
    max_iterations: int

    @classmethod
    def of_request(cls, request: RefineRequest) -> Relaxation | None:
        """What the request's settings ask for; None without.

        Raises:
            UsageError: the refinement has a symmetry of its own, or no poses to stay near.
        """
        name = request.settings.relax_symmetry
        if not name:
            return None
        operations = point_group(name)
        if normalise_name(request.symmetry) != "C1" or request.local_deg is None or request.settings.junk:
            raise UsageError(
                f"refine.relax_symmetry = '{name}' searches the copies of given poses in C1: it needs "
                f"sample.symmetry = 'C1' (found '{request.symmetry}') and refine.local_deg, and excludes refine.junk",
                code="options-conflict",
            )
        half = request.source.particles.half
        return cls(
            operations, _is_symmetric(request, operations), np.zeros(0, np.int8) if half is None else half,
            request.reference.pixel_size_A, request.seed, request.settings.max_iterations,
        )  # fmt: skip

    def of(self, poses: PriorPoses, uid: Int[np.ndarray, " n"], iteration: int) -> PriorPoses:
        """Where the search of an iteration stays near."""
        assert poses.rotation is not None  # a local search has poses
        operations = torch.as_tensor(self.operations, dtype=torch.float32, device=poses.rotation.device)
        if iteration > 0 or not self.at_random:
            return replace(poses, copies=operations)
        register = shuffle_keys(self.seed, "register", uid) % np.uint64(len(operations))
        return replace(poses, rotation=poses.rotation @ operations[register.astype(np.int64)])

    def settled(self, model: Model, before: np.ndarray, counted: np.ndarray, comm: Communicator) -> Model:
        """The model with both halves in one register, and not converged while particles change theirs (collective).

        Args:
            before: (N, 3, 3) poses of the iteration before; counted: (N,) bool.
        """
        moved = comm.bcast(self._moved(model) if comm.rank == 0 else None)
        far = angular_distance_deg(before[counted], model.rotation[counted]) > 0.5 * self._least_angle_deg()
        if moved is not None:
            operation, reference, half_map = moved
            rotation = model.rotation.copy()
            rotation[self.half == 2] = rotation[self.half == 2] @ operation.T
            model = replace(
                model, rotation=rotation, references={**model.references, 2: reference},
                half_maps={**model.half_maps, 2: half_map},
                views={**model.views, 2: _rotated(model.views[2], operation)},
            )  # fmt: skip
        elif far.mean() <= UNSETTLED:
            return model
        state = replace(model.state, stalled=0, done=model.state.iteration >= self.max_iterations)
        return replace(model, state=state)

    def _moved(self, model: Model) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The operation that brings the second half to the register of the first, and its maps there; None: it is."""
        first, second = (model.references[half] for half in (1, 2))
        copies = [second, *(place_map(second, self.pixel_size_A, op, np.zeros(3)) for op in self.operations[1:])]
        best = int(np.argmax([float(np.corrcoef(first.ravel(), copy.ravel())[0, 1]) for copy in copies]))
        if best == 0:
            return None
        operation = self.operations[best]
        half_map = place_map(model.half_maps[2], self.pixel_size_A, operation, np.zeros(3))
        return operation, copies[best].astype(np.float32), half_map.astype(np.float32)

    def _least_angle_deg(self) -> float:
        return float(angular_distance_deg(self.operations[1:], np.eye(3)).min())


def _rotated(counts: Float[np.ndarray, " cells"], operation: np.ndarray) -> Float[np.ndarray, " cells"]:
    """Weights of the cells of views after all views d became S d."""
    grid = view_grid()
    moved: np.ndarray = np.zeros_like(counts)
    np.add.at(moved, grid.index(grid.centres() @ operation.T), counts)
    return moved


def _is_symmetric(request: RefineRequest, operations: np.ndarray) -> bool:
    """Whether the first reference, as it is searched with, is the same in all registers."""
    pixel, box = request.reference.pixel_size_A, request.reference.box_px
    data = np.asarray(lowpass(torch.as_tensor(request.reference.data), pixel, request.lowpass_A), np.float32)
    inside = np.asarray(sphere_mask(box, box / 2 - 2)) > 0.5
    values = data[inside]
    copies = (place_map(data, pixel, op, np.zeros(3))[inside] for op in operations[1:])
    return all(float(np.corrcoef(values, copy)[0, 1]) > SYMMETRIC for copy in copies)
