"""The last step of the paper: a subset with balanced views, for a local refinement.

No direction keeps more than a cap of particles, those whose pose is most certain. The paper's authors picked their
subset by hand in a 2D histogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import Particles
from cryoiso.metrics.orientation import ViewGrid
from cryoiso.metrics.view_cones import ranks
from cryoiso.physics.symmetry import in_asymmetric_unit, point_group


@dataclass(frozen=True)
class Balanced:
    """Which particles are kept, and how that was decided."""

    keep: np.ndarray
    """(n,) bool"""
    cap: int
    """most particles of a direction in each half-set"""
    cells: int
    """directions that hold any particle"""
    step_deg: float

    def facts(self, particles: Particles, cone_deg: float = 36.0) -> dict[str, Any]:
        """Numbers for the report."""
        rotation, _ = particles.require_poses()
        top = np.abs(rotation[:, 2, 2]) > np.cos(np.radians(cone_deg))
        dropped = ~self.keep
        return {
            "kept": int(self.keep.sum()),
            "dropped": int(dropped.sum()),
            "cap": self.cap,
            "cells": self.cells,
            "step_deg": self.step_deg,
            "dropped_fraction_top": float(top[dropped].mean()) if dropped.any() else 0.0,
        }


def balanced_subset(
    particles: Particles, symmetry: str, cap: float, seed: int, step_deg: float = 10.0, *, keep: float = 0.25
) -> Balanced:
    """Chooses the subset by the density of views, half-set by half-set.

    Args:
        particles: with poses, half-sets and, where the refinement wrote it, rlnMaxValueProbDistribution.
        symmetry: views are counted modulo this point group.
        cap: most particles of a cell, in multiples of the median cell that holds any.
        step_deg: width of a cell.
        keep: resolution wants particles as well as even views: the cap rises until this share is kept. The paper kept
            24 %.
    """
    rotation, _ = particles.require_poses()
    grid = ViewGrid.with_step(step_deg)
    cell = grid.index(_unit_directions(rotation[:, 2], symmetry))
    rank = _rank_in_cell(cell, particles, seed)
    counts = np.unique(cell * 2 + (particles.half == 2), return_counts=True)[1]
    wanted = np.quantile(rank, keep, method="inverted_cdf") + 1
    most = int(max(1, np.ceil(cap * np.median(counts)), np.ceil(wanted)))
    return Balanced(rank < most, most, len(np.unique(cell)), step_deg)


def _unit_directions(directions: np.ndarray, symmetry: str) -> np.ndarray:
    """Each view's mate in the asymmetric unit (n, 3)."""
    mates = np.einsum("nj,gjk->ngk", directions, point_group(symmetry))
    inside = in_asymmetric_unit(mates.reshape(-1, 3), symmetry).reshape(len(directions), -1)
    mate: np.ndarray = mates[np.arange(len(directions)), inside.argmax(1)]
    return mate


def _rank_in_cell(cell: np.ndarray, particles: Particles, seed: int) -> np.ndarray:
    """(n,) place of each particle in its cell and half-set, the most certain pose first, ties by a random key."""
    certainty = particles.results.get("rlnMaxValueProbDistribution")
    quality = np.zeros(len(cell)) if certainty is None else np.round(np.asarray(certainty, np.float64), 6)
    half = particles.half if particles.half is not None else np.zeros(len(cell), np.int8)
    return ranks(2 * cell + (half == 2), quality, shuffle_keys(seed, "balanced subset", particles.uid))
