"""Directional numbers of half-maps, and the sampling of Fourier space by views: parts of what `diagnose` writes.

Keys of `directional` (masked half-maps; curves have one value a shell, as ``frequency_invA``):
    cone_deg, axes (n, 3): the double cones and their axes x, y, z, on a half sphere
    cfar: least over largest area below the conical FSC curves, by the open definition (not cryoSPARC's)
    evenness: 5th over 95th percentile of those areas
    cfsc_mean, cfsc_sd, cfsc_min, cfsc_max: over the axes
    resolution_A (n), resolution_mean_A, resolution_sd_A, resolution_min_A, resolution_max_A: FSC 0.143 by direction
    worst_axis, best_axis: the axes of the coarsest and of the finest resolution
    fso, bingham_p: Fourier shell occupancy, and probability that what is occupied is spread evenly
    fso_09_A, fso_05_A, fso_01_A: where the occupancy first drops below 0.9, 0.5 and 0.1 (null: nowhere)
    sphericity: of the region where the 3DFSC is 0.5 or more
    fsc3d_slices: x, y, z: 3DFSC in the plane through the origin perpendicular to that axis; last_invA: its half width
    expected (of random maps with the same spectrum, mask and FSC): even: cfar, evenness, if views were even; views: the
    same, and short_fraction: directions with less than half of the expected area, if these poses were right
    mask (null without one): share and share_worst of `cryoiso.metrics.mask_effect.MaskEffect`; cfar_unmasked
    unmasked (only where the mask makes that much of the agreement that the verdict rests on these): cfar, evenness,
    expected, resolution_min_A, resolution_max_A of the half-maps without the mask
Keys of `sampling` (``estimated``, and ``true`` where known):
    n, scf, scf_star, scf_star_even (of as many views spread evenly), empty_fraction, efficiency
    map: views through each of the first shell's points over their mean; points: how many (a Fibonacci half sphere)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.methods.assess.verdict import MASK_MADE
from cryoiso.metrics.anisotropy import (
    CFAR_CONE_DEG,
    ConicalFSC,
    conical_fsc,
    fourier_shell_occupancy,
    resolved_region,
    sphericity,
)
from cryoiso.metrics.directional_fsc import fsc3d_of_transforms
from cryoiso.metrics.expected import Surrogate, relative_sampling
from cryoiso.metrics.fsc_curve import fsc, last_filled_shell, shell_correlation, transform, without_shells_beyond
from cryoiso.metrics.mask_effect import mask_effect
from cryoiso.metrics.sampling import even_rotations, fourier_sampling, view_efficiency

if TYPE_CHECKING:
    from jaxtyping import Float

MAP_POINTS = 1000
_MOST_PIXELS = 96
"""Width of the 3DFSC's slices at most."""


def directional(
    half1: Float[np.ndarray, "box box box"],
    half2: Float[np.ndarray, "box box box"],
    mask: Float[np.ndarray, "box box box"] | None,
    pixel_size_A: float,
    rotation: Float[np.ndarray, "n 3 3"] | None = None,
    symmetry: str = "C1",
    *,
    seed: int = 0,
) -> tuple[dict[str, Any], Float[np.ndarray, "box box box"]]:
    """Agreement of two half-maps by direction.

    Args:
        half1, half2: (D, D, D) half-maps, neither masked nor filtered. mask: (D, D, D).
        rotation: (n, 3, 3) the poses they were made with, where known. symmetry: its point group.
        seed: of the random maps that tell what to expect.

    Returns:
        The numbers, and the 3DFSC (D, D, D).
    """
    box_px = len(half1)
    last = last_filled_shell(half1, half2)
    fa, fb = (without_shells_beyond(transform(half, mask), box_px, last) for half in (half1, half2))
    cones = conical_fsc(fa, fb, box_px, pixel_size_A, last_shell=last)
    resolution = np.maximum(cones.resolutions_A(), box_px * pixel_size_A / max(last, 1))
    known = np.ma.masked_invalid(cones.curves)
    occupied = fourier_shell_occupancy(fa, fb, box_px)
    volume = fsc3d_of_transforms(fa, fb, box_px)
    curve = shell_correlation(fa, fb, box_px)
    numbers = {
        "cone_deg": CFAR_CONE_DEG,
        "axes": np.round(cones.axes, 5),
        "cfar": cones.cfar,
        "evenness": cones.evenness,
        "expected": _expected(Surrogate(half1, curve, mask, seed=seed), cones, rotation, symmetry, last),
        **{f"cfsc_{k}": np.ma.filled(f(0), np.nan) for k, f in _statistics(known)},
        "resolution_A": np.round(resolution, 4),
        **{f"resolution_{k}_A": f() for k, f in _statistics(resolution)},
        "worst_axis": cones.axes[resolution.argmax()],
        "best_axis": cones.axes[resolution.argmin()],
        "fso": occupied.occupancy,
        "bingham_p": occupied.bingham_p,
        **{
            f"fso_{name}_A": occupied.resolution_A(level, box_px, pixel_size_A)
            for name, level in (("09", 0.9), ("05", 0.5), ("01", 0.1))
        },
        "sphericity": sphericity(resolved_region(volume, pixel_size_A)),
        "fsc3d_slices": _slices(volume, pixel_size_A),
        **_of_the_mask(half1, half2, mask, cones, rotation, symmetry, seed),
    }
    return numbers, volume


