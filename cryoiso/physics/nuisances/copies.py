"""Other copies of the object in an image: neighbours in its plane, and the second one of two stuck together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.rng import generator, shuffle_keys
from cryoiso.core.types import DensityMap, Particles
from cryoiso.physics.fourier import fourier_disc, fourier_to_images, pad_volume, shift_phases
from cryoiso.physics.nuisances.settings import Neighbours
from cryoiso.physics.nuisances.shape import Outline
from cryoiso.physics.projection import FourierVolume, magnified, scatter_to_half_plane
from cryoiso.physics.simulation import through_optics
from cryoiso.physics.views import GivenViews, Views, sample_rotations, uniforms

MAX_NEIGHBOURS = 64


@dataclass(frozen=True)
class Copies:
    """c copies, in the order of the particles in whose images they are."""

    row: np.ndarray
    """(c,) int64: of the particle."""
    kind: np.ndarray
    """(c,) str: neighbour or pair."""
    rotation: np.ndarray
    """(c, 3, 3)."""
    position_A: np.ndarray
    """(c, 3): x, y from the image's centre (pixel D//2), z from the particle's height."""

    def __len__(self) -> int:
        return len(self.row)

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For rows: (index of the copy, position in ``rows``) of every copy in their images."""
        start, stop = np.searchsorted(self.row, rows, "left"), np.searchsorted(self.row, rows, "right")
        where = np.repeat(np.arange(len(rows)), stop - start)
        index = [np.arange(a, b) for a, b in zip(start, stop, strict=True)]
        return (np.concatenate(index) if len(rows) else np.empty(0, np.int64)), where


def draw_copies(
    particles: Particles,
    pairs: np.ndarray,
    neighbours: Neighbours,
    outline: Outline,
    field_A: np.ndarray,
    views: Views | GivenViews,
    seed: int,
) -> Copies:
    """Copies in the images of all particles.

    Args:
        particles: with poses.
        pairs: (n,) bool: stuck to a second one.
        outline: of the object.
        field_A: (n,) width of each image.
        views: that copies are seen from.
    """
    some = [_pairs(particles, np.flatnonzero(pairs), outline, views, seed)]
    if neighbours.density > 0:
        diameter = neighbours.diameter_A or outline.diameter_A
        half = (field_A + outline.diameter_A) / 2 + np.abs(particles.require_poses()[1]).max(1)
        some.append(_neighbours(particles, neighbours, diameter, half, views, seed))
    order = np.argsort(np.concatenate([c.row for c in some]), kind="stable")
    names = ("row", "kind", "rotation", "position_A")
    return Copies(*(np.concatenate([getattr(c, name) for c in some])[order] for name in names))


def _pairs(particles: Particles, rows: np.ndarray, outline: Outline, views: Views | GivenViews, seed: int) -> Copies:
    """Second objects that touch the first along a random direction."""
    uid = particles.uid[rows]
    rotation = sample_rotations(views, shuffle_keys(seed, "second of a pair", uid), seed)
    z, azimuth = 2 * uniforms(seed, "pair z", uid) - 1, 2 * np.pi * uniforms(seed, "pair azimuth", uid)
    ring = np.sqrt(1 - z * z)
    direction = np.stack([ring * np.cos(azimuth), ring * np.sin(azimuth), z], 1)
    first, shift = particles.require_poses()
    distance = outline.contact_A(first[rows], rotation, direction) if len(rows) else np.empty(0)
    position = distance[:, None] * direction
    position[:, :2] -= shift[rows]
    return Copies(rows, np.full(len(rows), "pair", "<U9"), rotation, position)


