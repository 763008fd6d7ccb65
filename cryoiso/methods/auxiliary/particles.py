"""Who the auxiliary particles are: identities, even views, CTFs and shifts like those of the data. No images yet."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from scipy.special import ndtri

from cryoiso.core.errors import InputError
from cryoiso.core.rng import shuffle_keys, stable_hash
from cryoiso.core.types import Particles
from cryoiso.physics.simulation import draw_ctf
from cryoiso.physics.symmetry import in_asymmetric_unit, point_group
from cryoiso.physics.views import Views, sample_rotations, uniforms
from cryoiso.refine.schedule import first_shift_sd_px

FLAG = "cryoisoAuxiliary"
"""Column that is 1 for auxiliary particles."""
MICROGRAPH = "cryoiso_auxiliary_round{round}.mrc"
STACK = "cryoiso_auxiliary_round{round}_half{half}.mrcs"


def auxiliary_particles(
    raw: Particles,
    half: int,
    count: int,
    *,
    round_: int,
    seed: int,
    symmetry: str,
    box_px: int,
    pixel_size_A: float,
    known_shift_A: np.ndarray | None = None,
) -> Particles:
    """Auxiliary particles of one half-set.

    Views are uniform on the asymmetric unit, CTFs (whole rows, optics group included) drawn from the raw particles of
    the same half, shifts normal with the spread that a search finds of the raw shifts about the offsets which those
    particles came with. Everything of a particle follows from (seed, its uid).

    Args:
        raw: the data, with half-sets and poses.
        half: 1 or 2.
        count: how many; the first m of n are those of a set of m.
        round_: of the workflow; other rounds have other particles.
        seed: the run's seed.
        symmetry: point group; poses are reduced to one asymmetric unit.
        box_px, pixel_size_A: of the images.
        known_shift_A: (n, 2) offsets of ``raw`` around which a co-refinement will search; None: none are known.

    Raises:
        InputError: no raw particles in this half, or fewer than one particle wanted.
    """
    rows = np.flatnonzero(raw.half == half) if raw.half is not None else np.zeros(0, np.int64)
    if len(rows) == 0 or count < 1:
        expected = f"raw particles of half {half}"
        raise InputError(
            "cannot make auxiliary particles", expected=expected, found=len(rows), code="particles-too-few"
        )
    base = stable_hash(f"{seed}/auxiliary/round {round_}/half {half}")
    with np.errstate(over="ignore"):
        uid = shuffle_keys(seed, "uid of auxiliary particle", np.arange(count, dtype=np.uint64) + np.uint64(base))
    templates = raw.take(rows)
    groups, columns = draw_ctf(templates, uid, box_px, pixel_size_A, seed)
    known = None if known_shift_A is None else known_shift_A[rows]
    spread = _shift_spread(templates, known, first_shift_sd_px(box_px) * pixel_size_A)
    normals = [ndtri(uniforms(seed, f"auxiliary shift {axis}", uid)) for axis in "xy"]
    return Particles(
        uid=uid,
        groups=groups,
        stack=np.full(count, STACK.format(round=round_, half=half)),
        index=np.arange(count, dtype=np.int64),
        rotation=_in_unit(sample_rotations(Views(), uid, seed), symmetry),
        shift_A=spread * np.stack(normals, 1),
        half=np.full(count, half, np.int8),
        results={
            FLAG: np.ones(count, np.int64),
            "rlnMicrographName": np.full(count, MICROGRAPH.format(round=round_)),
        },
        **columns,
    )


def require_poolable(raw: Particles, pixel_size_A: float, file: object = None) -> None:
    """Auxiliary particles can share the optics groups of the raw ones only if they are images of the same kind.

    Args:
        pixel_size_A: of the images that are made.

    Raises:
        InputError: the CTF was applied to a group's images, or they have another pixel size; names the first.
    """
    for number in np.unique(raw.optics).tolist():
        group = raw.groups[number]
        why = f"has a pixel size of {group.pixel_size_A:g} Å, they have {pixel_size_A:g} Å"
        if group.ctf_applied:
            why = (
                f"has {'phase-flipped' if group.ctf_applied == 'flipped' else 'premultiplied'} images, they are neither"
            )
        elif group.pixel_size_A == pixel_size_A:
            continue
        raise InputError(
            f"auxiliary particles cannot share optics group {group.number} ({group.name}) with the raw ones: it {why}",
            file=file, hint="Set auxiliary.noise_group = 'own'.", code="particle-sets-differ",
        )  # fmt: skip


def apart(auxiliary: Particles, raw: Particles) -> Particles:
    """The same with optics groups that no program takes for those of the raw particles: other numbers, other names."""
    last = max(group.number for group in raw.groups)
    groups = [replace(g, number=last + i, name=f"{g.name}_auxiliary") for i, g in enumerate(auxiliary.groups, 1)]
    return replace(auxiliary, groups=tuple(groups))


def both_halves(first: Particles, second: Particles) -> Particles:
    """Half 1's particles and after them half 2's; their optics groups are the same, those of the data."""
    arrays = [f.name for f in fields(first) if isinstance(getattr(first, f.name), np.ndarray)]
    columns = {n: np.concatenate([getattr(first, n), getattr(second, n)]) for n in arrays}
    results = {n: np.concatenate([first.results[n], second.results[n]]) for n in first.results}
    return Particles(groups=first.groups, results=results, **columns)


def _shift_spread(raw: Particles, known_A: np.ndarray | None, searched_A: float) -> float:
    """Standard deviation along an axis of what a search of the raw particles has to find.

    Where their poses are just the known offsets, nothing has been found yet: the spread is that of the offsets, but no
    larger than a search expects at first (``searched_A``).
    """
    if raw.shift_A is None:
        return 0.0
    if known_A is None or not np.any(known_A):
        return _robust_sd(raw.shift_A)
    shift_error = raw.shift_A - known_A
    return _robust_sd(shift_error) if np.any(shift_error) else min(_robust_sd(raw.shift_A), searched_A)


def _robust_sd(shift_A: np.ndarray) -> float:
    """From the median absolute shift, so that failed particles do not count."""
    centred = shift_A - np.median(shift_A, axis=0)
    return float(1.4826 * np.median(np.abs(centred)))


def _in_unit(rotation: np.ndarray, symmetry: str) -> np.ndarray:
    """Equivalent poses whose views lie in the asymmetric unit (n, 3, 3): A S shows the same as A."""
    operations = point_group(symmetry)
    if len(operations) == 1:
        return rotation
    mates = np.einsum("nij,gjk->ngik", rotation, operations)
    inside = in_asymmetric_unit(mates[:, :, 2].reshape(-1, 3), symmetry).reshape(len(rotation), -1)
    mate: np.ndarray = mates[np.arange(len(rotation)), inside.argmax(1)]
    return mate
