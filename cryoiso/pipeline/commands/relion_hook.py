"""RELION's callback outside of a run: what a job file says about the correction, applied to one iteration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cryoiso.core.errors import UsageError
from cryoiso.pipeline.stages import engines

logger = logging.getLogger("cryoiso")


def correct_for_relion(star: Path, job_file: Path | None, *, tau2: str | None = None, limit_s: float) -> dict[str, Any]:
    """Reconstructs for RELION, and corrects the references if there is a job file.

    Args:
        star: RELION's ``..._external_reconstruct.star``, from the folder where RELION runs.
        job_file: its [realign], [correct], relion.tau2 and run.seed are used; what else it says is not looked at.
        tau2: "relion" or "uneven", in the place of what the job file says.
        limit_s: longest wait for the process of the other half.

    Raises:
        UsageError: a bad job file or ``tau2``.
        InputError, CryoisoError: as ``engines.relion.callback_standalone.reconstruct_alone``.
    """
    from cryoiso.engines.relion.callback_standalone import reconstruct_alone

    if tau2 not in (None, "relion", "uneven"):
        raise UsageError(f"--tau2: relion or uneven is expected (found '{tau2}')", code="choice-unknown")
    job = None if job_file is None else _job(job_file)
    correction = None if job is None else engines.map_correction(job)
    facts = reconstruct_alone(
        star, Path(), correction, tau2=tau2 or (job.relion.tau2 if job else "relion"), limit_s=limit_s
    )
    if "tau2_over_relion" in facts:
        logger.info("%s: tau2 is %s times RELION's", star.name, facts["tau2_over_relion"])
    if "why_not" in facts:
        logger.info("%s: references not corrected: %s", star.name, facts["why_not"])
    return facts


def _job(file: Path) -> Any:
    from cryoiso.pipeline.jobfile import read_job

    return read_job(file)[1]
