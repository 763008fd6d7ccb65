"""Decisions between iterations: next resolution, fineness of the search, convergence. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.config import RefineSection
from cryoiso.physics.so3 import grid_step_deg, local_rotations, so3_grid
from cryoiso.refine.search import Level, SearchPlan

if TYPE_CHECKING:
    from jaxtyping import Float

FIRST_CANDIDATES, LAST_CANDIDATES = 16, 4
"""Candidates per image at the first level of the local search, and at least at every later one."""
FIRST_THRESHOLD, LATER_THRESHOLD = 10.0, 6.0
"""Log-likelihood by which candidates may be worse than the best, at the first level and at later ones."""

SETTLED_STEP_DEG = 0.5
"""Steps down to this are taken wherever the resolution asks for them, finer ones only where posteriors are narrower."""
STEP_SLACK = 1.42
"""The last step may be so many times the one that is asked for; steps halve."""

EXPECTED_ITERATIONS = 8
"""Of a refinement from a low-passed reference; simulated sets take 4 to 10."""


@dataclass(frozen=True)
class ScheduleState:
    """State of the schedule; plain numbers, the same on every rank."""

    iteration: int = 0
    radius_px: int = 1
    """Radius of the references used in the search."""
    shift_sd_px: float = 3.0
    best_shell: int = 0
    """Highest shell at which the half-maps ever agreed."""
    stalled: int = 0
    """Iterations without a better shell and without better likelihood."""
    last_change_deg: float = 180.0
    uncertainty_deg: float = 180.0
    """Least that the particles' poses were ever uncertain by (median), no less than half of the step that told it."""
    done: bool = False


def expected_iterations(done: int, settings: RefineSection) -> int:
    """Estimated total number of iterations when ``done`` have ended and the last one is not yet known."""
    return min(max(EXPECTED_ITERATIONS, done + 2), max(settings.max_iterations, done + 1))


def global_grid(order: int, symmetry: str) -> Float[torch.Tensor, "j 3 3"]:
    """(J, 3, 3) float32 rotations of the global search."""
    return torch.as_tensor(so3_grid(order, symmetry), dtype=torch.float32)


def first_cell_deg(order: int, local_deg: float | None = None) -> float:
    """Step of the first grid of a search: in a local one at most half of its limit, 33 rotations or more."""
    step = grid_step_deg(order)
    return step if local_deg is None else min(step, local_deg / 2)


def local_grid(order: int, local_deg: float) -> Float[torch.Tensor, "j 3 3"]:
    """(J, 3, 3) float32 rotations of a given pose by at most ``local_deg``, the identity first."""
    step = first_cell_deg(order, local_deg)
    return torch.as_tensor(local_rotations(step, local_deg / step), dtype=torch.float32)


def disc_of_shifts(range_px: float, step_px: float) -> Float[torch.Tensor, "shifts 2"]:
    """(S, 2) square lattice of shifts inside a circle, the centre first."""
    reach = int(np.floor(range_px / step_px + 1e-6))
    axis = np.arange(-reach, reach + 1) * step_px
    y, x = np.meshgrid(axis, axis, indexing="ij")
    points = np.stack([x.ravel(), y.ravel()], 1)
    r = np.hypot(*points.T)
    order = np.argsort(r, kind="stable")
    return torch.as_tensor(points[order][r[order] <= range_px + 1e-6], dtype=torch.float32)


def first_shift_sd_px(box_px: int) -> float:
    """Assumed spread of the shifts before any has been estimated."""
    return max(2.0, 0.03 * box_px)


def shift_range_px(
    settings: RefineSection, box_px: int, pixel_size_A: float, diameter_A: float, local_deg: float | None = None
) -> float:
    """Range of the search for shifts about its centre: as set, otherwise a tenth of the box; in a local search at most
    the distance by which its rotations move the particle's rim."""
    reach_A = box_px * pixel_size_A / 10
    if local_deg is not None:
        reach_A = min(reach_A, np.radians(local_deg) * diameter_A / 2)
    return float((settings.shift_range_A or reach_A) / pixel_size_A)


def finest_step_deg(state: ScheduleState, settings: RefineSection, resolution_A: float, diameter_A: float) -> float:
    """Step that the search should end with: 0.3 of the angle that the resolution spans on the diameter.

    No finer than the settings say. "auto": below SETTLED_STEP_DEG no finer than poses are uncertain, since the mean of
    a posterior that is spread over several cells lies between them already, and finer cells give the same mean.
    """
    asked = float(np.degrees(0.3 * resolution_A / diameter_A))
    if settings.finest_step_deg == "auto":
        return max(asked, min(SETTLED_STEP_DEG, state.uncertainty_deg))
    return max(asked, settings.finest_step_deg)


