"""The stage ``reference``: the starting reference on the particles' grid."""

from __future__ import annotations

import logging

from cryoiso.core import products
from cryoiso.io.atomic import write_json
from cryoiso.io.mrc import write_map
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs

logger = logging.getLogger("cryoiso")


def reference(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """The reference on the particles' grid: as it is, and low-passed as the refinement starts from it."""
    on_root(run.comm, _write_reference, run, inputs)


def _write_reference(run: RunContext, inputs: Inputs) -> None:
    reference, folder, lowpass_A = inputs.reference(), run.folder.stage("reference"), run.job.reference.lowpass_A
    write_map(folder / products.REFERENCE, reference.map.data, reference.map.pixel_size_A)
    write_map(folder / products.LOWPASSED_REFERENCE, reference.initial.data, reference.initial.pixel_size_A)
    facts = {
        "source": reference.source,
        "lowpass_A": lowpass_A,
        "diameter_A": round(reference.diameter_A, 3),
        "box_px": reference.map.box_px,
        "pixel_size_A": reference.map.pixel_size_A,
    }
    facts |= reference.facts
    if reference.fit is not None:
        facts["fit"] = reference.fit.facts()
    write_json(folder / products.facts("reference"), facts)
    logger.info("reference: %s, low-passed at %g Å, diameter %.0f Å", reference.source, lowpass_A, reference.diameter_A)
