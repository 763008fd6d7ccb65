"""The noise spectrum of the particles by optics group, for auxiliary images of coloured noise."""

from __future__ import annotations

import numpy as np

from cryoiso.core.protocols import Communicator, ImageSource
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import DensityMap, Particles
from cryoiso.methods.auxiliary.condition import FEW, SCALE_BLOCK, SCALE_PARTICLES
from cryoiso.parallel.partition import owned_rows
from cryoiso.physics.filters import power_spectrum
from cryoiso.physics.simulation import Projector


def residual_spectra(
    source: ImageSource,
    particles: Particles,
    rows: np.ndarray,
    reference: DensityMap,
    scale: np.ndarray,
    comm: Communicator,
    seed: int,
) -> np.ndarray:
    """Mean power of x - a c P by optics group and shell (collective): a refinement's estimate of the noise, at the
    poses that the particles have instead of over the posterior.

    Args:
        source: images, row for row those of ``particles``.
        particles: with poses.
        rows: which to measure (one half-set, say); at most 2,048 of them are read.
        reference: on the images' grid.
        scale: (G,) grey scale of the reference by optics group.

    Returns:
        (G, D//2+1) float64, power per coefficient of orthonormal transforms, in shells of the group's own images;
        groups without enough particles get the common one. The same bits on any number of ranks.
    """
    keys = shuffle_keys(seed, "noise of the images", particles.uid[rows])
    chosen = np.sort(rows[np.argsort(keys, kind="stable")[:SCALE_PARTICLES]])
    projector, own_rows = Projector(reference), owned_rows(len(chosen), SCALE_BLOCK, comm.rank, comm.size)
    parts = []
    for start in range(own_rows.start, own_rows.stop, SCALE_BLOCK):
        part = chosen[start : min(start + SCALE_BLOCK, own_rows.stop)]
        model = projector.images(particles, part).numpy() * scale[particles.optics[part]][:, None, None]
        parts.append(np.asarray(power_spectrum(source.read(part) - model), np.float64))
    power = np.concatenate([p for share in comm.allgather(parts) for p in share])
    spectra = np.tile(power.mean(0), (len(particles.groups), 1))
    for group in range(len(spectra)):
        inside = particles.optics[chosen] == group
        if inside.sum() >= FEW:
            spectra[group] = power[inside].mean(0)
    spectra[:, 0] = spectra[:, 1]  # the mean of an image is no noise: normalisation sets it
    return spectra


def on_grid(spectra: np.ndarray, particles: Particles, pixel_size_A: float) -> np.ndarray:
    """(G, S) the same spectra by shell of images with another pixel size and the same box; empty shells, which are
    infinite in a refinement's spectra, have no noise."""
    shells = np.arange(spectra.shape[1])
    held = np.where(np.isfinite(spectra), spectra, 0.0)
    own = [shells * group.pixel_size_A / pixel_size_A for group in particles.groups]
    return np.stack([np.interp(place, shells, row) for place, row in zip(own, held, strict=True)])