def last_step_deg(cell_deg: float, finest_deg: float) -> float:
    """Step of the last of the levels that halve cells of ``cell_deg``; there is one at least."""
    step = cell_deg / 2
    while step > finest_deg * STEP_SLACK:
        step /= 2
    return step


def search_plan(
    state: ScheduleState,
    settings: RefineSection,
    rotations: Float[torch.Tensor, "j 3 3"],
    box_px: int,
    pixel_size_A: float,
    diameter_A: float,
    local_deg: float | None = None,
) -> SearchPlan:
    """How to search in this iteration.

    The global grid of step d sees detail down to about d * diameter / 2 / 1.2 (RELION's rule): finer detail would
    vanish between its views, so it is left out there. Levels halve the cell until it is about ``finest_step_deg``.

    A local search's ``rotations`` are those of ``local_grid``; its shifts go as far from the given ones as its turns
    move the particle's rim, unless the settings say how far.
    """
    extent = box_px * pixel_size_A
    cell = first_cell_deg(settings.healpix_order, local_deg)
    resolution = extent / state.radius_px

    def radius_for(cell_deg: float) -> int:
        detail = np.radians(cell_deg) * diameter_A / 2 / 1.2
        return int(np.clip(round(extent / detail), 2, state.radius_px))

    coarse_detail = max(resolution, extent / radius_for(cell))
    spacing = (settings.shift_step_A or coarse_detail / 4) / pixel_size_A
    reach_px = shift_range_px(settings, box_px, pixel_size_A, diameter_A, local_deg)
    span = min(reach_px, 3.5 * state.shift_sd_px + 0.5 * spacing)
    span = max(span, 1.01 * spacing)
    last = last_step_deg(cell, finest_step_deg(state, settings, resolution, diameter_A))
    levels: list[Level] = []
    step, max_candidates, threshold = spacing, FIRST_CANDIDATES, FIRST_THRESHOLD
    while cell > last:
        cell, step = cell / 2, step / 2
        levels.append(Level(2 * cell, step, radius_for(1.25 * cell), max_candidates, threshold))
        max_candidates, threshold = max(LAST_CANDIDATES, max_candidates // 2), LATER_THRESHOLD
    levels[-1] = replace(levels[-1], radius_px=state.radius_px)
    coarse = radius_for(2 ** len(levels) * cell)
    return SearchPlan(rotations, disc_of_shifts(span, spacing), coarse, tuple(levels), state.shift_sd_px, local_deg)


def agreement_shell(fsc: Float[np.ndarray, " shells"], threshold: float = 0.143) -> int:
    """Last shell before the curve first falls below the threshold."""
    below = np.flatnonzero(fsc[1:] < threshold)
    return int(below[0]) if len(below) else len(fsc) - 1


def advance(
    state: ScheduleState,
    shell: int,
    change_deg: float,
    tolerance_deg: float,
    shift_sd_px: float,
    settings: RefineSection,
    box_px: int,
    limit_px: int,
    uncertainty_deg: float = 180.0,
) -> ScheduleState:
    """The next iteration's state.

    Args:
        shell: where the half-maps agree now.
        change_deg: median angle that the particles moved in this iteration.
        tolerance_deg: smaller changes count as none.
        limit_px: no radius beyond this.
        uncertainty_deg: of the poses, as far as this iteration could tell.
    """
    better = shell > state.best_shell
    settled = change_deg < tolerance_deg or change_deg > 0.8 * state.last_change_deg
    stalled = 0 if better or not settled else state.stalled + 1
    radius = int(np.clip(round(1.15 * shell) + 2, 3, limit_px))
    iteration = state.iteration + 1
    return ScheduleState(
        iteration=iteration,
        radius_px=radius,
        shift_sd_px=float(np.clip(shift_sd_px, 0.3, box_px / 10)),
        best_shell=max(shell, state.best_shell),
        stalled=stalled,
        last_change_deg=change_deg,
        uncertainty_deg=min(uncertainty_deg, state.uncertainty_deg),
        done=is_done(stalled, iteration, settings),
    )


def with_finer_steps(
    state: ScheduleState, step_deg: float, next_step_deg: float, settings: RefineSection
) -> ScheduleState:
    """The same state, but not converged where the next search goes finer than this one's ``step_deg``.

    Down to SETTLED_STEP_DEG steps follow the resolution alone, whose growth keeps a refinement going.
    """
    if next_step_deg > 0.99 * step_deg or next_step_deg >= SETTLED_STEP_DEG:
        return state
    return replace(state, stalled=0, done=is_done(0, state.iteration, settings))


def is_done(stalled: int, iteration: int, settings: RefineSection) -> bool:
    """Whether no further iteration follows."""
    return stalled >= settings.stalled_iterations or iteration >= settings.max_iterations
