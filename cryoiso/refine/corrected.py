"""References of a refinement after the correction between two iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cryoiso.core.log import logger
from cryoiso.core.protocols import Communicator, HalfMaps, ReferenceCorrection
from cryoiso.core.types import HALVES


def corrected(
    correction: ReferenceCorrection,
    seen: HalfMaps,
    last: bool,
    without_solvent: Callable[[np.ndarray], np.ndarray],
    comm: Communicator,
) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    """Apply the correction to the references and flatten the solvent again; return them and the correction's record
    (collective).

    Args:
        seen: the half-maps and references of the iteration that has just ended.
        last: whether no further iteration follows.
    """
    if last or not correction.wants(seen):
        why_not = "no further iteration needs references" if last else correction.why_not(seen)
        if comm.rank == 0:
            logger.info("iteration %d: references not corrected: %s", seen.iteration, why_not)
        return seen.references, {"applied": False, "why_not": why_not}
    corrected_maps, facts = correction(seen, comm)
    return {half: without_solvent(corrected_maps[half]) for half in HALVES}, facts
