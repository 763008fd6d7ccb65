"""A trimer in detergent, and what is recovered of it: shared by the tests of the micelle."""

from __future__ import annotations

from functools import cache

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.io.sources import ArraySource
from cryoiso.methods.micelle.protein import protein_mask
from cryoiso.methods.micelle.recover import MicelleSettings, Recovery, recover_micelle_halves
from cryoiso.parallel.context import Context
from cryoiso.physics.detergent_belt import Belt, in_detergent
from cryoiso.physics.filters import lowpass
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import SimulatedSource, simulate
from cryoiso.physics.views import Views

BOX, PIXEL_A = 32, 6.0
BELT = Belt(centre_z_A=-30.0, radius_A=60.0, half_thickness_A=22.0)
TRPV1_BELT = Belt(centre_z_A=-26.0, radius_A=68.0, half_thickness_A=24.0, shell_density=0.8, core_density=0.3)


@cache
def trimer() -> DensityMap:
    return phantom_map(BOX, PIXEL_A, 14.0)


def held(source: SimulatedSource) -> ArraySource:
    found = ArraySource(source.read(np.arange(len(source))), source.particles)
    found.truth = source.volume
    return found


@cache
def trimers(n: int = 240, snr_db: float | None = -8.0, mode: str = "uniform") -> tuple[ArraySource, np.ndarray]:
    """Images of the trimer in detergent, and the detergent on the images' grey scale."""
    full, detergent = in_detergent(trimer(), BELT)
    source = held(simulate(full, n, snr_db=snr_db, shift_sd_A=5.0, seed=3, views=Views(mode)))
    return source, detergent.data * (source.truth.data.std() / full.data.std())


def recover(source: ArraySource, homologue: DensityMap | None = None, comm=None, mask=None, **choice) -> Recovery:
    homologue = homologue or trimer()
    options = {k: choice.pop(k) for k in ("checkpoint_file", "resume", "on_iteration") if k in choice}
    return recover_micelle_halves(
        source, source.particles, homologue, mask or protein_mask(homologue), comm or Context(),
        MicelleSettings(**{"symmetry": "C3", **choice}), **options,
    )  # fmt: skip


def correlation_at_20(found: np.ndarray, truth: np.ndarray, mask: np.ndarray, pixel_A: float) -> float:
    """Outside the mask, in the sphere that the box holds."""
    box = len(found)
    where = (mask < 0.5) & (np.asarray(sphere_mask(box, box / 2 - 3)) > 0.5)
    a, b = (lowpass(v.astype(np.float32), pixel_A, max(20.0, 2 * pixel_A)) for v in (found, truth))
    return float(np.corrcoef(a[where], b[where])[0, 1])
