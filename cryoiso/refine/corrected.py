"""The references of a refinement as a correction between two iterations leaves them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.log import logger
from cryoiso.core.protocols import HalfMaps
from cryoiso.refine.initial_model import first_references
from cryoiso.refine.model import HALVES
from cryoiso.refine.schedule import State
from cryoiso.refine.search import SearchPlan

if TYPE_CHECKING:
    from cryoiso.refine.iterate import Refinement


def corrected(
    run: Refinement,
    state: State,
    maps: dict[int, np.ndarray],
    references: dict[int, np.ndarray],
    curve: np.ndarray,
    resolution_A: float,
    plan: SearchPlan,
) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    """The references as the correction leaves them, without solvent again, and its record (collective).

    The last level halves the cells that it begins with, as one step of oversampling does, so the size of those is what
    others call the sampling of the search.

    Args:
        state: of the next iteration.
        maps: half -> unregularised map of all that is in the references.
        curve: FSC of the raw half-maps.
    """
    correction, request = run.request.correction, run.request
    assert correction is not None
    seen = HalfMaps(
        iteration=state.iteration,
        maps=maps,
        references=references,
        pixel_size_A=run.pixel,
        fsc=curve,
        resolution_A=resolution_A,
        step_deg=plan.levels[-1].cell_deg,
        folder=request.folder / "correction",
        mask=None if request.mask is None else request.mask.data,
        initial=first_references(run, request.lowpass_A),
    )
    if state.done or not correction.wants(seen):
        why_not = "no further iteration needs references" if state.done else correction.why_not(seen)
        if run.comm.rank == 0:
            logger.info("iteration %d: references not corrected: %s", state.iteration, why_not)
        return references, {"applied": False, "why_not": why_not}
    made, facts = correction(seen, run.comm)
    return {half: run.flatten(made[half], resolution_A) for half in HALVES}, facts