def _neighbours(
    particles: Particles,
    settings: Neighbours,
    diameter: float,
    half_A: np.ndarray,
    views: Views | GivenViews,
    seed: int,
) -> Copies:
    """A random sequential adsorption around each particle, as far as copies reach into its image."""
    placed = [
        _adsorbed(generator(seed, "neighbours", uid), settings, diameter, half)
        for uid, half in zip(particles.uid.tolist(), half_A.tolist(), strict=True)
    ]
    count = np.array([len(p) for p in placed])
    row = np.repeat(np.arange(len(particles)), count)
    number = np.concatenate([np.arange(k) for k in count]) if len(count) else np.empty(0, np.int64)
    uid = np.empty(len(row), np.uint64)
    for k in np.unique(number):
        uid[number == k] = shuffle_keys(seed, f"neighbour {k}", particles.uid[row[number == k]])
    position = np.concatenate([*placed, np.empty((0, 2))])
    position = position - particles.require_poses()[1][row]
    flat = np.concatenate([position, np.zeros((len(row), 1))], 1)
    return Copies(row, np.full(len(row), "neighbour", "<U9"), sample_rotations(views, uid, seed), flat)


def _adsorbed(rng: np.random.Generator, settings: Neighbours, diameter: float, half_A: float) -> np.ndarray:
    """(k, 2) centres about one at the origin, in the order in which they came."""
    least = settings.distance * diameter
    candidates = rng.uniform(-half_A, half_A, (rng.poisson(settings.density * (2 * half_A / diameter) ** 2), 2))
    kept = np.zeros((1, 2))
    for centre in candidates:
        if len(kept) <= MAX_NEIGHBOURS and np.square(kept - centre).sum(1).min() >= least**2:
            kept = np.append(kept, centre[None], 0)
    return kept[1:]


class CopyProjector:
    """Images of copies beside the centre: made in a box of twice the size, since a box is periodic, and cropped."""

    def __init__(self, volume: DensityMap) -> None:
        self.box_px, self.pixel_size_A = volume.box_px, volume.pixel_size_A
        data = torch.from_numpy(np.ascontiguousarray(volume.data, np.float32))
        # a box of twice the size needs no further padding: the grid is as large as that of the object alone
        self._volume = FourierVolume.from_volume(pad_volume(data, 2 * self.box_px), padding=1)

    def images(self, particles: Particles, rows: np.ndarray, copies: Copies) -> Tensor:
        """What the copies add to the images of these rows: (n, D, D) float32."""
        out = torch.zeros(len(rows), self.box_px, self.box_px)
        index, where = copies.of(rows)
        for g in np.unique(particles.optics[rows[where]]):
            used = particles.optics[rows[where]] == g
            target, place = np.unique(where[used], return_inverse=True)
            out[torch.from_numpy(target)] = self._group(particles, rows[target], g, copies, index[used], place)
        return out

    def _group(
        self, particles: Particles, rows: np.ndarray, g: int, copies: Copies, index: np.ndarray, place: np.ndarray
    ) -> Tensor:
        """Sums of the copies of particles of one optics group; ``place`` is each copy's position in ``rows``."""
        group, wide = particles.groups[g], 2 * self.box_px
        largest = float(np.linalg.norm(np.reshape(group.magnification, (2, 2)), 2))
        seen = fourier_disc(wide, 2 * ((self.box_px - 1) // 2) / max(largest, 1.0), with_dc=True)
        poses = torch.from_numpy(np.ascontiguousarray(copies.rotation[index], np.float32))
        if group.magnification != (1.0, 0.0, 0.0, 1.0):
            poses = magnified(poses, torch.tensor(group.magnification, dtype=poses.dtype).reshape(2, 2))
        values = self._volume.slices(poses, seen)
        phases = shift_phases(
            *seen.frequencies(1.0), torch.from_numpy(copies.position_A[index, :2] / self.pixel_size_A)
        )
        total = torch.zeros(len(rows), seen.size, dtype=values.dtype)
        total.index_add_(0, torch.from_numpy(place.reshape(-1)), values * phases.to(values))
        total = through_optics(total, particles, rows, group, seen, self.pixel_size_A)
        low = wide // 2 - self.box_px // 2
        part = slice(low, low + self.box_px)
        return fourier_to_images(scatter_to_half_plane(total, seen), wide)[:, part, part]
