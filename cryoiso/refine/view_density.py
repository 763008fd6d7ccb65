"""The density of views on the sphere, estimated from the posteriors of a half-set, and the resulting prior on views.

A refinement with a uniform prior over views assigns a large share of noisy images to the opposite side of the particle
or to a direction that no particle has; the densities of the set itself settle most of them. They are estimated by
expectation-maximisation: the posterior weights of one iteration, accumulated on cells of equal area, are the density of
the next one, with a floor of even views (pseudo-counts of a Dirichlet prior) that keeps rare views possible.

A density is a product of two factors. The *axial* one, the mean of p(v) and p(-v), is the frequency of an axis; it
draws rare views to frequent ones, so its odds are bounded. The *polarity*, p(v) over that mean, is the preference for
one of its two ends; projections along v and -v are mirror images, which are most easily confused by noise, and it
favours no axis over another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.config import RefineSection
from cryoiso.metrics.orientation import ViewGrid
from cryoiso.physics.symmetry import point_group

if TYPE_CHECKING:
    from jaxtyping import Float, Int

STEP_DEG = 4.0
"""Width of a cell: well below the kernel's."""
STILL_EVEN = 1.25
"""An axis whose density is up to this many times that of even views is not favoured."""
COUNT_UNIT = 2.0**32
"""Posterior weights are counted in fixed point of this unit, exact in any order."""


@lru_cache(maxsize=4)
def view_grid() -> ViewGrid:
    """The cells on which views are counted."""
    return ViewGrid.with_step(STEP_DEG)


@dataclass(frozen=True)
class ViewPrior:
    """Log prior of a view by cell, on a device."""

    log_prior: Tensor
    """(P,) float32; even views have 0."""
    rings: Tensor
    """(R+1,) float32: z of the rings' borders, from -1 up."""
    first: Tensor
    """(R,) int64 first cell of each ring, from z = 1 down."""
    cells: Tensor
    """(R,) int64 cells of each ring."""

    @classmethod
    def of(cls, log_prior: np.ndarray, device: str = "cpu") -> ViewPrior:
        grid = view_grid()
        first = np.concatenate([[0], np.cumsum(grid.cells)[:-1]])
        return cls(
            torch.as_tensor(log_prior, dtype=torch.float32, device=device),
            torch.as_tensor(-grid.z_edges, dtype=torch.float32, device=device),
            torch.as_tensor(first, device=device),
            torch.as_tensor(grid.cells, device=device),
        )

    def __call__(self, rotation: Tensor) -> Tensor:
        """(...,) log prior of the views of rotations (..., 3, 3)."""
        return self.log_prior[self.index(rotation[..., 2, :])]

    def index(self, view: Float[Tensor, "... 3"]) -> Int[Tensor, " ..."]:
        """(...,) int64 cell of unit vectors (..., 3); ``ViewGrid.index`` on a device."""
        ring = torch.searchsorted(self.rings, -view[..., 2].contiguous(), right=True) - 1
        ring = ring.clamp(0, len(self.cells) - 1)
        turn = torch.remainder(torch.atan2(view[..., 1], view[..., 0]) / (2 * np.pi), 1.0)
        cells = self.cells[ring]
        return self.first[ring] + torch.minimum((turn * cells).long(), cells - 1)


@dataclass(frozen=True)
class ViewCounts:
    """Posterior weight of each cell, (P,) int64 in COUNT_UNIT: partial sums, to be added over ranks."""

    counts: np.ndarray

    @classmethod
    def empty(cls) -> ViewCounts:
        return cls(np.zeros(len(view_grid()), np.int64))

    def add(self, rotation: Float[Tensor, "r 3 3"], weight: Float[Tensor, " r"], grid: ViewPrior) -> None:
        """Views of (R, 3, 3) with posterior weights (R,)."""
        cell = grid.index(rotation[..., 2, :]).cpu().numpy()
        np.add.at(self.counts, cell, np.rint(weight.double().cpu().numpy() * COUNT_UNIT).astype(np.int64))


def density(counts: Float[np.ndarray, " cells"], symmetry: str, kernel_deg: float) -> Float[np.ndarray, " cells"]:
    """Smooth density of views, relative to that of even views.

    Args:
        counts: (P,) weight of each cell.
        symmetry: point group whose symmetry mates are equivalent.
        kernel_deg: standard deviation of the smoothing kernel (von Mises-Fisher).

    Returns:
        (P,) float64 with mean 1; 1 everywhere without any count.
    """
    if not counts.sum() > 0:
        return np.ones(len(counts))
    smooth = counts / counts.sum() @ _kernel(symmetry, kernel_deg)
    density: np.ndarray = smooth / smooth.mean()
    return density


def log_prior(
    smooth: Float[np.ndarray, " cells"], *, axis_odds: float, polarity_floor: float
) -> Float[np.ndarray, " cells"]:
    """(P,) log of the axial factor times the polarity; 0 for even views.

    Args:
        smooth: (P,) density relative to that of even views.
        axis_odds: largest factor by which an axis is favoured over another; 1: the axial factor is 1. Favoured are axes
            seen more than STILL_EVEN times as often as in an even set, so that chance favours none there.
        polarity_floor: share of even views mixed into the density for the polarity; 1: the polarity is 1.
    """
    opposite = smooth[_opposite()]
    axial = np.clip((smooth + opposite) / 2 / STILL_EVEN, 1.0, axis_odds)
    here, there = ((1 - polarity_floor) * s + polarity_floor for s in (smooth, opposite))
    prior: np.ndarray = np.log(axial) + np.log(2 * here / (here + there))
    return prior


def prior_of(
    counts: dict[int, Float[np.ndarray, " cells"]], half: int, symmetry: str, settings: RefineSection, device: str
) -> ViewPrior | None:
    """Prior on the views of a half-set's images from its counts of the previous iteration; None: even views."""
    if not counts or not settings.view_density:
        return None
    smooth = density(counts[half], symmetry, settings.view_kernel_deg)
    odds, floor = settings.view_axis_odds, settings.view_polarity_floor
    return ViewPrior.of(log_prior(smooth, axis_odds=odds, polarity_floor=floor), device)


def density_facts(counts: dict[int, np.ndarray], symmetry: str, settings: RefineSection) -> dict[str, Any]:
    """Densities of the half-sets, relative to that of even views, for each cell of ``view_grid``: plain values."""
    s = settings
    facts: dict[str, Any] = {"step_deg": STEP_DEG, "kernel_deg": s.view_kernel_deg, "used": s.view_density}
    facts |= {"axis_odds": s.view_axis_odds, "polarity_floor": s.view_polarity_floor}
    for half, values in counts.items():
        facts[f"half{half}"] = [round(float(v), 4) for v in density(values, symmetry, s.view_kernel_deg)]
    return facts


@lru_cache(maxsize=2)
def _opposite() -> np.ndarray:
    return view_grid().index(-view_grid().centres())


@lru_cache(maxsize=2)
def _kernel(symmetry: str, kernel_deg: float) -> np.ndarray:
    """(P, P) float32 weights of a count in a cell for each other cell, mean over the symmetry mates of the first."""
    centres = view_grid().centres()
    kappa = 1 / np.radians(kernel_deg) ** 2
    total = np.zeros((len(centres),) * 2, np.float32)
    for operation in point_group(symmetry):
        total += np.exp(kappa * ((centres @ operation) @ centres.T - 1)).astype(np.float32)
    return total
