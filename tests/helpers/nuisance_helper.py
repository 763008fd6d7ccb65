"""A drawn set with nuisances on the phantom, beside the same set without them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.physics.nuisances.settings import Nuisances
from cryoiso.physics.nuisances.source import NuisanceSource
from cryoiso.physics.nuisances.truth import draw_truth
from cryoiso.physics.simulation import CtfRanges, SimulatedSource, make_particles
from cryoiso.physics.views import Views

FLAT = CtfRanges((0.0, 0.0), 0.0, spherical_aberration_mm=0.0, amplitude_contrast=0.99)
"""A CTF of 0.99 everywhere."""


@dataclass(frozen=True)
class Both:
    plain: SimulatedSource
    source: NuisanceSource

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self.plain))


def both(
    volume: DensityMap, n: int, settings: Nuisances, *, ctf=None, views=None, shift_sd_A=0.0, noise="white", seed=3,
    names=None, objects=None,
) -> Both:  # fmt: skip
    ctf, views = ctf or CtfRanges(), views or Views()
    base = make_particles(n, volume.box_px, volume.pixel_size_A, views=views, ctf=ctf, shift_sd_A=shift_sd_A, seed=seed)
    truth = draw_truth(base, volume, settings, views=views, ctf=ctf, names=names, seed=seed)
    plain = SimulatedSource(volume, base, seed, noise=noise is not None)
    return Both(plain, NuisanceSource({"particle": [volume], **(objects or {})}, truth, seed, noise))
