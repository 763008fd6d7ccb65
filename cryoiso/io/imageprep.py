"""What happens to an image between its stack and a shard: checks, normalisation, sign, one box size for all."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles
from cryoiso.io.imagenames import distinct
from cryoiso.io.stack import StackReader

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped


@dataclass(frozen=True)
class IngestSettings:
    """How images are prepared; the fields that a job file's [particles] section has mean the same there."""

    invert: str = "auto"
    """"yes" and "no" decide; "auto" asks the .cs file (blob/sign), else the data."""
    normalise: bool = True
    storage: str = "float16"
    shard_mib: int = 256
    project: str = ""
    ramp: bool = False
    """Also remove a linear ramp fitted to the background (RELION does so on extraction)."""
    background_fraction: float = 0.9
    """Diameter of the circle, as a fraction of the box, outside which is background."""

    @classmethod
    def of(cls, section: Any) -> IngestSettings:
        """From anything with some of these attributes, such as the job file's [particles] section."""
        if isinstance(section, cls):
            return section
        return cls(**{f.name: getattr(section, f.name) for f in fields(cls) if hasattr(section, f.name)})

    def describe(self) -> str:
        """One sentence for attributes and reports."""
        if not self.normalise:
            return "none"
        ramp = ", linear ramp removed" if self.ramp else ""
        return f"mean 0 and sd 1 outside a circle of {self.background_fraction:g} x box{ramp}"


@lru_cache(maxsize=16)
def background_mask(box_px: int, fraction: float) -> Bool[np.ndarray, "{box_px} {box_px}"]:
    """(D, D) bool: True outside a circle of diameter ``fraction`` x box about pixel D//2."""
    axis = np.arange(box_px) - box_px // 2
    mask = axis[:, None] ** 2 + axis[None, :] ** 2 > (fraction * box_px / 2) ** 2
    if mask.sum() < 8:
        raise InputError(
            "no background is left outside the particle",
            expected="a fraction of the box below 1",
            found=fraction,
            code="option-out-of-range",
        )
    return mask


def normalise(
    images: Float[np.ndarray, "n box box"], fraction: float = 0.9, ramp: bool = False
) -> tuple[Float[np.ndarray, "n box box"], Bool[np.ndarray, " n"]]:
    """Background to mean 0 and standard deviation 1, image by image.

    Args:
        images: (n, D, D) float32.
        fraction: the background lies outside a circle of this fraction of the box.
        ramp: subtract the plane fitted to the background instead of its mean.

    Returns:
        (n, D, D) float32, and (n,) bool: True where the background is empty (noise-free images), so that only the mean
        was subtracted.
    """
    mask = background_mask(images.shape[-1], fraction)
    background = _background(images, mask)
    if ramp:
        plane = _ramps(background, mask)
        out = images - plane.astype(np.float32)
        background = background - plane[:, mask]
    else:
        out = images - background.mean(1).astype(np.float32)[:, None, None]
    sd, empty = _deviation(background, out)
    out /= np.where(empty, 1.0, sd).astype(np.float32)[:, None, None]
    return out, empty


