"""Laying a reference into the frame of a map that the user names, and saying how well it lies there."""

from __future__ import annotations

import logging
from pathlib import Path

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.physics.fit import fit_into
from cryoiso.physics.fit_result import Fit
from cryoiso.pipeline.inputs.standard_frame import require_symmetry

logger = logging.getLogger("cryoiso")

FINEST_A = 10.0
"""What a homologue has in common with its relatives ends about there."""


def fit_to_file(
    moving: DensityMap, file: Path, symmetry: str = "C1", resolution_A: float | None = None, mirror: bool = True
) -> Fit:
    """Fits a map into the map of a file and reports how; what the user should look at is a warning.

    Args:
        moving: the reference, on any grid.
        file: MRC, any grid; with a symmetry, in its standard frame (Cn about z through the centre of the box).
        resolution_A: finest information used; by default 10 Å, or 2.5 pixels of the coarser of both maps.
        mirror: also try the mirror image. The reference itself is never mirrored.

    Raises:
        InputError: no such map, one too coarse for this resolution, or one without the symmetry in the standard frame.
    """
    from cryoiso.io.mrc import read_map

    if not file.is_file():
        raise InputError(
            "no such map to fit into",
            file=file,
            hint="Check reference.fit in the job file (--fit).",
            code="file-not-found",
        )
    target = read_map(file)
    require_symmetry(target, symmetry, file, what="the map to fit into")
    finest = resolution_A or max(FINEST_A, 2.5 * max(moving.pixel_size_A, target.pixel_size_A))
    fit = fit_into(moving, target, symmetry=symmetry, resolution_A=finest, mirror=mirror)
    doubtful = fit.ambiguous or fit.off_axis or fit.hand in ("mirrored", "undecided")
    logger.log(logging.WARNING if doubtful else logging.INFO, "fit into %s: %s", file.name, fit.verdict)
    if fit.hand == "mirrored":
        logger.warning(
            "the reference was not mirrored: if its own hand is right, then that of %s, and of all that is "
            "reconstructed in its frame, is wrong", file.name,
        )  # fmt: skip
    return fit
