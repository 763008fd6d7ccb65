"""View distributions of simulated particles: preferred orientation and missing directions.

Every draw depends on (seed, uid) alone. A view direction v is the third row of the pose; the image contains the Fourier
coefficients perpendicular to v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import shuffle_keys
from cryoiso.physics.so3 import rotation_with_view

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

MODES = ("uniform", "preferred", "retained", "missing-cone")
_DEFAULT_CONE_DEG = {"uniform": 0.0, "preferred": 36.0, "retained": 45.0, "missing-cone": 30.0}


def uniforms(seed: int, purpose: str, uids: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """(n,) float64 in (0, 1), one per uid, independent for every purpose."""
    keys = shuffle_keys(seed, purpose, np.asarray(uids, np.uint64))
    return ((keys >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normals(seed: int, purpose: str, uids: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """(n,) float64 normally distributed, one a uid, independent for every purpose."""
    from scipy.special import ndtri

    scores: np.ndarray = ndtri(uniforms(seed, purpose, uids))
    return scores


def rows_of(seed: int, purpose: str, uids: np.ndarray, count: int) -> np.ndarray:
    """(n,) int64: a row below ``count`` for each uid, all alike."""
    return np.minimum((uniforms(seed, purpose, uids) * count).astype(np.int64), count - 1)


@dataclass(frozen=True)
class Views:
    """A distribution of view directions; in-plane angles are always uniform.

    - ``uniform``: all directions equally likely.
    - ``preferred``: ``fraction`` of the views are within ``cone_deg`` of the pole(s), with angles to the pole in a
      Rayleigh distribution of ``sigma_deg`` (None: uniform over the cone); the rest is uniform outside.
    - ``retained``: uniform, but only the fraction ``retained`` of the side views, those more than ``cone_deg`` from the
      pole(s), is kept.
    - ``missing-cone``: no image measures a Fourier coefficient closer than ``cone_deg`` to the axis through the poles.
      The plane perpendicular to a view at angle t from the axis comes as close as |90 - t| degrees to it, so views keep
      t <= 90 - cone_deg (or t >= 90 + cone_deg), uniformly there.
    """

    mode: str = "uniform"
    fraction: float = 0.9
    cone_deg: float | None = None
    """None: 36 for preferred, 45 for retained, 30 for missing-cone."""
    sigma_deg: float | None = 12.0
    poles: int | None = None
    """1 or 2; None: 1 for preferred, else 2."""
    pole_tilt_deg: float = 0.0
    """Tilt of the preferred direction: 0 for top views (along z), 90 for side views."""
    pole_rot_deg: float = 0.0
    retained: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(
                "unknown view distribution", expected=", ".join(MODES), found=repr(self.mode), code="choice-unknown"
            )
        if not (0 <= self.fraction <= 1 and 0 <= self.retained <= 1):
            raise InputError(
                "fractions lie between 0 and 1",
                found=f"fraction {self.fraction}, retained {self.retained}",
                code="option-out-of-range",
            )
        if self.poles not in (None, 1, 2):
            raise InputError("wrong number of poles", expected="1 or 2", found=self.poles, code="option-out-of-range")
        if not 0 <= self.cone < 90:
            raise InputError(
                "wrong half-angle of the cone", expected="0 to 90 degrees", found=self.cone, code="option-out-of-range"
            )
        if self.sigma_deg is not None and self.sigma_deg <= 0:
            raise InputError(
                "the spread of the views must be positive", found=self.sigma_deg, code="option-out-of-range"
            )

    @property
    def cone(self) -> float:
        """The half-angle in degrees, with the mode's default."""
        return _DEFAULT_CONE_DEG[self.mode] if self.cone_deg is None else float(self.cone_deg)

    @property
    def pole_count(self) -> int:
        """1 or 2, with the mode's default."""
        return self.poles or (1 if self.mode == "preferred" else 2)


