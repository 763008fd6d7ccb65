"""The stage ``report``: the result folder, the report, and checksums."""

from __future__ import annotations

import json

from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.records.checksums import write_sums
from cryoiso.pipeline.stages.result_folder import fill_result
from cryoiso.pipeline.stages.rounds import final_poses
from cryoiso.pipeline.work import Work


def report(work: Work) -> None:
    """The result folder, the report where a maker of reports was given, and the result's checksums."""
    on_root(work.comm, _publish, work)


def _publish(work: Work) -> None:
    run = work.folder
    numbers = json.loads((run.stage("diagnose") / "diagnose.json").read_text(encoding="utf-8"))
    corrected = run.stage("correct") if run.has("correct") else None
    fill_result(run.result, final_poses(work), run.stage("reconstruct"), corrected, numbers)
    if work.report is not None:
        work.report(run.path)
    write_sums(run.result)
