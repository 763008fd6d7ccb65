"""Maps and masks that meet a point group: refused where they do not have it in the standard frame, or brought there."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.physics.map_symmetry import CLEAR, MapSymmetry, find_frame, map_symmetry
from cryoiso.physics.symmetry import normalise_name, point_group

logger = logging.getLogger("cryoiso")

SMALLEST_MOVE_DEG, SMALLEST_MOVE_A = 0.2, 0.5
"""A map whose axes lie nearer to the standard frame than this is not interpolated."""
MASK_CORRELATION = 0.85
"""Of a mask with its own copies, rotated by the group. Measured on four particles: 0.92 to 1.00 for masks made from
right maps, noisy ones too; 0.43 to 0.80 with axes tilted by 25 degrees, 0.26 to 0.61 for masks 18 Å off."""


def require_symmetry(
    density: DensityMap, group: str, file: object, lowpass_A: float = 0.0, what: str = "the reference"
) -> MapSymmetry:
    """Stops at a map that does not have a point group in the standard frame; says where its axes are.

    Args:
        density: the map as it will be used.
        group: point group that will be imposed.
        file: for messages.
        lowpass_A: resolution at which the map will be used.
        what: the map, in words.

    Raises:
        InputError: the map's correlation with its rotated copies is too low, and noise does not explain it.
    """
    result = map_symmetry(density, group, lowpass_A)
    if result.verdict == "noisy":
        logger.warning(
            "%s: %s has the symmetry %s only through much noise, or only nearly (correlation with its rotated copies "
            "%.2f at %.0f Å)", file, what, result.group, result.score, result.resolution_A,
        )  # fmt: skip
    if result.verdict in ("has it", "noisy"):
        return result
    fact = f"{result.score:.2f} at {result.resolution_A:.0f} Å"
    expected = f"a correlation with its rotated copies above {CLEAR:g}"
    if result.verdict == "elsewhere":
        raise InputError(
            f"{what} has the symmetry {result.group}, but not in the standard frame: {_where(result)}",
            file=file, expected=expected, found=fact, hint=_remedy(file, result.group),
            code="symmetry-not-in-standard-frame",
        )  # fmt: skip
    raise InputError(
        f"{what} does not have the symmetry {result.group}, in the standard frame or in any other that was found",
        file=file, expected=expected, found=fact,
        hint="Check the point group. If the map is only noisy, or its copies may be averaged, 'cryoiso reference' with "
        "--symmetrise does that (with --fit first into a map that has the symmetry).", code="symmetry-mismatch",
    )  # fmt: skip


def _where(result: MapSymmetry) -> str:
    if result.cryosparc:
        return f"it is in cryoSPARC's, with a two-fold axis on y instead of x (rotated by {result.turned_deg:.1f}°)"
    axis = "axis" if result.group[0] == "C" else "main axis"
    words = f"its {axis} is {result.tilt_deg:.1f}° from z and {result.offset_A:.1f} Å from the centre of the box"
    if result.group[0] != "C":
        words = f"its axes are rotated by {result.turned_deg:.1f}° and meet {result.offset_A:.1f} Å from the centre"
    return words


def _remedy(file: object, group: str) -> str:
    from cryoiso.io.models import is_model

    if is_model(file):
        return f"'cryoiso reference' with --symmetry {group} makes a map of the model there."
    name = Path(str(file)).name
    return (
        f"'cryoiso reference {name} moved.mrc --symmetry {group} --standard-frame --lowpass 0' writes the map moved "
        "there (poses that go with the map are not moved); or fit it into a map that lies right, with --fit."
    )


def to_standard_frame(density: DensityMap, group: str, file: object) -> tuple[DensityMap, str]:
    """A map brought into the standard frame of a point group, and in words what was done.

    Raises:
        InputError: the group's axes are not found in the map.
    """
    from cryoiso.physics.fit import apply_fit

    name = normalise_name(group)
    frame = find_frame(density, name) if name != "C1" else None
    if frame is None:
        raise InputError(
            f"no axes of the symmetry {name} were found in the map", file=file,
            hint="C1 has no standard frame." if name == "C1" else "Check the point group.", code="symmetry-mismatch",
        )  # fmt: skip
    result = MapSymmetry(name, "elsewhere", 0.0, 0.0, frame)
    if result.turned_deg < SMALLEST_MOVE_DEG and result.offset_A < SMALLEST_MOVE_A:
        return density, f"in the standard frame of {name} already"
    moved = (
        f"rotated by {result.turned_deg:.2f}° and shifted by {result.offset_A:.2f} Å into the standard frame of {name}"
    )
    return apply_fit(density, frame), moved


def symmetrised(density: DensityMap, group: str) -> DensityMap:
    """The mean of a map and its copies, rotated by a point group in the standard frame."""
    from cryoiso.physics.resample import place_map

    total = np.zeros_like(density.data, np.float64)
    ops = point_group(group)
    for op in ops:
        total += density.data if op is ops[0] else place_map(density.data, density.pixel_size_A, op, np.zeros(3))
    return DensityMap((total / len(ops)).astype(np.float32), density.pixel_size_A)


def mask_correlation(mask: np.ndarray, group: str) -> float:
    """Lowest correlation of a mask with its copies, rotated by a point group in the standard frame; 1 where it is even.

    Both are blurred a little, so that a hard edge does not count as a difference.

    Args:
        mask: (D, D, D).
    """
    from scipy.ndimage import gaussian_filter

    from cryoiso.physics.resample import place_map, resample_map

    box = len(mask)
    small = min(box, 64)
    coarse = resample_map(mask, 1.0, small, box / small) if small < box else np.asarray(mask, np.float32)
    coarse = gaussian_filter(coarse, 1.0)
    inside = _ball(small)
    values = coarse[inside].astype(np.float64)
    if float(values.std()) < 1e-6:
        return 1.0
    lowest = 1.0
    for op in point_group(group)[1:]:
        copy = place_map(coarse, 1.0, op, np.zeros(3))[inside]
        lowest = min(lowest, float(np.corrcoef(values, copy)[0, 1]) if float(copy.std()) > 1e-6 else 0.0)
    return lowest


def _ball(box: int) -> np.ndarray:
    axis2 = (np.arange(box) - box // 2) ** 2
    return axis2[:, None, None] + axis2[None, :, None] + axis2[None, None, :] < (box / 2 - 1) ** 2


def require_mask_symmetry(mask: np.ndarray, group: str, file: object) -> None:
    """Stops at a solvent mask that does not have the point group of the refinement that it is for.

    Raises:
        InputError: its correlation with its own rotated copies is below ``MASK_CORRELATION``.
    """
    name = normalise_name(group)
    lowest = mask_correlation(mask, name) if name != "C1" else 1.0
    if lowest < MASK_CORRELATION:
        raise InputError(
            f"the mask does not have the symmetry {name} in the standard frame", file=file,
            expected=f"a correlation with its rotated copies above {MASK_CORRELATION:g}", found=f"{lowest:.2f}",
            hint="Make it from a map in the standard frame; use C1 for a mask of one part only.",
            code="symmetry-mismatch",
        )  # fmt: skip


def warn_of_symmetry(density: DensityMap, group: str, what: str) -> str:
    """A sentence, also logged as a warning, if a map that is only measured lacks the point group; else empty."""
    result = map_symmetry(density, group)
    if result.verdict in ("has it", "noisy"):
        return ""
    where = _where(result) if result.verdict == "elsewhere" else "nor in any other that was found"
    words = (
        f"{what} does not have the symmetry {result.group} in the standard frame ({where}; correlation with its "
        f"rotated "
        f"copies {result.score:.2f} at {result.resolution_A:.0f} Å): what is counted modulo the symmetry is not right"
    )
    logger.warning(words)
    return words
