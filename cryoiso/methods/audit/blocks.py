"""Bootstrap over blocks of a map: voxels nearer than the resolution are not independent, blocks of that size nearly
are, so blocks are drawn with replacement (Kuensch, Ann. Statist. 17:1217, 1989), the same for all maps compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.rng import generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

DRAWS = 500
COVERED = 0.95
LEAST_BLOCKS = 8
"""Fewer blocks say nothing about their own scatter."""


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap distribution."""

    value: float
    low: float
    high: float
    error: float
    """standard error"""

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %."""
        return self.low, self.high


def block_numbers(
    where: Bool[np.ndarray, "box box box"], edge_px: int, orbits: Float[np.ndarray, "g 3 3"] | None = None
) -> np.ndarray:
    """(n,) int: the block of each voxel that is true in ``where``, in C order, numbered from 0.

    Args:
        edge_px: edge length of the cubic blocks.
        orbits: rotations of a point group; voxels that these take into each other share a block, since a symmetric map
            says nothing twice. The block of a voxel is that of its copy with the largest (z, y, x).
    """
    box = where.shape[0]
    points = np.argwhere(where).astype(np.float64) - box // 2
    if orbits is not None and len(orbits) > 1:
        copies = np.einsum("gij,nj->ngi", orbits, points[:, ::-1])[..., ::-1]  # rotations act on (x, y, z)
        rank = np.round(copies, 3) @ np.array([1e6, 1e3, 1.0])
        points = copies[np.arange(len(copies)), rank.argmax(1)]
    cells = np.floor((points + box) / max(edge_px, 1)).astype(np.int64)
    _, numbers = np.unique(cells, axis=0, return_inverse=True)
    return np.asarray(numbers).ravel()


def bootstrap(
    sums: Float[np.ndarray, "blocks terms"], statistic: Callable[[np.ndarray], np.ndarray], seed: int, purpose: str
) -> Estimate:
    """A statistic of sums over blocks, with its error from drawing blocks with replacement.

    Args:
        sums: (B, T) the terms that the statistic is made of, summed within each block.
        statistic: (..., T) totals -> (...) values.

    Returns:
        value, 2.5 and 97.5 percentiles, standard error; NaN for these where there are fewer than ``LEAST_BLOCKS``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(sums.sum(0)))
        if len(sums) < LEAST_BLOCKS or not np.isfinite(value):
            return Estimate(value, np.nan, np.nan, np.nan)
        rng = generator(seed, f"bootstrap {purpose}")
        counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=DRAWS)
        drawn = np.asarray(statistic(counts @ sums), np.float64)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < DRAWS / 2:
        return Estimate(value, np.nan, np.nan, np.nan)
    tail = 100 * (1 - COVERED) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(value, float(low), float(high), float(drawn.std()))


def summed(numbers: np.ndarray, *terms: np.ndarray) -> Float[np.ndarray, "blocks terms"]:
    """(B, T) sums of terms (n,) within blocks."""
    count = int(numbers.max(initial=-1)) + 1
    return np.stack([np.bincount(numbers, np.asarray(t, np.float64), minlength=count) for t in terms], 1)
