"""Half-maps expected if every pose were right: a standard of comparison for the measured anisotropy.

The views determine how often each coefficient was measured, S(k). With right poses a half-map contains signal and noise
of power proportional to 1 / S there, whatever the particle. A random density of the measured spectrum inside the mask
therefore represents it, with as much noise as gives the measured FSC, shell by shell, inside the same mask. Directional
numbers of this pair contain the effects of views, box, mask and counting noise; what the real pair shows beyond them
does not come from the views.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.rng import generator
from cryoiso.metrics.directional_fsc import Sphere
from cryoiso.metrics.fsc_curve import shell_correlation, transform
from cryoiso.metrics.sampling import symmetric_views

if TYPE_CHECKING:
    from jaxtyping import Complex, Float

_RADII = (2, 4, 8, 16, 32, 50)
"""Radii in Fourier pixels at which planes are counted; a shell takes the next smaller one."""
_MOST_MATES = 20_000
_WEAK = 0.05
"""Sampling, as a share of the mean, at which a reconstruction halves the amplitude (its Wiener constant)."""


class Surrogate:
    """Random half-maps with the spectrum, the FSC and the mask of given ones."""

    def __init__(self, half1: np.ndarray, curve: np.ndarray, mask: np.ndarray | None, *, seed: int = 0) -> None:
        """Draw signal and noise.

        Args:
            half1: (D, D, D) a half-map, from which the spectrum is taken.
            curve: (D//2+1,) FSC of the masked halves, which a pair will have (to the accuracy of one correction).
            mask: (D, D, D).
        """
        self.box_px, self.curve, self.mask = len(half1), curve, mask
        k2 = (np.fft.fftfreq(self.box_px) * self.box_px) ** 2
        radius = np.sqrt(k2[:, None, None] + k2[None, :, None] + np.arange(self.box_px // 2 + 1) ** 2)
        self._shell = np.minimum(np.rint(radius).astype(np.intp), self.box_px // 2).ravel()
        self._power = self._mean(np.abs(transform(half1).ravel()) ** 2)
        particle = self._white(seed, 0, mask)
        size = np.sqrt(np.maximum(self._mean(np.abs(particle) ** 2), 1e-12))
        self._particle = particle / size.astype(np.float32)[self._shell]
        self._noise = [self._white(seed, half) for half in (1, 2)]

    def pair(
        self, sampled: Float[np.ndarray, "box box box//2+1"] | None = None
    ) -> tuple[Complex[np.ndarray, "box box box//2+1"], Complex[np.ndarray, "box box box//2+1"]]:
        """Transforms (D, D, D//2+1) of two masked half-maps.

        Args:
            sampled: relative sampling from `relative_sampling`; None: the same everywhere.
        """
        inside = 1.0 if self.mask is None else float(np.mean(np.asarray(self.mask, np.float64) ** 2))
        ratio = inside * _odds(self.curve)  # the mask takes the noise around the particle away
        first = self._mixed(ratio, sampled)
        return self._mixed(ratio * _odds(self.curve) / _odds(shell_correlation(*first, self.box_px)), sampled)

    def _mixed(self, ratio: np.ndarray, sampled: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """``ratio`` (D//2+1,): signal over noise of each shell as a whole, before the mask."""
        from scipy import fft

        shape = (self.box_px, self.box_px, self.box_px // 2 + 1)
        flat = np.ones(np.prod(shape), np.float32) if sampled is None else sampled.ravel()
        weight = flat / (flat + np.float32(_WEAK))
        noise = np.divide(weight**2, flat, out=np.zeros_like(flat), where=flat > 0)
        noise *= (self._mean(weight**2) / np.maximum(self._mean(noise) * ratio, 1e-12)).astype(np.float32)[self._shell]
        level = np.sqrt(self._power / np.maximum(self._mean(weight**2 + noise), 1e-12)).astype(np.float32)[self._shell]
        pair = []
        for draw in self._noise:
            half = (level * (weight * self._particle + np.sqrt(noise) * draw)).reshape(shape)
            pair.append(half if self.mask is None else transform(fft.irfftn(half, s=(self.box_px,) * 3), self.mask))
        return pair[0], pair[1]

    def _mean(self, values: np.ndarray) -> np.ndarray:
        """(D//2+1,) mean over each shell."""
        return np.bincount(self._shell, values) / np.maximum(np.bincount(self._shell), 1)

    def _white(self, seed: int, number: int, mask: np.ndarray | None = None) -> np.ndarray:
        """Transform of white noise (within a mask), scaled so that a coefficient's mean power is 1 without one."""
        draw = generator(seed, "expected half-maps", number).standard_normal((self.box_px,) * 3, np.float32)
        return (transform(draw, mask) / np.float32(self.box_px**1.5)).ravel()


def _odds(curve: np.ndarray) -> np.ndarray:
    """Signal over noise of half-maps with this FSC."""
    agreement = np.clip(np.nan_to_num(curve), 0.01, 0.999)
    ratio: np.ndarray = agreement / (1 - agreement)
    return ratio


def relative_sampling(
    rotation: Float[np.ndarray, "n 3 3"], symmetry: str | Float[np.ndarray, "g 3 3"], box_px: int, seed: int = 0
) -> Float[np.ndarray, "{box_px} {box_px} {box_px}//2+1"]:
    """(D, D, D//2+1) float32: views whose plane holds each coefficient, over the mean of its shell."""
    from cryoiso.metrics._directional_kernels import count_near_planes, in_threads, paint_shells

    _, mates = symmetric_views(rotation, symmetry, seed)
    if len(mates) > _MOST_MATES:
        mates = mates[generator(seed, "views for the expectation").permutation(len(mates))[:_MOST_MATES]]
    sphere = Sphere(3.0)
    tilt = np.linspace(0, np.pi / 2, sphere.rings)[:, None]
    azimuth = np.arange(sphere.columns) * 2 * np.pi / sphere.columns
    points = np.stack([np.sin(tilt) * np.cos(azimuth), np.sin(tilt) * np.sin(azimuth), np.cos(tilt) + 0 * azimuth], -1)
    points = points.reshape(-1, 3)
    area = np.repeat(np.sin(np.clip(tilt, 0.01, None)), sphere.columns)
    by_radius = []
    for radius in _RADII:
        counts = np.empty(len(points), np.int64)
        in_threads(count_near_planes, len(points), points, mates, 0.5 / radius, counts)
        mean = (area * counts).sum() / area.sum()
        by_radius.append((counts / max(mean, 1e-9)).reshape(sphere.rings, sphere.columns).astype(np.float32))
    last = int(np.ceil(np.sqrt(3) * (box_px // 2)))
    which = np.searchsorted(_RADII, np.arange(1, last + 1), side="right") - 1
    out = np.zeros((box_px,) * 3, np.float32)
    nodes = np.stack([by_radius[max(i, 0)] for i in which])
    in_threads(paint_shells, box_px // 2 + 1, nodes, 1, out)
    out[(box_px // 2,) * 3] = 1.0
    return np.fft.ifftshift(out)[:, :, : box_px // 2 + 1]
