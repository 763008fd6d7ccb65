"""The stage ``report``: the result folder, the report, and checksums."""

from __future__ import annotations

import json

from cryoiso.core import products
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.records.checksums import write_sums
from cryoiso.pipeline.stages.result_folder import fill_result
from cryoiso.pipeline.stages.rounds import final_poses


def report(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """The result folder, the report where a maker of reports was given, and the result's checksums."""
    on_root(run.comm, _publish, run)


def _publish(run: RunContext) -> None:
    folder = run.folder
    numbers = json.loads((folder.stage("diagnose") / products.facts("diagnose")).read_text(encoding="utf-8"))
    corrected = folder.stage("correct") if folder.has("correct") else None
    local = folder.stage("diagnose") / products.LOCAL_RESOLUTION
    fill_result(folder.result, final_poses(run), folder.stage("reconstruct"), corrected, numbers, local)
    if run.report is not None:
        run.report(folder.path)
    write_sums(folder.result)
