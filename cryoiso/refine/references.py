"""From a half-set's Fourier sums to its next reference, and the initial reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.protocols import Communicator
from cryoiso.metrics.anisotropy import conical_fsc
from cryoiso.metrics.fsc_curve import fsc, transform
from cryoiso.parallel.partition import root_of_half
from cryoiso.physics.filters import apply_transfer, radius_grid
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.masks import soft_mask_from_map, sphere_mask

if TYPE_CHECKING:
    from jaxtyping import Float

CONES = 64
"""Directions in which half-maps are compared between iterations."""


def exchange_low_resolution(sums: dict[int, FourierSums], radius_px: int, comm: Communicator) -> None:
    """Replace both half-sets' sums inside radius_px by their common sum, in place (collective).

    The only place where information passes between the halves: coarser than 40 Å by default, to keep the two maps in
    one frame. ``sums`` has the halves of which this rank is root.
    """
    parts = {
        h: comm.bcast(_inner(sums[h], radius_px) if h in sums else None, root_of_half(h, comm.size)) for h in (1, 2)
    }
    for s in sums.values():
        edge = s.padding * radius_px
        h = (s.weight.shape[0] - 1) // 2
        box = (slice(h - edge, h + edge + 1), slice(h - edge, h + edge + 1), slice(0, edge + 1))
        inside = s.shells(edge) <= radius_px
        for target, i in ((s.numerator, 0), (s.weight, 1)):
            mean_of_halves = (torch.as_tensor(parts[1][i]) + torch.as_tensor(parts[2][i])).to(target) / 2
            target[box] = torch.where(inside, mean_of_halves, target[box])


def _inner(s: FourierSums, radius_px: int) -> tuple[np.ndarray, np.ndarray]:
    edge = s.padding * radius_px
    h = (s.weight.shape[0] - 1) // 2
    box = (slice(h - edge, h + edge + 1), slice(h - edge, h + edge + 1), slice(0, edge + 1))
    return s.numerator[box].cpu().numpy().copy(), s.weight[box].cpu().numpy().copy()


def half_map_fsc(
    maps_of_both_halves: dict[int, Float[np.ndarray, "box box box"]], mask: Float[np.ndarray, "box box box"] | None
) -> Float[np.ndarray, " box//2+1"]:
    """FSC between the two half-maps (D//2+1,)."""
    return fsc(maps_of_both_halves[1], maps_of_both_halves[2], mask)


def within(volume: Float[np.ndarray, "box box box"], radius_px: int) -> Float[np.ndarray, "box box box"]:
    """The map without its Fourier coefficients beyond a shell, where a mask leaves leakage that correlates like
    data."""
    box = np.shape(volume)[0]
    if radius_px >= (box - 1) // 2:
        return volume
    return np.asarray(apply_transfer(volume, (radius_grid(box, 3).round() <= radius_px).float()), np.float32)


def spherical(box_px: int, pixel_size_A: float, diameter_A: float) -> Float[np.ndarray, "{box_px} {box_px} {box_px}"]:
    """Soft sphere of the particle's diameter (D, D, D)."""
    radius = min(diameter_A / 2 / pixel_size_A, box_px / 2 - 3)
    return np.asarray(sphere_mask(box_px, radius, 3.0), np.float32)


def flattened(
    volume: Float[np.ndarray, "box box box"],
    sphere: Float[np.ndarray, "box box box"],
    solvent_mask: Float[np.ndarray, "box box box"] | None,
    pixel_size_A: float,
    resolution_A: float | None,
) -> tuple[Float[np.ndarray, "box box box"], Float[np.ndarray, "box box box"] | None]:
    """The map inside the sphere and a mask: the given one, or a soft one made from the map itself, low-passed at 15 Å
    or one and a half times the resolution; None: no mask is made.

    Returns:
        the map; the mask that was made, None if none was.
    """
    volume = volume * sphere
    if solvent_mask is not None:
        return (volume * solvent_mask).astype(np.float32), None
    if resolution_A is None:
        return volume, None
    lowpass_A = max(15.0, 1.5 * resolution_A)
    mask = np.asarray(soft_mask_from_map(volume, pixel_size_A, lowpass_A, extend_A=4.5, soft_A=9.0))
    return (volume * mask).astype(np.float32), mask


def anisotropy(
    maps_of_both_halves: dict[int, Float[np.ndarray, "box box box"]],
    mask: Float[np.ndarray, "box box box"],
    pixel_size_A: float,
    last_shell: int,
) -> float:
    """cFAR of the half-maps, coarsely: smallest over largest area under the conical FSC curves of CONES directions; NaN
    if they agree in none.

    Args:
        last_shell: last shell with data.
    """
    first, second = (transform(maps_of_both_halves[h], mask) for h in (1, 2))
    return conical_fsc(first, second, len(mask), pixel_size_A, axes=CONES, last_shell=last_shell).cfar
