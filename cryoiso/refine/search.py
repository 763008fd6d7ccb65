"""Coarse-to-fine search over views and shifts: a global grid selects candidates, finer levels refine them.

A local search differs in the first step: its candidates are rotations of each image's given pose by less than a given
angle, and no level exceeds that limit.

At a level with cells of size d, a rotation is replaced by its eight children d/4 away along each axis of rotation, and
a shift by the 3 x 3 lattice at half the spacing. Only candidates within ``threshold`` of the best log-likelihood are
refined, at most ``max_candidates`` per image. The samples of the last level are the posterior.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.physics.projection import FourierVolume
from cryoiso.refine.batches import Batch
from cryoiso.refine.likelihood import (
    ReferenceSlices,
    Whitened,
    global_scores,
    lattice,
    local_scores,
    near_scores,
    shift_factors,
)
from cryoiso.refine.view_density import ViewPrior

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

NEGLIGIBLE = 0.03
ARITHMETIC = 3
"""Number of the order of operations in the search: another one gives other last bits, and an interrupted iteration that
was begun with another is searched again."""


@dataclass(frozen=True)
class Level:
    """One step of refinement."""

    cell_deg: float
    """Size of the cells at the start of the level; children lie cell/4 from their parent along each axis."""
    spacing_px: float
    """Of the 3 x 3 lattice of shifts."""
    radius_px: int
    max_candidates: int
    """Candidates per image that enter the level."""
    threshold: float
    """Candidates worse than the best by more than this (in log-likelihood) are left out."""

    def __repr__(self) -> str:
        """Enters the digest of an unfinished iteration (``identity.of_iteration``), whose text must not change."""
        return (
            f"Level(cell_deg={self.cell_deg!r}, spacing_px={self.spacing_px!r}, radius_px={self.radius_px!r}, "
            f"beam={self.max_candidates!r}, threshold={self.threshold!r})"
        )


@dataclass(frozen=True)
class SearchPlan:
    """Search plan of one iteration; the same for all images."""

    rotations: Float[Tensor, "j 3 3"]
    """(J, 3, 3) global grid; in a local search the rotations of the given pose, in the image's frame."""
    shifts_px: Float[Tensor, "shifts 2"]
    """(S, 2) coarse shifts, relative to the given one if there is one."""
    coarse_radius_px: int
    levels: tuple[Level, ...]
    shift_sd_px: float
    """Of the Gaussian prior on shifts."""
    local_deg: float | None = None
    """Limit of a local search about the given poses."""

    def log_cells(self, steps: int) -> float:
        """Log of the samples that ``steps`` levels (0: the grid) would have for all views (in a local search: all
        turns) and all shifts of the prior: the evidence of a search is its sum over this number."""
        spacing_px = self.levels[steps - 1].spacing_px if steps else 2 * self.levels[0].spacing_px
        return float(np.log(len(self.rotations) * 8.0**steps)) + self.log_shifts(spacing_px)

    def log_shifts(self, spacing_px: float) -> float:
        """Log of the number of shifts within their prior."""
        return float(np.log(max(2 * np.pi * self.shift_sd_px**2 / spacing_px**2, 1.0)))


