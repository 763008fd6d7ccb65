"""Log lines of an iteration."""

from __future__ import annotations

from cryoiso.core.log import logger
from cryoiso.core.records import IterationRecord


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
