"""Soft masks: spheres, circles, and the region of a particle determined from its own map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.shapes import require_cube
from cryoiso.physics.filters import Array, as_tensor, like, lowpass

if TYPE_CHECKING:
    from jaxtyping import Float, Real


def sphere_mask(
    box_px: int,
    radius_px: float,
    soft_px: float = 0.0,
    *,
    dims: int = 3,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " ..."]:
    """1 up to a radius around pixel D//2, then a raised cosine to 0 over ``soft_px``.

    Args:
        box_px: D.
        radius_px: where the edge starts.
        soft_px: width of the edge; 0 makes it hard.
        dims: 3, or 2 for a circle.

    Returns:
        (D, D, D) or (D, D) in [0, 1].
    """
    axis2 = (torch.arange(box_px, device=device, dtype=torch.float64) - box_px // 2) ** 2
    r2 = axis2
    for _ in range(dims - 1):
        r2 = r2[..., None] + axis2
    return soft_edge(r2.sqrt() - radius_px, soft_px).to(dtype)


def circle_mask(
    box_px: int,
    radius_px: float,
    soft_px: float = 0.0,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "{box_px} {box_px}"]:
    """(D, D): :func:`sphere_mask` in two dimensions."""
    return sphere_mask(box_px, radius_px, soft_px, dims=2, device=device, dtype=dtype)


def soft_edge(distance_px: Tensor, soft_px: float) -> Tensor:
    """Distance beyond the mask's border -> mask value: 1 inside, a raised cosine over ``soft_px``, 0 beyond."""
    if soft_px <= 0:
        return (distance_px <= 0).to(distance_px.dtype)
    return 0.5 * (1 + torch.cos(torch.pi * (distance_px / soft_px).clamp(0, 1)))


def density_threshold(volume: Real[Array, "box box box"]) -> float:
    """A level that separates a (low-passed) particle from its solvent.

    Five robust standard deviations above the solvent, at least 15 % of the particle's density: most of the sphere
    inside the box is solvent, so its median and median deviation are the solvent's. Where a missing cone fills the
    solvent with streaks, that lies above most of the particle: then Otsu's level (IEEE Trans. SMC 1979), which parts
    the grey values into two classes, if they are parted more clearly than those of pure noise are.

    Args:
        volume: (D, D, D), protein positive.

    Returns:
        The threshold, in the volume's unit.

    Raises:
        InputError: the map is no cube.
    """
    box = require_cube(volume)
    v = as_tensor(volume)
    inside = v[sphere_mask(box, box / 2 - 1, device=v.device) > 0.5].double().cpu().numpy()
    middle = np.median(inside)
    noise = 1.4826 * np.median(np.abs(inside - middle))
    top = np.sort(inside)[-max(8, len(inside) // 500) :].mean()
    level = float(max(middle + 5 * noise, middle + 0.15 * (top - middle)))
    between, clearness = otsu(inside)
    return min(level, between) if clearness > CLEARLY_PARTED else level


CLEARLY_PARTED = 0.7
"""Share of the variance that is between Otsu's classes; 2 / pi = 0.64 for a single Gaussian."""


def otsu(values: Float[np.ndarray, " n"], bins: int = 512) -> tuple[float, float]:
    """The level that separates values into the two classes with the largest variance between them, and its share of
    all."""
    counts, edges = np.histogram(values, bins)
    centre, share = (edges[1:] + edges[:-1]) / 2, counts / max(counts.sum(), 1)
    below, moment = np.cumsum(share), np.cumsum(share * centre)
    between = (moment[-1] * below - moment) ** 2 / np.maximum(below * (1 - below), 1e-12)
    best, variance = int(between.argmax()), float(np.var(values))
    return float(centre[best]), float(between[best] / variance) if variance > 0 else 0.0


def soft_mask_from_map(
    volume: Real[Array, "box box box"],
    pixel_size_A: float,
    lowpass_A: float = 15.0,
    threshold: float | None = None,
    extend_A: float = 3.0,
    soft_A: float = 9.0,
    *,
    keep_fraction: float = 0.1,
) -> Float[Array, "box box box"]:
    """A soft mask around the particle of a map: low-pass, threshold, drop specks, extend, soften.

    Args:
        volume: (D, D, D), protein positive.
        pixel_size_A: Å.
        lowpass_A: filter before thresholding.
        threshold: of the filtered map; None finds one (:func:`density_threshold`).
        extend_A: how far the border is moved out.
        soft_A: width of the raised-cosine edge beyond that.
        keep_fraction: separate pieces smaller than this fraction of the largest are dropped.

    Returns:
        (D, D, D) in [0, 1], float32.

    Raises:
        InputError: the map is no cube, or nothing lies above the threshold.
    """
    from scipy import ndimage

    box = require_cube(volume)
    v = as_tensor(volume)
    filtered = lowpass(v.float(), pixel_size_A, max(lowpass_A, 2 * pixel_size_A))
    level = density_threshold(filtered) if threshold is None else threshold
    binary = (filtered > level).cpu().numpy()
    labels, count = ndimage.label(binary)
    if count == 0:
        raise InputError(
            "the mask would be empty: no density above the threshold",
            expected=f"a threshold below {float(filtered.max()):.4g}",
            found=f"{level:.4g}",
            code="mask-empty",
        )
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    binary = (sizes >= keep_fraction * sizes.max())[labels]
    distance = torch.from_numpy(_distance_px(binary, (extend_A + soft_A) / pixel_size_A))
    mask = soft_edge(distance - extend_A / pixel_size_A, soft_A / pixel_size_A).float()
    # the edge never reaches the corners of the box, where reconstructions hold nothing
    mask = mask * sphere_mask(box, box / 2 - 3, 3)
    return like(mask.to(v.device), volume)


def _distance_px(binary: np.ndarray, reach_px: float) -> np.ndarray:
    """Distance to the binary region in pixels, exact within ``reach_px``; the rest of the box is not computed."""
    from scipy import ndimage

    margin = int(np.ceil(reach_px)) + 1
    window = []
    for axis in range(3):
        hit = np.flatnonzero(binary.any(axis=tuple(a for a in range(3) if a != axis)))
        window.append(slice(max(0, hit[0] - margin), hit[-1] + margin + 1))
    distance = np.full(binary.shape, reach_px + 1.0)
    distance[tuple(window)] = ndimage.distance_transform_edt(~binary[tuple(window)])
    return distance


def mask_diameter_A(mask: Real[Array, "box box box"], pixel_size_A: float) -> float:
    """Diameter in Å of the smallest sphere around the box's centre that contains the mask above one half."""
    require_cube(mask, "a mask")
    m = as_tensor(mask)
    where = torch.nonzero(m > 0.5).double() - m.shape[0] // 2
    return 2 * pixel_size_A * float(where.norm(dim=1).max()) if len(where) else 0.0
