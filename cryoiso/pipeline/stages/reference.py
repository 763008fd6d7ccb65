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
    made, folder, lowpass_A = inputs.reference(), run.folder.stage("reference"), run.job.reference.lowpass_A
    write_map(folder / products.REFERENCE, made.map.data, made.map.pixel_size_A)
    write_map(folder / products.LOWPASSED_REFERENCE, made.initial.data, made.initial.pixel_size_A)
    facts = {
        "source": made.source,
        "lowpass_A": lowpass_A,
        "diameter_A": round(made.diameter_A, 3),
        "box_px": made.map.box_px,
        "pixel_size_A": made.map.pixel_size_A,
    }
    facts |= made.facts
    if made.fit is not None:
        facts["fit"] = made.fit.facts()
    write_json(folder / products.facts("reference"), facts)
    logger.info("reference: %s, low-passed at %g Å, diameter %.0f Å", made.source, lowpass_A, made.diameter_A)
