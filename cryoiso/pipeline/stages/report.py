"""The stage ``report``: the result folder, the report, and checksums."""

from __future__ import annotations

import json
import logging

from cryoiso.core import products
from cryoiso.io.cs_write import write_fields
from cryoiso.io.restore import rows_of_result
from cryoiso.io.star.read import read_particles
from cryoiso.parallel.abort import on_root
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.records.checksums import write_sums
from cryoiso.pipeline.stages.result_folder import fill_result
from cryoiso.pipeline.stages.rounds import final_poses

logger = logging.getLogger("cryoiso")


def report(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """The result folder, the report where a maker of reports was given, and the result's checksums."""
    on_root(run.comm, _publish, run)


def _publish(run: RunContext) -> None:
    folder = run.folder
    numbers = json.loads((folder.stage("diagnose") / products.facts("diagnose")).read_text(encoding="utf-8"))
    corrected = folder.stage("correct") if folder.has("correct") else None
    local = folder.stage("diagnose") / products.LOCAL_RESOLUTION
    fill_result(folder.result, final_poses(run), folder.stage("reconstruct"), corrected, numbers, local)
    if run.job.run.cs_result:
        _write_cs(run)
    if run.report is not None:
        run.report(folder.path)
    write_sums(folder.result)


def _write_cs(run: RunContext) -> None:
    """The last poses for cryoSPARC."""
    job, result = run.job, run.folder.result
    particles = read_particles(result / products.PARTICLES, job.particles.project, ())
    rows = rows_of_result(particles, job.particles.file, job.particles.passthrough, job.sample.symmetry)
    write_fields(result / products.CS_PARTICLES, rows)
    if any(any((*g.odd_zernike, *g.even_zernike)) or g.ctf_applied for g in particles.groups):
        logger.warning(
            "%s has neither the Zernike terms nor the CTF flags of %s: a .cs file has no known place for them",
            products.CS_PARTICLES, products.PARTICLES,
        )  # fmt: skip
