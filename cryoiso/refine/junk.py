"""Images without a particle: a class of its own beside that of particles, judged within viewing cones.

An image of this class shows nothing, or a smooth ball: the spherical mean of the reference, low-passed, at any shift.
Its likelihood is compared with that of the particle, both summed over what is not known (views and shifts; shifts).

Rare views must not be lost. Where few images saw a direction the reference is poor, and a true particle there fits
many poses a little. So its evidence is that of all poses, also of those that the search leaves out (``log_evidence``).
And nothing is judged by one measure for all views: in each cone the reference has an amplitude of its own, the one that
makes the images of this cone most likely. Where it knows nothing the amplitude is small, then the evidence is about
even, and images stay. The share of junk is the cone's as well, but an image is judged with a prior of at most 10 %: it
is left out because of what it shows, not because of its neighbours, and junk gathers in the cones of rare views.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import Communicator
from cryoiso.core.types import Particles
from cryoiso.metrics.view_cones import ViewCones, cone_facts
from cryoiso.physics.filters import lowpass
from cryoiso.physics.projection import FourierVolume
from cryoiso.refine.batches import Batch
from cryoiso.refine.intensity import Intensity
from cryoiso.refine.likelihood import ReferenceSlices, Whitened, global_scores, score_and_norm
from cryoiso.refine.rows import gathered_rows
from cryoiso.refine.search import Posterior, PriorPoses, SearchPlan

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BLOB_LOWPASS_A = 30.0
CONE_DEG = 29.0
"""Width of a cone: 46 on the whole sphere."""
FIRST_SHARE, FIRST_COUNT = 0.05, 4.0
"""Share of junk in a cone before any image is seen, and the images that this belief counts for."""
MOST_SHARE = 0.5
"""No cone's share is larger."""
MOST_PRIOR = 0.1
"""Nor the prior by which its images are judged: one is junk where nothing explains it nine times as well."""
AMPLITUDES = 10.0 ** (-0.05 * np.arange(21))
"""Of the reference in a cone: 1 to 0.1."""
AMPLITUDE_SD = 0.7
"""Standard deviation of the prior of their logarithm, about 0."""
JUNK_COLUMN = "cryoisoJunkProbability"
"""Of the STAR file."""
MUCH_JUNK = 0.3
"""Share of images above which a warning says that wrong poses look like junk."""
LEAST_PROBABILITY = 1e-6
"""An image's smallest weight in a reconstruction."""
ROUNDS = 30
"""of expectation-maximisation of a cone's share"""
FACTS = ("cross", "norm", "occam", "junk", "spread")
"""What is kept of each image: Re <x, c P> / sigma^2 and |c P|^2 / sigma^2 at its best pose, with the scale that images
of its micrograph have; the log of how much less the evidence of all poses is than the likelihood of that one; the log
evidence of junk; the relative variance of the scales."""


