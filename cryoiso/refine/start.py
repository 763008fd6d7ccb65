"""What the first iteration starts from: the low-passed reference on the data's grey scale, and the noise spectra."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import stdtr

from cryoiso.core.errors import InputError
from cryoiso.core.log import ProgressLine, logger
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import DensityMap
from cryoiso.physics.filters import lowpass
from cryoiso.physics.fourier import Disc, disc
from cryoiso.physics.project import FourierVolume
from cryoiso.refine import offsets
from cryoiso.refine.likelihood import ReferenceSlices, Whitened, cross_and_norm, whiten
from cryoiso.refine.maximise import NOISE_UNIT, NoiseSums
from cryoiso.refine.model import Model
from cryoiso.refine.noise import empty_facts, group_medians, mean_spectra, require_sound_images, tell_of_empty
from cryoiso.refine.schedule import State, disc_of_shifts, first_shift_sd_px
from cryoiso.refine.search import Given, SearchPlan

if TYPE_CHECKING:
    from cryoiso.refine.iterate import Refinement

SCALE_PARTICLES = (512, 2048, 8192)
"""Images that are compared with the reference: the first number, then more where those cannot tell it from chance."""
CHANCE = 3e-5
"""Images of noise match a reference by chance in fewer cases than this (four standard errors)."""


def initial_model(run: Refinement, lowpass_A: float) -> Model:
    """The low-passed reference, the same for both halves unless each was given its own, scaled to the images; noise
    from the images' mean power; for a local search the given poses (collective)."""
    sigma2 = mean_power(run)
    state = first_state(run, lowpass_A)
    reference = first_reference(run, run.request.reference, lowpass_A)
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
    elif run.has_offsets and run.comm.rank == 0:
        offsets.tell_of_given(run.centre_px, run.box)
    return Model(state, scaled, sigma2, rotation, shift_A)


def first_state(run: Refinement, lowpass_A: float) -> State:
    """The search is as fine as the low-passed reference, and no shift has been found yet."""
    radius = int(np.clip(round(run.box * run.pixel / lowpass_A), 3, run.limit))
    return State(radius_px=radius, shift_sd_px=first_shift_sd_px(run.box))


def first_reference(run: Refinement, given: DensityMap, lowpass_A: float) -> np.ndarray:
    """(D, D, D) float32: the map low-passed, inside the sphere of the particle's diameter."""
    return np.asarray(lowpass(torch.as_tensor(given.data), run.pixel, lowpass_A), np.float32) * run.sphere


