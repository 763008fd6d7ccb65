"""The reference of a refinement: an atomic model or a map, brought onto the particles' grid and low-passed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.pipeline.inputs.standard_frame import require_symmetry, symmetrised, to_standard_frame

if TYPE_CHECKING:
    from cryoiso.core.sections.data import ReferenceSection
    from cryoiso.io.confidence import ModelChoice
    from cryoiso.physics.fit_result import Fit

logger = logging.getLogger("cryoiso")

PIXEL_TOLERANCE = 0.01
"""Pixel sizes that differ by less are the same (headers are rounded, microscopes recalibrated)."""
LARGEST_RATIO = 2.0
"""A map whose edge in Å is more than this many times longer or shorter than the particles' box cannot be meant."""


@dataclass(frozen=True)
class Reference:
    """A reference as a refinement takes it."""

    map: DensityMap
    """on the particles' grid"""
    initial: DensityMap
    """the same low-passed: what a refinement starts from"""
    diameter_A: float
    """measured, with a margin"""
    source: str
    """what was done, in words"""
    fit: Fit | None = None
    """how it was laid into another map's frame"""
    facts: dict[str, Any] = field(default_factory=dict)
    """of the file: ``model`` (chains, B column, residues left out) or ``map`` (box, voxel, axes), for JSON"""


def model_choice(section: ReferenceSection) -> ModelChoice:
    """What of an atomic model a job uses; names of chains may stand in one word, with commas."""
    from cryoiso.io.confidence import ModelChoice

    return ModelChoice(
        split_chains(section.chains), section.assembly, section.confidence, section.min_confidence,
        section.full_confidence,
    )  # fmt: skip


def split_chains(words: list[str]) -> tuple[str, ...]:
    """Names of chains from words such as ``A,B``."""
    return tuple(name for word in words for name in map(str.strip, word.split(",")) if name)


def prepare_reference(
    file: Path,
    box_px: int,
    pixel_size_A: float,
    lowpass_A: float,
    *,
    map_pixel_size_A: float | None = None,
    resample: bool = False,
    symmetry: str = "C1",
    fit: Path | None = None,
    fit_resolution_A: float | None = None,
    mirror: bool = True,
    standard_frame: bool = False,
    symmetrise: bool = False,
    model: ModelChoice | None = None,
) -> Reference:
    """Reads a reference and brings it onto a grid.

    A model is turned into the frame of its point group and into density. A map must have this box and, within 1 %, this
    pixel size, unless ``resample`` is set, which interpolates it exactly in Fourier space (any box and voxel). What
    comes out must have the symmetry in its standard frame.

    Args:
        file: PDB, mmCIF or MRC.
        box_px: box of the particles.
        pixel_size_A: pixel size of the particles.
        lowpass_A: resolution of ``initial``; 0 leaves it as it is.
        map_pixel_size_A: replaces the pixel size in the map's header.
        resample: accept a map with another box or pixel size.
        symmetry: point group of the particles, which model or map must have.
        fit: a map on any grid; the reference is laid into its frame (``pipeline.inputs.fit_reference``).
        fit_resolution_A: finest information that decides where; by default 10 Å, or what both grids hold.
        mirror: also see whether the mirror image fits better.
        standard_frame: find the axes of ``symmetry`` in a map and move it into the standard frame.
        symmetrise: average the map over the operations of ``symmetry``.
        model: what of an atomic model is used.

    Raises:
        InputError: unreadable file, a map without a pixel size, a map that does not fit the particles, a model or map
            without the symmetry, a resolution that the grid cannot hold.
    """
    from cryoiso.io.models import is_model

    if not file.is_file():
        raise InputError(
            "no such reference", file=file, hint="Check its path (reference.file in a job file).", code="file-not-found"
        )
    _check_lowpass(lowpass_A, pixel_size_A, file)
    if is_model(file):
        full, source, facts = _from_model(file, box_px, pixel_size_A, lowpass_A, symmetry, choice=model)
    else:
        full, source, facts = _from_map(file, box_px, pixel_size_A, map_pixel_size_A, resample)
    if float(full.data.max()) <= 0:
        raise InputError(
            "no positive density in the reference",
            file=file,
            hint="Protein must be white in it.",
            code="map-without-density",
        )
    if float(full.data.max()) == float(full.data.min()):
        raise InputError(
            "the reference is constant", file=file, expected="densities that vary",
            found=f"{full.data.flat[0]:g} in every voxel", code="map-without-density",
        )  # fmt: skip
    full, placement = DensityMap(full.data, pixel_size_A), None
    if standard_frame and not is_model(file):
        full, done = to_standard_frame(full, symmetry, file)
        source += f", {done}"
    if fit is not None:
        from cryoiso.physics.fit import apply_fit
        from cryoiso.pipeline.inputs.fit_reference import fit_to_file

        placement = fit_to_file(full, fit, symmetry, fit_resolution_A, mirror)
        if is_model(file):
            again = (placement.rotation, placement.shift_A)
            full, source, facts = _from_model(file, box_px, pixel_size_A, lowpass_A, symmetry, again, model)
        else:
            full = apply_fit(full, placement)
        source += f", fitted into {fit.name}"
    if symmetrise:
        full = symmetrised(full, symmetry)
        source += f", averaged over {symmetry}"
    require_symmetry(
        full, symmetry, file, lowpass_A, "the reference" if fit is None else f"the map, as fitted into {fit},"
    )
    return replace(finish_reference(full, lowpass_A, source, placement), facts=facts)