def _background(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(n, p) float64: the pixels inside the mask."""
    return np.take(images.reshape(len(images), -1), np.flatnonzero(mask), axis=1).astype(np.float64)


def _ramps(background: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(n, D, D) float64: the planes fitted to backgrounds (n, p)."""
    axis = (np.arange(len(mask)) - len(mask) // 2) / len(mask)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    basis = np.stack([np.ones_like(x), x, y])
    return np.tensordot(background @ np.linalg.pinv(basis[:, mask]), basis, 1)


def _deviation(background: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) standard deviation of backgrounds, and which of them are empty beside the images ``out``."""
    background -= background.mean(1, keepdims=True)
    sd = np.sqrt(np.einsum("np,np->n", background, background) / background.shape[1])
    return sd, sd <= 1e-6 * np.maximum(out.max((1, 2)), -out.min((1, 2)))


def normalise_particles(
    images: Float[np.ndarray, "n box box"],
    particles: Particles,
    rows: Shaped[np.ndarray, " n"],
    settings: IngestSettings,
) -> tuple[Float[np.ndarray, "n box box"], Bool[np.ndarray, " n"]]:
    """``normalise``, as it would be of these particles' images before their CTF was applied to them.

    A phase-flipped image is flipped back, normalised and flipped again. A premultiplied one, y = c x, loses c times
    the mean (or ramp) of x and is divided by the standard deviation of x: that of y's background over the root mean
    square of c, since a background of power S(k) has the variance sum S c^2 there, and c^2 averages out over shells.

    Args:
        rows: (n,) which particles these are.
    """
    fraction, ramp = settings.background_fraction, settings.ramp
    kinds = np.array([g.ctf_applied for g in particles.groups])[particles.optics[rows]]
    if not kinds.any():
        return normalise(images, fraction, ramp)
    from cryoiso.physics.ctf_applied import apply_ctf, restored

    out, empty = np.empty_like(images), np.empty(len(images), bool)
    for kind in np.unique(kinds).tolist():
        rows_of_kind = np.flatnonzero(kinds == kind)
        these = rows[rows_of_kind]
        if kind == "premultiplied":
            out[rows_of_kind], empty[rows_of_kind] = _normalise_premultiplied(
                images[rows_of_kind], particles, these, fraction, ramp
            )
        else:
            normalised, empty[rows_of_kind] = normalise(
                restored(images[rows_of_kind], particles, these), fraction, ramp
            )
            out[rows_of_kind] = apply_ctf(normalised, particles, these)
    return out, empty


def _normalise_premultiplied(
    images: np.ndarray, particles: Particles, rows: np.ndarray, fraction: float, ramp: bool
) -> tuple[np.ndarray, np.ndarray]:
    from cryoiso.physics.ctf_applied import apply_ctf, low_frequencies_restored, mean_square_ctf

    mask = background_mask(images.shape[-1], fraction)
    before = _background(low_frequencies_restored(images, particles, rows), mask)
    level = _ramps(before, mask) if ramp else np.broadcast_to(before.mean(1)[:, None, None], images.shape)
    out = images - apply_ctf(level.astype(np.float32), particles, rows)
    sd, empty = _deviation(_background(out, mask), out)
    sd /= np.sqrt(mean_square_ctf(particles, rows, images.shape[-1]))
    out /= np.where(empty, 1.0, sd).astype(np.float32)[:, None, None]
    return out, empty


def fit_box(images: Shaped[np.ndarray, "n old old"], box_px: int) -> Shaped[np.ndarray, "n {box_px} {box_px}"]:
    """Crops or zero-pads (n, d, d) images to (n, box, box); pixel d//2 becomes pixel box//2."""
    d = images.shape[-1]
    if d == box_px:
        return images
    if d > box_px:
        start = d // 2 - box_px // 2
        return np.ascontiguousarray(images[:, start : start + box_px, start : start + box_px])
    out = np.zeros((len(images), box_px, box_px), images.dtype)
    start = box_px // 2 - d // 2
    out[:, start : start + d, start : start + d] = images
    return out


def check_images(images: np.ndarray, rows: np.ndarray, particles: Particles, file: object) -> None:
    """Stops at the first image that is not finite, or constant.

    Raises:
        InputError: names the row, the stack and the image.
    """
    low, high = images.min((1, 2)), images.max((1, 2))
    finite = np.isfinite(low) & np.isfinite(high)
    for good, problem in ((finite, "has NaN or infinite pixels"), (~finite | (high > low), "is constant")):
        if not good.all():
            row = int(rows[np.flatnonzero(~good)[0]])
            raise InputError(
                f"image {int(particles.index[row]) + 1} of {particles.stack[row]} {problem}",
                file=file,
                row=row + 1,
                hint="Remove this row from the particle file, or copy the stack again.",
                code="image-unusable",
            )


def read_prepared(
    reader: StackReader,
    particles: Particles,
    rows: np.ndarray,
    sign: np.ndarray,
    settings: IngestSettings,
    box_px: int,
    file: object = None,
) -> tuple[np.ndarray, int]:
    """Images of these rows, checked, normalised, with protein white and in one box size.

    Args:
        rows: (n,) row numbers, any order.
        sign: (N,) +1 or -1 for all particles.
        box_px: size to return; larger and smaller images are cropped or padded about their centre.

    Returns:
        (n, box, box) float32, and the number of noise-free images (see ``normalise``).
    """
    rows = np.asarray(rows, np.int64)
    out = np.empty((len(rows), box_px, box_px), np.float32)
    empty_count = 0
    for places in by_stack(particles.stack[rows]):
        these = rows[places]
        images = reader.read(str(particles.stack[these[0]]), particles.index[these], file, these)
        check_images(images, these, particles, file)
        if settings.normalise:
            images, empty = normalise_particles(images, particles, these, settings)
            empty_count += int(empty.sum())
        if (sign[these] != 1).any():
            images = images * sign[these].astype(np.float32)[:, None, None]
        out[places] = fit_box(images, box_px)
    return out, empty_count


def by_stack(stack: np.ndarray) -> list[np.ndarray]:
    """Positions of the rows of each different stack, each ascending; stacks in order of appearance."""
    if not len(stack):
        return []
    _, inverse = distinct(stack)
    order = np.argsort(inverse, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
    return sorted(groups, key=lambda rows: int(rows[0]))
