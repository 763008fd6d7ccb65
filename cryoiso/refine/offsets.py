"""Given offsets of particles: centres of the search for shifts, and validation of the offsets.

The offset of an image within its box is known before its view is (from picking, 2D classification or an earlier
refinement), so a search over all views looks for shifts around it. A global search uses nothing else of the given
poses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.log import logger
from cryoiso.core.types import Particles

if TYPE_CHECKING:
    from jaxtyping import Float

FAR = 0.25
"""Particles farther off centre than this share of the box may be cut off by its edge."""
MANY = 0.05
"""Share of the particles above which a warning is given."""


def check_poses(particles: Particles, box_px: int, file: object = None) -> None:
    """Refuse particles whose pose is not finite or whose offset lies outside the image.

    Args:
        particles: poses may be missing.
        box_px: side of the images, the same for all.

    Raises:
        InputError: names the row and the image of the first one.
    """
    rotation, shift_A = particles.rotation, particles.shift_A
    if rotation is not None:
        bad = ~np.isfinite(rotation).all((1, 2))
        _stop_at(bad, particles, file, "the angles of a particle are not numbers", "rot, tilt and psi in degrees")
    if shift_A is None:
        return
    bad = ~np.isfinite(shift_A).all(1)
    _stop_at(bad, particles, file, "the offset of a particle is not a number", "an offset in Å along x and y")
    reach_A = 0.5 * box_px * particles.group_values("pixel_size_A")
    bad = np.abs(shift_A).max(1) > reach_A
    if bad.any():
        row = int(np.argmax(bad))
        expected = f"at most half a box, {reach_A[row]:g} Å, along x and y"
        _stop_at(bad, particles, file, "the offset of a particle leads out of its image", expected)


def image_name(particles: Particles, row: int) -> str:
    """Number and stack of a row's image, as in a STAR file."""
    return f"{int(particles.index[row]) + 1}@{particles.stack[row]}"


def _stop_at(bad: np.ndarray, particles: Particles, file: object, problem: str, expected: str) -> None:
    if not bad.any():
        return
    row = int(np.argmax(bad))
    image = image_name(particles, row)
    others = f" ({int(bad.sum()):,} particles in all)" if bad.sum() > 1 else ""
    pose_text = "angles NaN" if particles.shift_A is None else "({:g}, {:g}) Å".format(*particles.shift_A[row])
    raise InputError(
        f"{problem}: {image}{others}",
        file=file,
        row=row + 1,
        expected=expected,
        found=pose_text,
        hint="Correct or remove the row; rlnOriginXAngst and rlnOriginYAngst are in Å.",
        code="offset-out-of-range",
    )


def given_centres_px(particles: Particles) -> Float[np.ndarray, "n 2"] | None:
    """(n, 2) position of the content of each image according to its offset, in pixels of its own, from pixel D//2; None
    if all offsets are zero."""
    shift_A = particles.shift_A
    if shift_A is None or not np.any(shift_A):
        return None
    offsets_px: np.ndarray = -shift_A / particles.group_values("pixel_size_A")[:, None]
    return offsets_px


def tell_of_given(centre_px: Float[np.ndarray, "n 2"], box_px: int) -> None:
    """Log that shifts are searched around given offsets, and warn if many particles are near the edge."""
    distance = np.hypot(*centre_px.T)
    logger.info(
        "shifts are searched around the given offsets (median %.1f px, largest %.1f px)",
        np.median(distance), distance.max(),
    )  # fmt: skip
    far = np.abs(centre_px).max(1) > FAR * box_px
    if far.mean() > MANY:
        logger.warning(
            "%d of %d particles sit more than a quarter of the box off centre and may be cut off by its edge; extract "
            "them again, recentred",
            far.sum(), len(far),
        )  # fmt: skip


def at_limit(residual_px: Float[np.ndarray, "n 2"], range_px: float) -> int:
    """Number of the shifts found (n, 2), relative to the centre of each search, that are at or beyond its range."""
    return int(np.sum(np.hypot(*residual_px.T) >= range_px * (1 - 1e-6)))


def warn_of_limit(count: int, n: int, range_A: float, local: bool, known: bool) -> None:
    """Warn if many particles ended at the edge of the search, since their shifts may lie beyond it."""
    if count <= MANY * n:
        return
    around = "the given offsets" if known or local else "the middle of the image"
    logger.warning(
        "%d of %d particles ended at the edge of the search for shifts, %.1f Å around %s; they may lie beyond it. "
        "Raise refine.shift_range_A (--shift-range)%s",
        count, n, range_A, around, "" if known or local else ", or give offsets (rlnOriginXAngst, rlnOriginYAngst)",
    )  # fmt: skip
