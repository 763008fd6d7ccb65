"""Images to which the CTF has been applied: phase-flipped ones, y = sign(c) x, and premultiplied ones, y = c x.

x = c P + n is the image as recorded by the microscope. Flipping does not change the noise and takes the CTF to |c|; no
further treatment is needed. Premultiplying colours the noise by c: x is y / c, which is exact where c is not close to
zero and undefined where it is. Likelihood and back-projection need only c x = y and c^2; quantities computed from the
power of x must weight coefficients by c^2 (docs/formulas.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.rng import generator
from cryoiso.core.types import Particles
from cryoiso.physics.contrast_transfer import ctf_for
from cryoiso.physics.filters import friedel_weights, radius_grid

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int, Shaped

LEAST_CTF = 1e-6
"""Below it a coefficient of a premultiplied image contains only rounding errors."""
LEAST_DIVISOR = 0.05
"""Smallest |c| used as a divisor for restored images; at zero frequency c is the amplitude contrast."""
LEAKED = 1.5
"""Upper limit of the power of a shell of a restored image, as a multiple of its c^2-weighted mean."""


def is_applied(particles: Particles, rows: Shaped[np.ndarray, " n"] | None = None) -> bool:
    """Whether any of these particles' images (None: of all) was phase-flipped or premultiplied."""
    used = np.unique(particles.optics if rows is None else particles.optics[rows])
    return any(particles.groups[g].ctf_applied for g in used.tolist())


def microscope_ctf(
    particles: Particles, rows: Shaped[np.ndarray, " n"], box_px: int, device: str | torch.device = "cpu"
) -> Float[Tensor, "n {box_px} {box_px}//2+1"]:
    """(n, D, D//2+1) float32: c, regardless of the processing of the images."""
    return ctf_for(particles.with_ctf_applied(""), rows, box_px, device=device)


def applied_factor(
    particles: Particles, rows: Shaped[np.ndarray, " n"], ctf: Float[Tensor, "n box columns"]
) -> Float[Tensor, "n box columns"]:
    """(n, D, D//2+1): the factor by which the transforms of these images were multiplied: 1, sign(c) or c."""
    factor = torch.ones_like(ctf)
    for number, kind in _kinds(particles, rows):
        factor[number] = ctf[number] if kind == "premultiplied" else _sign(ctf[number])
    return factor


def _sign(ctf: Tensor) -> Tensor:
    return torch.where(ctf < 0, -1.0, 1.0).to(ctf)


def _kinds(particles: Particles, rows: np.ndarray) -> list[tuple[Tensor, str]]:
    """(positions in rows, kind) of the flipped and of the premultiplied ones."""
    kinds = np.array([g.ctf_applied for g in particles.groups])[particles.optics[rows]]
    return [
        (torch.from_numpy(np.flatnonzero(kinds == k)), k) for k in ("flipped", "premultiplied") if (kinds == k).any()
    ]


def apply_ctf(
    images: Float[np.ndarray, "n box box"], particles: Particles, rows: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, "n box box"]:
    """Convert images as recorded to the kind declared by their optics groups: (n, D, D) float32."""
    if not is_applied(particles, rows):
        return images
    ctf = microscope_ctf(particles, rows, images.shape[-1])
    return _filtered(images, applied_factor(particles, rows, ctf))


def _filtered(images: np.ndarray, factor: Tensor) -> np.ndarray:
    originals = torch.from_numpy(np.ascontiguousarray(images, np.float32))
    filtered: np.ndarray = torch.fft.irfft2(torch.fft.rfft2(originals) * factor, s=originals.shape[-2:]).numpy()
    return filtered


def low_frequencies_restored(
    images: Float[np.ndarray, "n box box"], particles: Particles, rows: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, "n box box"]:
    """Premultiplied images divided by their CTF where it is above ``LEAST_DIVISOR``: (n, D, D) float32. Only suitable
    for the mean of a region, whose weight is at low frequencies."""
    ctf = microscope_ctf(particles, rows, images.shape[-1])
    return _filtered(images, ctf / ctf.square().clamp(min=LEAST_DIVISOR**2))


