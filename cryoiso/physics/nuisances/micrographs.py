"""Which particles lie together on a micrograph, where, and what they share: ice, defocus, B-factor, scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import Particles
from cryoiso.physics.nuisances.settings import PARTICLES_A_MICROGRAPH, Ice, Micrographs
from cryoiso.physics.simulation import CtfRanges, ctf_rows, draw_ctf
from cryoiso.physics.views import normals, uniforms


@dataclass(frozen=True)
class MicrographTruth:
    """M micrographs and the n particles on them."""

    names: np.ndarray
    """(M,) str."""
    of: np.ndarray
    """(n,) int64: micrograph of each particle."""
    thickness_A: np.ndarray
    """(M,)."""
    bfactor_A2: np.ndarray
    """(M,)."""
    scale: np.ndarray
    """(M,): of the signal, without what the ice does to it."""
    tilt_axis_deg: np.ndarray
    """(M,): direction in the micrograph along which the defocus grows."""
    error_A: np.ndarray
    """(M,): shared error of the defocus."""
    position_A: np.ndarray
    """(n, 2): x, y from the micrograph's corner."""


def lay_out(
    particles: Particles,
    settings: Micrographs,
    ice: Ice,
    ctf: CtfRanges | Particles,
    names: np.ndarray | None,
    axis: np.ndarray,
    seed: int,
) -> MicrographTruth:
    """Particles on micrographs.

    Args:
        particles: with poses.
        ctf: what the CTFs were drawn from.
        names: micrograph of each row of ``ctf``, for ``from_ctf``.
        axis: (3,) the view whose ice is thinnest.
        seed: of the simulation.
    """
    n, uid = len(particles), particles.uid
    side = _normal_scores(np.degrees(np.arccos(np.abs(np.clip(particles.require_poses()[0][:, 2] @ axis, -1, 1)))))
    if settings.from_ctf and names is not None and isinstance(ctf, Particles):
        known, of = np.unique(np.asarray(names)[ctf_rows(ctf, uid, seed)], return_inverse=True)
        known, of = known.astype(str), of.reshape(-1)
    else:
        count = settings.count or -(-n // PARTICLES_A_MICROGRAPH)
        known = np.array([f"micrograph{i + 1:05d}.mrc" for i in range(count)])
        of = np.arange(n) * count // n if settings.count else np.arange(n) // PARTICLES_A_MICROGRAPH
    number = np.arange(len(known), dtype=np.uint64)
    thickness = np.zeros(len(known))
    if ice.thickness_A is not None:
        thickness = np.interp(uniforms(seed, "ice thickness", number), [0, 1], ice.thickness_A)
        if settings.from_ctf:
            thickness = _sorted_by(thickness, _mean_scores(side, of, len(known)), ice.view_correlation, seed)
        else:
            of = _by_view(side, uid, thickness, ice.view_correlation, seed)
    bfactor = np.zeros(len(known))
    if settings.bfactor_A2 is not None:
        bfactor = np.interp(uniforms(seed, "micrograph B-factor", number), [0, 1], settings.bfactor_A2)
    return MicrographTruth(
        names=known, of=of, thickness_A=thickness, bfactor_A2=bfactor,
        scale=np.exp(settings.scale_sd * normals(seed, "micrograph scale", number)),
        tilt_axis_deg=360 * uniforms(seed, "tilt axis", number),
        error_A=settings.defocus_error_shared_sd_A * normals(seed, "micrograph defocus error", number),
        position_A=settings.field_A * np.stack([uniforms(seed, f"coordinate {a}", uid) for a in "xy"], 1),
    )  # fmt: skip


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """Quantiles of the normal distribution in the order of the values."""
    from scipy.special import ndtri

    rank = np.empty(len(values))
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return np.asarray(ndtri((rank + 0.5) / len(values)))


def _mean_scores(scores: np.ndarray, of: np.ndarray, count: int) -> np.ndarray:
    size = np.maximum(np.bincount(of, minlength=count), 1)
    return _normal_scores(np.bincount(of, scores, minlength=count) / size)


def _by_view(side: np.ndarray, uid: np.ndarray, thickness: np.ndarray, correlation: float, seed: int) -> np.ndarray:
    """Micrograph of each particle: equal numbers on each, in the order of a score correlated with the view."""
    n, count = len(side), len(thickness)
    score = correlation * side + np.sqrt(1 - correlation**2) * normals(seed, "ice of the particle", uid)
    of = np.empty(n, np.int64)
    of[np.argsort(score, kind="stable")] = np.argsort(thickness, kind="stable")[np.arange(n) * count // n]
    return of


def _sorted_by(thickness: np.ndarray, scores: np.ndarray, correlation: float, seed: int) -> np.ndarray:
    """The same thicknesses, handed to micrographs whose particles are given."""
    number = np.arange(len(thickness), dtype=np.uint64)
    score = correlation * scores + np.sqrt(1 - correlation**2) * normals(seed, "ice of the micrograph", number)
    out = np.empty_like(thickness)
    out[np.argsort(score, kind="stable")] = np.sort(thickness)
    return out


def shared_ctf(
    layout: MicrographTruth, ctf: CtfRanges | Particles, box_px: int, pixel_size_A: float, seed: int
) -> dict[str, Any]:
    """Columns of the CTF drawn once per micrograph: arrays (n,) by name of the column in ``Particles``."""
    uid = shuffle_keys(seed, "micrograph", np.arange(len(layout.names), dtype=np.uint64))
    _, columns = draw_ctf(ctf, uid, box_px, pixel_size_A, seed)
    return {name: np.asarray(values)[layout.of] for name, values in columns.items()}


def height_A(layout: MicrographTruth, settings: Micrographs, uid: np.ndarray, seed: int) -> np.ndarray:
    """(n,) what each particle's defocus exceeds its micrograph's by: the tilted plane and the height in the ice."""
    towards = np.radians(layout.tilt_axis_deg[layout.of])
    x, y = (layout.position_A - settings.field_A / 2).T
    plane = np.tan(np.radians(settings.stage_tilt_deg)) * (x * np.cos(towards) + y * np.sin(towards))
    return np.asarray(plane) + settings.height_sd_A * normals(seed, "height", uid)


def ice_factors(thickness_A: np.ndarray, ice: Ice) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the signal and of the noise's standard deviation, both 1 in the middle of the range.

    Elastically scattered and unscattered electrons interfere; those scattered inelastically on the way only add to the
    background, so the contrast is exp(-t / L). The variance of the noise is that of the shot noise, which does not
    change, and of the ice's own structure, which grows with its mass.

    Args:
        thickness_A: (m,).

    Returns:
        signal (m,), noise (m,).
    """
    if ice.thickness_A is None:
        return np.ones(len(thickness_A)), np.ones(len(thickness_A))
    signal = np.exp(-(thickness_A - ice.middle_A) / ice.mean_free_path_A)
    return signal, np.sqrt(1 - ice.noise_share + ice.noise_share * thickness_A / ice.middle_A)
