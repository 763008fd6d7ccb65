"""The posterior of a batch over classes and poses, and over showing no particle at all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.physics.projection import FourierVolume
from cryoiso.refine.batches import Batch
from cryoiso.refine.junk import FACTS, JunkJudge, log_evidence
from cryoiso.refine.leverage import Leverage, score_without
from cryoiso.refine.likelihood import Whitened
from cryoiso.refine.search import Posterior, PriorPoses, Searcher, SearchPlan

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NEGLIGIBLE_CLASS = 1e-3
"""A class with less of an image's posterior gets nothing of the image."""
POSE = 11
"""Columns of a pose in ``ClassPosterior.table``: rotation (9) and shift in pixels (2)."""
NAMES = ("rlnLogLikeliContribution", "rlnMaxValueProbDistribution", "particle")
"""Columns after the pose; then come those of the classes and the facts that junk is judged by."""


@dataclass(frozen=True)
class ClassPosterior:
    """What is found for a batch."""

    parts: tuple[Posterior, ...]
    """For each class the samples, their weights multiplied by the posterior of class and particle."""
    table: Float[np.ndarray, "n columns"]
    """(B, W) float64: pose of the best class, NAMES, posterior of each class, FACTS."""


def width(classes: int) -> int:
    """Columns of the table of a batch."""
    return POSE + len(NAMES) + classes + len(FACTS)


def at_given_poses(poses: PriorPoses, score: Float[Tensor, " n"]) -> Posterior:
    """The posterior of images whose poses are known: one sample each, of log-likelihood ``score`` (B,)."""
    assert poses.rotation is not None
    weight, rotation, shift = torch.ones_like(score), poses.rotation, poses.shift_px
    rows = torch.arange(len(score), device=score.device)
    none = torch.zeros_like(score)
    return Posterior(rows, rotation, shift, weight, rotation, shift, score, none, weight, none, none - torch.inf)


