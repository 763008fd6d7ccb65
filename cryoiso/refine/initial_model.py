"""Start of the first iteration: the low-passed reference on the data's grey scale, and the noise spectra."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import stdtr

from cryoiso.core.errors import InputError
from cryoiso.core.log import ProgressLine, logger
from cryoiso.core.rng import shuffle_keys
from cryoiso.physics.fourier import Disc, fourier_disc
from cryoiso.physics.projection import FourierVolume
from cryoiso.refine import offsets
from cryoiso.refine.intensity import Intensity
from cryoiso.refine.likelihood import ReferenceSlices, Whitened, cross_and_norm, whiten
from cryoiso.refine.maximise import NOISE_UNIT, NoiseSums
from cryoiso.refine.model import Model
from cryoiso.refine.noise import empty_facts, group_medians, mean_spectra, require_sound_images, tell_of_empty
from cryoiso.refine.schedule import ScheduleState, disc_of_shifts, first_shift_sd_px, global_grid, search_plan
from cryoiso.refine.search import PriorPoses, SearchPlan

if TYPE_CHECKING:
    from cryoiso.refine.iterate import Refinement

SCALE_PARTICLES = (512, 2048, 8192)
"""Images compared with the reference: the first number, then more if those are not conclusive."""
CHANCE = 3e-5
"""Images of noise match a reference by chance in fewer cases than this (four standard errors)."""


def initial_model(run: Refinement, lowpass_A: float) -> Model:
    """The low-passed reference, the same for both halves unless each has its own, scaled to the images; noise from the
    images' mean power; for a local search the given poses (collective)."""
    sigma2 = mean_power(run)
    state = first_state(run, lowpass_A)
    references, halves = run.first_references(lowpass_A), run.request.half_references
    common = references[1] if halves is None else run.first_reference(run.request.reference, lowpass_A)
    scale = run.request.grey_scale
    if scale is None:
        scale = grey_scale(run, common, sigma2, state, None if halves is None else references)
    if run.comm.rank == 0:
        logger.info(
            "reference low-passed at %.1f Å, grey scale multiplied by %.4g to match the images", lowpass_A, scale
        )
    scaled = {h: (r * scale).astype(np.float32) for h, r in references.items()}
    n = len(run.particles)
    rotation, shift_A = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 2))
    if run.request.local_deg is not None:
        rotation, shift_A = run.particles.require_poses()
    elif run.has_offsets and run.comm.rank == 0:
        offsets.tell_of_given(run.centre_px, run.box)
    # those of the file belong to its poses
    intensity = Intensity.ones(n) if run.request.local_deg is None else Intensity.of_particles(run.particles)
    return Model(state, scaled, sigma2, intensity, rotation, shift_A)


def first_state(run: Refinement, lowpass_A: float) -> ScheduleState:
    """Initial state: the search is as fine as the low-passed reference, and no shift has been estimated yet."""
    radius = int(np.clip(round(run.box * run.pixel / lowpass_A), 3, run.limit))
    return ScheduleState(radius_px=radius, shift_sd_px=first_shift_sd_px(run.box))


