"""Noise spectra of the images: shells without power, and a floor that keeps weights finite.

Low-passed, denoised and Fourier-padded images are empty beyond some radius (and high-passed ones inside another). There
"noise" is rounding error, 1e-8 of the images' variance in float16, and its inverse would outweigh all data. Such shells
have infinite variance in a spectrum: weight zero in the search and in the back-projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.log import logger
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.refine.offsets import image_name

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Real, Shaped

EMPTY = 1e-4
"""A shell with less than this share of the mean power of all coefficients of its optics group is empty."""
ROUNDING = 1e-6
"""The same where no noise spectrum is needed: noise-free images have signal down to there, rounding is 1e-8."""
FLOOR = 1e-4
"""No variance is smaller than this share of the median of its optics group's shells that are not empty."""
LARGEST_WEIGHT = 64.0
"""Inverse variances beyond this are scaled down for the back-projection, whose sums have a fixed range."""
TOLD_GROUPS = 5
OUTLIER = 100.0
"""An image with more than this many times the median image's power is an outlier."""


def mean_spectra(
    power: Real[np.ndarray, "groups shells"],
    count: Real[np.ndarray, "groups shells"],
    groups: Sequence[OpticsGroup],
    share: float = EMPTY,
) -> Float[np.ndarray, "groups shells"]:
    """(G, S) mean power of the images by optics group and shell, infinite where a shell is empty, 1 where nothing was
    measured.

    Args:
        power: (G, S) sums of |x|^2.
        count: (G, S) sums of the coefficients' counts (see ``maximise.NoiseSums``).
        share: fraction of the group's mean power below which a shell is empty.

    Raises:
        InputError: the images of a group have no power at all.
    """
    mean = power / np.where(count > 0, count, 1.0)
    spectra = np.where((count > 0) & (mean > 0), mean, 1.0)
    spectra[:, 0] = spectra[:, 1]
    for g in np.flatnonzero(count[:, 1:].sum(1)).tolist():
        level = power[g, 1:].sum() / count[g, 1:].sum()
        if not level > 0:
            raise InputError(
                f"the images of optics group {groups[g].number} ({groups[g].name}) are constant",
                expected="images with noise and particles",
                code="image-unusable",
            )
        measured = np.flatnonzero(count[g, 1:]) + 1
        empty = measured[mean[g, measured] < share * level]
        spectra[g, empty] = np.inf
        if len(empty) and empty[-1] == measured[-1]:
            spectra[g, measured[-1] :] = np.inf
    return spectra


def group_medians(
    values: Float[np.ndarray, " n *rest"], optics: Int[np.ndarray, " n"], counted: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " n *rest"]:
    """(n, ...) for each row the median over the counted rows of its optics group; over all rows if the group has
    none."""
    medians = np.empty_like(values)
    for group in np.unique(optics):
        inside = optics == group
        rows = inside & counted
        medians[inside] = np.nanmedian(values[rows if rows.any() else counted], axis=0)
    return medians


def require_sound_images(particles: Particles, facts: Float[np.ndarray, "n 2"]) -> None:
    """Refuse images that would spoil the noise spectra of the others of their optics group, and name them.

    Args:
        facts: (n, 2) mean power of each image's coefficients, and the same of its CTF.

    Raises:
        InputError: values that are not finite, an image without power, or a few images with most of the power.
    """
    power, ctf = facts.T
    defocus = (particles.defocus_u_A, particles.defocus_v_A, particles.defocus_angle_deg)
    _stop_at(~np.isfinite(power) & np.isfinite(ctf), particles, "has NaN or infinite pixels")
    for row in np.flatnonzero(~np.isfinite(ctf))[:1]:
        defocus_text = "defocus U, V, angle = {:g}, {:g}, {:g}".format(*(column[row] for column in defocus))
        _stop_at(~np.isfinite(ctf), particles, "has a CTF that is not a number", defocus_text)
    _stop_at(power == 0, particles, "is constant")
    optics = particles.optics
    ratio = power / group_medians(power, optics, np.ones(len(power), bool))  # groups may have scales of their own
    loud = ratio > OUTLIER
    if loud.any():
        worst = int(ratio.argmax())
        words = (
            f"{image_name(particles, worst)} (row {worst + 1}) has {ratio[worst]:.3g} times the power of most images"
        )
        total, of_loud = np.bincount(optics, power), np.bincount(optics, power * loud)
        if (of_loud > 0.5 * total).any():
            raise InputError(
                f"{int(loud.sum())} of {len(power)} images have most of the total power: {words}", row=worst + 1,
                expected=f"at most {OUTLIER:g} times the median", found=f"{ratio[worst]:.3g} times",
                hint="Remove these rows, or ingest with normalise = true.", code="image-unusable",
            )  # fmt: skip
        logger.warning("%d of %d images are far stronger than the others: %s", loud.sum(), len(power), words)


