"""Do the particles confirm their reference? How much a map agrees with it in shells that no search had of it, beside
random densities of the same outline, symmetry and spectrum and beside its mirror image.

Derived in docs/formulas.md, "Controls".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.rng import generator
from cryoiso.methods.audit.likeness import Band
from cryoiso.methods.audit.omega import TWO_SIDED
from cryoiso.methods.audit.regions import with_spectrum_of
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.physics.filters import lowpass
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.resample import resample_map

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

DECOYS = 60
FINER = 2.0
"""The band ends at this fraction of the initial reference's resolution: distant homologues still agree there, and
tenths of a degree and of an ångström between map and reference do not matter."""
ALIKE_A, REFUTING_A = 15.0, 10.0
"""Shells finer than the first are left out where enough remain, and finer ones than the second may confirm a reference
but do not refute it: haemagglutinin of another subtype (53 % identity, a good first reference) has 0.73 between 30 and
15 Å, 0.57 between 20 and 10 Å, 0.40 between 15 and 7.5 Å, 0.22 between 10 and 5 Å."""
COMMON_LOWPASS_A = (15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 60.0)
"""Low-pass filters of first references that may be advised."""
CLEARLY_MORE = 1.2
"""Factor on the number of shells from which on another low-pass filter is worth another run."""
EDGE_SHELLS = 4
"""Shells of the grid beyond the band."""
FINEST_PX = 3.0
"""Finest detail of a random density."""
SPARSE = 0.3
"""Standard deviations by which it is raised before negative values are cut: the share of the outline that is filled."""


@dataclass(frozen=True)
class ReferenceCorrelation:
    """Correlation of the particles' own signal with a reference; 1 for the right one, 0 for an unrelated one."""

    value: float
    decoys: Float[np.ndarray, " n"]
    """of random densities"""
    mirror: float
    """of the reference's mirror image"""
    finest_A: float
    """the end of the compared shells"""

    @property
    def may_refute(self) -> bool:
        """Whether a homologue worth the name would agree in these shells."""
        return self.finest_A >= REFUTING_A

    @property
    def error(self) -> float:
        """What unrelated densities have: root mean square of the decoys."""
        return float(np.sqrt(np.mean(np.square(self.decoys))))

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %, from the scatter of the decoys."""
        return self.value - TWO_SIDED * self.error, self.value + TWO_SIDED * self.error

    @property
    def reached(self) -> int:
        """Decoys that agree with the map at least as well."""
        return int((self.decoys >= self.value).sum())


@dataclass(frozen=True)
class BandGrid:
    """A grid that is as coarse as the band allows; its shells are those of the map's grid."""

    box_px: int
    pixel_size_A: float

    @classmethod
    def of(cls, band: Band, box_px: int, pixel_size_A: float) -> BandGrid:
        box = min(box_px, 2 * (band.last + EDGE_SHELLS))
        return cls(box, pixel_size_A * box_px / box)

    def take(self, volume: Float[np.ndarray, "box box box"], pixel_size_A: float) -> Float[np.ndarray, "e e e"]:
        """A map on this grid."""
        if len(volume) == self.box_px:
            return np.asarray(volume, np.float64)
        return np.asarray(resample_map(volume, pixel_size_A, self.box_px, self.pixel_size_A), np.float64)

    def sphere(self, diameter_A: float) -> Float[np.ndarray, "e e e"]:
        """A sphere around the particle with a soft edge, which has nothing of any reference's outline."""
        return sphere_mask(self.box_px, 0.55 * diameter_A / self.pixel_size_A, 3.0).numpy().astype(np.float64)


def band_of(lowpass_A: float, resolution_A: float, box_px: int, pixel_size_A: float) -> Band:
    """Shells beyond the initial reference that tell a right reference from a wrong one: none finer than ``ALIKE_A``
    if there are enough without."""
    finest_A = max(resolution_A, lowpass_A / FINER)
    coarse = Band.beyond(lowpass_A, max(finest_A, ALIKE_A), box_px, pixel_size_A)
    return coarse if coarse.usable else Band.beyond(lowpass_A, finest_A, box_px, pixel_size_A)


def better_lowpass(lowpass_A: float, resolution_A: float, box_px: int, pixel_size_A: float) -> float | None:
    """The common low-pass filter of the first reference that leaves most shells to judge a reference by, those first in
    which homologues are most alike; None where the present one leaves about as many."""

    def finest_and_shells(candidate_A: float) -> tuple[float, int]:
        band = band_of(candidate_A, resolution_A, box_px, pixel_size_A)
        return (box_px * pixel_size_A / band.last, band.last - band.first + 1) if band.usable else (0.0, 0)

    def worth(candidate_A: float) -> tuple[bool, bool, int]:
        finest_A, shells = finest_and_shells(candidate_A)
        return finest_A >= REFUTING_A, finest_A >= ALIKE_A, shells

    best_A = max(COMMON_LOWPASS_A, key=worth)
    (best_finest_A, most), (finest_A, now) = finest_and_shells(best_A), finest_and_shells(lowpass_A)
    may_now_refute = best_finest_A >= REFUTING_A > finest_A
    return best_A if may_now_refute or most > CLEARLY_MORE * now else None


