"""An atomic model in the frame of a map: as its file has it, or fitted, and the numbers of both."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.io.atoms import Atoms, density_of, read_atoms
from cryoiso.io.mrc import read_raw_map
from cryoiso.metrics.qscore import SIGMA_A

logger = logging.getLogger("cryoiso")
Fit = Literal["auto", "yes", "no"]
FIT_A = 6.0
"""Finest information with which a model is fitted (2.5 pixels of a coarser map)."""


def read_model_map(path: Path, pixel_size_A: float | None = None) -> tuple[DensityMap, tuple[int, int, int]]:
    """A map that a model belongs to, which may be a crop: padded to a cube at the far ends.

    Returns:
        the cube with the origin of the file, and the (z, y, x) voxels that the file has.

    Raises:
        InputError: unreadable, oblique, or voxels that are no cubes.
    """
    raw, header = read_raw_map(path)
    header.require_right_angles(path)
    voxel = header.voxel_A if pixel_size_A is None else (pixel_size_A,) * 3
    if min(voxel) <= 0 or max(voxel) - min(voxel) > 1e-3 * max(voxel):
        raise InputError(
            "the voxels are not cubes", file=path, expected="one pixel size",
            found=" x ".join(f"{v:g}" for v in voxel) + " Å", code="map-not-cubic",
        )  # fmt: skip
    data = np.array(raw, np.float32)
    if not np.isfinite(data).all():
        raise InputError("the map has voxels that are NaN or infinite", file=path, code="map-not-finite")
    shape = (data.shape[0], data.shape[1], data.shape[2])
    side = max(shape) + max(shape) % 2
    if shape != (side,) * 3:
        border = np.concatenate([data[[0, -1]].ravel(), data[:, [0, -1]].ravel(), data[:, :, [0, -1]].ravel()])
        cube = np.full((side,) * 3, np.median(border), np.float32)
        cube[: shape[0], : shape[1], : shape[2]] = data
        data = cube
    return DensityMap(data, float(np.mean(voxel)), header.origin_A), shape


def measure_model(
    density: DensityMap,
    model: Path,
    *,
    extent_px: tuple[int, int, int] | None = None,
    fit: Fit = "auto",
    symmetry: str = "C1",
    sigma_A: float = SIGMA_A,
    other: Path | None = None,
) -> dict[str, Any]:
    """Numbers of a model against a map, see `cryoiso.methods.assess.model_map`.

    Args:
        density: a cube. extent_px: its voxels that were measured; None: all.
        fit: "no": the coordinates are those of the map's frame, as a viewer shows both; "yes": the model is fitted as a
            rigid body; "auto": fitted if it does not lie in the density as it is.
        other: a second model that is compared with the first.

    Raises:
        InputError: unreadable model, one that does not lie in the map, or a second one of something else.
    """
    from cryoiso.methods.assess.measure import plain
    from cryoiso.methods.assess.model_map import comparison, model_numbers, placed_at_A

    atoms = read_atoms(model)
    rotation, offset_A, score, placed = _placed(density, atoms, model, fit, symmetry)
    numbers = model_numbers(density, extent_px or density.data.shape, atoms, rotation, offset_A, sigma_A)
    numbers = {"model": model.name, "placed": placed, "correlation": score, **numbers}
    numbers["placed_at_A"] = placed_at_A(density.pixel_size_A)
    if other is not None:
        numbers["comparison"] = {"model": other.name, **comparison(atoms, read_atoms(other))}
    record: dict[str, Any] = plain(numbers)
    return record


def _placed(
    density: DensityMap, atoms: Atoms, model: Path, fit: Fit, symmetry: str
) -> tuple[np.ndarray, np.ndarray, float, str]:
    """Rotation, offset from voxel D//2, correlation and how they were found."""
    from cryoiso.methods.assess.model_map import LIES_THERE, lies_in

    still = np.eye(3)
    as_given = -np.asarray(density.origin_A) - (density.box_px // 2) * density.pixel_size_A
    score = lies_in(density, atoms, still, as_given)
    if fit == "no" and score == 0.0:
        raise InputError(
            "the model does not lie inside the map", file=model, expected="the coordinates of the map's frame",
            hint="Fit it first, or let it be fitted (fit_model = 'auto', --fit-model auto).",
            code="model-outside-map",
        )  # fmt: skip
    if fit == "no" or (fit == "auto" and score >= LIES_THERE):
        return still, as_given, score, "as given"
    rotation, offset_A = _fitted(density, atoms, symmetry)
    fitted = lies_in(density, atoms, rotation, offset_A)
    if fit == "auto" and score >= fitted:
        return still, as_given, score, "as given"
    logger.info("%s was fitted into the map: correlation %.2f (%.2f as given)", model.name, fitted, score)
    if fitted < LIES_THERE:
        logger.warning(
            "%s: correlation with the map is only %.2f where it was fitted; its numbers mean little", model.name, fitted
        )
    return rotation, offset_A, fitted, "fitted"


def _fitted(density: DensityMap, atoms: Atoms, symmetry: str) -> tuple[np.ndarray, np.ndarray]:
    """The best rigid placement of a model."""
    from cryoiso.physics.fit import fit_into

    finest_A = max(FIT_A, 2.5 * density.pixel_size_A)
    moving = density_of(atoms, density.box_px, density.pixel_size_A, finest_A, np.eye(3), -atoms.centre_A)
    best = fit_into(moving, density, resolution_A=finest_A, symmetry=symmetry, mirror=False).best
    return best.rotation, best.shift_A - best.rotation @ atoms.centre_A
