"""Tables of particles: what ranks need of them, and two tables of the same particles side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles


def applied_to(particles: Particles) -> list[str]:
    """What was done to the images, by optics group in the order of first appearance."""
    _, first = np.unique(particles.optics, return_index=True)
    return [particles.groups[particles.optics[row]].ctf_applied for row in np.sort(first).tolist()]


def bare(particles: Particles) -> Particles:
    """Without the text of the source, but for the sign of each image: what ranks other than 0 need."""
    table = particles.table
    signs = table[["cryoisoSign"]] if table is not None and "cryoisoSign" in table else None
    return replace(particles, table=signs, optics_table=None)


def with_poses_of(particles: Particles, posed: Particles, file: object, source: object) -> Particles:
    """The particles with the poses that another file has for the same uids.

    Raises:
        InputError: ``posed`` (of ``file``) lacks a particle, or has no poses.
    """
    order = np.argsort(posed.uid, kind="stable")
    place = np.searchsorted(posed.uid[order], particles.uid)
    rows = order[np.minimum(place, len(order) - 1)]
    missing = np.flatnonzero(posed.uid[rows] != particles.uid)
    if len(missing):
        raise InputError(
            f"{len(missing)} of the particles are not in this file", file=file, expected="the image names of "
            f"{source}", hint=f"The first missing one is in row {int(missing[0]) + 1} there.",
            code="particle-sets-differ",
        )  # fmt: skip
    rotation, shift_A = posed.require_poses(file)
    return particles.with_poses(rotation[rows], shift_A[rows])
