"""Raw and auxiliary particles refined together by any engine, and told apart again by uid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from cryoiso.core.errors import CryoisoError
from cryoiso.core.log import logger
from cryoiso.core.protocols import Communicator, Engine, ImageSource, RefineRequest, RefineResult
from cryoiso.core.records import IterationRecord
from cryoiso.core.types import Particles
from cryoiso.io.sources import JoinedSource
from cryoiso.methods.auxiliary.particles import FLAG
from cryoiso.methods.auxiliary.reference_check import homologue_evidence
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group

WEIGHING = ("native",)
"""Engines that sum raw and auxiliary particles separately, and so can weigh them."""
EDGES_DEG = np.concatenate([[0.0], np.geomspace(0.25, 180, 39)])


@dataclass(frozen=True)
class CoRefined:
    """What a co-refinement gave; raw and auxiliary are row for row those that went in."""

    raw: Particles
    auxiliary: Particles
    result: RefineResult
    first: IterationRecord
    """The iteration that measured the weight: the result's first, or, where the engine cannot weigh, one of the raw
    particles before it; empty where neither is known."""

    @property
    def last(self) -> IterationRecord:
        """The iteration with the last weight of the auxiliary particles."""
        iterations = self.result.iterations
        return iterations[-1] if iterations and self.first is iterations[0] else self.first


def co_refine(
    engine: Engine,
    request: RefineRequest,
    auxiliary: ImageSource,
    comm: Communicator,
    *,
    pooled: bool = False,
    weight: float | Literal["measured"] = 1.0,
    evidence: IterationRecord | None = None,
) -> CoRefined:
    """Refines raw and auxiliary particles together (collective).

    The engine sees one set and searches all views of all particles; shifts of the raw ones around the offsets that
    ``request.source`` gives, those of the auxiliaries, which are made centred, around zero. They are marked as
    auxiliary: the native engine lets the raw particles alone make its half-maps and steer; the RELION engine cannot.

    Args:
        engine: any.
        request: as for the raw particles alone; ``source`` holds them.
        auxiliary: its particles carry the true poses that the images were made with.
        pooled: the auxiliaries join the optics groups of the raw particles, and one noise model serves both; else they
            have groups of their own, so that their noise is estimated apart.
        weight: factor on the auxiliaries' weight in the references; measured: by what the raw particles confirm of
            ``request.homologue``. Engines that cannot weigh refine all particles where it is confirmed, the raw ones
            alone where it is not; the auxiliaries then keep their poses.
        evidence: what an iteration of the same raw particles confirmed, for engines that cannot weigh; None: one is
            made.

    Raises:
        CryoisoError: the engine lost or reordered particles.
        InputError: ``pooled``, and the optics groups of both are not the same.
    """
    raw, first = request.source, IterationRecord()
    if weight == "measured" and engine.name not in WEIGHING:
        first = evidence or homologue_evidence(replace(request, source=without_views(raw, False)), comm)
        if not first["homologue"]["confirmed"]:
            return replace(refine_raw(engine, request, comm, first), auxiliary=auxiliary.particles)
        if comm.rank == 0:
            logger.warning(
                "%s cannot weigh auxiliary particles: they count in full, which draws poses to the homologue",
                engine.name,
            )
    joined = JoinedSource(without_views(raw, False), without_views(auxiliary, True), pooled=pooled)
    flags = np.arange(len(joined.particles)) >= len(raw.particles)
    result = engine.refine(replace(request, source=joined, auxiliary=flags, auxiliary_weight=weight), comm)
    first = first or (result.iterations or [first])[0]
    return CoRefined(_returned(engine, raw, result), _returned(engine, auxiliary, result), result, first)


def refine_raw(engine: Engine, request: RefineRequest, comm: Communicator, evidence: IterationRecord) -> CoRefined:
    """Refines the raw particles as ``co_refine`` does where they confirm nothing of the homologue: auxiliary ones would
    steer nothing and need not exist (collective).

    Args:
        request: as for ``co_refine``.
        evidence: the iteration that found nothing; engines that weigh measure it again in their first one.
    """
    raw, weighs = request.source, engine.name in WEIGHING
    alone = replace(request, source=without_views(raw), auxiliary_weight="measured" if weighs else 1.0)
    result = engine.refine(alone, comm)
    first = (result.iterations or [evidence])[0] if weighs else evidence
    return CoRefined(_returned(engine, raw, result), raw.particles.take(np.zeros(0, np.int64)), result, first)


def _returned(engine: Engine, source: ImageSource, result: RefineResult) -> Particles:
    """The source's particles, row for row, with the poses and results that the engine returned."""
    place = np.argsort(result.particles.uid, kind="stable")
    returned_uids = result.particles.uid[place]
    where = np.searchsorted(returned_uids, source.particles.uid)
    if (where >= len(returned_uids)).any() or (returned_uids[where] != source.particles.uid).any():
        raise CryoisoError(f"the engine '{engine.name}' did not return all particles", code="relion-particles-lost")
    return _with_results(source.particles, result.particles.take(place[where]))


class _WithoutViews:
    """A source whose particles have no angles."""

    def __init__(self, source: ImageSource, particles: Particles) -> None:
        self.particles, self.box_px, self.read = particles, source.box_px, source.read


def without_views(source: ImageSource, auxiliary: bool = False) -> ImageSource:
    """The same images; particles without angles, flagged as raw or auxiliary."""
    p = source.particles
    flags = {FLAG: np.full(len(p), int(auxiliary), np.int64)}
    known = np.zeros((len(p), 2)) if auxiliary or p.shift_A is None else p.shift_A
    return _WithoutViews(source, replace(p, rotation=None, shift_A=known, results=flags))


def _with_results(particles: Particles, refined: Particles) -> Particles:
    rotation, shift_A = refined.require_poses()
    columns = {k: v for k, v in refined.results.items() if k != FLAG}
    posed = particles.with_poses(rotation, shift_A).with_results(**columns)
    return posed.with_intensity(refined.signal_scale, refined.noise_level)


def movement(before: Particles, after: Particles, symmetry: str) -> dict[str, Any]:
    """How far particles moved between two sets of poses, row for row: median, quartile, shares, histogram."""
    moved = angular_distance_deg(before.require_poses()[0], after.require_poses()[0], point_group(symmetry))
    return {
        "median_deg": float(np.median(moved)),
        "upper_quartile_deg": float(np.quantile(moved, 0.75)),
        **{f"over_{limit}": float((moved > limit).mean()) for limit in (10, 20, 30)},
        "histogram": {"edges_deg": EDGES_DEG.tolist(), "counts": np.histogram(moved, EDGES_DEG)[0].tolist()},
    }
