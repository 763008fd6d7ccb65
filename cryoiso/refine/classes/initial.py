"""What the first iteration of a classification starts from: given maps, or back-projections of random subsets."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.log import logger
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import HALVES
from cryoiso.physics.filters import lowpass
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.projection import FourierVolume
from cryoiso.refine.batches import Batch
from cryoiso.refine.classes.expectation import ClassPosterior, at_given_poses, weighted
from cryoiso.refine.classes.iterate import Classification
from cryoiso.refine.classes.maximise import share_out
from cryoiso.refine.classes.model import ClassModel, Maps
from cryoiso.refine.initial_model import Match, first_state, grey_scale, mean_power, require_match
from cryoiso.refine.likelihood import Whitened, score_and_norm, whiten
from cryoiso.refine.maximise import NoiseSums
from cryoiso.refine.schedule import ScheduleState

if TYPE_CHECKING:
    from jaxtyping import Int

STEPS_BEFORE = 3
"""Iterations with one class in which junk is found, before there are several classes."""


def initial_classes(task: Classification) -> ClassModel:
    """First references, even occupancies, noise from the images' mean power (collective)."""
    run, n, k = task.run, len(task.particles), task.settings.classes
    sigma2 = mean_power(run)
    state = first_state(run, task.settings.lowpass_A)
    rotation, shift_A = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 2))
    if task.particles.rotation is not None:
        rotation, shift_A = task.particles.require_poses()
    none = np.zeros((run.box,) * 3, np.float32)
    model = ClassModel(
        state, [dict.fromkeys(HALVES, none) for _ in range(k)], sigma2, np.full(k, 1 / k), rotation, shift_A,
        np.full((n, k), 1 / k), np.ones(n),
    )  # fmt: skip
    if task.request.maps:
        model.references = _scaled(task, sigma2, state)
    else:
        model.posterior = np.eye(k)[random_classes(task)]
        model.posterior[~run.raw] = 1 / k  # auxiliary particles are of no class
        if task.settings.junk and k > 1:
            _without_junk(task, model)
        model.references, model.total_weight = _of_subsets(task, model)
    return model


def _scaled(task: Classification, sigma2: np.ndarray, state: ScheduleState) -> Maps:
    """The given maps, low-passed and on the grey scale of the images; one for both halves."""
    scaled_maps: Maps = []
    for number, class_map in enumerate(task.request.maps, 1):
        first = task.run.first_reference(class_map, task.settings.lowpass_A)
        if task.searched:
            scale = grey_scale(task.run, first, sigma2, state)
        else:
            scale = _scale_at_given_poses(task, first, sigma2, state)
        if task.comm.rank == 0:
            logger.info("reference %d: grey scale multiplied by %.4g to match the images", number, scale)
        scaled_maps.append(dict.fromkeys(HALVES, (first * scale).astype(np.float32)))
    return scaled_maps


def _scale_at_given_poses(
    task: Classification, reference: np.ndarray, sigma2: np.ndarray, state: ScheduleState
) -> float:
    """Least-squares factor between a map's projections at the given poses and the images (collective).

    Raises:
        InputError: they do not correlate, or do so with the opposite sign.
    """
    run = task.run
    tensor = torch.as_tensor(reference, device=run.device)
    volume = FourierVolume.from_volume(tensor, run.settings.padding, state.radius_px)
    terms = np.zeros((len(task.particles), 2))
    own_terms: list[tuple[np.ndarray, np.ndarray]] = []
    for half in HALVES:
        batches, most = run.owned(half)
        for i in range(most):
            run.heed()
            if i < len(batches):
                batch = task.intensity.of(run.reader.read(batches[i], state.radius_px))
                white = whiten(batch, sigma2).within(state.radius_px)
                poses = task.prior_poses(batches[i])
                assert poses is not None and poses.rotation is not None
                score, norm = score_and_norm(white, volume, poses.rotation, poses.shift_px)
                moments = torch.stack([score + norm / 2, norm], 1).double().cpu().numpy()
                own_terms.append((batches[i], moments))
    for rows, values in (item for part in run.comm.allgather(own_terms) for item in part):
        terms[rows] = values
    cross, square = terms.T
    match = Match.of(np.column_stack([cross, -cross, square, square]))
    require_match(match)
    return match.factor


def random_classes(task: Classification) -> Int[np.ndarray, " n"]:
    """(N,) class, from 0, of each particle in the first references: even numbers in each half-set, drawn by seed and
    uid."""
    particles, k = task.particles, task.settings.classes
    keys = shuffle_keys(task.request.base.seed, "first classes", particles.uid)
    drawn = np.zeros(len(particles), np.int64)
    for half in HALVES:
        rows = np.flatnonzero(particles.half == half)
        drawn[rows[np.argsort(keys[rows], kind="stable")]] = np.arange(len(rows)) % k
    return drawn


def _without_junk(task: Classification, model: ClassModel) -> None:
    """Finds images without a particle in a classification with one class, before there are several (collective).

    Junk makes the first maps too weak, a little more so in one class than in another, and particles prefer the stronger
    map: it would take all of them.
    """
    settings = task.settings.model_copy(update={"classes": 1})
    alone = Classification(replace(task.request, settings=settings), task.comm, task.run.device, task.run.diameter)
    classes = initial_classes(alone)
    for _ in range(STEPS_BEFORE):
        classes = alone.step(classes)
    model.particle, model.junk, model.sigma2 = classes.particle, classes.junk, classes.sigma2


def _of_subsets(task: Classification, model: ClassModel) -> tuple[Maps, Maps]:
    """Maps of random subsets at their given poses, low-passed, and their total weights; both halves share all of it
    (collective)."""
    run, lowpass_A, k = task.run, task.settings.lowpass_A, model.classes
    task.particles.require_poses()
    empty = torch.zeros((run.box,) * 3, device=run.device)
    nothing = FourierVolume.from_volume(empty, run.settings.padding, model.state.radius_px)

    share = model.share()

    def posterior(batch: Batch, white: Whitened) -> ClassPosterior:
        even = torch.zeros(len(batch), device=run.device)
        parts = [at_given_poses(task.at_given_poses(batch.rows), even)] * k
        return ClassPosterior(tuple(weighted(parts, share[batch.rows])), np.empty(0))

    sums: list[dict[int, FourierSums]] = [{} for _ in range(k)]
    noise = NoiseSums.empty(*model.sigma2.shape)
    for half in HALVES:
        task.add_half(half, posterior, [nothing] * k, model, noise, sums)
    class_maps = task.make_maps(sums, task.weights(model.posterior, model.particle), model, model.sigma2, lowpass_A)
    low = [
        {h: np.asarray(lowpass(torch.as_tensor(reference[h]), run.pixel, lowpass_A), np.float32) for h in HALVES}
        for reference in class_maps.references
    ]
    return low, share_out(run, class_maps, model.state.radius_px)
