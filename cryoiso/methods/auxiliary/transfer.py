"""How much of the reference a generator passes on to the images that it makes, by spatial frequency."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cryoiso.core.protocols import Communicator, ImageSource
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import Particles
from cryoiso.methods.auxiliary.condition import Condition
from cryoiso.parallel.partition import owned_rows
from cryoiso.physics.filters import radial_average

COMPARED = 1000
"""Auxiliary images of each half-set, at most."""
BLOCK = 64
LEAST_POWER = 1e-6
"""Shells in which the conditions have less than this share of their strongest shell's power say nothing."""


def measure(
    generated: ImageSource, particles: Particles, conditions: dict[int, Condition], comm: Communicator, seed: int
) -> dict[str, Any]:
    """The transfer of each half-set's generator over its auxiliary images (collective).

    t(k) = sum Re <x, c> / sum <c, c> over the coefficients of shell k and the images: x is the auxiliary image, c what
    it was conditioned on (the CTF-multiplied projection on the images' grey scale). A projection plus noise has t = 1
    at all k; a generator that learned not to trust the reference at some resolution has less there.

    Args:
        generated: the auxiliary images, row for row those of ``particles``.
        particles: auxiliary particles with poses and half-sets.
        conditions: half -> projections of its generator's reference.

    Returns:
        frequency_invA (S,) of shells 1 to D//2, and halves: half -> images, value and sd (S,), None where the
        conditions have no power. The same bits on any number of ranks (CPUs).
    """
    halves = {}
    for half, condition in sorted(conditions.items()):
        rows = np.flatnonzero(particles.half == half)
        keys = shuffle_keys(seed, "image whose transfer is measured", particles.uid[rows])
        chosen = np.sort(rows[np.argsort(keys, kind="stable")[:COMPARED]])
        own_rows = owned_rows(len(chosen), BLOCK, comm.rank, comm.size)
        parts = []
        for start in range(own_rows.start, own_rows.stop, BLOCK):
            part = chosen[start : min(start + BLOCK, own_rows.stop)]
            parts.append(shell_terms(generated.read(part), condition.images(particles, part)[:, 0].cpu().numpy()))
        terms = np.concatenate([p for share in comm.allgather(parts) for p in share])
        value, sd = transfer(terms)
        halves[str(half)] = {"images": len(chosen), "value": _plain(value[1:]), "sd": _plain(sd[1:])}
    reference = next(iter(conditions.values())).reference
    shells = np.arange(1, reference.box_px // 2 + 1)
    return {"frequency_invA": _plain(shells / (reference.box_px * reference.pixel_size_A)), "halves": halves}


def shell_terms(images: np.ndarray, conditions: np.ndarray) -> np.ndarray:
    """(n, 2, S) float64: means over each shell of Re x c* and |c|^2 of every image, from (n, D, D) images x and c."""
    x, c = (torch.fft.rfft2(torch.from_numpy(np.asarray(a, np.float64)), norm="ortho") for a in (images, conditions))
    return np.stack([radial_average(p, 2).numpy() for p in ((x * c.conj()).real, c.abs().square())], 1)


def transfer(terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """t and its standard deviation, (S,) each, from the terms (n, 2, S); NaN where the conditions have no power.

    The deviation is that of a ratio of sums, from the scatter of the images about it.
    """
    cross, power = terms.sum(0)
    known = power > LEAST_POWER * power[1:].max(initial=0.0)
    safe = np.where(known, power, 1.0)
    value = cross / safe
    spread = np.sqrt(np.square(terms[:, 0] - value * terms[:, 1]).sum(0)) / safe
    return np.where(known, value, np.nan), np.where(known, spread, np.nan)


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]
