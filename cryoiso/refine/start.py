"""What the first iteration starts from: the low-passed reference on the data's grey scale, and the noise spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.errors import InputError
from cryoiso.core.log import logger
from cryoiso.core.rng import shuffle_keys
from cryoiso.physics.filters import lowpass
from cryoiso.physics.fourier import Disc, disc
from cryoiso.physics.project import FourierVolume
from cryoiso.refine import schedule
from cryoiso.refine.likelihood import ReferenceSlices, Whitened, as_real, shift_factors, whiten
from cryoiso.refine.maximise import NoiseSums
from cryoiso.refine.schedule import State

if TYPE_CHECKING:
    from cryoiso.refine.iterate import Model, Refinement

SCALE_PARTICLES = 512


def initial_model(run: Refinement, lowpass_A: float) -> Model:
    """The same low-passed reference for both halves, scaled to the images; noise from the images' mean power
    (collective)."""
    from cryoiso.refine.iterate import Model

    radius = int(np.clip(round(run.box * run.pixel / lowpass_A), 3, run.limit))
    state = State(radius_px=radius, shift_sd_px=max(2.0, 0.03 * run.box))
    reference = np.asarray(lowpass(torch.as_tensor(run.request.reference.data), run.pixel, lowpass_A), np.float32)
    sigma2 = mean_power(run)
    reference = reference * run.sphere
    scale = grey_scale(run, reference, sigma2, state)
    if run.comm.rank == 0:
        logger.info(
            "reference low-passed at %.1f Å, grey scale multiplied by %.4g to match the images", lowpass_A, scale
        )
    n = len(run.particles)
    scaled = (reference * scale).astype(np.float32)
    return Model(state, {1: scaled, 2: scaled}, sigma2, np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 2)))


def mean_power(run: Refinement) -> np.ndarray:
    """(G, S) mean power of the images by optics group and shell: an upper bound of the noise."""
    noise = NoiseSums.empty(len(run.particles.groups), run.box // 2 + 1)
    for half in (1, 2):
        batches, _ = run.owned(half)
        radius = run.reader.preload_radius(run.limit, batches)
        for rows in batches:
            batch = run.reader.read(rows, radius)
            noise.add(batch, batch.coefficients.abs().square())
    noise = NoiseSums(run.comm.sum_all(noise.power), run.comm.sum_all(noise.count))
    flat = np.ones(noise.power.shape)
    spectra = noise.spectra(flat)
    spectra[:, 0] = spectra[:, 1]
    return spectra


def grey_scale(run: Refinement, reference: np.ndarray, sigma2: np.ndarray, state: State) -> float:
    """Least-squares factor between the reference's projections and the images.

    The pose is chosen with one half of the coefficients (even ones) by normalised correlation and the factor fitted
    with the other half, so that the noise which made a pose win does not inflate the factor.

    Raises:
        InputError: the reference does not correlate with the images at all.
    """
    volume = FourierVolume.from_volume(
        torch.as_tensor(reference, device=run.device), run.settings.padding, state.radius_px
    )
    plan = schedule.search_plan(state, run.settings, run.rotations, run.box, run.pixel, run.diameter)
    keys = shuffle_keys(run.request.seed, "grey scale", run.particles.uid)
    chosen = np.zeros(len(keys), bool)
    chosen[np.argsort(keys, kind="stable")[:SCALE_PARTICLES]] = True
    cross = norm = 0.0
    for half in (1, 2):
        for rows in run.owned(half)[0]:
            mine = np.flatnonzero(chosen[rows])
            if len(mine):
                batch = run.reader.read(rows, state.radius_px)
                c, n = _fit(whiten(batch, sigma2), mine, volume, plan)
                cross, norm = cross + c, norm + n
    totals = np.array(run.comm.allgather((cross, norm))).sum(0)
    factor = float(totals[0] / totals[1]) if totals[1] > 0 else 0.0
    if not np.isfinite(factor) or factor <= 0:
        raise InputError(
            "the reference does not match the images: its projections do not correlate with them",
            hint="Check the reference's sign, pixel size and identity, and whether the images need invert = 'yes'.",
        )
    return factor


def _fit(white: Whitened, rows: np.ndarray, volume: FourierVolume, plan) -> tuple[float, float]:
    index = torch.as_tensor(rows, device=white.data.device)
    ratio = 1.0 if white.magnification is None else float(np.linalg.norm(white.magnification, 2))
    where = disc(white.where.box_px, volume.radius_px / ratio)
    halves = [_every_second(where, i) for i in (0, 1)]
    shifts = plan.shifts_px.to(white.data.device)
    scores = []
    for part, keep in halves:
        data, weight = white.data[index][:, keep], white.weight[index][:, keep]
        slices = ReferenceSlices.of(volume, plan.rotations, part, white.magnification)
        moved = data[:, None, :] * shift_factors(part, shifts)
        b, s, k = moved.shape
        scores.append(((as_real(moved).reshape(b * s, 2 * k) @ slices.real).reshape(b, s, -1), weight @ slices.power))
    (cross_a, norm_a), (cross_b, norm_b) = scores
    best = (cross_a / norm_a.sqrt()[:, None, :]).flatten(1).argmax(1)
    views = norm_a.shape[1]
    cross = cross_b.flatten(1).gather(1, best[:, None]).double().sum()
    norm = norm_b.gather(1, (best % views)[:, None]).double().sum()
    return float(cross), float(norm)


def _every_second(where: Disc, first: int) -> tuple[Disc, np.ndarray]:
    keep = np.arange(first, where.size, 2)
    part = Disc(where.box_px, where.radius_px, where.ky[keep], where.kx[keep], where.flat[keep], where.shell[keep])
    return part, keep
