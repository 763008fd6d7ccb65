"""Share of the agreement of masked half-maps that comes from the mask.

A mask multiplies both half-maps and so convolves their transforms: agreement at one coefficient spreads to its
neighbours. Chen et al. (2013, doi 10.1016/j.ultramic.2013.06.004) measure this by randomising phases beyond the shell
at which the unmasked FSC falls below 0.8: the remaining correlation comes from the mask. Here this is done direction by
direction: phases are random from where the unmasked 3DFSC first falls below 0.8, which also detects agreement that a
mask carries from the measured directions into a missing cone, in shells whose overall FSC is high.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.metrics._directional_kernels import connected_to_centre
from cryoiso.metrics.anisotropy import ConicalFSC, conical_fsc
from cryoiso.metrics.directional_fsc import fsc3d_of_transforms
from cryoiso.metrics.fsc_curve import randomise_where, transform

if TYPE_CHECKING:
    from jaxtyping import Real

AGREES = 0.8
"""Unmasked agreement below which phases are randomised (Chen et al. 2013)."""
MARGIN = 2
"""Shells after the first randomised one that are ignored, because any mask extends correlation into them."""
WORST = 0.1
"""Fraction of the directions that form the group with the least agreement without the mask."""


@dataclass(frozen=True)
class MaskEffect:
    """Remaining agreement of masked half-maps with random phases."""

    share: float
    """Sum of FSC times shell^2 with random phases over that with the true ones, in all cones, from `MARGIN` shells
    beyond the start of the randomisation up to where the masked cone falls to 0.143."""
    share_worst: float
    """The same in the tenth of the cones that agree least without the mask."""
    unmasked: ConicalFSC
    """Without the mask."""


def mask_effect(
    half1: Real[np.ndarray, "box box box"],
    half2: Real[np.ndarray, "box box box"],
    mask: Real[np.ndarray, "box box box"],
    masked: ConicalFSC,
    *,
    seed: int = 0,
) -> MaskEffect:
    """Compare masked half-maps with those whose phases are random wherever the maps themselves do not agree.

    Args:
        half1, half2: (D, D, D) half-maps, not masked. mask: (D, D, D) in [0, 1].
        masked: cones of the masked half-maps.
        seed: of the random phases.

    Returns:
        Shares of 0 where the half-maps agree without the mask as far as with it.
    """
    box_px, halves = len(half1), (half1, half2)
    plain = [transform(half) for half in halves]
    unmasked = conical_fsc(plain[0], plain[1], box_px, masked.pixel_size_A)
    change = ~_agreeing(plain[0], plain[1], box_px)
    transforms = [transform(randomise_where(half, change, seed, uid), mask) for uid, half in enumerate(halves, 1)]
    random = conical_fsc(transforms[0], transforms[1], box_px, masked.pixel_size_A)
    shells = np.arange(box_px // 2 + 1)
    counted = (shells >= _first_below(unmasked, AGREES) + MARGIN) & (shells < _first_below(masked, 0.143))
    left, total = (
        np.where(counted, np.clip(np.nan_to_num(cones.curves), 0, 1) * shells**2, 0.0).sum(1)
        for cones in (random, masked)
    )
    worst = np.argsort(unmasked.areas, kind="stable")[: max(1, round(WORST * len(unmasked.axes)))]
    return MaskEffect(_ratio(left.sum(), total.sum()), _ratio(left[worst].sum(), total[worst].sum()), unmasked)


def _agreeing(fa: np.ndarray, fb: np.ndarray, box_px: int) -> np.ndarray:
    """(D, D, D//2+1) bool: coefficients up to which the 3DFSC is `AGREES` or more all the way from the origin."""
    volume = fsc3d_of_transforms(fa, fb, box_px)
    region = np.zeros(volume.shape, bool)
    connected_to_centre(volume, AGREES, 1.5, region)
    return np.fft.ifftshift(region)[:, :, : box_px // 2 + 1]


def _first_below(cones: ConicalFSC, threshold: float) -> np.ndarray:
    """(n, 1) the first shell of each cone at a threshold or below it; D//2+1 if none is. NaN is ignored."""
    below = cones.curves <= threshold
    below[:, 0] = False
    first: np.ndarray = np.where(below.any(1), below.argmax(1), cones.curves.shape[1])[:, None]
    return first


def _ratio(part: float, total: float) -> float:
    return float(part / total) if total > 0 else 0.0
