"""Image sources other than shards: stacks read in place, images in memory, and other sources combined or changed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import Particles, concatenate
from cryoiso.io.contrast_sign import decide_sign
from cryoiso.io.imageprep import IngestSettings, read_prepared
from cryoiso.io.ingest import check_stacks
from cryoiso.io.shards import CHUNK_IMAGES
from cryoiso.io.stack import StackReader
from cryoiso.physics.ctf_applied import is_applied, restored

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


def fixed_chunks(n: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of ``CHUNK_IMAGES`` rows."""
    return [(start, min(start + CHUNK_IMAGES, n)) for start in range(0, n, CHUNK_IMAGES)]


class StackSource:
    """Images straight from their stacks, prepared on every read as ``ingest`` does it once (an ``ImageSource``)."""

    def __init__(self, particles: Particles, settings: Any = None, file: object = None) -> None:
        """
        Args:
            particles: with image stacks.
            settings: IngestSettings, or the job's [particles] section.
            file: the particle file, for messages.

        Raises:
            InputError: see ``ingest.check_stacks``.
        """
        self._settings = IngestSettings.of(settings) if settings is not None else IngestSettings()
        self._file = file
        self.particles = replace(particles, groups=check_stacks(particles, file))
        self.decision = decide_sign(self.particles, self._settings, file)
        self.box_px = self.particles.first_group.box_px
        self.chunks = fixed_chunks(len(particles))
        self._reader = StackReader()

    def read(self, rows: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, "n box box"]:
        """Images of these rows: (n, D, D) float32, protein white, normalised."""
        images, _ = read_prepared(
            self._reader,
            self.particles,
            np.arange(len(self.particles))[rows],
            self.decision.sign,
            self._settings,
            self.box_px,
            self._file,
        )
        return images

    def close(self) -> None:
        self._reader.close()


class ArraySource:
    """Images that are in memory already, taken as they are (an ``ImageSource``)."""

    def __init__(self, images: np.ndarray, particles: Particles) -> None:
        """
        Args:
            images: (n, D, D), protein white, normalised.
            particles: n rows.
        """
        if images.ndim != 3 or images.shape[1] != images.shape[2] or len(images) != len(particles):
            raise InputError(
                "images and particles do not fit",
                expected=f"({len(particles)}, D, D)",
                found=tuple(images.shape),
                code="arrays-do-not-fit",
            )
        self._images = images
        self.particles = particles
        self.box_px = int(images.shape[1])
        self.chunks = fixed_chunks(len(particles))

    def read(self, rows: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, "n box box"]:
        """Images of these rows: (n, D, D) float32."""
        return np.asarray(self._images[rows], np.float32)


class JoinedSource:
    """Two sources as one, the rows of the second after those of the first (an ``ImageSource``)."""

    def __init__(self, first: ImageSource, second: ImageSource, *, pooled: bool = False) -> None:
        """
        Args:
            pooled: both have the same optics groups, and a refinement estimates one noise for both; else the second
                keeps groups of its own, so that its noise is estimated apart.

        Raises:
            InputError: different boxes, a uid that is in both, or ``pooled`` and the groups differ.
        """
        if first.box_px != second.box_px:
            raise InputError(
                "the particle sets have different boxes",
                expected=first.box_px,
                found=second.box_px,
                code="box-mismatch",
            )
        if len(np.intersect1d(first.particles.uid, second.particles.uid)):
            raise InputError(
                "a particle is in both sets", expected="uids of their own in each", code="particle-sets-differ"
            )
        self._parts = (first, second)
        self._n = len(first.particles)
        self.particles = concatenate(first.particles, second.particles, pooled=pooled)
        self.box_px = first.box_px
        self.chunks = fixed_chunks(len(self.particles))

    def read(self, rows: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, "n box box"]:
        """Images of these rows: (n, D, D) float32."""
        rows = np.arange(len(self.particles))[rows]
        out = np.empty((len(rows), self.box_px, self.box_px), np.float32)
        for part, selected, shift in ((0, rows < self._n, 0), (1, rows >= self._n, self._n)):
            if selected.any():
                out[selected] = self._parts[part].read(rows[selected] - shift)
        return out


class SubsetSource:
    """Some rows of another source (an ``ImageSource``)."""

    def __init__(self, source: ImageSource, rows: np.ndarray) -> None:
        """
        Args:
            rows: indices or a boolean mask.
        """
        self._source = source
        self._rows = np.arange(len(source.particles))[rows]
        self.particles = source.particles.take(self._rows)
        self.box_px = source.box_px
        self.chunks = fixed_chunks(len(self._rows))

    def read(self, rows: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, "n box box"]:
        """Images of these rows: (n, D, D) float32."""
        return self._source.read(self._rows[np.arange(len(self._rows))[rows]])


class RestoredSource:
    """Another source's images as the microscope would have given them, see ``ctf_applied.restored`` (an
    ``ImageSource``)."""

    def __init__(self, source: ImageSource, particles: Particles, kinds: tuple[str, ...]) -> None:
        """
        Args:
            particles: of the source, with any poses.
            kinds: which images are changed, "flipped" or "premultiplied" or both.
        """
        self._source = source
        changed = [g.ctf_applied in kinds for g in particles.groups]
        groups = particles.groups
        self._given = replace(
            particles, groups=tuple(g if c else g.with_ctf_applied("") for g, c in zip(groups, changed, strict=True))
        )
        self.particles = replace(
            particles, groups=tuple(g.with_ctf_applied("") if c else g for g, c in zip(groups, changed, strict=True))
        )
        self.changed = np.array(changed)[particles.optics]
        """(n,) bool: whose images are not those of the source."""
        self.box_px = source.box_px
        self.chunks = getattr(source, "chunks", None) or fixed_chunks(len(particles))

    def read(self, rows: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, "n box box"]:
        """Images of these rows: (n, D, D) float32."""
        rows = np.arange(len(self.particles))[rows]
        return restored(self._source.read(rows), self._given, rows)


def as_recorded(
    source: ImageSource, particles: Particles, kinds: tuple[str, ...] = ("flipped", "premultiplied")
) -> tuple[ImageSource, Particles]:
    """A source, and its particles, of images that no CTF was applied to; the given ones where they are that already.

    Args:
        particles: of the source, with any poses.
        kinds: which images are changed.
    """
    if not is_applied(particles) or not any(g.ctf_applied in kinds for g in particles.groups):
        return source, particles
    restored = RestoredSource(source, particles, kinds)
    return restored, restored.particles
