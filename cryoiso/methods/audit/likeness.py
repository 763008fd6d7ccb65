"""How much a map resembles a reference, in all shells or only in those that the initial reference did not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.methods.audit.blocks import Estimate, block_numbers, bootstrap, summed
from cryoiso.physics.filters import apply_radial

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

LEAST_SHELLS = 2
"""A band of fewer shells holds too little to compare."""
MARGIN_SHELLS = 2
"""The low-pass filter of the initial reference ends within so many shells beyond its resolution."""


@dataclass(frozen=True)
class Band:
    """A range of shells of a box, both included."""

    first: int
    last: int

    @classmethod
    def beyond(cls, lowpass_A: float, resolution_A: float, box_px: int, pixel_size_A: float) -> Band:
        """From where an initial reference low-passed at ``lowpass_A`` has ended to a resolution."""
        length_A = box_px * pixel_size_A
        first = int(np.ceil(length_A / lowpass_A)) + MARGIN_SHELLS
        return cls(first, min(int(length_A / resolution_A), box_px // 2 - 1))

    @classmethod
    def up_to(cls, resolution_A: float, box_px: int, pixel_size_A: float) -> Band:
        """All shells to a resolution but the first, which is the box."""
        return cls(1, min(max(int(box_px * pixel_size_A / resolution_A), LEAST_SHELLS), box_px // 2 - 1))

    @property
    def usable(self) -> bool:
        """Whether it holds enough shells."""
        return self.last - self.first + 1 >= LEAST_SHELLS

    def curve(self, box_px: int) -> Float[np.ndarray, " shells"]:
        """(D//2+1,) 1 within, 0 without, half in the shells next to it."""
        shells = np.arange(box_px // 2 + 1)
        inside = (shells >= self.first) & (shells <= self.last)
        beside = (shells == self.last + 1) | (shells == self.first - 1)
        curve: Float[np.ndarray, " shells"] = np.where(inside, 1.0, np.where(beside, 0.5, 0.0))
        return curve


def filtered(volume: Float[np.ndarray, "box box box"], band: Band) -> Float[np.ndarray, "box box box"]:
    """The map's shells of a band, (D, D, D) float64."""
    return np.asarray(apply_radial(np.asarray(volume, np.float64), band.curve(volume.shape[0])), np.float64)


def correlation(
    volume: Float[np.ndarray, "box box box"], reference: Float[np.ndarray, "box box box"],
    inside: Bool[np.ndarray, "box box box"], band: Band, seed: int = 0, orbits: np.ndarray | None = None,
) -> Estimate:  # fmt: skip
    """Pearson's correlation of two maps in a band, within a mask, with its bootstrap error over blocks of the band's
    finest detail; 0 where one has no power there.

    Args:
        orbits: rotations of the point group that both have.
    """
    a, b = (filtered(v, band)[inside] for v in (volume, reference))
    numbers = block_numbers(inside, _edge_px(band, len(volume)), orbits)
    terms = summed(numbers, np.ones_like(a), a, b, a * a, b * b, a * b)
    if not (a.std() > 0 and b.std() > 0):
        return Estimate(0.0, 0.0, 0.0, 0.0)
    return bootstrap(terms, _pearson, seed, "correlation")


def difference(
    first: Float[np.ndarray, "box box box"], second: Float[np.ndarray, "box box box"],
    reference: Float[np.ndarray, "box box box"], inside: Bool[np.ndarray, "box box box"], band: Band,
    seed: int = 0, orbits: np.ndarray | None = None,
) -> Estimate:  # fmt: skip
    """Correlation of the first map with the reference less that of the second, blocks drawn alike for both."""
    a, c, b = (filtered(v, band)[inside] for v in (first, second, reference))
    numbers = block_numbers(inside, _edge_px(band, len(first)), orbits)
    sums = summed(numbers, np.ones_like(a), a, b, a * a, b * b, a * b)
    two = summed(numbers, np.ones_like(c), c, b, c * c, b * b, c * b)

    def statistic(totals: np.ndarray) -> np.ndarray:
        sums, second = _pearson(totals[..., :6]), _pearson(totals[..., 6:])
        return np.asarray(np.nan_to_num(sums) - np.nan_to_num(second))

    return bootstrap(np.concatenate([sums, two], 1), statistic, seed, "difference")


def _pearson(totals: np.ndarray) -> np.ndarray:
    n, a, b, aa, bb, ab = np.moveaxis(totals, -1, 0)
    result: np.ndarray = (ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n))
    return result


def _edge_px(band: Band, box_px: int) -> int:
    """Voxels of half a period of the band's finest shell, at least 2."""
    return max(2, round(box_px / (2 * max(band.last, 1))) + 1)
