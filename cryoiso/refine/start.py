"""What the first iteration starts from: the low-passed reference on the data's grey scale, and the noise spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.errors import InputError
from cryoiso.core.log import logger
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import DensityMap
from cryoiso.physics.filters import lowpass
from cryoiso.physics.fourier import Disc, disc
from cryoiso.physics.project import FourierVolume
from cryoiso.refine.likelihood import ReferenceSlices, Whitened, cross_and_norm, whiten
from cryoiso.refine.maximise import NoiseSums
from cryoiso.refine.schedule import State
from cryoiso.refine.search import Given, SearchPlan

if TYPE_CHECKING:
    from cryoiso.refine.iterate import Model, Refinement

SCALE_PARTICLES = 512


def initial_model(run: Refinement, lowpass_A: float) -> Model:
    """The low-passed reference, the same for both halves unless each was given its own, scaled to the images; noise
    from the images' mean power; for a local search the given poses (collective)."""
    from cryoiso.refine.iterate import Model

    radius = int(np.clip(round(run.box * run.pixel / lowpass_A), 3, run.limit))
    state = State(radius_px=radius, shift_sd_px=max(2.0, 0.03 * run.box))
    reference = first_reference(run, run.request.reference, lowpass_A)
    sigma2 = mean_power(run)
    scale = grey_scale(run, reference, sigma2, state)
    if run.comm.rank == 0:
        logger.info(
            "reference low-passed at %.1f Å, grey scale multiplied by %.4g to match the images", lowpass_A, scale
        )
    references = {1: reference, 2: reference}
    if run.request.half_references is not None:
        references = {h: first_reference(run, run.request.half_references[h], lowpass_A) for h in (1, 2)}
    scaled = {h: (r * scale).astype(np.float32) for h, r in references.items()}
    n = len(run.particles)
    rotation, shift_A = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 2))
    if run.request.local_deg is not None:
        rotation, shift_A = run.particles.require_poses()
    return Model(state, scaled, sigma2, rotation, shift_A)


def first_reference(run: Refinement, given: DensityMap, lowpass_A: float) -> np.ndarray:
    """(D, D, D) float32: the map low-passed, inside the sphere of the particle's diameter."""
    return np.asarray(lowpass(torch.as_tensor(given.data), run.pixel, lowpass_A), np.float32) * run.sphere


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
        InputError: the reference does not correlate with the images, or does so with the opposite sign.
    """
    volume = FourierVolume.from_volume(
        torch.as_tensor(reference, device=run.device), run.settings.padding, state.radius_px
    )
    plan = run.plan(state)
    keys = shuffle_keys(run.request.seed, "grey scale", run.particles.uid)
    chosen = np.zeros(len(keys), bool)
    chosen[np.argsort(keys, kind="stable")[:SCALE_PARTICLES]] = True
    mine: list[tuple[np.ndarray, np.ndarray]] = []
    for half in (1, 2):
        for rows in run.owned(half)[0]:
            some = np.flatnonzero(chosen[rows])
            if len(some):
                batch = run.reader.read(rows, state.radius_px)
                mine.append((rows[some], _fit(whiten(batch, sigma2), some, volume, plan, run.given(rows))))
    everything = [item for part in run.comm.allgather(mine) for item in part]
    order = np.argsort(np.concatenate([rows for rows, _ in everything]), kind="stable")
    # summed in row order, so that the factor has the same bits on any number of ranks
    white, dark, norm, norm_dark = np.concatenate([values for _, values in everything])[order].sum(0)
    factor = float(white / norm) if norm > 0 else 0.0
    if dark > 0 and dark**2 * norm > max(white, 0.0) ** 2 * norm_dark:
        raise InputError(
            "the images match the reference's projections better with their sign changed",
            expected="protein white in both",
            found="opposite signs",
            hint="Set invert = 'yes' under [particles] if protein is dark in the images, or invert the reference.",
        )
    if not np.isfinite(factor) or factor <= 0:
        raise InputError(
            "the reference does not match the images: its projections do not correlate with them",
            hint="Check the reference's identity and pixel size.",
        )
    return factor


def _fit(white: Whitened, rows: np.ndarray, volume: FourierVolume, plan: SearchPlan, given: Given | None) -> np.ndarray:
    """(n, 4) of each image: sum of cross terms and of squares at its best pose, as it is and with its sign changed.

    Columns: cross, cross with changed sign, squares, squares at the pose for the changed sign.
    """
    ratio = 1.0 if white.magnification is None else float(np.linalg.norm(white.magnification, 2))
    where = disc(white.where.box_px, volume.radius_px / ratio)
    if given is not None:
        white = given.centre(white)
    halves = [_every_second(where, i) for i in (0, 1)]

    def slices_of(rotations: torch.Tensor) -> list[ReferenceSlices]:
        return [ReferenceSlices.of(volume, rotations, part, white.magnification) for part, _ in halves]

    slices = slices_of(plan.rotations) if given is None else []
    width = len(plan.shifts_px) if given is None else max(len(plan.shifts_px), where.size)
    step = max(1, (1 << 24) // (width * len(plan.rotations)))
    found = []
    for i in range(0, len(rows), step):
        index = torch.as_tensor(rows[i : i + step], device=white.data.device)
        if given is not None:
            slices = slices_of(given.take(index).turned(plan.rotations))
        parts = [
            Whitened(white.data[index][:, keep], white.weight[index][:, keep], part, white.magnification)
            for part, keep in halves
        ]
        terms = [cross_and_norm(part, views, plan.shifts_px) for part, views in zip(parts, slices, strict=True)]
        found.append(_held_out(*terms))
    return torch.cat(found).cpu().numpy()


def _held_out(choose: tuple[torch.Tensor, torch.Tensor], fit: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Terms of the second half of the coefficients at the poses that the first half chose, (B, 4) float64."""
    correlation = (choose[0] / choose[1].sqrt()[:, None, :]).flatten(1)
    cross, views = fit[0].flatten(1), fit[1].shape[1]
    best, worst = correlation.argmax(1, keepdim=True), correlation.argmin(1, keepdim=True)
    columns = [cross.gather(1, best), -cross.gather(1, worst)]
    columns += [fit[1].gather(1, best % views), fit[1].gather(1, worst % views)]
    return torch.cat(columns, 1).double()


def _every_second(where: Disc, first: int) -> tuple[Disc, np.ndarray]:
    keep = np.arange(first, where.size, 2)
    part = Disc(where.box_px, where.radius_px, where.ky[keep], where.kx[keep], where.flat[keep], where.shell[keep])
    return part, keep
