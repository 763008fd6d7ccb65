"""Whether two half-maps that should be independent are, and how many poses two refinements share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.metrics.fsc_curve import transform
from cryoiso.physics.so3 import angular_distance_deg

if TYPE_CHECKING:
    from jaxtyping import Float

FALSE_ALARM = 0.01
"""Probability that independent half-maps leave the band in any shell."""


@dataclass(frozen=True)
class Independence:
    """FSC of two maps with its standard error if they were independent, shell by shell; shell 0 left out."""

    shells: Float[np.ndarray, " s"]
    fsc: Float[np.ndarray, " s"]
    error: Float[np.ndarray, " s"]

    @property
    def z(self) -> Float[np.ndarray, " s"]:
        """FSC over its standard error."""
        quotient: Float[np.ndarray, " s"] = self.fsc / self.error
        return quotient

    @property
    def limit(self) -> float:
        """Largest value of ``z`` that independent maps reach in any shell but in one of a hundred cases."""
        from scipy.stats import norm

        return float(norm.isf(FALSE_ALARM / max(len(self.shells), 1)))

    @property
    def total(self) -> float:
        """Sum of ``z`` over the square root of the number of shells: a weak leak in all shells shows here."""
        return float(self.z.sum() / np.sqrt(max(len(self.shells), 1)))


def independence(
    first: Float[np.ndarray, "box box box"], second: Float[np.ndarray, "box box box"], operations: int, last: int
) -> Independence:
    """FSC of two maps and its standard error for independent coefficients.

    With coefficients A, B whose phases are independent, Re(A conj B) has mean 0 and variance |A|^2 |B|^2 / 2, so that
    the error of the FSC is sqrt(sum |A|^2 |B|^2 / 2 / (sum |A|^2 sum |B|^2)) over the unique half of a shell, times the
    square root of the order of the point group, whose mates repeat each coefficient, and over that of the share of the
    box that the maps fill: where they have power only inside a part of it, neighbouring coefficients are alike.

    Args:
        operations: order of the point group that both maps have.
        last: last shell.
    """
    box = first.shape[0]
    a, b = transform(first), transform(second)
    k = np.fft.fftfreq(box) * box
    kx = np.arange(box // 2 + 1.0)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + kx**2)
    shell = np.rint(radius).astype(np.int64).ravel()
    unique = np.broadcast_to(np.where((kx == 0) | ((box % 2 == 0) & (kx == box // 2)), 0.5, 1.0), a.shape).ravel()

    def per_shell(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        sums = np.bincount(shell, weight * values.ravel())
        return np.asarray(sums[1 : last + 1])

    power_a, power_b = np.abs(a) ** 2, np.abs(b) ** 2
    scale = np.sqrt(per_shell(power_a, unique) * per_shell(power_b, unique))
    # the planes kx = 0 and D/2 hold each of their coefficients twice
    variance = operations * 0.5 * per_shell(power_a * power_b, unique) / filled(first, second)
    with np.errstate(divide="ignore", invalid="ignore"):
        curve = per_shell((a * b.conj()).real, unique) / scale
        error = np.sqrt(variance) / scale
    good = np.isfinite(curve) & (error > 0)
    return Independence(np.arange(1, last + 1)[good], curve[good], error[good])


def filled(first: Float[np.ndarray, "box box box"], second: Float[np.ndarray, "box box box"]) -> float:
    """Share of the box that two maps fill: <p><q> / <p q>, p and q their mean squares at each distance from the centre;
    1 if their power is the same everywhere."""
    axis2 = (np.arange(first.shape[0]) - first.shape[0] // 2) ** 2
    radius = np.sqrt(axis2[:, None, None] + axis2[None, :, None] + axis2[None, None, :])
    ring = np.rint(radius).astype(np.int64).ravel()
    count = np.bincount(ring)
    p, q = (np.bincount(ring, (np.asarray(v, np.float64) ** 2).ravel()) / np.maximum(count, 1) for v in (first, second))
    n = count.sum()
    together = float((count * p * q).sum() / n)
    return float((count * p).sum() / n * (count * q).sum() / n / together) if together > 0 else 1.0


def in_frame_of(
    rotations: Float[np.ndarray, "n 3 3"], target: Float[np.ndarray, "n 3 3"], operations: Float[np.ndarray, "g 3 3"]
) -> Float[np.ndarray, "n 3 3"]:
    """Poses in the frame of another refinement of the same particles: two refinements of a map with a Cn axis differ by
    a spin about it, of one without symmetry by any rotation, which is no difference between their poses.

    Poses that were found differently count little: the frame follows from a mean over all particles.
    """
    between = np.swapaxes(rotations, 1, 2) @ target
    if len(operations) == 1:
        u, _, vt = np.linalg.svd(between.sum(0))
        frame = u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt
        return np.asarray(rotations @ frame)
    if not np.allclose(np.asarray(operations)[:, 2, 2], 1):
        return np.asarray(rotations)
    same_end = between[between[:, 2, 2] > 0.5]
    angle = np.arctan2(same_end[:, 1, 0] - same_end[:, 0, 1], same_end[:, 0, 0] + same_end[:, 1, 1])
    spin = float(np.angle(np.exp(1j * len(operations) * angle).sum())) / len(operations)
    cos, sin = np.cos(spin), np.sin(spin)
    return np.asarray(rotations @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]))


def shared(
    first: Float[np.ndarray, "n 3 3"], second: Float[np.ndarray, "n 3 3"], operations: Float[np.ndarray, "g 3 3"],
    within_deg: float,
) -> tuple[float, float, Float[np.ndarray, " n"]]:  # fmt: skip
    """Share of poses that differ by less than an angle, its standard error, and the differences in degrees (n,)."""
    moved = np.asarray(angular_distance_deg(first, second, operations), np.float64)
    share = float((moved < within_deg).mean())
    return share, float(np.sqrt(max(share * (1 - share), 0.25 / len(moved)) / len(moved))), moved