def finish_reference(full: DensityMap, lowpass_A: float, source: str, fit: Fit | None = None) -> Reference:
    """Low-passes a map that is on the particles' grid (0: leaves it) and measures the particle's diameter in it."""
    from cryoiso.physics.filters import lowpass

    data = lowpass(full.data, full.pixel_size_A, lowpass_A) if lowpass_A else full.data
    initial = DensityMap(np.asarray(data, np.float32), full.pixel_size_A)
    return Reference(full, initial, measure_diameter(full), source, fit)


def _check_lowpass(lowpass_A: float, pixel_size_A: float, file: Path) -> None:
    if lowpass_A and lowpass_A < 2 * pixel_size_A:
        raise InputError(
            "the low-pass is beyond the Nyquist frequency of the grid", file=file,
            expected=f"{2 * pixel_size_A:g} Å or more", found=f"{lowpass_A:g} Å", code="grid-too-coarse",
        )  # fmt: skip


def _from_model(
    file: Path,
    box_px: int,
    pixel_size_A: float,
    lowpass_A: float,
    symmetry: str,
    placement: Any = None,
    choice: ModelChoice | None = None,
) -> tuple[DensityMap, str, dict[str, Any]]:
    from cryoiso.io.models import load_model, loaded_model_to_map

    model, facts = load_model(file, choice)
    resolution = max(2.2 * pixel_size_A, 0.5 * lowpass_A)
    full = loaded_model_to_map(
        model, file, box_px, pixel_size_A, resolution, align_symmetry_axis=symmetry, placement=placement
    )
    source = f"density of the atomic model {file.name}"
    if facts["chains"]:
        source += f", chains {', '.join(facts['chains'])}"
    if facts["b_column"] == "confidence":
        source += f", predicted, {facts['left_out']} of {facts['residues']} residues left out"
    return full, source, {"model": facts}


def _from_map(
    file: Path, box_px: int, pixel_size_A: float, map_pixel_size_A: float | None, resample: bool
) -> tuple[DensityMap, str, dict[str, Any]]:
    from cryoiso.io.mapbox import densities, read_map_box
    from cryoiso.io.mrc import read_map
    from cryoiso.physics.resample import resample_box, resample_map

    box = read_map_box(file, map_pixel_size_A)
    has, expected, facts = box.words, f"{box_px} px of {pixel_size_A:g} Å", {"map": box.facts()}
    plain = read_map(file, map_pixel_size_A) if box.is_plain else None
    same_pixel = plain is not None and abs(plain.pixel_size_A / pixel_size_A - 1) <= PIXEL_TOLERANCE
    if plain is not None and same_pixel and plain.box_px == box_px:
        return plain, f"map {file.name}", facts
    if not 1 / LARGEST_RATIO <= box.longest_A / (box_px * pixel_size_A) <= LARGEST_RATIO:
        raise InputError(
            "the reference map and the particles are of very different size", file=file, expected=expected, found=has,
            hint="One of the pixel sizes is wrong, or this is the reference of another sample.",
            code="reference-size-mismatch",
        )  # fmt: skip
    if not resample:
        same_box = set(box.data.shape) == {box_px}
        what = "pixel size" if same_box else "box" if same_pixel else "box and pixel size"
        raise InputError(
            f"the reference map has another {what} than the particles", file=file, expected=expected, found=has,
            hint="If the map's header is right, set reference.resample = true (--resample) to bring it onto the "
            "particles' grid; if it is wrong, set reference.pixel_size_A.", code="grid-mismatch",
        )  # fmt: skip
    if plain is not None:
        data = resample_map(plain.data, plain.pixel_size_A, box_px, pixel_size_A)
    else:
        x, y, z = box.voxel_A
        data = resample_box(densities(box, file), (z, y, x), box_px, pixel_size_A)
    logger.info("reference %s: %s interpolated to %s", file.name, has, expected)
    if plain is None or facts["map"]["mapc_mapr_maps"] != [1, 2, 3]:
        logger.info(
            "%s: MAPC, MAPR, MAPS %s; its voxel n//2 comes to the centre, its origin %s Å is not used", file.name,
            facts["map"]["mapc_mapr_maps"], facts["map"]["origin_A"],
        )  # fmt: skip
    return DensityMap(data, pixel_size_A), f"map {file.name}, interpolated from {has}", facts


def measure_diameter(reference: DensityMap, keep: float = 0.99, margin_A: float = 10.0) -> float:
    """Diameter of the sphere about the box centre that holds the particle, in Å.

    Twice the radius that contains ``keep`` of the density above the solvent's level in the map low-passed to 20 Å, plus
    a margin on either side; never more than the box.
    """
    from cryoiso.physics.filters import lowpass
    from cryoiso.physics.masks import density_threshold

    box, pixel = reference.box_px, reference.pixel_size_A
    smooth = np.asarray(lowpass(reference.data, pixel, max(20.0, 2.5 * pixel)), np.float64)
    inside = np.where(smooth > density_threshold(smooth), smooth, 0.0)
    axis2 = (np.arange(box) - box // 2) ** 2
    radius = np.sqrt(axis2[:, None, None] + axis2[None, :, None] + axis2[None, None, :]).ravel()
    order = np.argsort(radius, kind="stable")
    mass = np.cumsum(inside.ravel()[order])
    if mass[-1] <= 0:
        return box * pixel
    reach = radius[order][np.searchsorted(mass, keep * mass[-1])]
    return float(min(2 * (reach * pixel + margin_A), box * pixel))
