"""Which part of space is protein: a mask from a homologue, with a threshold that is found in the map itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.physics.filters import lowpass
from cryoiso.physics.masks import density_threshold, soft_mask_from_map, sphere_mask

if TYPE_CHECKING:
    from jaxtyping import Float

MASK_LOWPASS_A = 10.0
"""The homologue is filtered to this before thresholding: side chains differ between homologues, the fold does not."""
SOFT_EDGE_A = 6.0
LEAST_OUTSIDE = 0.05
"""Smallest part of the inscribed sphere that must lie outside the mask."""
PROTEIN_DALTON_A3 = 1 / 1.21
"""Protein has 1.35 g/cm^3, that is 1.21 Å^3 a dalton."""


@dataclass(frozen=True)
class ProteinMask:
    """A mask and how it came about."""

    data: Float[np.ndarray, "box box box"]
    """(D, D, D) float32 in [0, 1]."""
    threshold: float | None
    """On the grey scale of the homologue filtered to MASK_LOWPASS_A; None for a given mask."""
    volume_A3: float

    def facts(self) -> dict[str, float | None]:
        """What a report says about it; the mass is that of protein filling the mask."""
        return {
            "threshold": self.threshold,
            "mask_volume_A3": round(self.volume_A3, 1),
            "mask_mass_kDa": round(self.volume_A3 * PROTEIN_DALTON_A3 / 1000, 2),
        }


def filtered(homologue: DensityMap) -> Float[np.ndarray, "box box box"]:
    """The homologue as it is thresholded: (D, D, D) float32."""
    pixel = homologue.pixel_size_A
    return np.asarray(lowpass(np.asarray(homologue.data, np.float32), pixel, max(MASK_LOWPASS_A, 2 * pixel)))


def half_height(volume: Float[np.ndarray, "box box box"]) -> float:
    """The level half-way between the solvent and the mean of what lies above the level.

    For a body of even density, however blurred, the surface at half its height encloses its own volume, so this level
    needs neither the molecular mass nor a grey scale. Found by iteration (Ridler and Calvard 1978,
    doi 10.1109/TSMC.1978.4310039), from the level where density stands out from the solvent at all.

    Args:
        volume: (D, D, D), protein positive, low-passed.

    Returns:
        The threshold, in the volume's unit.

    Raises:
        InputError: nothing stands out of the solvent.
    """
    box = len(volume)
    inside = volume[np.asarray(sphere_mask(box, box / 2 - 1)) > 0.5].astype(np.float64)
    solvent, level = float(np.median(inside)), density_threshold(volume)
    for _ in range(200):
        above = inside[inside > level]
        if not len(above) or not above.mean() > solvent:
            raise InputError("no density above the solvent in the homologue", code="map-without-density")
        new = 0.5 * (solvent + float(above.mean()))
        if abs(new - level) <= 1e-7 * abs(new - solvent):
            break
        level = new
    return level


def protein_mask(homologue: DensityMap, threshold: float | None = None, file: object = None) -> ProteinMask:
    """A soft mask M of the protein: 1 where the filtered homologue exceeds a threshold, an edge of SOFT_EDGE_A beyond.

    Args:
        homologue: protein positive.
        threshold: on the filtered homologue; None finds one (:func:`half_height`).
        file: named in errors.

    Raises:
        InputError: the mask is empty, or leaves no room outside.
    """
    smooth = filtered(homologue)
    try:
        level = half_height(smooth) if threshold is None else float(threshold)
        data = soft_mask_from_map(
            smooth, homologue.pixel_size_A, MASK_LOWPASS_A, level, extend_A=0.0, soft_A=SOFT_EDGE_A
        )  # fmt: skip
    except InputError as error:
        raise InputError(
            error.problem, file=file, expected=error.expected, found=error.found, code=error.code
        ) from None
    return checked_mask(np.asarray(data, np.float32), homologue.pixel_size_A, level, file)


def checked_mask(
    data: np.ndarray, pixel_size_A: float, threshold: float | None = None, file: object = None
) -> ProteinMask:
    """A mask with its volume.

    Raises:
        InputError: nearly nothing lies outside it, so there is nothing to solve for.
    """
    box = len(data)
    sphere = np.asarray(sphere_mask(box, box / 2 - 3), np.float64)
    outside = float(((1 - data) * sphere).sum() / sphere.sum())
    if outside < LEAST_OUTSIDE:
        raise InputError(
            "the protein mask fills the box: no room for a micelle", file=file,
            expected=f"at least {100 * LEAST_OUTSIDE:g} % of the sphere in the box outside the mask",
            found=f"{100 * outside:.1f} %", hint="Give a higher --threshold, or a mask of the protein alone.",
            code="mask-fills-box",
        )  # fmt: skip
    return ProteinMask(data, threshold, float((data > 0.5).sum()) * pixel_size_A**3)
