"""The two half-sets of a gold-standard refinement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import Particles


def assign_halves(particles: Particles, seed: int, file: object = None) -> Particles:
    """Particles whose half-set numbers are all 1 or 2.

    Numbers that the file has are kept. Where no particle has one, the set is halved at random, balanced to one
    particle, by keys that depend on seed and uid alone: neither the order of rows nor the number of ranks matters.

    Args:
        particles: n particles.
        seed: the run's seed.
        file: named in errors.

    Raises:
        InputError: a half-set is empty, or only some particles have a number.
    """
    if len(particles) < 2:
        raise InputError(
            "too few particles for two half-sets",
            file=file,
            expected="2 or more",
            found=len(particles),
            code="particles-too-few",
        )
    half = particles.half
    if half is None or not half.any():
        order = np.argsort(shuffle_keys(seed, "halves", particles.uid), kind="stable")
        half = np.empty(len(particles), np.int8)
        half[order] = 1 + np.arange(len(particles)) % 2
        return replace(particles, half=half)
    bad = np.flatnonzero((half != 1) & (half != 2))
    if len(bad):
        raise InputError(
            "some particles have no half-set number", file=file, row=int(bad[0]) + 1, expected="1 or 2 in every row",
            found=int(half[bad[0]]), hint="Remove the column rlnRandomSubset to have new half-sets made.",
            code="half-set-missing",
        )  # fmt: skip
    for number in (1, 2):
        if not (half == number).any():
            raise InputError(
                f"half-set {number} is empty", file=file, expected="particles with rlnRandomSubset 1 and 2",
                found=f"only {3 - number}", hint="Remove the column rlnRandomSubset to have new half-sets made.",
                code="half-set-empty",
            )  # fmt: skip
    return particles
