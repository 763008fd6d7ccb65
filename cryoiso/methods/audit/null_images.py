"""Images without particles: Gaussian noise with the spectra of a refinement, or patches of real background."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.core.types import Particles
from cryoiso.physics.ctf_applied import apply_ctf
from cryoiso.physics.noise import colour_noise
from cryoiso.physics.resample import resample_matrix

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PURPOSE = "null images"


def gaussian(
    particles: Particles, rows: Int[np.ndarray, " n"], spectra: Float[np.ndarray, "groups shells"], box_px: int,
    seed: int, purpose: str = PURPOSE,
) -> Float[np.ndarray, "n {box_px} {box_px}"]:  # fmt: skip
    """Noise for each particle, with the spectrum of its optics group: (n, D, D) float32.

    Args:
        spectra: (G, D//2+1) variance of a coefficient of the images as recorded, infinite where a shell is empty.
    """
    images = np.empty((len(rows), box_px, box_px), np.float32)
    for i, row in enumerate(rows.tolist()):
        white = generator(seed, purpose, int(particles.uid[row])).standard_normal((1, box_px, box_px), np.float32)
        own = spectra[particles.optics[row]]
        curve = np.where(np.isfinite(own), own, 0.0)
        images[i] = colour_noise(torch.from_numpy(white), curve)[0].numpy()
    return np.asarray(apply_ctf(images, particles, rows), np.float32)


def crop_px(side_px: int, pixel_size_A: float, box_px: int, box_pixel_A: float, file: object = None) -> int:
    """Side of the part of a patch that makes an image.

    Args:
        side_px, pixel_size_A: of the patches.
        box_px, box_pixel_A: of the images.

    Raises:
        InputError: the patches are smaller than an image.
    """
    size = round(box_px * box_pixel_A / pixel_size_A)
    if size > side_px:
        raise InputError(
            "the background patches are smaller than the particle images", file=file,
            expected=f"at least {size} px of {pixel_size_A:g} Å", found=f"{side_px} px", code="box-mismatch",
        )  # fmt: skip
    return size


class Background:
    """Patches of micrographs without particles, cut, resampled, rotated and mirrored at random."""

    def __init__(
        self, patches: Float[np.ndarray, "n height width"], pixel_size_A: float, box_px: int, box_pixel_A: float,
        file: object = None,
    ) -> None:  # fmt: skip
        """
        Args:
            patches: (n, H, W), H = W.
            box_px, box_pixel_A: of the images that are made.

        Raises:
            InputError: the patches are smaller than an image.
        """
        size = crop_px(min(patches.shape[1:]), pixel_size_A, box_px, box_pixel_A, file)
        self.patches, self.size, self.box_px = patches, size, box_px
        self.matrix = resample_matrix(size, pixel_size_A, box_px, size * pixel_size_A / box_px)

    def images(
        self, particles: Particles, rows: Int[np.ndarray, " n"], seed: int, purpose: str = PURPOSE
    ) -> Float[np.ndarray, "n box box"]:
        """An image for each particle, of mean 0 and standard deviation 1: (n, D, D) float32."""
        high, wide = (side - self.size for side in self.patches.shape[1:])
        pixels = np.empty((len(rows), self.box_px, self.box_px), np.float32)
        for i, row in enumerate(rows.tolist()):
            rng = generator(seed, f"{purpose} of background", int(particles.uid[row]))
            number, y, x, turns, flip = rng.integers(0, (len(self.patches), high + 1, wide + 1, 4, 2))
            crop = self.patches[number, y : y + self.size, x : x + self.size][:: 1 - 2 * int(flip)]
            image = self.matrix @ (np.rot90(crop, turns) - crop.mean()) @ self.matrix.T
            pixels[i] = image / max(float(image.std()), 1e-12)
        return np.asarray(apply_ctf(pixels, particles, rows), np.float32)
