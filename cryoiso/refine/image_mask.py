"""Soft circular mask on the images as they are scored, so that neighbouring particles do not pull poses.

A search, the noise spectra and the intensities see y = M x, or y = M x + sqrt(1 - M^2) n with noise n of the spectrum
of the image's optics group; what is back-projected is x. M is 1 in a circle around the particle as far as its place is
known before the iteration.

The particle's signal at spatial frequency s lies displaced by up to lambda |defocus| s, so the circle has the radius of
the particle plus that displacement at the finest detail that is searched with: nothing of the signal is cut off. RELION
takes the particle's diameter alone.

Images are masked within the band of their coefficients (their mean included), which needs no second reading of the
files. White noise of variance sigma^2 then has, in shell k, the power g(k) sigma^2 with g = |M^|^2 convolved with the
band, about the mean of M^2. Sums for the noise spectra count each coefficient g times: sigma^2 remains the variance of
whole images, and sum |y - c P|^2 / sigma^2 is the log-likelihood of the pixels inside the mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.rng import generator
from cryoiso.core.types import Particles
from cryoiso.physics.contrast_transfer import wavelength_A
from cryoiso.physics.fourier import Disc, fourier_disc, fourier_to_images, images_to_fourier
from cryoiso.physics.masks import circle_mask, soft_edge
from cryoiso.physics.projection import scatter_to_half_plane
from cryoiso.refine.batches import Batch

if TYPE_CHECKING:
    from jaxtyping import Complex, Float

    from cryoiso.refine.model import Model

EDGE_PX = 5.0
"""Width of the raised-cosine edge outside the circle."""
FIRST_SHIFTS = 2.0
"""Before any shift has been found the circle is wider by so many standard deviations of the shifts."""


@dataclass(frozen=True)
class ImageMask:
    """The masks of one iteration; the same bits on every number of ranks."""

    particles: Particles
    fill: bool
    """Noise takes the place of what is cut off; otherwise zeros."""
    centre_px: Float[np.ndarray, "n 2"]
    """(N, 2) place of each image's content (x, y) from pixel D//2."""
    radius_px: Float[np.ndarray, " n"]
    """(N,) of each circle, whole pixels."""
    sigma2: Float[np.ndarray, "groups shells"]
    """(G, S) noise spectra."""
    seed: int

    @classmethod
    def of_iteration(
        cls, request: RefineRequest, particles: Particles, model: Model, centre_px: np.ndarray, diameter_A: float
    ) -> ImageMask | None:
        """The masks that a refinement's settings ask for; None without.

        Args:
            centre_px: (N, 2) places of the contents that were known before any search.

        Raises:
            InputError: the images cannot be masked.
        """
        state, settings, pixel_A = model.state, request.settings, particles.group_values("pixel_size_A")
        if settings.image_mask == "none":
            return None
        require_whole_images(particles)
        box, grid_A = request.source.box_px, request.reference.pixel_size_A
        room_A = displacement_A(particles, box * grid_A / state.radius_px)
        if state.iteration > 0 or request.local_deg is not None:
            centre_px = -model.shift_A / pixel_A[:, None]
        else:
            room_A += FIRST_SHIFTS * state.shift_sd_px * grid_A
        radius_px = np.minimum(np.ceil((diameter_A / 2 + room_A) / pixel_A), 2 * box)
        return cls(particles, settings.image_mask == "noise", centre_px, radius_px, model.sigma2, request.seed)

    def of(self, batch: Batch) -> Batch:
        """The batch as it is scored; itself where no mask cuts anything."""
        radius = self.radius_px[batch.rows]
        box, disc = batch.disc.box_px, batch.disc
        if (radius >= box / np.sqrt(2) + np.abs(self.centre_px[batch.rows]).sum(1)).all():
            return batch
        device = batch.coefficients.device
        mask = self._masks(batch, device)
        images = _to_images(batch.coefficients, batch.mean, disc) * mask
        share = [gain_of(box, r, disc.radius_px, False) for r in radius.tolist()]
        if self.fill:
            images = images + (1 - mask.square()).clamp(min=0).sqrt() * self._noise(batch, device)
            share = [s + gain_of(box, r, disc.radius_px, True) for s, r in zip(share, radius.tolist(), strict=True)]
        return replace(batch, coefficients=disc.gather(images_to_fourier(images)), share=np.stack(share))

    def _masks(self, batch: Batch, device: torch.device) -> Float[Tensor, "n box box"]:
        box = batch.disc.box_px
        axis = torch.arange(box, dtype=torch.float32, device=device) - box // 2
        centre, radius = (
            torch.as_tensor(values[batch.rows], dtype=torch.float32, device=device)
            for values in (self.centre_px, self.radius_px)
        )
        x, y = ((axis - centre[:, i : i + 1]).square() for i in (0, 1))
        return soft_edge((y[:, :, None] + x[:, None, :]).sqrt() - radius[:, None, None], EDGE_PX)

    def _noise(self, batch: Batch, device: torch.device) -> Float[Tensor, "n box box"]:
        """Noise with the group's spectrum in the band of the batch; of each particle the same in all iterations."""
        box, disc = batch.disc.box_px, batch.disc
        white = np.empty((len(batch), box, box), np.float32)
        for image, uid in zip(white, self.particles.uid[batch.rows].tolist(), strict=True):
            image[:] = generator(self.seed, "image mask", uid).standard_normal((box, box), np.float32)
        sd = np.sqrt(np.where(np.isfinite(self.sigma2), self.sigma2, 0.0))[batch.group]
        sd = sd[:, np.minimum(disc.shell, sd.shape[1] - 1)]
        waves = images_to_fourier(torch.from_numpy(white).to(device))
        coloured = disc.gather(waves) * torch.as_tensor(sd, dtype=torch.float32, device=device)
        return _to_images(coloured, waves[:, 0, 0].real, disc)


