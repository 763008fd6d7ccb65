"""A correction of two half-maps at toy size."""

from __future__ import annotations

from pathlib import Path

from cryoiso.core.config import CorrectSection
from cryoiso.pipeline.stages.correct import CorrectionFiles

BOX, PIXEL = 24, 8.0
SIZES = {"cube_px": 16, "sub_maps": 4, "batch": 2, "epochs": 1}


def task_of(halves: dict[int, Path], out: Path, **keys: object) -> CorrectionFiles:
    return CorrectionFiles(halves, out, CorrectSection(**{**SIZES, **keys}), seed=2)