def mean_square_ctf(particles: Particles, rows: Shaped[np.ndarray, " n"], box_px: int) -> Float[np.ndarray, " n"]:
    """(n,) float64: c^2 averaged over all frequencies of an image."""
    square = microscope_ctf(particles, rows, box_px).double().square().sum(1)
    return ((square * friedel_weights(box_px)).sum(1) / box_px**2).clamp(min=1e-12).numpy()


def divide_by_ctf(values: Complex[Tensor, "... k"], ctf: Float[Tensor, "... k"]) -> Complex[Tensor, "... k"]:
    """y / c of premultiplied coefficients, 0 where c is 0: multiplied by c it is y again, and it has the noise of x.

    Args:
        values, ctf: (..., K).
    """
    return torch.where(ctf.abs() > LEAST_CTF, values / torch.where(ctf.abs() > LEAST_CTF, ctf, 1.0), 0.0)


def restored(
    images: Float[np.ndarray, "n box box"], particles: Particles, rows: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, "n box box"]:
    """Images as the microscope would have recorded them, from images of any kind: (n, D, D) float32.

    Flipped images are flipped back, without loss (except at the Nyquist frequency). For premultiplied ones, y c /
    max(c^2, c0^2), c0 = ``LEAST_DIVISOR``, is the recoverable part; the noise missing at the zeros of the CTF is
    replaced by noise of the same spectrum, determined by the particle's uid. For methods that need images with the
    usual noise, such as the training of a generator; likelihood and back-projection do not.
    """
    if not is_applied(particles, rows):
        return images
    box = images.shape[-1]
    ctf = microscope_ctf(particles, rows, box)
    out = np.array(images, np.float32)
    for number, kind in _kinds(particles, rows):
        image, c = out[number.numpy()], ctf[number]
        if kind == "flipped":
            out[number.numpy()] = _filtered(image, _sign(c))
        else:
            out[number.numpy()] = _whole(image, c, particles.uid[rows[number.numpy()]])
    return out


def _whole(images: np.ndarray, ctf: Tensor, uids: np.ndarray) -> np.ndarray:
    box = images.shape[-1]
    seen = torch.fft.rfft2(torch.from_numpy(images))
    divisor = ctf.square().clamp(min=LEAST_DIVISOR**2)
    known = ctf.square() / divisor
    draws = [
        generator(0, "noise at zeros of the CTF", u).standard_normal((box, box), np.float32) for u in uids.tolist()
    ]
    white = torch.fft.rfft2(torch.from_numpy(np.stack(draws))) / box
    power = restored_spectrum(seen.abs().square(), ctf)
    shell = shells(box)
    parts = seen * ctf / divisor
    # where an image was cut out of a larger one after the multiplication, more than c x stands at the zeros of c
    spectrum = restored_spectrum(parts.abs().square(), torch.ones_like(ctf))
    limit = (LEAKED * power / spectrum.clamp(min=1e-30)).clamp(max=1).sqrt()[:, shell]
    restored_images: np.ndarray = torch.fft.irfft2(
        parts * limit + white * (power[:, shell] * (1 - known.square())).sqrt(), s=(box, box)
    ).numpy()
    return restored_images


def shells(box_px: int) -> Int[Tensor, "{box_px} {box_px}//2+1"]:
    """(D, D//2+1) int64: the shell of each coefficient of a transform with its origin at index 0."""
    return radius_grid(box_px, 2).round().long()


def restored_spectrum(
    power: Float[Tensor, "n box columns"], ctf: Float[Tensor, "n box columns"], least: float = 1e-6
) -> Float[Tensor, "n shells"]:
    """(n, S) power of x by shell from that of y = c x: sum |y|^2 / sum c^2.

    Every coefficient is weighted by c^2, so that signal leaking into the zeros of the CTF when a premultiplied image is
    cropped has no effect.

    Args:
        power: (n, D, D//2+1) |y|^2.
        ctf: the same shape.
        least: smallest mean c^2 used as a divisor.
    """
    shell = shells(power.shape[-2]).to(power.device)
    size = int(shell.max()) + 1
    sums = torch.zeros(2, len(power), size, dtype=torch.float64, device=power.device)
    flat = shell.reshape(-1)
    sums[0].index_add_(1, flat, power.flatten(1).double())
    sums[1].index_add_(1, flat, ctf.square().flatten(1).double())
    count = torch.bincount(flat, minlength=size).double()
    return (sums[0] / torch.maximum(sums[1], least * count)).float()
