"""What RELION's files of the iteration before tell a callback that no ranks wait for.

RELION calls in the middle of an iteration, whose own sampling, model and optimiser files it writes afterwards.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import HALVES
from cryoiso.engines.relion.files import Name, read_model, read_optimiser, read_sampling, run_with_iteration
from cryoiso.io.mrc import read_map


@dataclass(frozen=True)
class PreviousIteration:
    """What is known of it; the defaults are what is assumed where its files are missing."""

    half_sets: bool = True
    """False: RELION classifies, or refines without half-sets"""
    pixel_size_A: float | None = None
    dimensions: int = 2
    """of the particles"""
    step_deg: float | None = None
    """angular sampling before oversampling"""
    version: str = ""
    """of RELION"""
    mask: str = ""
    """solvent mask, relative to RELION's working folder"""


def read_previous_iteration(name: Name) -> PreviousIteration:
    """Reads what there is of the iteration before the one that an output's name tells.

    Args:
        name: of an output of the iteration in which RELION calls; without a number nothing is known.
    """
    run = None if name.iteration is None else run_with_iteration(name, name.iteration - 1)
    if run is None or name.iteration is None:
        return PreviousIteration()
    before = name.iteration - 1
    models = {half_sets: run.of(before, f"{'half1_' * half_sets}model.star") for half_sets in (True, False)}
    half_sets = models[True].exists() or not models[False].exists()
    facts: dict[str, Any] = {"half_sets": half_sets}
    with suppress(InputError):
        model = read_model(models[half_sets])
        facts |= {"pixel_size_A": model["pixel_size_A"], "dimensions": model["data_dimensions"]}
    with suppress(InputError):
        facts["step_deg"] = read_sampling(run.of(before, "sampling.star")).step_deg
    with suppress(InputError):
        optimiser = read_optimiser(run.of(before, "optimiser.star"))
        facts |= {"version": optimiser["version"], "mask": optimiser["mask"]}
    return PreviousIteration(**facts)


def read_first_references(name: Name, pixel_size_A: float) -> dict[int, np.ndarray] | None:
    """Half -> (D, D, D) reference of iteration 0; None where it is not there any more."""
    run = run_with_iteration(name, 0)
    files = {} if run is None else {half: run.of(0, f"half{half}_class001.mrc") for half in HALVES}
    if not files or not all(file.exists() for file in files.values()):
        return None
    return {half: read_map(file, pixel_size_A).data for half, file in files.items()}


def path_of_sampling(name: Name) -> Path:
    """Where the sampling of the iteration before is expected."""
    return name.of((name.iteration or 1) - 1, "sampling.star")
