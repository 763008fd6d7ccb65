"""How wide the particle is, from noisy images alone: where their variance falls to that of the background.

The images are low-passed to ``LOWPASS_A``, so that noise is averaged and the signal is not spread far by the CTF. In
the mean over images, the excess of the variance over that of the border falls with the radius from the centre. The
diameter at which a tenth of it is left is stable, but smaller than the particle, whose longest direction is seldom
seen. Measured against the diameter of the true map (``pipeline.inputs.reference.measure_diameter``) on simulated sets
of apoferritin, beta-galactosidase, GroEL, HA, TRPV1, PfCRT and 70S ribosome, 300 images each of -13 to -20 dB, with
white and coloured noise and with neighbours: the particle is 1.03 to 1.50 times as wide. 101 real images of
beta-galactosidase (193 Å) give 142 Å; 101 real images of ice nothing; 220 tilted ones of ribosomes are too uncertain.

**Of a particle that is mostly seen along its longest direction only the width is seen**: HA (158 Å) from the top gives
75 Å, as clearly. So it is a lower bound; the upper one holds for even views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.rng import generator

if TYPE_CHECKING:
    from jaxtyping import Float, Real

LOWPASS_A = 30.0
LEFT = 0.1
"""Share of the largest excess that is left at the estimated diameter."""
NARROWEST, WIDEST = 1.0, 1.55
"""Bounds of the particle's diameter over the estimate, from the measurements above."""
BORDER = 0.84
"""Beyond this share of half the box the images are taken as background."""
FEWEST_IMAGES, LEAST_Z, LARGEST_SPREAD = 50, 8.0, 0.1
"""An estimate is believed from so many images, with an excess of so many standard errors, if resampled sets of the
images scatter by no more than this share of it. Real images of particles: 10; of ice: -0.4."""
RESAMPLED = 100
RINGS = 64


@dataclass(frozen=True)
class ParticleExtent:
    """Width of the signal in images."""

    images: int
    diameter_A: float | None
    """at which a tenth of the excess is left; None where that is not clear"""
    spread_A: float
    """standard deviation over resampled sets of images; NaN without an estimate"""
    z: float
    """largest excess in standard errors"""
    contrast: float
    """largest excess over the variance of the background"""
    reason: str
    """why there is no diameter; else empty"""

    @property
    def particle_A(self) -> tuple[float, float] | None:
        """Bounds of the diameter of a particle that is seen evenly; the first holds for any views."""
        if self.diameter_A is None:
            return None
        return (
            NARROWEST * (self.diameter_A - 2 * self.spread_A), WIDEST * (self.diameter_A + 2 * self.spread_A),
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Plain values for a file."""
        bounds = self.particle_A
        return {
            "images": self.images, "signal_diameter_A": _rounded(self.diameter_A), "spread_A": _rounded(self.spread_A),
            "z": _rounded(self.z, 2), "contrast": _rounded(self.contrast, 3), "reason": self.reason,
            "particle_A": None if bounds is None else [_rounded(b) for b in bounds], "lowpass_A": LOWPASS_A,
        }  # fmt: skip


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


class RadialVariance:
    """Variance of low-passed images against the radius, image by image."""

    def __init__(self, box_px: int, pixel_size_A: float) -> None:
        self.box_px, self.pixel_A = box_px, pixel_size_A
        axis = np.arange(box_px) - box_px // 2
        radius = np.hypot(axis[:, None], axis[None, :])
        self._width = max(1, box_px // (2 * RINGS))
        self._rings = int(box_px // 2 // self._width)
        ring = (radius / self._width).astype(np.int64)
        self._inside = ring < self._rings
        self._ring = ring[self._inside]
        self._count = np.bincount(self._ring, minlength=self._rings)
        self._border = (radius > BORDER * box_px / 2) & self._inside
        frequency = np.hypot(np.fft.fftfreq(box_px, pixel_size_A)[:, None], np.fft.rfftfreq(box_px, pixel_size_A)[None])
        self._filter = np.exp(-0.5 * (frequency * max(LOWPASS_A, 2.5 * pixel_size_A) / 1.177) ** 2)  # half at 1/30 Å
        self.profiles: list[np.ndarray] = []

    def add(self, images: Real[np.ndarray, "n box box"]) -> None:
        """Adds images; constant ones are left out."""
        for image in np.asarray(images, np.float32):
            border = image[self._border]
            deviation = float(border.std())
            if not (np.isfinite(image).all() and deviation > 0):
                continue
            flat = (image - border.mean()) / deviation
            smooth = np.fft.irfft2(np.fft.rfft2(flat) * self._filter, s=image.shape)
            smooth -= smooth[self._border].mean()
            square = (smooth[self._inside] ** 2).astype(np.float64)
            self.profiles.append(np.bincount(self._ring, square, self._rings) / self._count)

    def extent(self) -> ParticleExtent:
        """Width of the signal in all images that were added."""
        n = len(self.profiles)
        if n < 3:
            return ParticleExtent(n, None, float("nan"), 0.0, 0.0, "too few images")
        table = np.array(self.profiles)
        diameter = self._diameter(table.mean(0))
        excess, background = self._excess(table.mean(0))
        inner = slice(0, self._rings // 2)
        error = float(np.sqrt((table[:, inner].var(0, ddof=1) / n).mean()))
        height = _height(excess)
        z, contrast = height / max(error, 1e-30), height / max(background, 1e-30)
        rng = generator(0, "width of the signal")
        again = [self._diameter(table[rng.integers(0, n, n)].mean(0)) for _ in range(RESAMPLED)]
        spread = float(np.std(again)) if np.isfinite(again).all() else float("nan")
        reason = ""
        if n < FEWEST_IMAGES:
            reason = f"{n} images are too few ({FEWEST_IMAGES} or more)"
        elif z < LEAST_Z:
            reason = f"the images' variance in the middle exceeds the border's by only {z:.1f} standard errors"
        elif not np.isfinite(diameter) or diameter > BORDER * self.box_px * self.pixel_A:
            reason = "the variance does not fall to a level inside the box"
        elif not spread <= LARGEST_SPREAD * diameter:
            reason = f"resampled sets of the images scatter too much (about {diameter:.0f} Å)"
        return ParticleExtent(n, None if reason else float(diameter), spread, z, contrast, reason)

    def _excess(self, profile: np.ndarray) -> tuple[np.ndarray, float]:
        outer = (np.arange(self._rings) + 0.5) * self._width > BORDER * self.box_px / 2
        background = float(profile[outer].mean())
        return profile - background, background

    def _diameter(self, profile: np.ndarray) -> float:
        """In Å, by linear interpolation between rings; NaN where the excess never falls below ``LEFT``."""
        excess, _ = self._excess(profile)
        level = LEFT * _height(excess)
        for ring in range(int(excess.argmax()) + 1, self._rings):
            if excess[ring] < level:
                part = (excess[ring - 1] - level) / (excess[ring - 1] - excess[ring])
                return float(2 * (ring - 0.5 + part) * self._width * self.pixel_A)
        return float("nan")


def _height(excess: Float[np.ndarray, " rings"]) -> float:
    """Largest excess: the mean of the three highest rings of the inner half."""
    return float(np.sort(excess[: max(3, len(excess) // 2)])[-3:].mean())