@dataclass(frozen=True)
class JunkPrior:
    """What is known of the cones when an iteration begins."""

    share: Float[np.ndarray, " cones"]
    """(C,) of junk."""
    amplitude: Float[np.ndarray, " cones"]
    """(C,) of the reference."""

    def particle_probability(
        self, facts: Float[np.ndarray, "n 5"], cone: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """(N,) posterior probability that an image shows a particle, from its facts (N, 5) and its cone (N,)."""
        prior = np.minimum(self.share[cone], MOST_PRIOR)
        odds = np.log1p(-prior) - np.log(prior)
        return _logistic(odds + advantage(facts, self.amplitude[cone]))


def advantage(facts: Float[np.ndarray, "n 5"], amplitude: Float[np.ndarray, " n"] | float) -> Float[np.ndarray, " n"]:
    """(N,) log evidence of the particle over that of junk, D(a) = a x - a^2 n / 2 - occam - junk, x and n those of the
    best pose: that of a reference multiplied by a.

    Where scales differ between images by the relative variance t, it is the mean over a normal distribution of them,
    (a x - a^2 n / 2 + t a^2 x^2 / 2) / (1 + t a^2 n) - log(1 + t a^2 n) / 2 instead of the first two terms. With the
    scale fitted to the image itself nothing would be junk: an image without a particle fits well with a scale of 0.
    """
    cross, norm, occam, junk, spread = np.asarray(facts, np.float64).T
    x, n = amplitude * cross, np.square(amplitude) * norm
    gain = (x - n / 2 + spread * np.square(x) / 2) / (1 + spread * n) - np.log1p(spread * n) / 2
    ratio: np.ndarray = gain - occam - junk
    return ratio


def learned(facts: Float[np.ndarray, "n 5"], cone: Int[np.ndarray, " n"], cones: int) -> JunkPrior:
    """Share and amplitude of each cone that make its images most likely.

    For each amplitude the share follows by expectation-maximisation with a Beta prior; the amplitude is that of the
    largest posterior, with a log-normal prior about 1.

    Args:
        facts: (N, 5) columns as FACTS, of all images in row order.
        cone: (N,) of each image.
        cones: number of cones.
    """
    share, amplitude = np.full(cones, FIRST_SHARE), np.ones(cones)
    for c in np.unique(cone).tolist():
        gain = np.stack([advantage(facts[cone == c], a) for a in AMPLITUDES])
        shares, objective = _shares(gain)
        best = int(np.argmax(objective - np.square(np.log(AMPLITUDES)) / (2 * AMPLITUDE_SD**2)))
        share[c], amplitude[c] = shares[best], AMPLITUDES[best]
    return JunkPrior(share, amplitude)


def _shares(gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of junk (A,) and log posterior (A,) of images with log evidence ratios (A, n)."""
    prior = FIRST_SHARE * FIRST_COUNT, (1 - FIRST_SHARE) * FIRST_COUNT
    share = np.full(len(gain), FIRST_SHARE)
    for _ in range(ROUNDS):
        junk = _logistic(np.log(share / (1 - share))[:, None] - gain).sum(1)
        share = np.minimum((junk + prior[0]) / (gain.shape[1] + sum(prior)), MOST_SHARE)
    likelihood = np.logaddexp(np.log1p(-share)[:, None] + gain, np.log(share)[:, None]).sum(1)
    return share, likelihood + prior[0] * np.log(share) + prior[1] * np.log1p(-share)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def spherical_mean(
    volume: Float[np.ndarray, "d d d"], pixel_size_A: float, lowpass_A: float = BLOB_LOWPASS_A
) -> Float[np.ndarray, "d d d"]:
    """(D, D, D) float32: every voxel the mean of those at its distance from the centre, low-passed."""
    box = len(volume)
    axis2 = np.square(np.arange(box) - box // 2)
    radius = np.sqrt(axis2[:, None, None] + axis2[None, :, None] + axis2[None, None, :])
    shell = np.rint(radius).astype(np.int64)
    mean = np.bincount(shell.ravel(), np.asarray(volume, np.float64).ravel()) / np.bincount(shell.ravel())
    mean[box // 2 :] = 0.0  # beyond the box's sphere there are corners only
    ball = np.interp(radius, np.arange(len(mean)), mean).astype(np.float32)
    return np.asarray(lowpass(torch.as_tensor(ball), pixel_size_A, lowpass_A), np.float32)


def log_evidence(posterior: Posterior, plan: SearchPlan) -> Float[np.ndarray, " n"]:
    """(B,) log of the mean likelihood of all poses, also of those that no level of the search refined.

    Of an image that fits many poses a little the search leaves most out: with its own samples alone the evidence of
    weak particles, those of rare views above all, is too small by some 5.
    """
    refined = posterior.log_evidence - plan.log_cells(len(plan.levels))
    return np.asarray(torch.logaddexp(refined, posterior.left_out).double().cpu().numpy())


@dataclass
class JunkJudge:
    """Compares the images of a half-set with its reference and with junk."""

    blob: FourierVolume
    cones: ViewCones
    prior: JunkPrior | None
    """None in the first iteration: all images count as particles."""
    plan: SearchPlan | None
    """None: poses are given and not searched."""

    @classmethod
    def of(
        cls, reference: np.ndarray, pixel_size_A: float, like: FourierVolume, cones: ViewCones,
        prior: JunkPrior | None, plan: SearchPlan | None,
    ) -> JunkJudge:  # fmt: skip
        """
        Args:
            reference: (D, D, D) of the half-set.
            like: the reference as it is searched with.
        """
        ball = torch.as_tensor(spherical_mean(reference, pixel_size_A), device=like.grid.device)
        return cls(FourierVolume.from_volume(ball, like.padding, like.radius_px), cones, prior, plan)

    def facts(
        self,
        white: Whitened,
        score: Tensor,
        norm: Tensor,
        log_evidence: np.ndarray,
        around_px: Tensor | None,
        expected: np.ndarray | None = None,
    ) -> np.ndarray:
        """(B, 5) float64, columns as FACTS.

        Args:
            white: images, within the radius of the reference.
            score, norm: (B,) log-likelihood and norm at the best pose, as ``likelihood.score_and_norm`` has them.
            log_evidence: (B,) of all poses, normalised.
            around_px: (B, 2) where the content is or, in a search, what shifts are searched around; None: the centre.
            expected: (B, 2) of ``Intensity.expectation``; None: equal scales.
        """
        expected = np.tile([1.0, 0.0], (len(score), 1)) if expected is None else expected
        ratio = torch.as_tensor(expected[:, :1], dtype=torch.float32, device=white.weight.device)
        white = replace(white, data=white.data * ratio, weight=white.weight * ratio.square())
        junk = self.evidence(white, around_px).double().cpu().numpy()
        best, square = (part.double().cpu().numpy() for part in (score, norm))
        factor, spread = expected.T
        cross = (best + square / 2) * factor
        return np.column_stack([cross, square * np.square(factor), best - log_evidence, junk, spread])

    def evidence(self, white: Whitened, centre_px: Tensor | None) -> Tensor:
        """(B,) log evidence of junk: the mean of that of nothing (0) and of the ball, at ``centre_px`` or, in a search,
        at all shifts around it."""
        if centre_px is not None:
            white = PriorPoses(None, centre_px).centre(white)
        identity = torch.eye(3, device=white.data.device)[None]
        slices = ReferenceSlices.of(self.blob, identity, white.disc, white.magnification)
        if self.plan is None:
            none = torch.zeros(1, 2, device=white.data.device)
            ball = global_scores(white, slices, none, none[:, 0])[:, 0, 0]
        else:
            shifts = self.plan.shifts_px
            log_prior = -shifts.square().sum(1) / (2 * self.plan.shift_sd_px**2)
            scores = global_scores(white, slices, shifts, log_prior)[:, :, 0]
            ball = scores.logsumexp(1) - self.plan.log_shifts(2 * self.plan.levels[0].spacing_px)
        evidence: Tensor = torch.logaddexp(torch.zeros_like(ball), ball) - np.log(2.0)
        return evidence

    def particle_probability(self, facts: np.ndarray, rotation: Tensor) -> np.ndarray:
        """(B,) by what the iteration before learned of the cones."""
        if self.prior is None:
            return np.ones(len(facts))
        return self.prior.particle_probability(facts, self.cones.index(rotation[:, 2].double().cpu().numpy()))


class JunkSearch:
    """The junk class of one iteration of a refinement; without cones it is switched off and changes nothing."""

    def __init__(
        self, cones: ViewCones | None, prior: JunkPrior | None, plan: SearchPlan, intensity: Intensity | None = None
    ) -> None:
        """
        Args:
            intensity: of all images; None: equal.
        """
        self.cones, self.prior, self.plan, self.intensity = cones, prior, plan, intensity
        self._found: list[tuple[np.ndarray, np.ndarray]] = []
        self._facts = np.zeros((0, len(FACTS) + 1))
        self._judge: JunkJudge | None = None

    def begin(self, reference: np.ndarray | None, pixel_size_A: float, volume: FourierVolume) -> None:
        """The next images are of a half-set with this reference, which is searched as ``volume``; None: they are not
        judged."""
        self._judge, self._volume = None, volume
        if self.cones is not None and reference is not None:
            self._judge = JunkJudge.of(reference, pixel_size_A, volume, self.cones, self.prior, self.plan)

    def weighed(self, batch: Batch, white: Whitened, posterior: Posterior, prior: PriorPoses | None) -> Posterior:
        """A search's posterior with the weights of each image times its probability of a particle."""
        if self._judge is None:
            return posterior
        p, inner = posterior, white.within(self._volume.radius_px)
        score, norm = score_and_norm(inner, self._volume, p.best_rotation.float(), p.best_shift_px.float())
        evidence = log_evidence(p, self.plan)
        facts = self._judge.facts(
            inner, score, norm, evidence, None if prior is None else prior.shift_px,
            None if self.intensity is None else self.intensity.expectation(batch.rows),
        )  # fmt: skip
        probability = self._judge.particle_probability(facts, p.best_rotation)
        self._found.append((batch.rows, np.column_stack([facts, probability])))
        factor = torch.as_tensor(probability, dtype=p.weight.dtype, device=p.weight.device)
        return replace(p, weight=p.weight * factor[p.particle])

    def columns(self, judged: np.ndarray, comm: Communicator) -> dict[str, np.ndarray]:
        """Columns for the STAR file (collective).

        Args:
            judged: (N,) bool; the others show particles.
        """
        if self.cones is None:
            return {}
        self._facts = gathered_rows(self._found, len(judged), len(FACTS) + 1, comm)
        return {JUNK_COLUMN: np.where(judged, 1 - self._facts[:, -1], 0.0)}

    def learned(self, rotation: np.ndarray, judged: np.ndarray) -> JunkPrior | None:
        """The prior of the next iteration, after ``columns``, from the poses (N, 3, 3) that were found."""
        if self.cones is None:
            return None
        return learned(self._facts[judged, :-1], self.cones.index(rotation[judged][:, 2]), len(self.cones))


def with_junk_of_file(particles: Particles, file: object = None) -> Particles:
    """The particles with the column of their file among their results, where it has one; a reconstruction uses it.

    Raises:
        InputError: a value is no probability.
    """
    if particles.table is None or JUNK_COLUMN not in particles.table:
        return particles
    import pandas as pd

    text = particles.table[JUNK_COLUMN]
    junk = pd.to_numeric(text, errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~((junk >= 0) & (junk <= 1)))
    if len(wrong):
        raise InputError(
            f"row {int(wrong[0]) + 1}: {JUNK_COLUMN} is no probability", file=file, expected="a number from 0 to 1",
            found=text.iloc[int(wrong[0])], hint="Correct the value, or remove the column.", code="value-out-of-range",
        )  # fmt: skip
    return particles.with_results(**{JUNK_COLUMN: junk})


def particle_probability(particles: Particles) -> Float[np.ndarray, " n"] | None:
    """(N,) probability that an image shows a particle, at least LEAST_PROBABILITY; None: not known."""
    junk = particles.results.get(JUNK_COLUMN)
    return None if junk is None else np.clip(1 - np.asarray(junk, np.float64), LEAST_PROBABILITY, 1.0)


def too_much_junk(facts: dict[str, Any], n: int) -> str:
    """A warning where so many images are called junk that it is more likely that their poses are wrong; else empty.

    On images of beta-galactosidase without any junk, 42 % of them with wrong poses, 5 % are called junk.

    Args:
        facts: of :func:`junk_facts`; n: number of images.
    """
    if facts["count"] <= MUCH_JUNK * n:
        return ""
    return (
        f"refine.junk calls {facts['count']:,} of {n:,} images junk. Images with a wrong pose look like junk, too: do "
        f"not discard them by {JUNK_COLUMN} before you have looked at some and at the map of the others"
    )


def junk_facts(
    cones: ViewCones, rotation: np.ndarray, probability: np.ndarray, prior: JunkPrior | None
) -> dict[str, Any]:
    """Plain values for a summary: how many particles each cone had before and has after.

    Args:
        rotation: (N, 3, 3) poses; probability: (N,) of junk.
    """
    cone = cones.index(rotation[:, 2])
    kept = np.column_stack([1 - probability, probability <= 0.5])
    rows = cone_facts(cones, cone, ["weight_after", "particles_after"], kept)
    if prior is not None:
        for row, c in zip(rows, np.unique(cone).tolist()):
            row |= {"prior": round(float(prior.share[c]), 4), "amplitude": round(float(prior.amplitude[c]), 3)}
    return {"share": round(float(probability.mean()), 5), "count": int((probability > 0.5).sum()), "cones": rows}
