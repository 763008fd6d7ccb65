"""The same images as they came from the microscope, phase-flipped, premultiplied, and some of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cryoiso.core.types import Particles
from cryoiso.io.sources import ArraySource
from cryoiso.physics.contrast_transfer import ctf_for

KINDS = ("flipped", "premultiplied", "mixed", "both flags")


def filtered(images: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """(n, D, D) float32: images with their transforms multiplied by (n, D, D//2+1)."""
    plane = np.fft.rfft2(np.asarray(images, np.float64)) * factor
    return np.fft.irfft2(plane, s=images.shape[-2:]).astype(np.float32)


def with_flags(particles: Particles, kind: str) -> Particles:
    """Particles that say what kind of images they have; "mixed": an optics group of each kind, row by row."""
    one = particles.groups[0]
    flags = {"flipped": (False, True), "premultiplied": (True, False), "both flags": (True, True)}
    if kind != "mixed":
        premultiplied, flipped = flags[kind]
        return replace(particles, groups=(replace(one, ctf_premultiplied=premultiplied, phase_flipped=flipped),))
    groups = tuple(
        replace(one, number=i + 1, name=f"g{i}", ctf_premultiplied=i == 1, phase_flipped=i == 2) for i in range(3)
    )
    return replace(particles, groups=groups, optics=(np.arange(len(particles)) % 3).astype(np.int32))


def of_kind(images: np.ndarray, particles: Particles, kind: str) -> ArraySource:
    """The source of a kind of images, made here from those as they came."""
    c = ctf_for(particles, None, images.shape[-1]).numpy().astype(np.float64)
    flagged = with_flags(particles, kind)
    premultiplied = np.array([g.ctf_premultiplied for g in flagged.groups])[flagged.optics]
    flipped = np.array([g.phase_flipped for g in flagged.groups])[flagged.optics]
    factor = np.ones_like(c)
    factor[flipped] = np.where(c[flipped] < 0, -1.0, 1.0)
    factor[premultiplied] = c[premultiplied]
    return ArraySource(filtered(images, factor), flagged)
