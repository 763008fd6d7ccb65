"""Changes of a reference: compact regions left out, blobs added beside it, another fold of the same size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.rng import generator
from cryoiso.physics.filters import apply_radial, lowpass, power_spectrum

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

EDGE_A = 4.0
"""Standard deviation of the soft edge of a region."""
BLOB_SD_A = 8.0
BLOB_GAP_A = 12.0
"""From the particle's surface to the centre of a blob."""


def regions(
    reference: Float[np.ndarray, "box box box"], inside: Bool[np.ndarray, "box box box"],
    operations: Float[np.ndarray, "g 3 3"], count: int, share: float,
) -> list[Bool[np.ndarray, "box box box"]]:  # fmt: skip
    """Compact regions of a particle, far apart from each other, each with a share of its mass.

    A region is all that is nearest to a seed or to its symmetry mates. The first seed is as far from the particle's
    centre of mass as possible, each further one as far from the earlier ones as possible.

    Args:
        reference: density; negative values have no mass.
        inside: the particle.
        operations: its point group.
    """
    box = reference.shape[0]
    points = np.argwhere(inside).astype(np.float64)[:, ::-1] - box // 2  # (x, y, z)
    mass = np.maximum(reference[inside].astype(np.float64), 0)
    mass = mass if mass.sum() > 0 else np.ones(len(mass))
    candidates = points[mass > 0.25 * mass.max()]
    if not len(candidates):
        candidates = points
    centre = (points * mass[:, None]).sum(0) / mass.sum()
    distance = np.linalg.norm(candidates - centre, axis=1)
    chosen = []
    for _ in range(count):
        seed = candidates[int(distance.argmax())]
        mates = operations @ seed
        distance = np.minimum(distance, _to_nearest(candidates, mates))
        order = np.argsort(_to_nearest(points, mates), kind="stable")
        taken = order[: int(np.searchsorted(np.cumsum(mass[order]), share * mass.sum())) + 1]
        region = np.zeros(reference.shape, bool)
        x, y, z = (points[taken] + box // 2).astype(np.int64).T
        region[z, y, x] = True
        chosen.append(region)
    return chosen


def _to_nearest(points: np.ndarray, mates: np.ndarray) -> np.ndarray:
    """(n,) distance of points (n, 3) to the nearest of mates (g, 3)."""
    nearest = np.full(len(points), np.inf)
    for mate in mates:
        np.minimum(nearest, np.linalg.norm(points - mate, axis=1), out=nearest)
    return nearest


def without(
    reference: Float[np.ndarray, "box box box"], region: Bool[np.ndarray, "box box box"], pixel_size_A: float
) -> Float[np.ndarray, "box box box"]:
    """The reference without a region and its surroundings, with a soft edge."""
    from scipy.ndimage import binary_dilation, gaussian_filter

    grown = binary_dilation(region, iterations=max(1, round(EDGE_A / pixel_size_A)))
    soft = gaussian_filter(grown.astype(np.float64), EDGE_A / pixel_size_A)
    left: Float[np.ndarray, "box box box"] = (reference * (1 - soft)).astype(np.float32)
    return left


def blob_places(
    inside: Bool[np.ndarray, "box box box"], operations: Float[np.ndarray, "g 3 3"], pixel_size_A: float, others: int,
    seed: int,
) -> Float[np.ndarray, "n 3"]:  # fmt: skip
    """Centres (x, y, z) in voxels from the middle of balls that are clear of the particle and of their symmetry mates.

    The first is the one nearest to the middle of the box, so that it is within the sphere that the refinement looks at;
    the others, at most as many as asked for, are random and clear of the first and its mates.
    """
    from scipy.ndimage import distance_transform_edt

    box = inside.shape[0]
    z, y, x = np.indices(inside.shape) - float(box // 2)
    away = distance_transform_edt(~inside) * pixel_size_A
    points = np.stack([x, y, z], -1)
    radius, apart_px = np.linalg.norm(points, axis=-1), 4 * BLOB_SD_A / pixel_size_A
    free = (away > BLOB_GAP_A) & (radius < 0.45 * box)
    for op in operations[1:]:  # not near an axis, where mates would lie upon each other
        free &= np.linalg.norm(points @ op.T - points, axis=-1) > apart_px
    if not free.any():
        free = (away > 0.5 * BLOB_GAP_A) & (radius < 0.5 * box)
    candidates = points[free]
    first = candidates[np.linalg.norm(candidates, axis=1).argmin()]
    clear = candidates[_to_nearest(candidates, operations @ first) > apart_px]
    chosen = generator(seed, "blobs elsewhere").permutation(len(clear))[:others]
    return np.concatenate([first[None], clear[chosen]])


def blob_at(
    centre: Float[np.ndarray, " 3"], box_px: int, operations: Float[np.ndarray, "g 3 3"], pixel_size_A: float
) -> Float[np.ndarray, "{box_px} {box_px} {box_px}"]:
    """A ball of height 1 and its symmetry mates: (D, D, D)."""
    z, y, x = np.indices((box_px,) * 3) - float(box_px // 2)
    blob = np.zeros((box_px,) * 3)
    for mate in operations @ centre:
        r2 = ((x - mate[0]) ** 2 + (y - mate[1]) ** 2 + (z - mate[2]) ** 2) * pixel_size_A**2
        blob = np.maximum(blob, np.exp(-0.5 * r2 / BLOB_SD_A**2))
    return blob


def other_fold(
    reference: Float[np.ndarray, "box box box"], inside: Bool[np.ndarray, "box box box"], seed: int,
    pixel_size_A: float,
) -> Float[np.ndarray, "box box box"]:  # fmt: skip
    """A random compact density that fills a ball of the particle's volume and has its spectrum; without symmetry.

    Not the mirror image: projections of a molecule's mirror image are mirror images of its projections, so particles
    refined against it give the mirrored molecule, as right as the other.
    """
    box = reference.shape[0]
    z, y, x = np.indices(reference.shape) - float(box // 2)
    radius = (3 * inside.sum() / (4 * np.pi)) ** (1 / 3)
    white = generator(seed, "decoy").standard_normal(reference.shape)
    coarse = np.asarray(lowpass(white, pixel_size_A, max(12.0, 3 * pixel_size_A)), np.float64)
    chains = np.maximum(coarse / coarse.std() + 0.3, 0)
    ball = 1 / (1 + np.exp(2 * (np.sqrt(x**2 + y**2 + z**2) - radius)))
    return with_spectrum_of(chains * ball, reference)


def noise_reference(reference: Float[np.ndarray, "box box box"], seed: int, half: int) -> Float[np.ndarray, "b b b"]:
    """Gaussian noise with the reference's spectrum, for one half-set: (D, D, D)."""
    white = generator(seed, "noise reference", half).standard_normal(reference.shape)
    return with_spectrum_of(white, reference)


def with_spectrum_of(
    volume: Float[np.ndarray, "box box box"], model: Float[np.ndarray, "box box box"]
) -> Float[np.ndarray, "box box box"]:
    """The map with the radial power spectrum of another, (D, D, D) float32."""
    own, wanted = (power_spectrum(np.asarray(v, np.float64), dims=3) for v in (volume, model))
    factor = np.sqrt(np.asarray(wanted) / np.maximum(np.asarray(own), 1e-30))
    return np.asarray(apply_radial(np.asarray(volume, np.float64), factor), np.float32)
