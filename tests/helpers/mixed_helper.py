"""A particle set of two optics groups that see one object: another pixel size, beam tilt, magnification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.io.sources import ArraySource
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.resample import resample_map
from cryoiso.physics.simulation import SimulatedSource, make_particles, scale_for_snr

PARTICLE_ARRAYS = (
    "uid", "stack", "index", "rotation", "shift_A", "half", "defocus_u_A", "defocus_v_A", "defocus_angle_deg",
    "phase_shift_deg", "ctf_bfactor_A2", "ctf_scale",
)  # fmt: skip


def two_microscopes(
    n: int,
    box_px: int,
    pixel_A: float,
    other_pixel_A: float,
    *,
    snr_db: float | None,
    shift_sd_A: float = 5.0,
    beam_tilt_mrad: tuple[float, float] = (0.0, 0.0),
    magnification: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 1.0),
) -> ArraySource:
    """n images of each kind in random order; ``.truth`` is the map on the first kind's grid.

    Images of both kinds are the same function of position: the map on the other grid is multiplied by the ratio of the
    voxels' volumes, so that a sum over its voxels is an integral in units of the first grid.

    Args:
        snr_db: None for noise-free images.
        beam_tilt_mrad, magnification: of the second group.
    """
    truth = phantom_map(box_px, pixel_A, 2.3 * max(pixel_A, other_pixel_A))
    ratio = (other_pixel_A / pixel_A) ** 3
    other = DensityMap(resample_map(truth.data, pixel_A, box_px, other_pixel_A) * ratio, other_pixel_A)
    first = make_particles(n, box_px, pixel_A, shift_sd_A=shift_sd_A, seed=3)
    second = make_particles(n, box_px, other_pixel_A, shift_sd_A=shift_sd_A, seed=4)
    group = replace(
        second.groups[0], number=2, name="other", beam_tilt_mrad=beam_tilt_mrad, magnification=magnification
    )
    second = replace(second, groups=(group,))
    scale = np.float32(1) if snr_db is None else scale_for_snr(truth, first, snr_db)
    images = [
        SimulatedSource(replace(v, data=v.data * scale), p, seed=5, noise=snr_db is not None).read(np.arange(n))
        for v, p in ((truth, first), (other, second))
    ]
    mixed = np.random.default_rng(0).permutation(2 * n)
    columns = {k: np.concatenate([getattr(first, k), getattr(second, k)])[mixed] for k in PARTICLE_ARRAYS}
    optics = np.repeat([0, 1], n).astype(np.int32)[mixed]
    particles = replace(first, groups=(first.groups[0], group), optics=optics, **columns)
    source = ArraySource(np.concatenate(images)[mixed], particles)
    source.truth = replace(truth, data=truth.data * scale)
    return source
