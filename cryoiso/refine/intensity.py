"""Intensity of each image: the scale of its signal and the level of its noise, estimated with the poses.

The image i of an optics group with noise variance sigma^2 is x = a c exp(-2 pi i k.s/D) P + sqrt(v) n, a its scale and
v its noise level. Dividing by sqrt(v) gives an image with unit level and the CTF a c / sqrt(v), so that search,
back-projection and noise spectra need no other change (``batches.Batch.scaled``).

Both are posterior means of a normal model with two levels, images within micrographs, whose variances are estimated
from all images (empirical Bayes). What the images do not determine falls back on the micrograph's value, and the
micrograph's on that of the set: with equal intensities all stay near 1. RELION has a scale per micrograph and a noise
level per image (``--scale``, ``--norm``), without such a prior; cryoSPARC has a scale per particle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.protocols import Communicator
from cryoiso.core.types import HALVES, Particles
from cryoiso.metrics.view_cones import ViewCones
from cryoiso.physics.so3 import view_direction
from cryoiso.refine.batches import Batch
from cryoiso.refine.own_shares import OwnShares

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

LIMITS = (0.2, 5.0)
"""Smallest and largest intensity, relative to the median of the half-set."""
ROUNDING = 1e-6
"""Degrees of freedom below this are none."""
CONE_DEG = 30.0
"""Width of the cones of views over which intensities are averaged for the record."""


@dataclass(frozen=True)
class Intensity:
    """Scale and noise level of every image."""

    scale: Float[np.ndarray, " n"]
    """(N,) factor of the signal beside the CTF's own."""
    noise: Float[np.ndarray, " n"]
    """(N,) noise variance over that of the optics group."""
    expected: Float[np.ndarray, " n"] | None = None
    """(N,) scale that an image of the same micrograph is expected to have; None: its own."""
    spread: Float[np.ndarray, " n"] | None = None
    """(N,) variance of the scales of a micrograph's images over the square of the expected one; None: 0."""

    @classmethod
    def ones(cls, n: int) -> Intensity:
        return cls(np.ones(n), np.ones(n))

    @classmethod
    def of_particles(cls, particles: Particles) -> Intensity:
        """The particles' own; 1 where they have none."""
        ones, n = np.ones(len(particles)), len(particles)
        own = particles.signal_scale, particles.noise_level
        return cls(*(ones if values is None else np.asarray(values, np.float64).reshape(n) for values in own))

    def of(self, batch: Batch) -> Batch:
        """The batch with its intensities taken into account; the batch itself where all are 1."""
        return batch.scaled(self.scale[batch.rows], self.noise[batch.rows])

    def expectation(self, rows: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b 2"]:
        """(B, 2) what is expected of the scales of these images without looking at them: over their own ones, and the
        relative variance."""
        ratio = np.ones(len(rows)) if self.expected is None else self.expected[rows] / self.scale[rows]
        return np.column_stack([ratio, np.zeros(len(rows)) if self.spread is None else self.spread[rows]])

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, for a checkpoint."""
        arrays = {"scale": self.scale, "noise": self.noise}
        more = {"expected scale": self.expected, "scale spread": self.spread}
        return arrays | {name: values for name, values in more.items() if values is not None}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray], rows: Int[np.ndarray, " n"]) -> Intensity:
        """That of a checkpoint.

        Args:
            rows: of each present particle among those of the checkpoint.
        """
        more = (arrays[name][rows] if name in arrays else None for name in ("expected scale", "scale spread"))
        return cls(arrays["scale"][rows], arrays["noise"][rows], *more)

    def largest_weight(self) -> float:
        """Largest a^2 / v of all images."""
        return float(np.max(np.square(self.scale) / self.noise))


def image_terms(
    batch: Batch,
    residual: Tensor,
    cross: Tensor,
    norm: Tensor,
    sigma2: Float[np.ndarray, "groups shells"],
    particle: Float[np.ndarray, " b"] | None = None,
) -> Float[np.ndarray, "n 5"]:
    """What a batch's posterior says of the intensities, (B, 5) float64.

    Columns: sum of Re conj(M) x / sigma^2 and of |M|^2 / sigma^2, M the model of the image with its present intensity;
    mean of |x - M|^2 / sigma^2; number of coefficients in that mean; probability of showing a particle.

    Args:
        residual: (B, K) posterior mean of |x - M|^2.
        cross: (B, k) posterior mean of Re conj(M) x of the coefficients inside the search radius, the first k.
        norm: (B, k) the same of |M|^2.
        sigma2: (G, S) noise spectra.
        particle: (B,) sum of the posterior's weights; None: 1.
    """
    shell = np.minimum(batch.disc.shell, sigma2.shape[1] - 1)
    inverse = 1.0 / sigma2[batch.group][:, shell]
    inside = inverse[:, : cross.shape[1]]
    power_weight = batch.power_weight()
    weight = (inverse > 0).astype(np.float64)
    if power_weight is not None:
        weight *= _double(power_weight)
    left = 1.0 if batch.share is None else batch.share[:, np.minimum(batch.disc.shell, batch.share.shape[1] - 1)]
    total, squares = (np.maximum((w * left).sum(1), 1e-30) for w in (weight, np.square(weight)))
    columns = (
        (_double(cross) * inside).sum(1), (_double(norm) * inside).sum(1),
        (_double(residual) * inverse * weight).sum(1) / total, np.square(total) / squares,
        np.ones(len(batch)) if particle is None else particle,
    )  # fmt: skip
    return np.column_stack(columns)


def _double(values: Tensor) -> np.ndarray:
    return values.to(torch.float64).cpu().numpy()


@dataclass
class ImageTerms:
    """The terms of this rank's batches in one iteration, if intensities are estimated."""

    mode: Literal["none", "group", "particle"]
    sigma2: Float[np.ndarray, "groups shells"]
    """(G, S) noise spectra."""
    own: OwnShares | None = None
    """Shares of the images in the present reference; None: it was not made of them."""
    _found: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        """Whether intensities are estimated."""
        return self.mode != "none"

    def add(
        self, batch: Batch, residual: Tensor, cross: Tensor, norm: Tensor, particle: np.ndarray | None = None
    ) -> None:
        """Add the terms of a batch; arguments as for ``image_terms``."""
        self._found.append((batch.rows, image_terms(batch, residual, cross, norm, self.sigma2, particle)))

    def estimate(
        self, now: Intensity, particles: Particles, used: Bool[np.ndarray, " n"], comm: Communicator
    ) -> Intensity:
        """New intensities of the used particles (collective); the same where none are estimated."""
        if not self.wanted:
            return now
        rows = np.concatenate([rows for rows, _ in self._found] or [np.empty(0, np.int64)])
        terms = np.concatenate([terms for _, terms in self._found] or [np.empty((0, 5))])
        table = np.zeros((len(particles), 5))
        table[comm.concat_all(rows)] = comm.concat_all(terms)
        return estimated(now, table, particles, used, own=self.mode == "particle")


def estimated(
    now: Intensity,
    terms: Float[np.ndarray, "n 5"],
    particles: Particles,
    used: Bool[np.ndarray, " n"],
    *,
    own: bool,
) -> Intensity:
    """New intensities of the used particles of each half-set, the others' as they are.

    Args:
        terms: (N, 5) of ``image_terms``.
        particles: with half numbers; grouped by micrograph, else by optics group.
        own: each image gets an intensity of its own, near its micrograph's; otherwise its micrograph's.
    """
    groups = particles.optics if particles.micrograph is None else particles.micrograph
    half = particles.half if particles.half is not None else np.zeros(len(particles), np.int8)
    scale, noise, expected, spread = now.scale.copy(), now.noise.copy(), now.scale.copy(), np.zeros(len(half))
    cross, norm, residual, count, particle = terms.T
    for h in HALVES:
        rows = np.flatnonzero(used & (half == h) & (count > 0))
        if not len(rows):
            continue
        group = np.unique(groups[rows], return_inverse=True)[1].reshape(-1)
        ratio = np.divide(cross[rows], norm[rows], out=np.ones(len(rows)), where=norm[rows] > 0)
        a, v = now.scale[rows], now.noise[rows]
        # log p(x | a) is quadratic with curvature 2 |M|^2 / sigma^2 in a relative change of a; |n|^2 has the variance 1
        mean, variance, each = two_levels(a * ratio, 2 * norm[rows] / np.square(a), group, particle[rows])
        scale[rows], expected[rows] = _limited(each if own else mean, mean)
        if own:
            spread[rows] = variance / np.maximum(np.square(mean), 1e-30)
        mean, _, each = two_levels(v * residual[rows], count[rows] / np.square(v), group, np.ones(len(rows)))
        noise[rows], _ = _limited(each if own else mean, mean)
    return Intensity(scale, noise, expected, spread)


def _limited(values: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values with mean 1 and within LIMITS of their median, and others treated by the same limits and factor."""
    limits = np.median(values) * np.array(LIMITS) if np.median(values) > 0 else np.array(LIMITS)
    inside = np.clip(values, *limits)
    return np.asarray(inside / inside.mean()), np.asarray(np.clip(others, *limits) / inside.mean())


def two_levels(
    values: Float[np.ndarray, " n"],
    precision: Float[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    particle: Float[np.ndarray, " n"],
) -> tuple[Float[np.ndarray, " n"], float, Float[np.ndarray, " n"]]:
    """Posterior means of a normal model with two levels, its variances estimated by moments.

    Args:
        values: (n,) measured.
        precision: (n,) inverse variances of their errors times ``particle``; 0: not measured.
        group: (n,) group of each, from 0 without gaps.
        particle: (n,) probability that there is anything to measure.

    Returns:
        (n,) mean of each element's group; variance within groups; (n,) mean of each element, of the own one where there
        is something to measure and of the group's where not.

    Source: R. DerSimonian, N. Laird, Control. Clin. Trials 7 (1986) 177, for the variances between elements.
    """
    weighted = np.bincount(group, precision)
    mean = np.bincount(group, precision * values) / np.maximum(weighted, 1e-30)
    within = _excess_variance(values - mean[group], precision, group, particle)
    total = precision / (1 + within * precision)
    weight = np.bincount(group, total)
    mean = np.bincount(group, total * values) / np.maximum(weight, 1e-30)
    centre = float(weight @ mean / max(weight.sum(), 1e-30))
    shown = np.bincount(group, total * particle) / np.maximum(weight, 1e-30)
    between = _excess_variance(mean - centre, weight, np.zeros(len(mean), np.int64), shown)
    mean = (centre + between * weight / (1 + between * weight) * (mean - centre))[group]
    of_particle = np.divide(precision, particle, out=np.zeros_like(precision), where=particle > 0)
    own = within * (of_particle / (1 + within * of_particle)) * particle
    return np.asarray(mean), within, np.asarray(mean + own * (values - mean))


def _excess_variance(deviation: np.ndarray, precision: np.ndarray, group: np.ndarray, particle: np.ndarray) -> float:
    """Variance of elements about their groups' weighted means, beyond that of their errors; at least 0.

    With errors of variance p/w, p the probability of a particle and w the precision, the expected sum of w times the
    squared deviation is sum p (1 - w/W), W that of the group: an image without a particle counts for nothing.
    """
    weight, squares = np.bincount(group, precision), np.bincount(group, np.square(precision))
    measured = weight > 0
    share = np.divide(precision, weight[group], out=np.zeros_like(precision), where=weight[group] > 0)
    freedom = float(np.where(precision > 0, particle, 0.0) @ (1 - share))
    scale = float(weight.sum() - (squares[measured] / weight[measured]).sum())
    if freedom <= ROUNDING or scale <= 0:
        return 0.0
    return max(0.0, (float(precision @ np.square(deviation)) - freedom) / scale)


def intensity_facts(
    intensity: Intensity,
    particles: Particles,
    rotation: Float[np.ndarray, "n 3 3"],
    used: Bool[np.ndarray, " n"],
    symmetry: str,
) -> dict[str, Any]:
    """Spread of the intensities and their means over cones of views: plain values.

    Returns:
        scale_sd, noise_sd; micrographs (None: grouped by optics group); at_limits, the share of scales there; cone_deg;
        by_view: for each cone with particles axis [x, y, z], particles, scale, scale_error (standard error of the
        mean), noise.
    """
    scale, noise = intensity.scale[used], intensity.noise[used]
    median = float(np.median(scale))
    cones = ViewCones.with_step(CONE_DEG, symmetry)
    cone = cones.index(view_direction(rotation[used]))
    by_view = []
    for i in np.unique(cone).tolist():
        rows = cone == i
        by_view.append({
            "axis": [round(float(x), 4) for x in cones.axes[i]], "particles": int(rows.sum()),
            "scale": round(float(scale[rows].mean()), 4),
            "scale_error": round(float(scale[rows].std() / np.sqrt(rows.sum())), 4),
            "noise": round(float(noise[rows].mean()), 4),
        })  # fmt: skip
    named = particles.micrograph
    edge = (scale < 1.01 * LIMITS[0] * median) | (scale > 0.99 * LIMITS[1] * median)
    return {
        "scale_sd": round(float(scale.std()), 4), "noise_sd": round(float(noise.std()), 4),
        "micrographs": None if named is None else len(np.unique(named[used])),
        "at_limits": round(float(edge.mean()), 5), "cone_deg": CONE_DEG, "by_view": by_view,
    }  # fmt: skip