def mean_power(run: Refinement) -> np.ndarray:
    """(G, S) mean power of the images by optics group and shell: an upper bound of the noise; infinite where a shell is
    empty.

    Raises:
        InputError: an image with values that are not finite, images without power (one, or a whole group), or one with
        most of the power of all.
    """
    noise = NoiseSums.empty(len(run.particles.groups), run.box // 2 + 1)
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    for half in (1, 2):
        batches, most = run.owned(half)
        radius = run.reader.preload_radius(run.limit, batches)
        line = ProgressLine(f"noise of half {half}", most, active=run.comm.rank == 0)
        for i in range(most):
            run.heed()
            if i < len(batches):
                batch = run.reader.read(batches[i], radius)
                square = batch.coefficients.abs().square()
                noise.add(batch, square)
                weight = batch.power_weight()
                sums = (square if weight is None else square * weight, batch.ctf.square())
                seen.append((batch.rows, torch.stack([x.double().mean(1) for x in sums], 1).cpu().numpy()))
            line.update(i + 1)
        line.close()
    facts, read = np.zeros((len(run.particles), 2)), np.zeros(len(run.particles), bool)
    for rows, values in (item for part in run.comm.allgather(seen) for item in part):
        facts[rows], read[rows] = values, True
    # of particles in no half-set nothing is known
    facts[~read] = group_medians(facts, run.particles.optics, read)[~read]
    require_sound_images(run.particles, facts)
    power, count = run.comm.sum_all(noise.power), run.comm.sum_all(noise.count)
    spectra = mean_spectra(power / NOISE_UNIT, count / NOISE_UNIT, run.particles.groups)
    if run.comm.rank == 0:
        tell_of_empty(empty_facts(spectra, run.particles.groups, run.box))
    run.heed_empty(spectra)
    return spectra


@dataclass(frozen=True)
class Match:
    """Agreement of the projections of a reference with images, in coefficients that were not used to choose the
    poses."""

    factor: float
    """Least-squares grey scale of the reference."""
    chance: float
    """Probability of such agreement if the images were unrelated to the reference."""
    inverted: bool
    """They agree better with their sign changed; ``chance`` is then that of this agreement."""
    images: int
    """number of images compared"""

    @classmethod
    def of(cls, terms: np.ndarray) -> Match:
        """Match from the columns of ``_fit``, (n, 4)."""
        white, dark, norm, norm_dark = terms.sum(0)
        factor = float(white / norm) if norm > 0 else 0.0
        inverted = bool(dark > 0 and dark**2 * norm > max(white, 0.0) ** 2 * norm_dark)
        return cls(factor, _chance(terms[:, int(inverted)]), inverted, len(terms))


def _chance(cross: np.ndarray) -> float:
    """Student's one-sided test for a positive mean of the images' cross terms (n,).

    Poses and factor come from different coefficients, so that noise gives terms of either sign for any selected pose.
    """
    n, mean = len(cross), float(cross.mean())
    if n < 2 or not np.isfinite(mean):
        return 0.0 if mean > 0 else 1.0
    error = float(cross.std(ddof=1)) / np.sqrt(n)
    return float(stdtr(n - 1, -mean / error)) if error > 0 else float(mean <= 0)


def match(run: Refinement, references: dict[int, np.ndarray], sigma2: np.ndarray, state: ScheduleState) -> Match:
    """Agreement of the raw images with the references; more images are used if few are not conclusive (collective).

    The pose is chosen with one half of the coefficients (even ones) by normalised correlation and the factor fitted
    with the other half, so that the noise that selected a pose does not inflate the factor.

    Noise must not match, whatever its history. Noise that was once refined against a reference matches it at the
    resulting poses and offsets, so all views are searched, also before a local search, and the same shifts for all
    images, in a disc wide enough for nearly all offsets. Noise also matches a map that was made from it, so the images
    of a half-set are compared with the reference of the other one.

    Args:
        references: half -> the half-set's own reference (D, D, D).
    """
    plan = _plan_for_all_views(run, state)
    radius_px = state.radius_px if run.request.local_deg is None else min(state.radius_px, plan.coarse_radius_px)
    volumes, order = _volumes(run, references, radius_px), _order(run)
    terms = np.zeros((0, 4))
    for most in SCALE_PARTICLES:
        more = _terms(run, np.sort(order[len(terms) : most]), volumes, plan, sigma2, known=False)
        terms = np.concatenate([terms, more])
        result = Match.of(terms)
        if result.chance < CHANCE or len(terms) == len(order):
            break
    return result


def _plan_for_all_views(run: Refinement, state: ScheduleState) -> SearchPlan:
    """The global search's first step, with one disc of shifts for all images."""
    plan = run.plan(state)
    if run.request.local_deg is not None:
        rotations = global_grid(run.settings.healpix_order, run.request.symmetry).to(run.device)
        plan = search_plan(state, run.settings, rotations, run.box, run.pixel, run.diameter)
    if run.has_offsets:
        widest_px = float(np.quantile(np.hypot(*run.centre_px.T), 0.95))
        spacing_px, reach_px = 2 * plan.levels[0].spacing_px, float(plan.shifts_px.norm(dim=1).max())
        plan = replace(plan, shifts_px=disc_of_shifts(reach_px + widest_px, spacing_px))
    return replace(plan, shifts_px=plan.shifts_px.to(run.device))


def _volumes(run: Refinement, references: dict[int, np.ndarray], radius_px: int) -> dict[int, FourierVolume]:
    """Half -> reference for the comparison with its images: that of the other half-set."""
    maps = {id(data): data for data in references.values()}
    volumes = {
        key: FourierVolume.from_volume(torch.as_tensor(data, device=run.device), run.settings.padding, radius_px)
        for key, data in maps.items()
    }
    return {half: volumes[id(references[3 - half])] for half in (1, 2)}


def _order(run: Refinement) -> np.ndarray:
    """Rows of the raw particles in the order in which they are compared with the reference."""
    rows = np.flatnonzero(run.raw)
    return rows[np.argsort(shuffle_keys(run.request.seed, "grey scale", run.particles.uid[rows]), kind="stable")]


def _terms(
    run: Refinement,
    rows: np.ndarray,
    volumes: dict[int, FourierVolume],
    plan: SearchPlan,
    sigma2: np.ndarray,
    known: bool,
) -> np.ndarray:
    """The columns of ``_fit`` for these rows; ``known``: around their given poses (collective)."""
    chosen = np.zeros(len(run.particles), bool)
    chosen[rows] = True
    own_terms: list[tuple[np.ndarray, np.ndarray]] = []
    for half in (1, 2):
        batches, most = run.owned(half)
        for i in range(most):
            run.heed()
            batch_rows = batches[i] if i < len(batches) else np.zeros(0, np.int64)
            some = np.flatnonzero(chosen[batch_rows])
            if len(some):
                batch = run.reader.read(batch_rows, volumes[half].radius_px)
                near = run.prior_poses(batch_rows) if known else None
                own_terms.append((batch_rows[some], _fit(whiten(batch, sigma2), some, volumes[half], plan, near)))
    everything = [item for part in run.comm.allgather(own_terms) for item in part]
    # in row order, so that the sums have the same bits on any number of ranks
    order = np.argsort(np.concatenate([r for r, _ in everything]), kind="stable")
    return np.concatenate([values for _, values in everything])[order]


def grey_scale(
    run: Refinement,
    reference: np.ndarray,
    sigma2: np.ndarray,
    state: ScheduleState,
    references: dict[int, np.ndarray] | None = None,
) -> float:
    """Least-squares factor between the common reference's projections and the raw images (collective).

    Args:
        reference: (D, D, D).
        references: half -> the half-set's own reference; None: the common one. Images must match these.

    Raises:
        InputError: the references do not correlate with the images, or do so with the opposite sign.
    """
    common, most = dict.fromkeys((1, 2), reference), SCALE_PARTICLES[0]
    known = run.request.local_deg is not None or run.has_offsets
    if not run.request.judged:
        result = match(run, references or common, sigma2, state)
        require_match(result)
        if not known and references is None:
            return result.factor
        most = result.images
    rows, volumes = np.sort(_order(run)[:most]), _volumes(run, common, state.radius_px)
    return Match.of(_terms(run, rows, volumes, run.plan(state), sigma2, known)).factor


def require_match(result: Match) -> None:
    """Refuse images that do not match the reference.

    Raises:
        InputError: they do not correlate beyond chance, or do so with the opposite sign.
    """
    if result.chance >= CHANCE:
        raise InputError(
            "the reference does not match the images: its projections do not correlate with them beyond chance",
            expected=f"a correlation that noise reaches in less than one of {1 / CHANCE:,.0f} sets",
            found=f"one that noise reaches in {100 * result.chance:.2g} % of them, in {result.images:,} images",
            hint="Check the reference's identity, the pixel size, and whether the images show particles at all.",
            code="reference-does-not-match-images",
        )
    if result.inverted:
        raise InputError(
            "the images match the reference's projections better with inverted contrast",
            expected="protein white in both",
            found="opposite signs",
            hint="Set invert = 'yes' under [particles] if protein is dark in the images, or invert the reference.",
            code="contrast-inverted",
        )


def _fit(
    white: Whitened, rows: np.ndarray, volume: FourierVolume, plan: SearchPlan, prior: PriorPoses | None
) -> np.ndarray:
    """(n, 4) of each image: sum of cross terms and of squares at its best pose, as it is and with its sign changed.

    Columns: cross, cross with changed sign, squares, squares at the pose for the changed sign.
    """
    ratio = 1.0 if white.magnification is None else float(np.linalg.norm(white.magnification, 2))
    disc = fourier_disc(white.disc.box_px, volume.radius_px / ratio)
    if prior is not None:
        white = prior.centre(white)
        prior = prior.near()
    halves = [_every_second(disc, i) for i in (0, 1)]

    def slices_of(rotations: torch.Tensor) -> list[ReferenceSlices]:
        return [ReferenceSlices.of(volume, rotations, part, white.magnification) for part, _ in halves]

    slices = slices_of(plan.rotations) if prior is None else []
    width = len(plan.shifts_px) if prior is None else max(len(plan.shifts_px), disc.size)
    step = max(1, (1 << 24) // (width * len(plan.rotations)))
    scores = []
    for i in range(0, len(rows), step):
        index = torch.as_tensor(rows[i : i + step], device=white.data.device)
        if prior is not None:
            slices = slices_of(prior.take(index).turned(plan.rotations))
        parts = [
            Whitened(white.data[index][:, keep], white.weight[index][:, keep], part, white.magnification)
            for part, keep in halves
        ]
        terms = [cross_and_norm(part, views, plan.shifts_px) for part, views in zip(parts, slices, strict=True)]
        scores.append(_held_out(*terms))
    return torch.cat(scores).cpu().numpy()


def _held_out(choose: tuple[torch.Tensor, torch.Tensor], fit: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Terms of the second half of the coefficients at the poses chosen with the first half, (B, 4) float64."""
    correlation = (choose[0] / choose[1].sqrt()[:, None, :]).flatten(1)
    cross, views = fit[0].flatten(1), fit[1].shape[1]
    best, worst = correlation.argmax(1, keepdim=True), correlation.argmin(1, keepdim=True)
    columns = [cross.gather(1, best), -cross.gather(1, worst)]
    columns += [fit[1].gather(1, best % views), fit[1].gather(1, worst % views)]
    return torch.cat(columns, 1).double()


def _every_second(disc: Disc, first: int) -> tuple[Disc, np.ndarray]:
    keep = np.arange(first, disc.size, 2)
    part = Disc(disc.box_px, disc.radius_px, disc.ky[keep], disc.kx[keep], disc.flat[keep], disc.shell[keep])
    return part, keep
