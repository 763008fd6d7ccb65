"""Density in a part of a map, as a share of another's: Omega of an omitted region, and what is left of an added one.

Omega (Lucas et al., eLife 90486, 2023) = (sum rho_full - sum rho_omit) / sum rho_full over the voxels in which the two
templates differ, rho being the maps reconstructed with the full and with the shortened template: 0 if the data alone
made the density there, 1 if the template did. Both maps are brought to one grey scale and their solvent to zero first,
which the definition needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.methods.audit.blocks import LEAST_BLOCKS, Estimate, block_numbers, bootstrap, summed

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

TWO_SIDED = 1.96
"""Standard errors of a 95 % interval."""
STRONGEST = 100
SHARE = 0.1
"""Voxels count whose difference of templates is above this share of the mean of the strongest ones."""


def differing(
    full: Float[np.ndarray, "box box box"], omitted: Float[np.ndarray, "box box box"]
) -> Bool[np.ndarray, "box box box"]:
    """Voxels of the omitted part: full - omitted above a tenth of the mean of its 100 largest values."""
    gap = np.asarray(full, np.float64) - omitted
    part: Bool[np.ndarray, "box box box"] = gap > SHARE * float(np.sort(gap, axis=None)[-STRONGEST:].mean())
    return part


def levelled(
    volume: Float[np.ndarray, "box box box"], solvent: Bool[np.ndarray, "box box box"]
) -> Float[np.ndarray, "box box box"]:
    """The map with its solvent at zero, (D, D, D) float64."""
    data = np.asarray(volume, np.float64)
    return data - (float(np.median(data[solvent])) if solvent.any() else 0.0)


def scale_between(
    volume: Float[np.ndarray, "box box box"], other: Float[np.ndarray, "box box box"],
    where: Bool[np.ndarray, "box box box"],
) -> float:  # fmt: skip
    """Least-squares factor from ``other`` to ``volume`` within some voxels; 0 where ``other`` is empty."""
    a, b = volume[where].astype(np.float64), other[where].astype(np.float64)
    power = float(b @ b)
    return float(a @ b) / power if power > 0 else 0.0


def omega(
    made_full: Float[np.ndarray, "box box box"], made_omitted: Float[np.ndarray, "box box box"],
    part: Bool[np.ndarray, "box box box"], rest: Bool[np.ndarray, "box box box"],
    solvent: Bool[np.ndarray, "box box box"], edge_px: int, seed: int = 0, orbits: np.ndarray | None = None,
) -> Estimate:  # fmt: skip
    """Omega with its bootstrap interval over blocks of the part.

    Args:
        made_full, made_omitted: maps reconstructed with the full and with the shortened reference.
        part: voxels of the omitted part; ``rest``: the remaining particle, which sets the grey scale; ``solvent``.
        edge_px: of a block.
    """
    full, omitted = levelled(made_full, solvent), levelled(made_omitted, solvent)
    factor = scale_between(full, omitted, rest)
    terms = summed(block_numbers(part, edge_px, orbits), full[part], factor * omitted[part])
    return bootstrap(terms, lambda t: (t[..., 0] - t[..., 1]) / t[..., 0], seed, "omega")


@dataclass(frozen=True)
class Matched:
    """Omega of a part beside a matched control."""

    omega: Estimate
    """as Lucas et al. define it"""
    floor: Estimate
    """the same of maps whose reference had this part and lacked another one: what a poorer reference costs anywhere in
    the map, since fewer particles find their pose; NaN without such maps"""
    net: Estimate
    """omega - floor: what depends on the presence of this very part in the reference"""
    terms: Float[np.ndarray, "blocks 3"]
    """densities of each block in the three maps: reference unchanged, without this part, without another one"""


def matched(
    made_full: Float[np.ndarray, "box box box"], made_omitted: Float[np.ndarray, "box box box"],
    controls: list[Float[np.ndarray, "box box box"]], part: Bool[np.ndarray, "box box box"],
    rest: Bool[np.ndarray, "box box box"], solvent: Bool[np.ndarray, "box box box"], edge_px: int, seed: int = 0,
    orbits: np.ndarray | None = None,
) -> Matched:  # fmt: skip
    """Omega, its matched control and their difference, blocks drawn alike for all.

    Args:
        controls: maps reconstructed with references that had the part and lacked another one.
        rest: the particle without any part that a reference lacked; others as in :func:`omega`.
    """
    full = levelled(made_full, solvent)
    scaled = [m * scale_between(full, m, rest) for m in (levelled(v, solvent) for v in (made_omitted, *controls))]
    numbers = block_numbers(part, edge_px, orbits)
    own, *others = (signal[part] for signal in scaled)
    lost = bootstrap(summed(numbers, full[part], own), lambda t: 1 - t[..., 1] / t[..., 0], seed, "omega")
    terms = summed(numbers, full[part], own, np.mean(others, 0) if others else np.full(part.sum(), np.nan))
    floor = bootstrap(terms, lambda t: 1 - t[..., 2] / t[..., 0], seed, "omega")
    return Matched(lost, floor, bootstrap(terms, _net, seed, "omega"), terms)


def pooled(parts: list[Matched], seed: int = 0) -> Estimate:
    """The difference of Omega and its matched control for all parts together: differences in quality between the maps
    move parts of equal mass in opposite directions and cancel."""
    return bootstrap(np.concatenate([region.terms for region in parts]), _net, seed, "omega")


def _net(totals: np.ndarray) -> np.ndarray:
    return np.asarray((totals[..., 2] - totals[..., 1]) / totals[..., 0])


def widened(estimate: Estimate, error: float) -> Estimate:
    """With a further, independent standard error."""
    total = float(np.hypot(estimate.error, error))
    reach = TWO_SIDED * total
    return Estimate(estimate.value, estimate.value - reach, estimate.value + reach, total)


def share_left(
    made_changed: Float[np.ndarray, "box box box"], made_full: Float[np.ndarray, "box box box"],
    added: Float[np.ndarray, "box box box"], elsewhere: list[Float[np.ndarray, "box box box"]],
    rest: Bool[np.ndarray, "box box box"], reference: Float[np.ndarray, "box box box"],
) -> Estimate:  # fmt: skip
    """What is left of density that was added to a reference, as a share of what was added, beyond what the map without
    it has in the same place.

    The error is the scatter of the same number in other places, to which nothing was added.

    Args:
        made_changed, made_full: maps reconstructed with and without the addition.
        added: the addition, on the grey scale of ``reference``; ``elsewhere``: the same in other places; ``rest``: the
            particle.

    Returns:
        NaN where a map does not resemble the reference; NaN for the error with fewer than ``LEAST_BLOCKS`` places.
    """
    scale_changed, scale_full = (scale_between(m, reference, rest) for m in (made_changed, made_full))
    if scale_changed <= 0 or scale_full <= 0:
        return Estimate(np.nan, np.nan, np.nan, np.nan)
    gap = made_changed.astype(np.float64) / scale_changed - made_full.astype(np.float64) / scale_full
    value, *others = (float((gap * t).sum() / (t * t).sum()) for t in (added, *elsewhere))
    if len(others) < LEAST_BLOCKS:
        return Estimate(value, np.nan, np.nan, np.nan)
    error = float(np.sqrt(np.mean(np.square(others))))
    return Estimate(value, value - TWO_SIDED * error, value + TWO_SIDED * error, error)
