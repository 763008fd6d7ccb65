"""What a reference says of the particle: its size, its point group, and how much of it shows a direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.io.confidence import ModelChoice
from cryoiso.pipeline.inputs.reference import measure_diameter

COARSE_A = 4.0
"""Pixel size at which size and directions are measured."""
MODEL_A, MARGIN_A = 10.0, 60.0
"""Resolution of a model's density there, and what is left around the atoms."""
FILTERS_A = (30.0, 20.0, 15.0)
"""Low-pass filters that are compared."""
DALTON_A3 = 1.21
"""Volume of a protein per dalton in Å^3 (specific volume 0.73 cm^3/g)."""


@dataclass(frozen=True)
class ReferenceFacts:
    """Of a map or a model."""

    kind: str
    """"model" or "map" """
    diameter_A: float
    symmetry: str
    """point group that it has; empty where nothing can be said"""
    nearly: str
    """a larger one that it has only nearly"""
    symmetry_words: str
    directional: dict[float, float]
    """low-pass -> share of the power that is not the same in all directions"""
    box_px: tuple[int, int, int] | None = None
    """of a map"""
    voxel_A: tuple[float, float, float] | None = None
    mass_kDa: float | None = None
    """of a model"""
    source: dict[str, Any] | None = None
    """as `cryoiso.pipeline.inputs.reference.Reference.facts`"""

    def facts(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "kind": self.kind, "diameter_A": round(self.diameter_A, 1), "symmetry": self.symmetry,
            "nearly": self.nearly, "symmetry_words": self.symmetry_words, "mass_kDa": self.mass_kDa,
            "directional": {f"{k:g}": round(v, 4) for k, v in self.directional.items()}, **(self.source or {}),
        }  # fmt: skip


def facts_of_reference(file: Path, choice: ModelChoice, map_pixel_size_A: float | None = None) -> ReferenceFacts:
    """Reads a reference and measures it; minutes for the symmetry of a map, seconds for a model.

    Raises:
        InputError: as ``pipeline.inputs.reference.prepare_reference``.
    """
    from cryoiso.io.models import is_model

    return _of_model(file, choice) if is_model(file) else _of_map(file, map_pixel_size_A)


def _of_model(file: Path, choice: ModelChoice) -> ReferenceFacts:
    from cryoiso.io.models import load_model, loaded_model_to_map, positions
    from cryoiso.io.modelsymmetry import model_group

    model, facts = load_model(file, choice)
    xyz, mass = positions(model)
    reach_A = float(np.abs(xyz - np.average(xyz, axis=0, weights=mass)).max())
    box = 2 * math.ceil((reach_A + MARGIN_A) / COARSE_A)
    coarse = loaded_model_to_map(model, file, box, COARSE_A, MODEL_A)
    group = model_group(model)
    single = len(group.counts) == 1 and group.counts[0][0] == 1
    return ReferenceFacts(
        "model", measure_diameter(coarse), "" if single or not group.counts else group.group, group.nearly, group.words,
        directional_power(coarse), mass_kDa=round(float(mass.sum()) / 1000, 1), source={"model": facts},
    )  # fmt: skip


def _of_map(file: Path, map_pixel_size_A: float | None) -> ReferenceFacts:
    from cryoiso.io.mapbox import densities, read_map_box
    from cryoiso.io.mrc import read_map
    from cryoiso.physics.resample import resample_box
    from cryoiso.physics.symmetry_proposal import propose_symmetry

    box = read_map_box(file, map_pixel_size_A)
    x, y, z = box.voxel_A
    data = read_map(file, map_pixel_size_A).data if box.is_plain else densities(box, file)
    if not np.std(data) > 0:
        raise InputError(
            "the reference map is empty", file=file, expected="densities that vary", code="map-without-density"
        )
    coarse_A = max(COARSE_A, x, y, z)
    side = 2 * math.ceil(box.longest_A / coarse_A / 2)
    coarse = DensityMap(resample_box(data, (z, y, x), side, coarse_A), coarse_A)
    diameter_A = measure_diameter(coarse)
    if diameter_A >= side * coarse_A:  # a map cropped tightly: the box is not the limit, its corners are
        roomy = 2 * math.ceil((math.sqrt(3) * box.longest_A / 2 + MARGIN_A) / coarse_A)
        diameter_A = measure_diameter(DensityMap(resample_box(data, (z, y, x), roomy, coarse_A), coarse_A))
    proposal = propose_symmetry(coarse)
    nz, ny, nx = box.data.shape
    return ReferenceFacts(
        "map", diameter_A, proposal.group, proposal.pseudo or "", proposal.words,
        directional_power(coarse), box_px=(nx, ny, nz), voxel_A=box.voxel_A, source={"map": box.facts()},
    )  # fmt: skip


def directional_power(density: DensityMap) -> dict[float, float]:
    """Share of a map's power, up to each of ``FILTERS_A``, that is not the same in all directions.

    In every shell the mean of the coefficients over all directions is what a round particle would have; it tells no
    view from another. Filters that the grid does not hold are left out. Shells are one pixel wide, so that a perfect
    ball has about 0.03.
    """
    data = np.asarray(density.data, np.float64)
    box = density.box_px
    spectrum = np.fft.rfftn(np.fft.ifftshift(data))
    full, half = np.fft.fftfreq(box, 1 / box), np.arange(box // 2 + 1)
    radius = np.sqrt(full[:, None, None] ** 2 + full[None, :, None] ** 2 + half[None, None, :] ** 2)
    shell = np.rint(radius).astype(np.int64).ravel()
    weight = np.where((half == 0) | (2 * half == box), 1.0, 2.0)
    weight = np.broadcast_to(weight, spectrum.shape).ravel()
    count = np.bincount(shell, weight)
    power = np.bincount(shell, weight * np.abs(spectrum.ravel()) ** 2)
    mean = np.bincount(shell, weight * spectrum.real.ravel()) / count  # imaginary parts cancel between Friedel mates
    frequency = np.arange(len(count)) / (box * density.pixel_size_A)
    shares = {}
    for lowpass_A in FILTERS_A:
        used = (frequency > 0) & (frequency <= 1 / lowpass_A)
        if lowpass_A >= 2 * density.pixel_size_A and power[used].sum() > 0:
            shares[lowpass_A] = float(1 - (count * mean**2)[used].sum() / power[used].sum())
    return shares