def _of_the_mask(
    half1: np.ndarray, half2: np.ndarray, mask: np.ndarray | None, cones: ConicalFSC, rotation: np.ndarray | None,
    symmetry: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """How much the mask makes of the agreement; where it is too much, the numbers without the mask."""
    if mask is None or np.min(mask) > 0.999:
        return {"mask": None}
    effect = mask_effect(half1, half2, mask, cones, seed=seed)
    plain = effect.unmasked
    facts: dict[str, Any] = {
        "mask": {"share": effect.share, "share_worst": effect.share_worst, "cfar_unmasked": plain.cfar}
    }
    if max(effect.share, effect.share_worst) > MASK_MADE:
        curve = fsc(half1, half2)
        resolution = plain.resolutions_A()
        facts["unmasked"] = {
            "cfar": plain.cfar,
            "evenness": plain.evenness,
            "expected": _expected(Surrogate(half1, curve, None, seed=seed), plain, rotation, symmetry),
            "resolution_min_A": resolution.min(),
            "resolution_max_A": resolution.max(),
        }
    return facts


def _expected(
    surrogate: Surrogate, cones: ConicalFSC, rotation: np.ndarray | None, symmetry: str, last_shell: int | None = None
) -> dict[str, dict[str, float]]:
    kinds: dict[str, np.ndarray | None] = {"even": None}
    if rotation is not None and len(rotation):
        kinds["views"] = relative_sampling(rotation, symmetry, cones.box_px)
    result = {}
    for name, sampled in kinds.items():
        curves = conical_fsc(*surrogate.pair(sampled), cones.box_px, cones.pixel_size_A, last_shell=last_shell)
        result[name] = {"cfar": curves.cfar, "evenness": curves.evenness}
        if name == "views":
            result[name]["short_fraction"] = float(np.mean(cones.areas < 0.5 * curves.areas))
    return result


def _statistics(values: Any) -> tuple[tuple[str, Any], ...]:
    return (("mean", values.mean), ("sd", values.std), ("min", values.min), ("max", values.max))


def _slices(volume: np.ndarray, pixel_size_A: float) -> dict[str, Any]:
    """Central planes of a 3DFSC, its origin in the middle; of a large box every other (third, ...) coefficient."""
    box_px = len(volume)
    half = (box_px - 1) // 2
    step = -(-(2 * half + 1) // _MOST_PIXELS)
    steps = half // step
    index = box_px // 2 + step * np.arange(-steps, steps + 1)
    planes = {
        name: np.round(volume.take(box_px // 2, axis)[np.ix_(index, index)].astype(np.float64), 3)
        for axis, name in enumerate("zyx")
    }
    return {"last_invA": step * steps / (box_px * pixel_size_A), **planes}


def sampling(rotation: Float[np.ndarray, "n 3 3"], symmetry: str) -> dict[str, Any]:
    """How the views of poses sample Fourier space.

    Args:
        rotation: (n, 3, 3), n > 0.
    """
    result = fourier_sampling(rotation, symmetry)
    even = fourier_sampling(even_rotations(result.views), symmetry)
    coarse = fourier_sampling(rotation, symmetry, radius_px=30, most_points=MAP_POINTS)
    return {
        "n": result.views,
        "scf": result.scf,
        "scf_star": result.scf_star,
        "scf_star_even": even.scf_star,
        "empty_fraction": result.empty_fraction,
        "efficiency": view_efficiency(rotation, symmetry),
        "points": len(coarse.points),
        "map": np.round(coarse.counts / max(float(coarse.counts.mean()), 1e-9), 3),
    }