def _stop_at(bad: np.ndarray, particles: Particles, problem: str, found: str | None = None) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        others = f" ({int(bad.sum()):,} images in all)" if bad.sum() > 1 else ""
        raise InputError(
            f"the image {image_name(particles, row)} {problem}{others}", row=row + 1, found=found,
            hint="Remove this row from the particle file, or copy the stack again.", code="image-unusable",
        )  # fmt: skip


def floored(
    spectra: Float[np.ndarray, "groups shells"], previous: Float[np.ndarray, "groups shells"]
) -> Float[np.ndarray, "groups shells"]:
    """(G, S) new spectra: infinite where the previous ones are, and at least FLOOR times the median of the rest."""
    out = np.array(spectra, np.float64)
    for value, empty in zip(out, np.isinf(previous), strict=True):
        held = value[1:][~empty[1:]]
        if len(held):
            np.maximum(value, FLOOR * np.median(held), out=value)
        value[empty] = np.inf
    return out


def last_shell(
    spectra: Float[np.ndarray, "groups shells"], particles: Particles, pixel_size_A: float, limit_px: int
) -> int:
    """Radius, in shells of a grid with this pixel size and the images' box, up to which any optics group with particles
    has power; at most ``limit_px``."""
    used = np.unique(particles.optics).tolist()
    reach = [np.flatnonzero(np.isfinite(spectra[g]))[-1] / particles.groups[g].pixel_size_A for g in used]
    return min(limit_px, int(max(reach) * pixel_size_A + 1e-6))


def empty_between(
    spectra: Float[np.ndarray, "groups shells"], particles: Particles, pixel_size_A: float, limit_px: int
) -> Shaped[np.ndarray, " _"]:
    """Shells of such a grid from 1 to ``limit_px`` in which no group with particles has power."""
    shells = np.arange(1, limit_px + 1)
    seen = np.zeros(len(shells), bool)
    for g in np.unique(particles.optics).tolist():
        own = np.rint(shells * particles.groups[g].pixel_size_A / pixel_size_A).astype(int)
        seen |= np.isfinite(spectra[g][np.minimum(own, spectra.shape[1] - 1)])
    return shells[~seen]


def weight_scale(spectra: Float[np.ndarray, "groups shells"]) -> float:
    """Power of two by which the weights of a back-projection are multiplied to keep them below LARGEST_WEIGHT; 1 for
    normalised images with ordinary noise. It cancels in the division."""
    smallest = float(spectra[np.isfinite(spectra)].min())
    return 1.0 if smallest * LARGEST_WEIGHT >= 1 else float(2.0 ** np.floor(np.log2(smallest * LARGEST_WEIGHT)))


def empty_facts(spectra: np.ndarray, groups: Sequence[OpticsGroup], box_px: int) -> list[dict[str, Any]]:
    """The empty shells of each optics group, as plain values.

    Returns:
        for each band of each group: optics_group, name, from_A, to_A (None: up to the end), shells [first, last].
    """
    facts: list[dict[str, Any]] = []
    for row, group in zip(spectra, groups, strict=True):
        empty = np.flatnonzero(np.isinf(row[1:])) + 1
        for band in np.split(empty, np.flatnonzero(np.diff(empty) > 1) + 1) if len(empty) else []:
            first, last = int(band[0]), int(band[-1])
            length_A = box_px * group.pixel_size_A
            facts.append({
                "optics_group": group.number, "name": group.name, "from_A": round(length_A / first, 3),
                "to_A": None if last == len(row) - 1 else round(length_A / last, 3), "shells": [first, last],
            })  # fmt: skip
    return facts


def tell_of_empty(facts: list[dict[str, Any]]) -> None:
    """Warn of empty shells."""
    for fact in facts[:TOLD_GROUPS]:
        where = f"beyond {fact['from_A']:.2f} Å"
        if fact["to_A"] is not None:
            where = f"between {fact['from_A']:.2f} and {fact['to_A']:.2f} Å"
        logger.warning(
            "the images of optics group %d (%s) have no power %s (low-passed, denoised or padded?); nothing is "
            "searched, back-projected or claimed there",
            fact["optics_group"], fact["name"], where,
        )  # fmt: skip
    if len(facts) > TOLD_GROUPS:
        logger.warning("... and %d more such bands; refine.json has them all", len(facts) - TOLD_GROUPS)
