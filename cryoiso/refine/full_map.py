"""The map of both half-sets together, with every Fourier coefficient weighted by how well it was measured.

The plain quotient of sums and weights gives every direction its full strength, so that for uneven views the noise of
poorly sampled directions dominates the map. Here the sums are divided by weight + 1/tau^2, a Wiener filter:
well-measured coefficients keep their strength, the others tend to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.protocols import Communicator, ImageSource
from cryoiso.core.types import HALVES, DensityMap, Particles
from cryoiso.metrics.fsc_curve import fsc_corrected
from cryoiso.parallel.abort import on_root
from cryoiso.parallel.context import Context
from cryoiso.parallel.partition import root_of_half
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.refine import references
from cryoiso.refine.agreement import agreement, as_map, on_every_rank
from cryoiso.refine.reconstruct import half_sums

if TYPE_CHECKING:
    from jaxtyping import Float

PLANES = 16
"""Planes of a half's sums sent to the root of the other at once."""
MaskOf = Callable[[DensityMap], np.ndarray]
"""Mean of the filtered half-maps -> (D, D, D) mask in [0, 1]; called on rank 0."""


@dataclass(frozen=True)
class FullReconstruction:
    """Both half-maps and their weighted combination."""

    halves: dict[int, DensityMap]
    """Half -> the map from ``reconstruct_halves``, on every rank."""
    weighted: DensityMap | None
    """The Wiener-weighted map of all particles; on rank 0."""
    fsc: Float[np.ndarray, " shells"]
    """(D//2+1,) of the filtered half-maps, corrected for the mask: the basis of the weights."""


def reconstruct_full(
    source: ImageSource,
    particles: Particles,
    comm: Communicator | None,
    mask_of: MaskOf,
    *,
    symmetry: str = "C1",
    padding: int = 2,
    device: str = "cpu",
    diameter_A: float | None = None,
    pixel_size_A: float | None = None,
    seed: int = 0,
) -> FullReconstruction:
    """Half-maps, and (N1 + N2) / (W1 + W2 + 1/tau^2) of their sums (collective).

    tau^2, a number a shell, follows from the half-map FSC and the halves' own weights
    (``FourierSums.wiener_term``), in two steps: FSC of the plain maps inside a sphere; then, corrected for the mask by
    phase randomisation, that of the maps filtered with the first estimate. Zero from the first shell on in which these
    do not correlate. While the second half is back-projected the sums of the first lie beside its grid (half its
    size); the grid is gone before anything is divided.

    Args:
        mask_of: makes the mask, (D, D, D) in [0, 1], from a map.
        diameter_A: of the sphere (default: 0.9 boxes).
        seed: of the random phases.
        comm, symmetry, padding, device, pixel_size_A: as ``reconstruct_halves``.

    Raises:
        InputError: as ``reconstruct_halves``.
    """
    comm = comm if comm is not None else Context()
    pixel, box = pixel_size_A or particles.first_group.pixel_size_A, source.box_px
    limits: dict[int, int] = {}
    sums: dict[int, FourierSums] = {}
    for half, half_sum in half_sums(source, particles, comm, symmetry, padding, device, HALVES, pixel, limits):
        sums[half] = half_sum.to("cpu")  # GPUs need the room for the other half
    sums = {half: s.to(device) for half, s in sums.items()}
    last = min(limits.values())
    plain = on_every_rank({h: references.within(as_map(s.reconstruct()), limits[h]) for h, s in sums.items()}, comm)
    sphere = references.spherical(box, pixel, diameter_A or 0.9 * box * pixel)

    def fsc_in_sphere(maps: dict[int, np.ndarray]) -> np.ndarray:
        return _upto(references.half_map_fsc(maps, sphere), last)

    def fsc_in_mask(maps: dict[int, np.ndarray]) -> np.ndarray:
        cut = {h: references.within(m, limits[h]) for h, m in maps.items()}
        return _upto(on_root(comm, _corrected_fsc, cut, pixel, mask_of, seed), last)  # type: ignore[arg-type]

    agreed = agreement(sums, plain, fsc_in_sphere, comm, fsc_filtered=fsc_in_mask)
    curve, wiener = agreed.weighted, mean_term(agreed.wiener, comm)
    joined_sums = joined(sums, comm)
    weighted = None
    if joined_sums is not None:
        weighted = DensityMap(references.within(joined_sums.reconstruct(wiener).cpu().numpy(), end_of(curve)), pixel)
    return FullReconstruction({half: DensityMap(m, pixel) for half, m in plain.items()}, weighted, curve)


def joined(sums: dict[int, FourierSums], comm: Communicator) -> FourierSums | None:
    """The sum of both halves' sums, on the root of half 1; those of half 1 are consumed (collective).

    Plane by plane, to avoid temporaries of the grid's size.
    """
    roots = {half: root_of_half(half, comm.size) for half in HALVES}
    rows = comm.bcast(len(sums[1].weight) if 1 in sums else None, roots[1])
    for name in ("numerator", "weight"):
        for start in range(0, rows, PLANES):
            part = slice(start, start + PLANES)
            theirs = comm.bcast(getattr(sums[2], name)[part].cpu().numpy() if 2 in sums else None, roots[2])
            if 1 in sums:
                own_part = getattr(sums[1], name)
                own_part[part] += torch.as_tensor(theirs, device=own_part.device)
    return sums.get(1)


def end_of(curve: np.ndarray) -> int:
    """The last shell before the first one in which the curve is not above zero."""
    none = np.flatnonzero(~(curve[1:] > 0))
    return int(none[0]) if len(none) else len(curve) - 1


def _corrected_fsc(filtered: dict[int, np.ndarray], pixel_size_A: float, mask_of: MaskOf, seed: int) -> np.ndarray:
    mask = mask_of(DensityMap((filtered[1] + filtered[2]) / 2, pixel_size_A))
    return np.asarray(fsc_corrected(filtered[1], filtered[2], mask, seed)["corrected"])


def mean_term(terms: dict[int, torch.Tensor], comm: Communicator) -> torch.Tensor:
    """The term of the mean of both halves' tau^2, on every rank (collective)."""
    half_terms = [
        comm.bcast(terms[h].cpu().numpy() if h in terms else None, root_of_half(h, comm.size)) for h in HALVES
    ]
    inverse = [1.0 / np.maximum(term.astype(np.float64), 1e-300) for term in half_terms]
    return torch.as_tensor(2.0 / (inverse[0] + inverse[1])).float()


def _upto(curve: np.ndarray, last: int) -> np.ndarray:
    """The curve, zero beyond a shell: a mask leaks into shells without data."""
    return np.where(np.arange(len(curve)) <= last, np.nan_to_num(curve), 0.0)
