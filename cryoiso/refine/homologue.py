"""How far the raw particles alone confirm the homologue that the auxiliary particles show, and the weight that follows.

Poses of the first iteration are chosen by the coefficients inside the first reference's radius. Beyond it, the raw
particles' sums know nothing of the homologue but what the images hold: for noise of independent coefficients the
expected correlation is zero, whatever happens inside. Derived in docs/formulas.md, "Weight of auxiliary particles".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import ndtr

from cryoiso.core.log import logger
from cryoiso.core.protocols import Communicator
from cryoiso.core.records import HomologueRecord
from cryoiso.core.types import HALVES
from cryoiso.parallel.partition import root_of_half
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.refine.agreement import as_map, on_every_rank

if TYPE_CHECKING:
    from jaxtyping import Float

BEYOND = 2
"""Shells from the radius of the search to the first that is compared; the interpolation mixes neighbouring ones."""
CHANCE = 3e-5
"""Noise confirms a homologue in fewer cases than this (four standard errors)."""
ERRORS = 2.0
"""Standard errors by which correlations are lowered, and the half-maps' own raised."""
EXTENDED = 3
"""Mean of the first so many compared shells, which stands for the shells inside the first reference."""
LARGEST = 0.99
"""Highest correlation that is believed: a precision of 49 times that of the prior without a homologue."""