@dataclass
class ClassExpectation:
    """The expectation of one half-set: its references and, for a search, what searches against each."""

    volumes: list[FourierVolume]
    occupancy: Float[np.ndarray, " classes"]
    """(K,) prior; 0: the class is empty and gets no image."""
    searchers: list[Searcher] | None = None
    """One for each class; None: poses are given."""
    leverage: list[Leverage | None] | None = None
    """Of each class, None for an empty one; None: the references were not made of these images."""
    judge: JunkJudge | None = None

    def __call__(self, batch: Batch, white: Whitened, prior: PriorPoses | None) -> ClassPosterior:
        """
        Args:
            prior: poses of the batch, or what a search starts from.
        """
        each = [self._of_class(k, batch, white, prior) for k in range(len(self.volumes))]
        parts = [posterior for posterior, _, _ in each]
        evidence = np.column_stack([p.log_evidence.double().cpu().numpy() for p in parts])
        with np.errstate(divide="ignore"):
            posterior, total = class_posterior(evidence + np.log(self.occupancy))
        facts, particle = self._junk(white, each, posterior.argmax(1), total, prior)
        poses = best_poses(parts, posterior.argmax(1))
        largest = np.column_stack([p.max_weight.double().cpu().numpy() for p in parts])
        most = (posterior * largest).max(1) * particle
        table = np.column_stack([poses, total, most, particle, posterior, facts])
        return ClassPosterior(tuple(weighted(parts, posterior * particle[:, None])), table)

    def _of_class(
        self, k: int, batch: Batch, white: Whitened, prior: PriorPoses | None
    ) -> tuple[Posterior, Tensor, Tensor]:
        """Posterior over the poses, its evidence without the image's own share in the reference; score at the best
        pose, likewise, and norm there: (B,) each."""
        volume = self.volumes[k]
        inner = white.within(volume.radius_px)
        if self.searchers is None:
            assert prior is not None and prior.rotation is not None
            score, norm = self._score(k, batch.rows, inner, prior.rotation, prior.shift_px)
            return at_given_poses(prior, score), score, norm
        posterior = self.searchers[k].search(batch, white, prior)
        pose = posterior.best_rotation.float(), posterior.best_shift_px.float()
        score, norm = self._score(k, batch.rows, inner, *pose)
        if self.leverage is not None:
            with_own = score_without(inner, volume, *pose, None)[0]
            posterior = replace(posterior, log_evidence=posterior.log_evidence - (with_own - score))
        return posterior, score, norm

    def _score(
        self, k: int, rows: np.ndarray, white: Whitened, rotation: Tensor, shift_px: Tensor
    ) -> tuple[Tensor, Tensor]:
        leverage = None if self.leverage is None else self.leverage[k]
        own = None if leverage is None else leverage(white, rows, rotation)
        return score_without(white, self.volumes[k], rotation, shift_px, own)

    def _junk(
        self, white: Whitened, best: list[tuple[Posterior, Tensor, Tensor]], chosen: np.ndarray, total: np.ndarray,
        prior: PriorPoses | None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Facts (B, 5) and probability of a particle (B,)."""
        if self.judge is None:
            return np.zeros((len(total), len(FACTS))), np.ones(len(total))
        score, norm = (
            _of_best([class_terms[1] for class_terms in best], chosen),
            _of_best([class_terms[2] for class_terms in best], chosen),
        )
        rotation = _of_best([class_terms[0].best_rotation for class_terms in best], chosen)
        shift = _of_best([class_terms[0].best_shift_px for class_terms in best], chosen)
        searched = self.judge.plan is not None
        evidence = total if self.judge.plan is None else self._of_all_poses([p for p, _, _ in best], self.judge.plan)
        around = (None if prior is None else prior.shift_px) if searched else shift.float()
        facts = self.judge.facts(white.within(self.volumes[0].radius_px), score, norm, evidence, around)
        return facts, self.judge.particle_probability(facts, rotation)

    def _of_all_poses(self, parts: list[Posterior], plan: SearchPlan) -> np.ndarray:
        """(B,) log evidence of all classes, also of the poses that the searches left out."""
        with np.errstate(divide="ignore"):
            each = np.column_stack([log_evidence(p, plan) for p in parts]) + np.log(self.occupancy)
        return class_posterior(each)[1]


def _of_best(values: list[Tensor], chosen: np.ndarray) -> Tensor:
    """Of each image's best class (B,), from one (B, ...) per class."""
    index = torch.as_tensor(chosen, device=values[0].device)
    return torch.stack(values)[index, torch.arange(len(chosen), device=index.device)]


def class_posterior(
    log_joint: Float[np.ndarray, "n classes"],
) -> tuple[Float[np.ndarray, "n classes"], Float[np.ndarray, " n"]]:
    """Posterior (B, K) and log of its normalisation (B,) from log prior plus log evidence (B, K); classes with a
    negligible share get none."""
    highest = log_joint.max(1, keepdims=True)
    p = np.exp(log_joint - highest)
    total = highest[:, 0] + np.log(p.sum(1))
    p = p / p.sum(1, keepdims=True)
    p = np.where(p >= NEGLIGIBLE_CLASS, p, 0.0)
    return p / p.sum(1, keepdims=True), total


def best_poses(parts: list[Posterior], best: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n 11"]:
    """(B, 11) float64 rotation and shift in pixels of the best class of each image."""
    poses = np.stack([
        np.column_stack([p.best_rotation.flatten(1).double().cpu().numpy(), p.best_shift_px.double().cpu().numpy()])
        for p in parts
    ])  # fmt: skip
    chosen: np.ndarray = poses[best, np.arange(len(best))]
    return chosen


def weighted(parts: list[Posterior], share: Float[np.ndarray, "n classes"]) -> list[Posterior]:
    """Each class's samples with their weights multiplied by its share (B, K) of the image; those without any left
    out."""
    weighted_posteriors = []
    for k, p in enumerate(parts):
        factor = _column(share, k, p.weight)[p.particle]
        rows = factor > 0
        weighted_posteriors.append(replace(
            p, particle=p.particle[rows], rotation=p.rotation[rows], shift_px=p.shift_px[rows],
            weight=(p.weight * factor)[rows],
        ))  # fmt: skip
    return weighted_posteriors


def _column(share: np.ndarray, k: int, like: Tensor) -> Tensor:
    return torch.as_tensor(share[:, k], dtype=like.dtype, device=like.device)
