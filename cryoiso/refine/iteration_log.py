"""Log lines of an iteration."""

from __future__ import annotations

import logging

from cryoiso.core.config import RefineSection
from cryoiso.core.log import logger
from cryoiso.core.records import IterationRecord

UNSETTLED_DEG = 20.0
"""Median change of the poses in the last iteration above which a warning is given."""


def log_iteration(record: IterationRecord) -> None:
    """Log resolution and search of an iteration, and what it found out about auxiliary particles and intensities."""
    logger.info(
        "iteration %d: resolution %.2f Å (unmasked %.2f, by measured directions %.2f), cFAR %.2f, step %.2f°, "
        "moved by %.2f°, max. probability %.2f",
        record["iteration"], record["resolution_A"], record["resolution_unmasked_A"],
        record["resolution_weighted_A"], record["cfar"] or 0.0, record["step_deg"], record["changes_deg"],
        record["max_probability_mean"],
    )  # fmt: skip
    if record.get("auxiliary_weight_share"):
        logger.info("auxiliary particles hold %.0f %% of the references' weight",
                    100 * record["auxiliary_weight_share"])  # fmt: skip
    if "scale_sd" in record:
        logger.info("the images' scales have a standard deviation of %.2f", record["scale_sd"])


def log_ending(record: IterationRecord, stalled: int, settings: RefineSection, *, expected: bool = False) -> None:
    """Say after the last iteration if it was not the end by itself, and warn if the poses are still unsettled.

    Args:
        stalled: iterations without progress until now.
        expected: the images need not match the reference, so that unsettled poses are no reason for a warning.
    """
    if stalled < settings.stalled_iterations:
        logger.info("ended by refine.max_iterations = %d, not converged", settings.max_iterations)
    if record["iteration"] > 1 and record["changes_deg"] > UNSETTLED_DEG:
        logger.log(
            logging.INFO if expected else logging.WARNING,
            "the poses still moved by a median of %.0f° in the last iteration: most images do not determine their "
            "poses, by noise or for want of a fitting reference",
            record["changes_deg"],
        )