@dataclass(frozen=True)
class PriorPoses:
    """Poses known before the search, row for row those of a batch: shifts are searched around the given ones, and a
    local search stays near the given rotations."""

    rotation: Float[Tensor, "n 3 3"] | None
    """(B, 3, 3) float32; None in a global search."""
    shift_px: Float[Tensor, "n 2"]
    """(B, 2) float32, of the content."""
    copies: Float[Tensor, "g 3 3"] | None = None
    """(G, 3, 3) operations S: a local search stays near A S for every one of them; None: near A."""

    def near(self) -> PriorPoses | None:
        """Itself for a local search, None for a global one."""
        return None if self.rotation is None else self

    def take(self, rows: slice | Tensor) -> PriorPoses:
        return replace(
            self, rotation=None if self.rotation is None else self.rotation[rows], shift_px=self.shift_px[rows]
        )

    def centre(self, white: Whitened) -> Whitened:
        """The images with their content moved back by the given shifts, so that a search finds the remaining shift."""
        return replace(white, data=white.data * shift_factors(white.disc, self.shift_px))

    def turned(self, rotations: Float[Tensor, "j 3 3"]) -> Float[Tensor, "n j 3 3"]:
        """(B, J, 3, 3): every given rotation combined with every one of ``rotations`` (J, 3, 3); (B, J G, 3, 3) with
        copies, those of a rotation one after the other."""
        near = torch.einsum("jik,bkl->bjil", rotations, self._rotation())
        if self.copies is None:
            return near
        return torch.einsum("bjil,glm->bjgim", near, self.copies).flatten(1, 2)

    def taken(self, rotations: Float[Tensor, "j 3 3"], index: Int[Tensor, "n m"]) -> Float[Tensor, "n m 3 3"]:
        """(B, M, 3, 3): those of ``turned`` at ``index`` (B, M)."""
        if self.copies is None:
            return rotations[index] @ self._rotation()[:, None]
        count = len(self.copies)
        return rotations[index // count] @ self._rotation()[:, None] @ self.copies[index % count]

    @property
    def copy_count(self) -> int:
        """Number of poses that a local search stays near, per image."""
        return 1 if self.copies is None else len(self.copies)

    def _rotation(self) -> Tensor:
        assert self.rotation is not None  # asked for in local searches only
        return self.rotation

    def is_near(
        self, rotation: Float[Tensor, "r c 3 3"], particle: Int[Tensor, " r"], limit_deg: float
    ) -> Bool[Tensor, "r c"]:
        """(R, C): which of ``rotation`` (R, C, 3, 3) are within an angle of those given for their ``particle`` (R,)."""
        prior_rotation = self._rotation()[:, None]
        prior_rotation = prior_rotation if self.copies is None else prior_rotation @ self.copies
        # |A - B|^2 = 8 sin^2(angle / 2), exact for small angles
        distance2 = (rotation[:, :, None] - prior_rotation[particle][:, None]).square().sum((-2, -1)).amin(2)
        near: Tensor = distance2 <= 8 * np.sin(np.radians(limit_deg) / 2) ** 2 * (1 + 1e-4)
        return near


@dataclass(frozen=True)
class Posterior:
    """Result of the search for a batch: weighted samples, best poses, evidence."""

    particle: Int[Tensor, " r"]
    """(R,) row of the batch, sorted."""
    rotation: Float[Tensor, "r 3 3"]
    """(R, 3, 3)."""
    shift_px: Float[Tensor, "r 2"]
    """(R, 2): posterior mean of the shift at that view."""
    weight: Float[Tensor, " r"]
    """(R,) sums to 1 per image."""
    best_rotation: Float[Tensor, "n 3 3"]
    """(B, 3, 3): posterior mean of the leading mode."""
    best_shift_px: Float[Tensor, "n 2"]
    log_evidence: Float[Tensor, " n"]
    """(B,) log of the marginal likelihood over the samples, up to the image's own constant."""
    entropy: Float[Tensor, " n"]
    """(B,) nats, over the last level's samples."""
    max_weight: Float[Tensor, " n"]
    """(B,) posterior probability of the best sample's view."""
    spread_deg: Float[Tensor, " n"]
    """(B,) root mean square angle of the leading mode's views from the best pose; 0 where one has all the weight."""
    left_out: Float[Tensor, " n"]
    """(B,) what the poses that no level refined add to the evidence over the number of samples (``log_cells``), as a
    log; minus infinity where it was not asked for."""


@lru_cache(maxsize=32)
def cell_children(cell_deg: float) -> Tensor:
    """(8, 3, 3) rotations by +-cell/4 along each axis."""
    from cryoiso.physics.so3 import rotvec_to_matrix

    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    return torch.as_tensor(rotvec_to_matrix(np.radians(cell_deg / 4) * signs), dtype=torch.float32)


@dataclass
class Searcher:
    """The search against one half-set's reference."""

    plan: SearchPlan
    volume: FourierVolume
    views: ViewPrior | None = None
    """Prior on views; None: even."""
    block: int = 1 << 24
    """Scores (image x shift x view) in memory at once."""
    complete: bool = False
    """Whether ``Posterior.left_out`` is asked for."""

    def __post_init__(self) -> None:
        self._slices: dict[bytes | None, ReferenceSlices] = {}
        self._grid_prior: Tensor | None = None

    def _reference(self, white: Whitened) -> ReferenceSlices:
        key = None if white.magnification is None else white.magnification.tobytes()
        if key not in self._slices:
            self._slices[key] = ReferenceSlices.of(self.volume, self.plan.rotations, white.disc, white.magnification)
        return self._slices[key]

    def search(self, batch: Batch, white: Whitened, prior: PriorPoses | None = None) -> Posterior:
        """Posterior over poses of every image of the batch; near the given poses if the plan is that of a local search.

        Args:
            prior: row for row those of the batch; None: no prior poses.
        """
        if prior is not None:
            white = prior.centre(white)
        near = prior.near() if prior is not None else None
        candidates, shifts, score, mass, left_out = self._nominate(white.within(self.plan.coarse_radius_px), near)
        left_out = left_out - self.plan.log_cells(0)
        for i, level in enumerate(self.plan.levels):
            (candidates, shifts, score, mass), pruned = pruned_to(level, candidates, shifts, score, mass)
            left_out = torch.logaddexp(left_out, pruned - self.plan.log_cells(i))
            narrowed = white.within(level.radius_px)
            last = i == len(self.plan.levels) - 1
            candidates, shifts, score, mass = self._level(narrowed, level, candidates, shifts, score, near, last)
        posterior = summarise(candidates, shifts, score, self.plan.levels[-1], left_out)
        if prior is None:
            return posterior
        return replace(
            posterior,
            shift_px=posterior.shift_px + prior.shift_px[posterior.particle],
            best_shift_px=posterior.best_shift_px + prior.shift_px,
        )

    def _nominate(self, white: Whitened, prior: PriorPoses | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Best views of the grid: rotation (B, M, 3, 3), shift (B, M, 2), score (B, M), log of the sum over shifts
        (B, M), and over the other views (B,)."""
        plan = self.plan
        log_prior = -plan.shifts_px.square().sum(1) / (2 * plan.shift_sd_px**2)
        max_candidates = min(plan.levels[0].max_candidates, len(plan.rotations))
        # in a local search the slices of every image are held too
        width = len(plan.shifts_px) if prior is None else max(len(plan.shifts_px), white.disc.size)
        step = max(1, self.block // (width * len(plan.rotations) * (1 if prior is None else prior.copy_count)))
        scores, indices, shift_indices, masses, others = [], [], [], [], []
        for i in range(0, len(white.data), step):
            part = Whitened(white.data[i : i + step], white.weight[i : i + step], white.disc, white.magnification)
            if prior is None:
                scored = global_scores(part, self._reference(white), plan.shifts_px, log_prior)
            else:
                turned = prior.take(slice(i, i + step)).turned(plan.rotations)
                scored = near_scores(part, self.volume, turned, plan.shifts_px, log_prior)
            best, at = scored.max(dim=1)
            mass = scored.logsumexp(1) if self.complete else torch.full_like(best, -torch.inf)
            if self.views is not None:
                log_views = self._prior_of_grid(None if prior is None else prior.take(slice(i, i + step)))
                best, mass = best + log_views, mass + log_views
            top, j = best.topk(max_candidates, dim=1)
            masses.append(mass.gather(1, j))
            none = torch.full_like(mass[:, 0], -torch.inf)
            others.append(mass.scatter(1, j, -torch.inf).logsumexp(1) if self.complete else none)
            scores.append(top)
            indices.append(j)
            shift_indices.append(at.gather(1, j))
        chosen = torch.cat(indices)
        rotation = plan.rotations[chosen] if prior is None else prior.taken(plan.rotations, chosen)
        best_shifts = plan.shifts_px[torch.cat(shift_indices)]
        return rotation, best_shifts, torch.cat(scores), torch.cat(masses), torch.cat(others)

    def _prior_of_grid(self, prior: PriorPoses | None) -> Tensor:
        """Log prior of the first step's views: (J,), or (B, J) for rotations of the given poses."""
        assert self.views is not None
        if prior is not None:
            return self.views(prior.turned(self.plan.rotations))
        if self._grid_prior is None:
            self._grid_prior = self.views(self.plan.rotations)
        return self._grid_prior

    def _level(
        self,
        white: Whitened,
        level: Level,
        rotation: Tensor,
        shift: Tensor,
        score: Tensor,
        prior: PriorPoses | None,
        keep_lattice: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Children of the candidates with a finite score: (B, M, 3, 3), (B, M, 2), (B, M) or (B, M, 9) for the last
        level, and log of the sum over the lattice (B, M)."""
        particle, slot = (score > -torch.inf).nonzero(as_tuple=True)
        children = cell_children(level.cell_deg).to(rotation.device)
        kids = torch.einsum("cij,rjk->rcik", children, rotation[particle, slot])
        centre = shift[particle, slot][:, None].expand(-1, 8, 2)
        rows = particle[:, None].expand(-1, 8).reshape(-1)
        values = local_scores(
            white, self.volume, rows, kids.reshape(-1, 3, 3), centre.reshape(-1, 2), level.spacing_px, together=8
        ).reshape(-1, 8, 9)
        places = centre[:, :, None] + lattice(level.spacing_px, rotation.device)
        values = values - places.square().sum(-1) / (2 * self.plan.shift_sd_px**2)
        if self.views is not None:
            values = values + self.views(kids)[..., None]
        if prior is not None and self.plan.local_deg is not None:
            near = prior.is_near(kids, particle, self.plan.local_deg)
            values = torch.where(near[..., None], values, -torch.inf)
        b, m = score.shape
        out_rotation = rotation[:, :, None].repeat(1, 1, 8, 1, 1)
        out_rotation[particle, slot] = kids
        out_shift = torch.zeros(b, m, 8, 9, 2, device=rotation.device)
        out_shift[particle, slot] = places
        out_score = torch.full((b, m, 8, 9), -torch.inf, device=rotation.device)
        out_score[particle, slot] = values
        out_rotation = out_rotation.reshape(b, m * 8, 3, 3)
        out_shift, out_score = out_shift.reshape(b, m * 8, 9, 2), out_score.reshape(b, m * 8, 9)
        mass = out_score.logsumexp(2) if self.complete else torch.full_like(out_score[..., 0], -torch.inf)
        if keep_lattice:
            return out_rotation, out_shift, out_score, mass
        best, at = out_score.max(2)
        return out_rotation, out_shift.gather(2, at[..., None, None].expand(-1, -1, 1, 2))[:, :, 0], best, mass


def pruned_to(
    level: Level, rotation: Tensor, shift: Tensor, score: Tensor, mass: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The candidates (B, M, ...) that enter a level, those that are too bad with a score of minus infinity, and log of
    the summed mass of all others (B,)."""
    pruned = torch.full_like(mass[:, 0], -torch.inf)
    if score.shape[1] > level.max_candidates:
        score, order = score.topk(level.max_candidates, dim=1)
        rotation = rotation.gather(1, order[..., None, None].expand(-1, -1, 3, 3))
        shift = shift.gather(1, order[..., None].expand(-1, -1, 2))
        pruned = mass.scatter(1, order, -torch.inf).logsumexp(1)
        mass = mass.gather(1, order)
    alive = score > score.amax(1, keepdim=True) - level.threshold
    pruned = torch.logaddexp(pruned, torch.where(alive, -torch.inf, mass).logsumexp(1))
    return (rotation, shift, torch.where(alive, score, -torch.inf), mass), pruned


def summarise(
    rotation: Float[Tensor, "n m 3 3"],
    shift: Float[Tensor, "n m 9 2"],
    score: Float[Tensor, "n m 9"],
    level: Level,
    left_out: Float[Tensor, " n"],
    keep: int = 12,
) -> Posterior:
    """Normalise the samples of the last level.

    Args:
        rotation: (B, M, 3, 3); shift: (B, M, 9, 2); score: (B, M, 9); left_out: of the posterior.
        keep: largest number of views per image passed to the back-projection; those below NEGLIGIBLE times the best are
            left out.
    """
    log_evidence = score.flatten(1).logsumexp(1)
    p = (score - log_evidence[:, None, None]).exp()
    entropy = -(p * torch.where(p > 0, p, 1.0).log()).flatten(1).sum(1)
    view = p.sum(2)
    mean_shift = (p[..., None] * shift).sum(2) / view.clamp(min=1e-30)[..., None]
    top, order = view.topk(min(keep, view.shape[1]), dim=1)
    top = torch.where(top >= NEGLIGIBLE * top[:, :1], top, 0.0)
    top = top / top.sum(1, keepdim=True)
    chosen_rotation = rotation.gather(1, order[..., None, None].expand(-1, -1, 3, 3))
    chosen_shift = mean_shift.gather(1, order[..., None].expand(-1, -1, 2))
    best_rotation, best_shift, spread_deg = leading_mode(chosen_rotation, chosen_shift, top, level.cell_deg)
    particle, slot = (top > 0).nonzero(as_tuple=True)
    return Posterior(
        particle,
        chosen_rotation[particle, slot],
        chosen_shift[particle, slot],
        top[particle, slot],
        best_rotation,
        best_shift,
        log_evidence,
        entropy,
        view.amax(1),
        spread_deg,
        left_out,
    )


def leading_mode(
    rotation: Float[Tensor, "n s 3 3"], shift: Float[Tensor, "n s 2"], weight: Float[Tensor, "n s"], cell_deg: float
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 2"], Float[Tensor, " n"]]:
    """Posterior mean over the samples within two cells of the best, rotation (B, 3, 3) and shift (B, 2), and the root
    mean square angle (B,) in degrees of these samples from it.

    The mean of a mode is nearer to the truth than its best sample, which lies on a grid.
    """
    trace = torch.einsum("bij,bmij->bm", rotation[:, 0], rotation)
    near = trace >= 1 + 2 * np.cos(np.radians(min(2 * cell_deg, 30.0)))
    w = torch.where(near, weight, 0.0)
    w = w / w.sum(1, keepdim=True)
    mean = torch.einsum("bm,bmij->bij", w, rotation).double()
    u, _, vh = torch.linalg.svd(mean)
    sign = torch.det(u @ vh)
    u = torch.cat([u[:, :, :2], u[:, :, 2:] * sign[:, None, None]], 2)
    best = u @ vh
    # |A - B|^2 = 8 sin^2(angle / 2), about twice the square of a small angle
    square = (w * (rotation - best[:, None]).square().sum((-2, -1))).sum(1) / 2
    return best, (w[..., None] * shift).sum(1), torch.rad2deg(square.sqrt())