def require_whole_images(particles: Particles) -> None:
    """Refuse images that cannot be masked.

    Raises:
        InputError: premultiplied images, whose noise and signal a mask would mix between the CTF's rings.
    """
    if any(group.ctf_applied == "premultiplied" for group in particles.groups):
        raise InputError(
            "images that were multiplied by their CTF cannot be masked", expected="untouched or phase-flipped images",
            found="rlnCtfDataAreCtfPremultiplied 1", hint="Set refine.image_mask = 'none'.", code="options-conflict",
        )  # fmt: skip


def displacement_A(particles: Particles, detail_A: float) -> Float[np.ndarray, " n"]:
    """(N,) distance by which defocus displaces detail of a size, lambda |defocus| / size, in Å (the spherical
    aberration, a few Å the other way, is left out)."""
    voltage = particles.group_values("voltage_kV")
    wavelength = np.empty(len(voltage))
    for kV in np.unique(voltage).tolist():
        wavelength[voltage == kV] = wavelength_A(kV)
    defocus = np.maximum(np.abs(particles.defocus_u_A), np.abs(particles.defocus_v_A))
    displaced: np.ndarray = wavelength * defocus / detail_A
    return displaced


def _to_images(
    coefficients: Complex[Tensor, "n k"], mean: Float[Tensor, " n"] | None, disc: Disc
) -> Float[Tensor, "n box box"]:
    """Images of coefficients within a disc and of their transforms at zero frequency (0 if unknown)."""
    plane = scatter_to_half_plane(coefficients, disc)
    if mean is not None:
        plane[:, 0, 0] = mean.to(plane)
    return fourier_to_images(plane, disc.box_px)


@lru_cache(maxsize=256)
def gain_of(box_px: int, radius_px: float, band_px: float, outside: bool) -> Float[np.ndarray, " box_px//2+1"]:
    """(S,) mean power of white noise of variance 1 that was limited to a band and masked, of each shell's coefficients
    in the band; 1 beyond it.

    Args:
        radius_px: of the circle; band_px: largest frequency of the band.
        outside: of sqrt(1 - M^2) in place of M.
    """
    mask = circle_mask(box_px, radius_px, EDGE_PX, dtype=torch.float64)
    mask = (1 - mask.square()).clamp(min=0).sqrt() if outside else mask
    window = torch.fft.fft2(mask).abs().square() / box_px**4
    disc = fourier_disc(box_px, band_px, with_dc=True)
    power = torch.fft.ifft2(torch.fft.fft2(window) * torch.fft.fft2(_band(box_px, disc))).real
    ky, kx = (torch.as_tensor(k).long() % box_px for k in (disc.ky, disc.kx))
    sums, counts = np.zeros((2, box_px // 2 + 1))
    np.add.at(sums, disc.shell, power[ky, kx].numpy())
    np.add.at(counts, disc.shell, 1)
    return np.where(counts > 0, np.maximum(sums / np.maximum(counts, 1), 1e-6), 1.0)


def _band(box_px: int, disc: Disc) -> Float[Tensor, "box box"]:
    """1 at the coefficients of a disc and their Friedel mates, in FFT order."""
    ky, kx = (torch.as_tensor(k).long() for k in (disc.ky, disc.kx))
    full = torch.zeros(box_px, box_px, dtype=torch.float64)
    full[ky % box_px, kx % box_px] = 1
    full[-ky % box_px, -kx % box_px] = 1
    return full
