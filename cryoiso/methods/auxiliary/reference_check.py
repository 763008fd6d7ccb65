"""Tests whether the raw images correlate with the reference above chance, before anything is made from it, and how far
they confirm the homologue.

For engines other than the native one, which asks by itself, and for sets of which only a part is refined.
"""

from __future__ import annotations

from dataclasses import replace

from cryoiso.core.protocols import Communicator, RefineRequest
from cryoiso.core.records import IterationRecord
from cryoiso.refine.initial_model import Match, first_state, initial_model, match, mean_power, require_match
from cryoiso.refine.iterate import Refinement


def require_evidence(request: RefineRequest, comm: Communicator) -> Match:
    """Stops where the raw images match the references no better than noise does (collective);
    ``refine.initial_model.match`` says how noise is kept from matching what it was refined against or what was made of
    it.

    Args:
        request: as for a refinement of the raw particles.

    Raises:
        InputError: they do not correlate beyond chance, or do so with the opposite sign.
    """
    run = _refinement(request, comm)
    references = run.first_references(request.lowpass_A)
    sigma2 = mean_power(run)
    result = match(run, references, sigma2, first_state(run, request.lowpass_A))
    require_match(result)
    return result


def homologue_evidence(request: RefineRequest, comm: Communicator) -> IterationRecord:
    """How far the raw images alone confirm the homologue: one native iteration of them (collective).

    Args:
        request: as for a refinement of the raw particles, with the homologue.

    Raises:
        InputError: as ``require_evidence``.
    """
    without_auxiliary = replace(request, auxiliary_weight="measured", folder=None, correction=None)  # type: ignore[arg-type]
    run = _refinement(without_auxiliary, comm)
    return run.step(initial_model(run, request.lowpass_A)).history[0]


def _refinement(request: RefineRequest, comm: Communicator) -> Refinement:
    diameter_A = request.diameter_A or 0.9 * request.source.box_px * request.reference.pixel_size_A
    return Refinement(request, comm, comm.device(), diameter_A)
