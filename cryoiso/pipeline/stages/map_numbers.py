"""What is measured of the final maps beside FSC, directions and views: local resolution, a model, EMDB's flags."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core import products
from cryoiso.core.config import DiagnoseSection
from cryoiso.core.errors import UsageError
from cryoiso.core.records import DiagnoseRecord
from cryoiso.core.types import DensityMap
from cryoiso.io.atomic import write_text
from cryoiso.io.mrc import write_map
from cryoiso.methods.assess.emdb_flags import emdb_flags, sentences
from cryoiso.methods.assess.measure import plain
from cryoiso.methods.assess.model_map import q_table
from cryoiso.metrics.windowed_fsc import local_resolution
from cryoiso.parallel import signals
from cryoiso.pipeline.inputs.placed_model import measure_model

logger = logging.getLogger("cryoiso")
AUTO_BOX_PX = 400
"""Largest box in which the local resolution is measured unasked; time grows as its third power."""


def check_models(section: DiagnoseSection, grid: tuple[int, float]) -> None:
    """Makes sure, before anything is computed, that the models can be read and the window fits the box.

    Raises:
        InputError: a model cannot be read.
        UsageError: a second model without a first one, or a window wider than half the box.
    """
    from cryoiso.io.atoms import read_atoms

    if section.compare_model and not section.model:
        raise UsageError("diagnose.compare_model (--compare-model) needs a model to compare with: diagnose.model "
                         "(--model)", code="options-conflict")  # fmt: skip
    for name in filter(None, (section.model, section.compare_model)):
        read_atoms(name)
    box_px, pixel_A = grid
    window_A = section.local_window_A
    if window_A is not None and not 2 * pixel_A < window_A <= box_px * pixel_A / 2:
        raise UsageError(
            f"diagnose.local_window_A = {window_A:g}: more than {2 * pixel_A:g} Å and at most half the box, "
            f"{box_px * pixel_A / 2:g} Å, is expected", code="option-out-of-range",
        )  # fmt: skip


def measure_further(
    numbers: DiagnoseRecord, half1: DensityMap, half2: DensityMap, mask: np.ndarray, primary: DensityMap | None,
    section: DiagnoseSection, symmetry: str, folder: Path,
) -> None:  # fmt: skip
    """Adds to what `diagnose` measured, and writes maps and tables into a folder.

    Args:
        primary: the map that is deposited as the primary one; a model is compared with it.
    """
    note_flags(numbers, None if primary is None else primary.data)
    if wants_local_resolution(section, half1.box_px):
        measure_locally(numbers, half1, half2, mask, section, folder / products.LOCAL_RESOLUTION)
    if section.model:
        add_model(numbers, primary or mean_of(half1, half2), section, symmetry, folder / products.Q_TABLE)


def note_flags(numbers: DiagnoseRecord, primary: np.ndarray | None) -> None:
    """EMDB's flags, those that are raised as warnings and notes as well."""
    curve = numbers.get("fsc_unmasked")
    flags = plain(emdb_flags(None if curve is None else np.array(curve, float), primary))
    numbers["emdb_flags"] = flags
    for words in sentences(flags):
        logger.warning("%s", words)


def wants_local_resolution(section: DiagnoseSection, box_px: int) -> bool:
    return section.local_resolution == "yes" or (section.local_resolution == "auto" and box_px <= AUTO_BOX_PX)


def measure_locally(
    numbers: DiagnoseRecord, half1: DensityMap, half2: DensityMap, mask: np.ndarray, section: DiagnoseSection,
    out: Path,
) -> None:  # fmt: skip
    """The local resolution as a map, and its percentiles."""
    result = local_resolution(
        half1.data, half2.data, half1.pixel_size_A, window_A=section.local_window_A,
        threshold=section.local_threshold, resolution_A=numbers.get("resolution_0143_A"), each_band=signals.heed,
    )  # fmt: skip
    numbers["local_resolution"] = plain(result.summary(mask))
    write_map(out, result.resolution_A, half1.pixel_size_A, half1.origin_A)


def add_model(
    numbers: DiagnoseRecord, density: DensityMap, section: DiagnoseSection, symmetry: str, table: Path,
    extent_px: tuple[int, int, int] | None = None,
) -> None:  # fmt: skip
    """Map-model FSC and Q-scores, with the table by residue as a file of its own."""
    model_record: dict[str, Any] = measure_model(
        density, Path(section.model), extent_px=extent_px, fit=section.fit_model, symmetry=symmetry,
        sigma_A=section.q_sigma_A, other=Path(section.compare_model) if section.compare_model else None,
    )  # fmt: skip
    numbers["model"] = model_record
    write_text(table, q_table(model_record))


def mean_of(half1: DensityMap, half2: DensityMap) -> DensityMap:
    """The mean of two half-maps, in the frame of the first."""
    return DensityMap((half1.data + half2.data) / 2, half1.pixel_size_A, half1.origin_A)
