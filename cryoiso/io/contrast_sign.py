"""Is protein white or dark in these images? Decided by the data, with a measure of how sure that is."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from cryoiso.core.types import Particles
from cryoiso.io.imageprep import IngestSettings, check_images, normalise
from cryoiso.io.stack import StackReader

logger = logging.getLogger("cryoiso")

SURE = 4.0
"""Standard errors that a contrast must reach to be believed."""
CONTRADICTION = 0.5
"""A contrast of the other sign at another radius may reach this share of the largest; hollow particles exceed it."""


@dataclass(frozen=True)
class SignDecision:
    """(n,) multiplier of each image, and what it rests on."""

    sign: np.ndarray
    reason: str
    z: float
    """Contrast of the sample in standard errors; positive = protein white as stored."""

    @property
    def inverted(self) -> bool:
        return bool((self.sign < 0).any())


def source_sign(particles: Particles) -> np.ndarray | None:
    """blob/sign of a .cs file (+1 light protein, -1 dark protein) as the reader kept it, or None."""
    values = particles.results.get("cryoisoSign")
    if values is None and particles.table is not None and "cryoisoSign" in particles.table:
        values = particles.table["cryoisoSign"].to_numpy(dtype=str).astype(float)
    return None if values is None else np.where(np.asarray(values, float) < 0, -1, 1).astype(np.int8)


def decide_sign(particles: Particles, settings: IngestSettings, file: object = None, sample: int = 300) -> SignDecision:
    """The sign of every image.

    "yes" and "no" of ``settings.invert`` win; then blob/sign of the source; then the data: the mean of the centre
    against the background, after weighting the Fourier transform by the CTF where that is known (so that the low
    frequencies all count with the right sign). Where neither tells, the images are taken as they are, with a warning:
    RELION's own extraction stores white protein. So they are where the particles are hollow, seen as they mostly are:
    their centre is darker than the background around them, and tells nothing about the protein.

    Args:
        sample: number of images looked at, spread evenly over the set; five times as many if they leave a doubt.
    """
    n = len(particles)
    z, differences, rows = 0.0, np.zeros((0, len(CENTRES))), np.zeros(0, np.int64)
    for count in (sample, 5 * sample):
        rows = np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(np.int64))
        differences = _differences(particles, rows, settings, file)
        z = _largest(_errors(differences))
        if abs(z) > 2 * SURE or count >= n or settings.invert != "auto":
            break
    ones = np.ones(n, np.int8)
    if settings.invert in ("yes", "no"):
        factor = -1 if settings.invert == "yes" else 1
        if z * factor < -SURE:
            logger.warning(
                "invert = %s was given, but protein then seems dark (contrast %.1f)", settings.invert, z * factor
            )
        return SignDecision(ones * np.int8(factor), f"invert = {settings.invert}", z)
    known = source_sign(particles)
    if known is not None:
        if z * float(np.sign(known.mean(dtype=float))) < -SURE:
            logger.warning("%s: blob/sign contradicts the images (contrast %.1f); blob/sign is believed", file, z)
        return SignDecision(known, "blob/sign of the .cs file", z)
    _warn_of_both_signs(particles, rows, differences, file)
    against = _against(_errors(differences))
    hollow = against > max(SURE, CONTRADICTION * abs(z))
    if abs(z) < SURE or hollow:
        other = f" at one radius, {-np.sign(z) * against:.1f} at another" if hollow else ""
        logger.warning(
            "the images do not tell whether protein is white or dark (%s); taken as white. "
            "Set invert under [particles] if that is wrong.",
            f"contrast {z:.1f}{other}",
        )
        return SignDecision(ones, "undecided by the data, taken as white", z)
    return SignDecision(ones * np.int8(1 if z > 0 else -1), "decided by the data", z)


def contrast(particles: Particles, rows: np.ndarray, settings: IngestSettings, file: object = None) -> float:
    """How much brighter the centre is than the background: mean over images divided by its standard error.

    Positive where protein is white. Images are normalised first, in blocks, so memory stays small.
    """
    return _largest(_errors(_differences(particles, rows, settings, file)))


def _differences(particles: Particles, rows: np.ndarray, settings: IngestSettings, file: object) -> np.ndarray:
    """(n, len(CENTRES)) centre minus rim of the images of these rows."""
    values = np.empty((len(rows), len(CENTRES)))
    with StackReader() as reader:
        for start in range(0, len(rows), 64):
            row = rows[start : start + 64]
            for stack in np.unique(particles.stack[row]):
                place = np.flatnonzero(particles.stack[row] == stack)
                these = row[place]
                images = reader.read(str(stack), particles.index[these], file, these)
                check_images(images, these, particles, file)
                images, _ = normalise(images, settings.background_fraction)  # a scale for each image is all it takes
                values[start + place] = _centre_minus_rim(_ctf_weighted(images, particles, these))
    return values


def _errors(d: np.ndarray) -> np.ndarray:
    """(len(CENTRES),) means in standard errors; zeros for fewer than two images."""
    if len(d) < 2:
        return np.zeros(d.shape[1])
    error = d.std(axis=0, ddof=1) / np.sqrt(len(d))
    mean = d.mean(axis=0)
    significance: np.ndarray = np.where(error > 0, mean / np.where(error > 0, error, 1), np.sign(mean) * 1e3)
    return significance


def _largest(z: np.ndarray) -> float:
    return float(z[np.abs(z).argmax()])


def _against(z: np.ndarray) -> float:
    """The largest contrast whose sign is not that of the largest of all, without its sign."""
    other = z[np.sign(z) != np.sign(_largest(z))]
    return float(np.abs(other).max(initial=0.0))


def _warn_of_both_signs(particles: Particles, rows: np.ndarray, differences: np.ndarray, file: object) -> None:
    """Warns where protein is white in some optics groups and dark in others, by every radius of the centre."""
    kinds: dict[str, list[str]] = {"white": [], "dark": []}
    for k, group in enumerate(particles.groups):
        z = _errors(differences[particles.optics[rows] == k])
        if abs(_largest(z)) > SURE and abs(np.sign(z).sum()) == len(z):
            kinds["white" if z[0] > 0 else "dark"].append(str(group.number))
    if kinds["white"] and kinds["dark"]:
        logger.warning(
            "%s: protein seems white in the images of optics group %s and dark in those of %s, but one sign is taken "
            "for all. Multiply the images of one kind by -1 first.",
            file, ", ".join(kinds["white"]), ", ".join(kinds["dark"]),
        )  # fmt: skip


CENTRES = (0.05, 0.1, 0.15, 0.2)
"""Radii of the centre, in boxes: one that fits the particle tells most, a larger one takes in its dark fringe."""


def _centre_minus_rim(images: np.ndarray) -> np.ndarray:
    """(n, len(CENTRES)) mean of the centre minus that of the rim."""
    box = images.shape[-1]
    axis = np.arange(box) - box // 2
    radius = np.hypot(axis[:, None], axis[None, :])
    rim = images[:, radius > 0.45 * box].mean(1, dtype=np.float64)
    centres = [images[:, radius <= max(r * box, 1.0)].mean(1, dtype=np.float64) for r in CENTRES]
    difference: np.ndarray = np.stack(centres, 1) - rim[:, None]
    return difference


def _ctf_weighted(images: np.ndarray, particles: Particles, rows: np.ndarray) -> np.ndarray:
    """Images filtered by their CTF; unchanged where defocus or pixel size are unknown, and where they are already."""
    pixel = particles.group_values("pixel_size_A")[rows]
    if not np.isfinite(particles.defocus_u_A[rows] + particles.defocus_v_A[rows] + pixel).all():
        return images
    from cryoiso.physics.contrast_transfer import ctf_for

    weights = ctf_for(particles, rows, images.shape[-1]).numpy()
    done = np.array([g.ctf_applied == "premultiplied" for g in particles.groups])[particles.optics[rows]]
    weights[done] = 1
    return np.fft.irfft2(np.fft.rfft2(images) * weights, s=images.shape[-2:])
