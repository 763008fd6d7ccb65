"""Noise from real images of ice: the patches themselves where they are large enough, else a field of their spectrum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.physics.filters import power_spectrum
from cryoiso.physics.noise import colour_noise, noise_spectrum
from cryoiso.physics.resample import resample_matrix

MEASURED_PATCHES = 256
TRIM_PX = 2
"""Cut off along each edge after a change of pixel size, which takes a patch for periodic."""
LEAST_PX = 16
PIXEL_TOLERANCE = 0.01
WAYS = ("auto", "patches", "field")


@dataclass(frozen=True)
class PatchStack:
    """Square patches of ice without particles."""

    read: Callable[[np.ndarray], np.ndarray]
    """Patches (n, P, P) by their numbers."""
    count: int
    box_px: int
    pixel_size_A: float
    way: str = "auto"
    """patches: drawn, rotated, mirrored, cropped; field: Gaussian with their spectrum; auto: patches if they fit."""
    name: str = "patches"


@dataclass
class RealNoise:
    """Noise of variance 1 on one grid.

    A drawn patch is brought to the images' pixel size, rotated by a multiple of 90 degrees, mirrored or not, rolled
    where it is exactly as large as the image and cropped at a random place where it is larger. The mean of the crop is
    removed; all are divided by one number, so that patches keep their differences in variance.
    """

    stack: PatchStack
    box_px: int
    pixel_size_A: float
    seed: int
    way: str = field(init=False)
    spectrum: np.ndarray = field(init=False)
    """(D//2+1,) measured radial spectrum, of variance 1."""
    _matrix: np.ndarray | None = field(init=False, default=None)
    _scale: float = field(init=False, default=1.0)

    def __post_init__(self) -> None:
        s = self.stack
        if s.way not in WAYS:
            raise InputError(
                "unknown way to make noise of patches",
                expected=", ".join(WAYS),
                found=repr(s.way),
                code="choice-unknown",
            )
        if s.pixel_size_A > self.pixel_size_A * (1 + PIXEL_TOLERANCE):
            raise InputError(
                "the noise patches are coarser than the images", file=s.name,
                expected=f"{self.pixel_size_A:g} Å or less",
                found=f"{s.pixel_size_A:g} Å", hint="Larger pixels say nothing of the noise at high resolution.",
            code="grid-too-coarse")  # fmt: skip
        same = abs(s.pixel_size_A / self.pixel_size_A - 1) <= PIXEL_TOLERANCE
        room = s.box_px if same else int(s.box_px * s.pixel_size_A / self.pixel_size_A)
        usable = room if same else room - 2 * TRIM_PX
        if usable < LEAST_PX or s.count < 1:
            raise InputError(
                "the noise patches are too small to measure a spectrum", file=s.name,
                expected=f"{LEAST_PX * self.pixel_size_A:.0f} Å and more", found=f"{s.box_px * s.pixel_size_A:.0f} Å",
            code="box-mismatch")  # fmt: skip
        if s.way == "patches" and usable < self.box_px:
            raise InputError(
                "the noise patches are smaller than the images", file=s.name,
                expected=f"{self.box_px * self.pixel_size_A:.0f} Å and more",
                found=f"{usable * self.pixel_size_A:.0f} Å",
                hint="A smaller box fits, or a Gaussian field of their spectrum.",
            code="box-mismatch")  # fmt: skip
        self.way = "field" if s.way == "field" or usable < self.box_px else "patches"
        if not same:
            matrix = resample_matrix(s.box_px, s.pixel_size_A, room, self.pixel_size_A)
            self._matrix = matrix[TRIM_PX : room - TRIM_PX]
        self.spectrum = noise_spectrum(self.box_px, "table", table=self._table())
        if self.way == "patches":
            sample = self._windows(np.arange(min(s.count, MEASURED_PATCHES), dtype=np.uint64))
            self._scale = float(sample.double().var((1, 2), correction=0).mean()) ** -0.5

    def _patches(self, numbers: np.ndarray) -> np.ndarray:
        """Patches on the images' grid."""
        patches = np.asarray(self.stack.read(numbers), np.float64)
        if self._matrix is not None:
            patches = self._matrix @ patches @ self._matrix.T
        return patches

    def _table(self) -> np.ndarray:
        """Radial power from zero frequency to Nyquist, from patches whose edges are tapered."""
        some = np.arange(min(self.stack.count, MEASURED_PATCHES))
        total: np.ndarray | float = 0.0
        for part in np.array_split(some, max(1, len(some) // 16)):
            patches = self._patches(part)
            patches = patches - patches.mean((1, 2), keepdims=True)
            taper = np.hanning(patches.shape[-1] + 2)[1:-1]
            total = total + np.asarray(power_spectrum(patches * np.outer(taper, taper))).sum(0)
        if not (np.isfinite(total).all() and np.max(total) > 0):
            raise InputError(
                "the noise patches are constant, or hold values that are no numbers",
                file=self.stack.name,
                code="image-unusable",
            )
        return np.asarray(total)

    def noise(self, uids: np.ndarray) -> Tensor:
        """(n, D, D) float32, image by image from (seed, uid)."""
        if self.way == "patches":
            return (self._windows(uids) * self._scale).float()
        shape = (self.box_px, self.box_px)
        white = [generator(self.seed, "image noise", u).standard_normal(shape, np.float32) for u in uids.tolist()]
        return colour_noise(torch.from_numpy(np.stack(white)), self.spectrum)

    def _windows(self, uids: np.ndarray) -> Tensor:
        """(n, D, D) float64: drawn, moved and cropped patches with mean 0."""
        rngs = [generator(self.seed, "noise patch", u) for u in uids.tolist()]
        patches = self._patches(np.array([rng.integers(self.stack.count) for rng in rngs]))
        out = np.empty((len(uids), self.box_px, self.box_px))
        spare = patches.shape[-1] - self.box_px
        for i, rng in enumerate(rngs):
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            patch = np.rot90(patches[i].T if mirrored else patches[i], turns)
            if spare:
                y, x = rng.integers(spare + 1, size=2)
                patch = patch[y : y + self.box_px, x : x + self.box_px]
            else:
                patch = np.roll(patch, tuple(rng.integers(self.box_px, size=2)), (0, 1))
            out[i] = patch - patch.mean()
        return torch.from_numpy(out)