def mean_power(run: Refinement) -> np.ndarray:
    """(G, S) mean power of the images by optics group and shell: an upper bound of the noise; infinite where a shell
    is empty.

    Raises:
        InputError: an image with values that are not numbers, or one or all of a group without power, or one that
            holds most of the power of all.
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
                both = (square if weight is None else square * weight, batch.ctf.square())
                seen.append((batch.rows, torch.stack([x.double().mean(1) for x in both], 1).cpu().numpy()))
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
    """How the projections of a reference agree with images, in coefficients that did not choose the poses."""

    factor: float
    """Least-squares grey scale of the reference."""
    chance: float
    """Of agreeing so well if the images had nothing to do with the reference."""
    inverted: bool
    """They agree better with their sign changed; ``chance`` is then that of this agreement."""
    images: int
    """that were looked at"""

    @classmethod
    def of(cls, terms: np.ndarray) -> Match:
        """From the columns of ``_fit``, (n, 4)."""
        white, dark, norm, norm_dark = terms.sum(0)
        factor = float(white / norm) if norm > 0 else 0.0
        inverted = bool(dark > 0 and dark**2 * norm > max(white, 0.0) ** 2 * norm_dark)
        return cls(factor, _chance(terms[:, int(inverted)]), inverted, len(terms))


def _chance(cross: np.ndarray) -> float:
    """Student's one-sided test that the images' cross terms (n,) have a mean above zero.

    Poses and factor come from different coefficients, so that noise gives terms of either sign, whatever pose it chose.
    """
    n, mean = len(cross), float(cross.mean())
    if n < 2 or not np.isfinite(mean):
        return 0.0 if mean > 0 else 1.0
    error = float(cross.std(ddof=1)) / np.sqrt(n)
    return float(stdtr(n - 1, -mean / error)) if error > 0 else float(mean <= 0)


def match(run: Refinement, reference: np.ndarray, sigma2: np.ndarray, state: State) -> Match:
    """How well the images match a reference; more of them are asked where few cannot tell (collective).

    The pose is chosen with one half of the coefficients (even ones) by normalised correlation and the factor fitted
    with the other half, so that the noise which made a pose win does not inflate the factor.

    Noise that was once refined against the reference matches it around the offsets that it was given then. So a global
    search looks at the same shifts for all images, in a disc wide enough for nearly all offsets.
    """
    volume, order = _volume(run, reference, state), _order(run)
    plan, known = run.plan(state), run.request.local_deg is not None
    if not known and run.has_offsets:
        widest_px = float(np.quantile(np.hypot(*run.centre_px.T), 0.95))
        spacing_px, reach_px = 2 * plan.levels[0].spacing_px, float(plan.shifts_px.norm(dim=1).max())
        plan = replace(plan, shifts_px=disc_of_shifts(reach_px + widest_px, spacing_px).to(run.device))
    terms = np.zeros((0, 4))
    for most in SCALE_PARTICLES:
        more = _terms(run, np.sort(order[len(terms) : most]), volume, plan, sigma2, state, known)
        terms = np.concatenate([terms, more])
        found = Match.of(terms)
        if found.chance < CHANCE or len(terms) == len(order):
            break
    return found


def _volume(run: Refinement, reference: np.ndarray, state: State) -> FourierVolume:
    data = torch.as_tensor(reference, device=run.device)
    return FourierVolume.from_volume(data, run.settings.padding, state.radius_px)


def _order(run: Refinement) -> np.ndarray:
    """Rows in the order in which they are compared with the reference."""
    return np.argsort(shuffle_keys(run.request.seed, "grey scale", run.particles.uid), kind="stable")


def _terms(
    run: Refinement,
    rows: np.ndarray,
    volume: FourierVolume,
    plan: SearchPlan,
    sigma2: np.ndarray,
    state: State,
    known: bool,
) -> np.ndarray:
    """The columns of ``_fit`` for these rows; ``known``: around what is given of their poses (collective)."""
    chosen = np.zeros(len(run.particles), bool)
    chosen[rows] = True
    mine: list[tuple[np.ndarray, np.ndarray]] = []
    for half in (1, 2):
        batches, most = run.owned(half)
        for i in range(most):
            run.heed()
            batch_rows = batches[i] if i < len(batches) else np.zeros(0, np.int64)
            some = np.flatnonzero(chosen[batch_rows])
            if len(some):
                batch = run.reader.read(batch_rows, state.radius_px)
                near = run.given(batch_rows) if known else None
                mine.append((batch_rows[some], _fit(whiten(batch, sigma2), some, volume, plan, near)))
    everything = [item for part in run.comm.allgather(mine) for item in part]
    # in row order, so that the sums have the same bits on any number of ranks
    order = np.argsort(np.concatenate([r for r, _ in everything]), kind="stable")
    return np.concatenate([values for _, values in everything])[order]


def grey_scale(run: Refinement, reference: np.ndarray, sigma2: np.ndarray, state: State) -> float:
    """Least-squares factor between the reference's projections and the images (collective).

    Raises:
        InputError: the reference does not correlate with the images, or does so with the opposite sign.
    """
    found = match(run, reference, sigma2, state)
    require_match(found)
    if run.request.local_deg is not None or not run.has_offsets:
        return found.factor
    rows, volume = np.sort(_order(run)[: found.images]), _volume(run, reference, state)
    return Match.of(_terms(run, rows, volume, run.plan(state), sigma2, state, True)).factor


def require_match(found: Match) -> None:
    """Stops where images and reference have nothing to do with each other.

    Raises:
        InputError: they do not correlate beyond chance, or do so with the opposite sign.
    """
    if found.chance >= CHANCE:
        raise InputError(
            "the reference does not match the images: its projections do not correlate with them beyond chance",
            expected=f"a correlation that noise reaches in less than one of {1 / CHANCE:,.0f} sets",
            found=f"one that noise reaches in {100 * found.chance:.2g} % of them, in {found.images:,} images",
            hint="Check the reference's identity, the pixel size, and whether the images show particles at all.",
        )
    if found.inverted:
        raise InputError(
            "the images match the reference's projections better with their sign changed",
            expected="protein white in both",
            found="opposite signs",
            hint="Set invert = 'yes' under [particles] if protein is dark in the images, or invert the reference.",
        )


def _fit(white: Whitened, rows: np.ndarray, volume: FourierVolume, plan: SearchPlan, given: Given | None) -> np.ndarray:
    """(n, 4) of each image: sum of cross terms and of squares at its best pose, as it is and with its sign changed.

    Columns: cross, cross with changed sign, squares, squares at the pose for the changed sign.
    """
    ratio = 1.0 if white.magnification is None else float(np.linalg.norm(white.magnification, 2))
    where = disc(white.where.box_px, volume.radius_px / ratio)
    if given is not None:
        white = given.centre(white)
        given = given.near()
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