PairFsc = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(D//2+1,) FSC of two maps, inside the mask used for FSCs."""


@dataclass(frozen=True)
class HalfSide:
    """Correlation of one half-set with the homologue, by shell (radius+1,)."""

    cross: Float[np.ndarray, " shells"]
    """Sum of Re conj(numerator) V0."""
    variance: Float[np.ndarray, " shells"]
    """Its variance if the images are noise."""
    coefficients: Float[np.ndarray, " shells"]
    """Effective number of independent complex coefficients of the filtered map."""
    correlation: Float[np.ndarray, " shells"]
    """FSC of the filtered map with the homologue, filtered likewise."""
    power: Float[np.ndarray, " shells"]
    """Mean |V0|^2 over the shell, in the units of tau^2."""


@dataclass(frozen=True)
class HomologueCorrelation:
    """Correlation with the homologue that the raw particles confirm."""

    rho: Float[np.ndarray, " shells"]
    """(radius+1,) lower limit of the correlation of signal and homologue; zero where nothing is confirmed."""
    correlation: Float[np.ndarray, " shells"]
    """(radius+1,) of the filtered half-maps with the homologue, mean of both; zero before ``first_shell``."""
    inverse_power: Float[np.ndarray, " shells"]
    """(radius+1,) of the homologue on the grey scale of the data: what 1 / tau^2 would be if it were the signal, in
    units of weights without ``noise.weight_scale``."""
    first_shell: int
    """The first that was compared."""
    deviation: float
    """Correlation of all compared shells in standard deviations of noise."""

    @property
    def confirmed(self) -> bool:
        return bool(self.rho.any())

    @property
    def precision(self) -> Float[np.ndarray, " shells"]:
        """(radius+1,) precision rho^2 / (1 - rho^2) of the homologue as an observation of the map, in units of 1 /
        tau^2 where the signal is as strong as the homologue."""
        square = np.square(self.rho)
        return np.asarray(square / (1 - square))

    def precision_of(
        self, wiener: Float[torch.Tensor, " shells"], scale: float = 1.0
    ) -> Float[torch.Tensor, " shells"]:
        """Precision by shell in units of the weight: rho^2 / (1 - rho^2) over the power of the signal or of the
        homologue, whichever is larger; zero beyond the shells that were compared.

        A homologue with more power than the signal would otherwise outshine it where directions are empty.

        Args:
            wiener: (>= radius+1,) 1 / tau^2 in units of the weight.
            scale: factor on the weights (``noise.weight_scale``).
        """
        precision = torch.zeros_like(wiener, dtype=torch.float64)
        last = min(len(wiener), len(self.rho))
        weakest = torch.minimum(
            wiener[:last].double(), torch.as_tensor(scale * self.inverse_power[:last]).to(precision)
        )
        precision[:last] = torch.as_tensor(self.precision[:last]).to(precision) * weakest
        return precision

    def record(self, extent_A: float) -> HomologueRecord:
        """Plain values, from which ``of_record`` gives the same bits.

        Args:
            extent_A: length of the box.
        """
        return {
            "confirmed": self.confirmed,
            "deviation": self.deviation,
            "first_shell": self.first_shell,
            "first_A": extent_A / self.first_shell,
            "correlation": self.correlation.tolist(),
            "rho": self.rho.tolist(),
            "inverse_power": self.inverse_power.tolist(),
        }

    @classmethod
    def of_record(cls, record: HomologueRecord) -> HomologueCorrelation:
        rho, correlation, inverse = (np.array(record[k]) for k in ("rho", "correlation", "inverse_power"))
        return cls(rho, correlation, inverse, record["first_shell"], record["deviation"])


def confirmation(
    sums: dict[int, FourierSums],
    wiener: dict[int, torch.Tensor],
    homologue: Float[np.ndarray, "box box box"],
    searched_px: int,
    fsc: PairFsc,
    comm: Communicator,
    *,
    operations: int = 1,
    scale: float = 1.0,
    covered: float = 1.0,
) -> HomologueCorrelation:
    """Compare the raw particles of a first iteration with the homologue (collective).

    Args:
        sums, wiener: of the halves of which this rank is root.
        homologue: (D, D, D) on any grey scale, inside the sphere of the particle.
        searched_px: radius of the coefficients that chose the poses.
        operations: number of rotations of the point group.
        scale: factor on the weights of the back-projection (``noise.weight_scale``).
        covered: share of the box inside the mask of ``fsc``.
    """
    filtered = {h: as_map(s.reconstruct(wiener[h])) for h, s in sums.items()}
    own = {
        h: _half_side(s, wiener[h], homologue, filtered[h], fsc, operations, scale, covered) for h, s in sums.items()
    }
    sides = {h: comm.bcast(own.get(h), root_of_half(h, comm.size)) for h in HALVES}
    halves = on_every_rank(filtered, comm)
    grey_scale = max(_grey_scale(sides, searched_px, operations * scale), 1e-15)
    return judged(sides, fsc(halves[1], halves[2]), searched_px + BEYOND, grey_scale)


def _half_side(
    sums: FourierSums, wiener: torch.Tensor, homologue: np.ndarray, filtered: np.ndarray, fsc: PairFsc,
    operations: int, scale: float, covered: float,
) -> HalfSide:  # fmt: skip
    known = sums.sampled(torch.from_numpy(np.ascontiguousarray(homologue, np.float32)).to(sums.weight.device))
    cross, variance, coefficients, power = _by_shell(sums, known, wiener)
    seen = FourierSums(known * sums.weight, sums.weight, sums.box_px, sums.padding, sums.radius_px)
    curve = fsc(filtered, as_map(seen.reconstruct(wiener)))[: sums.radius_px + 1]
    # The FSC sees padding^3 grid points in a coefficient of the box and the noise inside its mask only; the likelihood
    # counts Friedel pairs, so that a weight w is the precision w / 2.
    power *= sums.padding**3 / (2 * covered)
    return HalfSide(cross, variance * operations * scale, coefficients * covered / operations, curve, power)


def _grey_scale(sides: dict[int, HalfSide], searched_px: int, factor: float) -> float:
    """Least-squares factor of the homologue on the sums of both half-sets, in the shells that chose the poses.

    Args:
        factor: of the variance on sum W |V0|^2.
    """
    inside = slice(1, searched_px + 1)
    variance = sum(float(side.variance[inside].sum()) for side in sides.values())
    return max(sum(float(side.cross[inside].sum()) for side in sides.values()) * factor / max(variance, 1e-30), 0.0)


def _by_shell(
    sums: FourierSums, known: torch.Tensor, wiener: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(radius+1,) cross terms, their variance for one operation, independent coefficients in the whole box, and mean
    power of the homologue.

    Plane by plane, to save memory; without x = 0, where every coefficient stands twice.
    """
    size, rows = sums.radius_px + 1, len(sums.weight)
    totals = np.zeros((6, size + 1))
    term = torch.cat([wiener[:size].to(sums.weight), torch.ones(1).to(sums.weight)])
    axis = torch.arange(rows, device=sums.weight.device, dtype=torch.float32) - (rows - 1) // 2
    x = torch.arange(1, sums.weight.shape[2], device=sums.weight.device, dtype=torch.float32)
    plane = axis[:, None] ** 2 + x[None, :] ** 2
    for i in range(rows):
        shell = ((plane + axis[i] ** 2).sqrt() / sums.padding).round().long().clamp(max=size)
        w, v = sums.weight[i, :, 1:], known[i, :, 1:]
        share = (w / (w + term[shell]).clamp(min=1e-30)).square().double()
        square = v.abs().square()
        values = (
            (sums.numerator[i, :, 1:].conj() * v).real, w * square, share, share.square(), square, torch.ones_like(w),
        )  # fmt: skip
        for total, value in zip(totals, values, strict=True):
            flat = value.double().reshape(-1)
            total += torch.bincount(shell.reshape(-1), flat, minlength=size + 1).cpu().numpy()
    cross, variance, first, second, power, voxels = totals[:, :size]
    coefficients = first**2 / np.maximum(second, 1e-300) / sums.padding**3
    return cross, variance, coefficients, power / np.maximum(voxels, 1)


def judged(sides: dict[int, HalfSide], halves: np.ndarray, first: int, grey_scale: float = 1.0) -> HomologueCorrelation:
    """The correlation with the homologue that both half-sets confirm.

    Args:
        halves: (>= radius+1,) FSC of the two filtered half-maps.
        first: first shell that is compared.
        grey_scale: of the data over that of the homologue.
    """
    inverse = 1 / np.maximum(grey_scale**2 * sides[1].power, 1e-30)
    shells = len(sides[1].cross)
    nothing, beyond = np.zeros(shells), np.arange(shells) >= first
    variance = sum(side.variance[beyond].sum() for side in sides.values())
    if not variance > 0:
        return HomologueCorrelation(nothing, nothing, inverse, first, 0.0)
    deviation = float(sum(side.cross[beyond].sum() for side in sides.values()) / np.sqrt(variance))
    mean = np.where(beyond, (sides[1].correlation + sides[2].correlation) / 2, 0.0)
    coefficients = np.where(beyond, (sides[1].coefficients + sides[2].coefficients) / 2, 0.0)
    pooled, number = _pooled(mean, coefficients)
    error = 1 / np.sqrt(2 * np.maximum(number, 1))
    low = pooled - ERRORS * error * (1 - pooled**2)
    ends = np.flatnonzero(beyond & ~(low > 0))  # from the first shell without agreement on, nothing is believed
    low[ends[0] if len(ends) else shells :] = 0
    low[:first] = 0
    if ndtr(-deviation) >= CHANCE or not low.any():
        return HomologueCorrelation(nothing, mean, inverse, first, deviation)
    signal = np.clip(_pooled(halves[:shells], coefficients)[0], 0, 1)
    signal = np.minimum(signal + ERRORS * error * (1 - signal**2), 1)
    rho = np.minimum(low / np.sqrt(signal), LARGEST)
    rho[1:first] = rho[first : first + EXTENDED].mean()
    return HomologueCorrelation(rho, mean, inverse, first, deviation)


def _pooled(values: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of a shell and its two neighbours, by their numbers of coefficients, and the sum of these numbers.

    Unevenly measured shells have few; correlations vary little between neighbours.
    """
    window = np.ones(3)
    total = np.convolve(number, window, "same")
    return np.convolve(values * number, window, "same") / np.maximum(total, 1e-300), total


def log_confirmation(correlation: HomologueCorrelation, extent_A: float) -> None:
    """Say whether the data confirm the homologue.

    Args:
        extent_A: length of the box.
    """
    first_A, last = extent_A / correlation.first_shell, len(correlation.rho) - 1
    if correlation.confirmed:
        last = int(np.flatnonzero(correlation.rho)[-1])
        logger.info(
            "the raw particles confirm the homologue beyond the first reference, at %.1f to %.1f Å (%.1f standard "
            "deviations above noise): correlation at least %.2f inside and %.2f at the end",
            first_A, extent_A / last, correlation.deviation, correlation.rho[1], correlation.rho[last],
        )  # fmt: skip
    else:
        logger.warning(
            "the raw particles do not confirm the homologue beyond the first reference, at %.1f to %.1f Å (%.1f "
            "standard deviations above noise): auxiliary particles are left out of the references",
            first_A, extent_A / last, correlation.deviation,
        )  # fmt: skip
