"""Do the raw images know the reference at all? Asked of the raw images alone, before anything is made from it.

A co-refinement cannot ask that: half of its images show the reference, because they were made from it.
"""

from __future__ import annotations

from cryoiso.core.protocols import Communicator, RefineRequest
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.start import Match, first_reference, first_state, match, mean_power, require_match


def require_evidence(request: RefineRequest, comm: Communicator) -> Match:
    """Stops where the images match the reference no better than noise does (collective).

    Poses that came with the particles are not looked at (of their offsets only how large they are): noise that was once
    refined against the reference matches it at those.

    Args:
        request: as for a global refinement of the raw particles.

    Raises:
        InputError: they do not correlate beyond chance, or do so with the opposite sign.
    """
    diameter_A = request.diameter_A or 0.9 * request.source.box_px * request.reference.pixel_size_A
    run = Refinement(request, comm, comm.device(), diameter_A)
    reference = first_reference(run, request.reference, request.lowpass_A)
    sigma2 = mean_power(run)
    found = match(run, reference, sigma2, first_state(run, request.lowpass_A))
    require_match(found)
    return found