@dataclass(frozen=True)
class GivenViews:
    """View directions drawn from a list, such as that of a real set; in-plane angles are uniform."""

    directions: Float[np.ndarray, "m 3"]
    """(m, 3) unit vectors."""
    purpose: str = "view row"
    """Of the draw. With that of the CTFs, both are of the same row."""

    def __post_init__(self) -> None:
        if not len(self.directions):
            raise InputError("no views to draw from", code="particles-too-few")


def sample_rotations(
    views: Views | GivenViews, uids: Shaped[np.ndarray, " n"], seed: int
) -> Float[np.ndarray, "n 3 3"]:
    """Poses drawn from a view distribution.

    Args:
        views: the distribution.
        uids: (n,) identities; the pose of a uid does not depend on the others.
        seed: of the simulation.

    Returns:
        (n, 3, 3).
    """
    if isinstance(views, GivenViews):
        chosen = views.directions[rows_of(seed, views.purpose, uids, len(views.directions))]
        return rotation_with_view(chosen, 360 * uniforms(seed, "in-plane angle", uids))
    cosine = _pole_cosine(views, uids, seed)
    azimuth = 2 * np.pi * uniforms(seed, "view azimuth", uids)
    sine = np.sqrt(np.clip(1 - cosine**2, 0, 1))
    local = np.stack([sine * np.cos(azimuth), sine * np.sin(azimuth), cosine], 1)
    tilt, rot = np.radians(views.pole_tilt_deg), np.radians(views.pole_rot_deg)
    pole = [np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)]
    directions = local @ rotation_with_view(np.array([pole]))[0]
    return rotation_with_view(directions, 360 * uniforms(seed, "in-plane angle", uids))


def _pole_cosine(views: Views, uids: np.ndarray, seed: int) -> np.ndarray:
    """Cosine of each view's angle to the pole."""
    u = uniforms(seed, "view angle", uids)
    edge = np.cos(np.radians(views.cone))
    low = -edge if views.pole_count == 2 else -1.0
    if views.mode == "retained":
        bands = [(edge, 1.0, 1.0), (low, edge, views.retained)]
        return _from_bands(u, bands + ([(-1.0, low, 1.0)] if views.pole_count == 2 else []))
    if views.mode == "missing-cone":
        allowed = np.cos(np.radians(90 - views.cone))
        return _from_bands(u, [(allowed, 1.0, 1.0)] + ([(-1.0, -allowed, 1.0)] if views.pole_count == 2 else []))
    if views.mode == "preferred":
        top = np.cos(_cone_angle(views, u))
        if views.pole_count == 2:
            top = np.where(uniforms(seed, "which pole", uids) < 0.5, top, -top)
        rest = _from_bands(u, [(low, edge, 1.0)])
        return np.where(uniforms(seed, "preferred or not", uids) < views.fraction, top, rest)
    return 2 * u - 1


def _cone_angle(views: Views, u: np.ndarray) -> np.ndarray:
    """Angles from the pole in radians, up to the cone's half-angle (inverse of the truncated distribution)."""
    cone = np.radians(views.cone)
    if views.sigma_deg is None:
        within: np.ndarray = np.arccos(1 - u * (1 - np.cos(cone)))
        return within
    sigma = np.radians(views.sigma_deg)
    angle: np.ndarray = sigma * np.sqrt(-2 * np.log1p(-u * -np.expm1(-0.5 * (cone / sigma) ** 2)))
    return angle


def _from_bands(u: np.ndarray, bands: list[tuple[float, float, float]]) -> np.ndarray:
    """Cosines with a constant density in each band (from, to, relative density)."""
    mass = np.array([(high - low) * weight for low, high, weight in bands])
    ends = np.cumsum(mass) / mass.sum()
    which = np.minimum(np.searchsorted(ends, u, side="right"), len(bands) - 1)
    start = np.concatenate([[0.0], ends[:-1]])
    low, high = np.array([b[:2] for b in bands]).T
    share = (u - start[which]) / np.where(mass[which] > 0, mass[which] / mass.sum(), 1)
    angle: np.ndarray = low[which] + (high - low)[which] * np.clip(share, 0, 1)
    return angle