def signal(
    first: Float[np.ndarray, "e e e"], second: Float[np.ndarray, "e e e"], mask: Float[np.ndarray, "e e e"]
) -> Float[np.ndarray, " shells"]:
    """(E//2+1,) correlation of the mean of two half-maps with their signal, (2 F / (1 + F))^1/2 of their FSC F."""
    curve = np.clip(fsc(first, second, mask), 0, 1)
    return np.asarray(np.sqrt(2 * curve / (1 + curve)))


def agreement(curve: Float[np.ndarray, " shells"], own: Float[np.ndarray, " shells"], band: Band) -> float:
    """Correlation rho of signal and reference in a band: the FSC of map and reference is rho times that of map and
    signal, so that the best estimate from shells with as many coefficients as k^2 is sum k^2 s FSC / sum k^2 s^2.

    Args:
        curve: FSC of map and reference.
        own: s, correlation of map and signal, see :func:`signal`.

    Returns:
        NaN where the half-maps have no signal in the band.
    """
    k = np.arange(band.first, band.last + 1)
    weight = k**2 * own[k]
    total = float((weight * own[k]).sum())
    return float((weight * curve[k]).sum()) / total if total > 0 else float("nan")


def representatives(box_px: int, operations: Float[np.ndarray, "g 3 3"]) -> Int[np.ndarray, "e e e"]:
    """(E, E, E) for each voxel the flat index of one voxel of its orbit, the same for all mates but for rounding."""
    shape, half = (box_px,) * 3, box_px // 2
    points = np.indices(shape).reshape(3, -1)[::-1].T.astype(np.float64) - half  # (x, y, z)
    best, chosen = np.full(len(points), -np.inf), points
    for rotation in operations:
        moved = points @ rotation.T
        rank = np.round(moved, 3) @ np.array([1.0, 1e3, 1e6])
        chosen = np.where((rank > best)[:, None], moved, chosen)
        best = np.maximum(rank, best)
    x, y, z = np.clip(np.rint(chosen).astype(np.int64) + half, 0, box_px - 1).T
    return np.asarray(np.ravel_multi_index((z, y, x), shape)).reshape(shape)


def random_density(
    outline: Float[np.ndarray, "e e e"], orbit: Int[np.ndarray, "e e e"], model: Float[np.ndarray, "e e e"],
    seed: int, number: int,
) -> Float[np.ndarray, "e e e"]:  # fmt: skip
    """Chains of random course within an outline, with the symmetry of ``orbit`` and the spectrum of ``model``."""
    white = generator(seed, "random density", number).standard_normal(outline.shape)
    coarse = np.asarray(lowpass(white.ravel()[orbit], 1.0, FINEST_PX), np.float64)
    return with_spectrum_of(np.maximum(coarse / coarse.std() + SPARSE, 0) * outline, model)


def mirror_image(volume: Float[np.ndarray, "box box box"]) -> Float[np.ndarray, "box box box"]:
    """A map mirrored through the plane x = 0 of its centre, voxel D//2; (D, D, D)."""
    flipped = np.flip(volume, 2)
    return np.ascontiguousarray(np.roll(flipped, 1, 2) if volume.shape[2] % 2 == 0 else flipped)


def confirm(
    volume: Float[np.ndarray, "box box box"], halves: tuple[np.ndarray, np.ndarray],
    reference: Float[np.ndarray, "box box box"], mirrored: Float[np.ndarray, "box box box"],
    inside: Bool[np.ndarray, "box box box"], band: Band, pixel_size_A: float, diameter_A: float,
    operations: Float[np.ndarray, "g 3 3"], seed: int = 0,
) -> ReferenceCorrelation:  # fmt: skip
    """Agreement of a map with its reference, with decoys and with the mirror image, in a band.

    Args:
        volume: of the particles, in the frame of the reference.
        halves: its half-maps.
        mirrored: mirror image of the reference, laid upon the map as well as it can be.
        inside: outline of the reference, within which random densities are made.
        operations: point group of all of them.
    """
    grid = BandGrid.of(band, len(volume), pixel_size_A)
    sphere = grid.sphere(diameter_A)
    map_values, model, other = (grid.take(v, pixel_size_A) for v in (volume, reference, mirrored))
    first, second = (grid.take(half, pixel_size_A) for half in halves)
    own = signal(first, second, sphere)
    outline = np.asarray(
        lowpass(grid.take(inside.astype(np.float64), pixel_size_A), grid.pixel_size_A, 3 * grid.pixel_size_A),
        np.float64,
    )
    orbit = representatives(grid.box_px, operations)

    def of(density: np.ndarray) -> float:
        return agreement(fsc(map_values, density, sphere), own, band)

    decoy_maps = (random_density(np.clip(outline, 0, 1), orbit, model, seed, number) for number in range(DECOYS))
    decoys = np.array([of(density) for density in decoy_maps])
    return ReferenceCorrelation(of(model), decoys, of(other), len(volume) * pixel_size_A / band.last)
