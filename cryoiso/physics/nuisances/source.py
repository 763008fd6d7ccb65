"""Images with nuisances: x = C (scale P(pose) V + copies) + noise, image by image from (seed, uid) alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.core.types import DensityMap
from cryoiso.physics.noise import colour_noise, noise_spectrum
from cryoiso.physics.nuisances.copies import CopyProjector
from cryoiso.physics.nuisances.patches import PatchStack, RealNoise
from cryoiso.physics.nuisances.settings import PARTICLE
from cryoiso.physics.nuisances.truth import NuisanceTruth
from cryoiso.physics.resample import resample_map
from cryoiso.physics.simulation import BLOCK_PIXELS, SNR_IMAGES, Projector, image_to_background_db
from cryoiso.physics.views import rows_of

Grid = tuple[int, float]
"""Box in pixels and pixel size in Å."""


def on_grid(volume: DensityMap, grid: Grid) -> DensityMap:
    """A map on another grid, such that its images have noise of variance 1 per pixel at the same dose.

    A pixel of side p collects p^2 electrons for a contrast that is the integral of the density along the beam, so
    signal over noise grows with p; a sum over voxels misses another factor p.
    """
    box, pixel = grid
    if grid == (volume.box_px, volume.pixel_size_A):
        return volume
    data = resample_map(volume.data, volume.pixel_size_A, box, pixel) * (pixel / volume.pixel_size_A) ** 2
    return DensityMap(data.astype(np.float32), pixel)


class NuisanceSource:
    """Simulated images of a drawn set (``core.protocols.ImageSource`` where all optics groups have one grid)."""

    def __init__(
        self,
        objects: Mapping[str, list[DensityMap]],
        truth: NuisanceTruth,
        seed: int,
        noise: str | PatchStack | None = "white",
    ) -> None:
        """
        Args:
            objects: maps on the first grid, in units of the noise: ``particle``, and ``broken`` and ``other`` where
                the set has such images. Of several, each image shows one at random.
            truth: the set.
            seed: of the noise.
            noise: kind for :func:`cryoiso.physics.noise.noise_spectrum`, real patches, or None for none.
        """
        self.truth, self.particles, self.seed = truth, truth.particles, seed
        self.volume = objects[PARTICLE][0]
        self.box_px = self.volume.box_px
        self._objects, self._noise_kind = objects, noise
        self._projectors: dict[tuple[str, int, Grid], Projector] = {}
        self._copies: dict[Grid, CopyProjector] = {}
        self._shown = np.where(truth.kind == "pair", PARTICLE, truth.kind)
        self._grids: list[Grid] = [(g.box_px, g.pixel_size_A) for g in self.particles.groups]
        self._real = {g: RealNoise(noise, *g, seed) for g in self.grids} if isinstance(noise, PatchStack) else {}
        self._spectra = {g: noise_spectrum(g[0], noise) for g in self.grids} if isinstance(noise, str) else {}

    def __len__(self) -> int:
        return len(self.particles)

    @property
    def grids(self) -> list[Grid]:
        """Grids in the order of their first optics group."""
        return list(dict.fromkeys(self._grids))

    def rows_of_grid(self, grid: Grid) -> np.ndarray:
        """Rows of the images of one box and pixel size."""
        groups = [i for i, g in enumerate(self._grids) if g == grid]
        return np.flatnonzero(np.isin(self.particles.optics, groups))

    def grid_of(self, rows: np.ndarray) -> Grid:
        """The grid of these rows.

        Raises:
            InputError: they have several.
        """
        grids = {self._grids[g] for g in np.unique(self.particles.optics[rows]).tolist()}
        if len(grids) > 1:
            raise InputError(
                "images of several sizes cannot be read together",
                expected="one",
                found=sorted(grids),
                code="box-mismatch",
            )
        return grids.pop() if grids else self._grids[0]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images of these rows, which have one size: (n, D, D) float32."""
        return self._in_parts(rows, noise=self._noise_kind is not None)

    def signal(self, rows: np.ndarray) -> np.ndarray:
        """The images without their noise: (n, D, D) float32."""
        return self._in_parts(rows, noise=False)

    def blocks(self, grid: Grid, size: int = 512) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, images) of one grid, in order."""
        rows = self.rows_of_grid(grid)
        for i in range(0, len(rows), size):
            yield rows[i : i + size], self.read(rows[i : i + size])

    def _in_parts(self, rows: np.ndarray, noise: bool) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        grid = self.grid_of(rows)
        out = np.empty((len(rows), grid[0], grid[0]), np.float32)
        step = max(1, BLOCK_PIXELS // grid[0] ** 2)
        for i in range(0, len(rows), step):
            part = rows[i : i + step]
            images = self._signal(part, grid)
            if noise:
                scale = torch.from_numpy(self.truth.noise_scale[part].astype(np.float32))
                images += self._noise(part, grid) * scale[:, None, None]
            out[i : i + step] = images.numpy()
        return out

    def _signal(self, rows: np.ndarray, grid: Grid) -> Tensor:
        images = torch.zeros(len(rows), grid[0], grid[0])
        for kind in np.unique(self._shown[rows]).tolist():
            if kind == "empty":
                continue
            where = np.flatnonzero(self._shown[rows] == kind)
            variant = rows_of(
                self.seed, f"variant of {kind}", self.particles.uid[rows[where]], len(self._objects[kind])
            )
            for v in np.unique(variant).tolist():
                place = where[variant == v]
                projections = self._projector(kind, v, grid).images(self.particles, rows[place])
                images[torch.from_numpy(place)] = projections
        if len(self.truth.copies.of(rows)[0]):
            images += self._copy_projector(grid).images(self.particles, rows, self.truth.copies)
        return images

    def _projector(self, kind: str, variant: int, grid: Grid) -> Projector:
        key = kind, variant, grid
        if key not in self._projectors:
            self._projectors[key] = Projector(on_grid(self._objects[kind][variant], grid))
        return self._projectors[key]

    def _copy_projector(self, grid: Grid) -> CopyProjector:
        if grid not in self._copies:
            self._copies[grid] = CopyProjector(on_grid(self.volume, grid))
        return self._copies[grid]

    def _noise(self, rows: np.ndarray, grid: Grid) -> Tensor:
        uids = self.particles.uid[rows]
        if grid in self._real:
            return self._real[grid].noise(uids)
        shape = (grid[0], grid[0])
        white = [generator(self.seed, "image noise", u).standard_normal(shape, np.float32) for u in uids.tolist()]
        return colour_noise(torch.from_numpy(np.stack(white)), self._spectra[grid])

    def measured(self) -> dict[str, Any]:
        """What the set really has: dB of signal over noise and the paper's number (first images), shares, averages."""
        truth, m = self.truth, self.truth.micrographs
        facts: dict[str, Any] = {}
        rows = self.rows_of_grid(self._grids[0])[:SNR_IMAGES]
        if self._noise_kind is not None and len(rows):
            noise = float(np.square(truth.noise_scale[rows]).mean())
            facts["snr_dB"] = float(10 * np.log10(self.signal(rows).var((1, 2)).mean() / noise))
            facts["image_to_background_dB"] = image_to_background_db(self.read(rows), 0.5 * self.box_px)
        if self._real:
            facts["noise"] = {f"{box} px of {pixel:g} Å": real.way for (box, pixel), real in self._real.items()}
        kinds, count = np.unique(truth.kind, return_counts=True)
        facts["kinds"] = dict(zip(kinds.tolist(), count.tolist(), strict=True))
        neighbours = truth.copies.kind == "neighbour"
        facts["neighbours_per_image"] = float(neighbours.sum() / len(self))
        facts["signal_scale"] = _spread(truth.signal_scale)
        facts["noise_scale"] = _spread(truth.noise_scale)
        facts["defocus_error_A"] = _spread(truth.given.defocus_u_A - self.particles.defocus_u_A)
        facts["micrographs"] = len(m.names)
        return facts


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "sd": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def scaled(objects: Mapping[str, list[DensityMap]], factor: float) -> dict[str, list[DensityMap]]:
    """The same maps times a factor."""
    return {k: [replace(v, data=v.data * np.float32(factor)) for v in maps] for k, maps in objects.items()}
