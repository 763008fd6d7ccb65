"""Noise of particle images: spectra measured outside the particle, and synthetic noise of a given spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.shapes import require_images
from cryoiso.physics.filters import Array, as_tensor, friedel_weights, like, power_spectrum, radius_grid
from cryoiso.physics.masks import circle_mask

if TYPE_CHECKING:
    from jaxtyping import Float


def background_statistics(
    images: Float[Array, "n box box"], radius_px: float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Mean and standard deviation of each image outside a circle around its centre.

    Args:
        images: (n, D, D).
        radius_px: of the circle; smaller than D/2.

    Returns:
        mean (n,), sd (n,) float64.

    Raises:
        InputError: no set of images, or nothing lies outside the circle.
    """
    require_images(images)
    x = as_tensor(images)
    outside = _outside(x.shape[-1], radius_px, x.device)
    values = x[..., outside].double()
    return like(values.mean(-1), images), like(values.std(-1, unbiased=False), images)


def normalise_background(images: Float[Array, "n box box"], radius_px: float) -> Float[Array, "n box box"]:
    """Images with mean 0 and standard deviation 1 outside a circle; a constant background only loses its mean.

    Args:
        images: (n, D, D).
        radius_px: of the circle.

    Returns:
        (n, D, D), same dtype, new array.
    """
    x = as_tensor(images)
    mean, sd = background_statistics(x, radius_px)
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    return like(((x.double() - mean[:, None, None]) / sd[:, None, None]).to(x.dtype), images)


def _outside(box_px: int, radius_px: float, device: torch.device) -> Tensor:
    outside = circle_mask(box_px, radius_px, device=device) < 0.5
    if not bool(outside.any()):
        raise InputError(
            "no background left",
            expected=f"a radius below {box_px / 2**0.5:.0f} px",
            found=radius_px,
            code="option-out-of-range",
        )
    return outside


def background_spectrum(
    images: Float[Array, "n box box"], radius_px: float, soft_px: float = 4.0
) -> Float[Array, " box//2+1"]:
    """Radial noise spectrum of images from the area outside a circle, averaged over the images.

    The image inside a soft circle is set to zero and the power divided by the mean square of the window, which is exact
    for white noise and smooths other spectra over about D / (D - radius) shells.

    Args:
        images: (n, D, D).
        radius_px: of the circle.
        soft_px: width of the window's edge.

    Returns:
        (D//2+1,) float64, power per coefficient of orthonormal transforms (1 for white noise of variance 1).
    """
    x = as_tensor(images)
    mean, _ = background_statistics(x, radius_px)
    window = 1 - circle_mask(x.shape[-1], radius_px, soft_px, device=x.device, dtype=x.dtype)
    spectrum = power_spectrum((x - mean[:, None, None].to(x.dtype)) * window).mean(0)
    return like(spectrum / float(window.square().mean()), images)


def noise_spectrum(
    box_px: int, kind: str = "white", knee: float = 0.1, floor: float = 0.2, table: ArrayLike | None = None
) -> Float[np.ndarray, " {box_px}//2+1"]:
    """A radial spectrum of total variance 1 for simulated noise.

    Args:
        box_px: D.
        kind: ``white``; ``coloured``: floor + 1 / (1 + (k / k0)^2), which falls like amorphous ice plus shot noise; or
            ``table``.
        knee: k0 as a fraction of the sampling frequency (0.5 is Nyquist).
        floor: the white part relative to the height at zero frequency.
        table: (m,) relative power from zero frequency to Nyquist, for ``table``; resampled linearly.

    Returns:
        (D//2+1,) float64, scaled so that noise of it has variance 1.

    Raises:
        InputError: unknown kind, or a table with negative values.
    """
    shells = np.arange(box_px // 2 + 1)
    if kind == "white":
        curve = np.ones(len(shells))
    elif kind == "coloured":
        curve = floor + 1 / (1 + (shells / (box_px * knee)) ** 2)
    elif kind == "table" and table is not None:
        table = np.asarray(table, np.float64)
        curve = np.interp(shells / (box_px / 2), np.linspace(0, 1, len(table)), table)
    else:
        raise InputError(
            "unknown noise", expected="white, coloured, or table with values", found=repr(kind), code="choice-unknown"
        )
    if not np.all(curve >= 0) or curve.max() <= 0:
        raise InputError("the noise spectrum must not be negative", found=curve.min(), code="option-out-of-range")
    plane = _on_plane(curve, box_px)
    weights = friedel_weights(box_px).expand(plane.shape)
    return curve / float((plane * weights).sum() / weights.sum())


def _on_plane(curve: np.ndarray, box_px: int) -> Tensor:
    """A radial curve on the half-plane, linear between shells, the last value beyond."""
    radius = radius_grid(box_px, 2).numpy()
    return torch.from_numpy(np.interp(radius, np.arange(len(curve)), curve))


def colour_noise(
    white: Float[Tensor, "n box box"], spectrum: Float[np.ndarray, " box//2+1"]
) -> Float[Tensor, "n box box"]:
    """Give white noise of variance 1 a radial spectrum.

    Args:
        white: (n, D, D).
        spectrum: (D//2+1,) power per coefficient, from :func:`noise_spectrum`.

    Returns:
        (n, D, D) same dtype.
    """
    if np.all(spectrum == spectrum[0]):
        return white * float(np.sqrt(spectrum[0]))
    amplitude = _on_plane(spectrum, white.shape[-1]).sqrt().to(white)
    images: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=white.shape[-2:])
    return images
