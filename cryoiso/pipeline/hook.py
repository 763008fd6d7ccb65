"""RELION's callback outside of a run: what a job file says about the correction, applied to one iteration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cryoiso.pipeline import wire

logger = logging.getLogger("cryoiso")


def correct_for_relion(star: Path, job_file: Path | None, *, limit_s: float) -> dict[str, Any]:
    """Reconstructs for RELION, and corrects the references if there is a job file.

    Args:
        star: RELION's ``..._external_reconstruct.star``, from the folder where RELION runs.
        job_file: its [realign], [correct] and run.seed are used; what else it says is not looked at.
        limit_s: longest wait for the process of the other half.

    Raises:
        UsageError: a bad job file.
        InputError, CryoisoError: as ``engines.relion.alone.reconstruct_alone``.
    """
    from cryoiso.engines.relion.alone import reconstruct_alone

    correction = None if job_file is None else wire.map_correction(_job(job_file))
    facts = reconstruct_alone(star, Path(), correction, limit_s=limit_s)
    if "why_not" in facts:
        logger.info("%s: references not corrected: %s", star.name, facts["why_not"])
    return facts


def _job(file: Path) -> Any:
    from cryoiso.pipeline.run import read_job

    return read_job(file)[1]
