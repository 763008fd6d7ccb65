"""What the solvent tells about unmeasured Fourier coefficients: density is nowhere below it.

Projections onto two sets, in turn: maps with the measured coefficients A x, and maps without negative density
(Gerchberg and Papoulis; in crystallography solvent flattening and positivity). The support of the particle needs no
mask for this, since a missing cone throws negative streaks around it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cryoiso.methods.anisotropy.filter import half_layout

AXES = (-3, -2, -1)


class Solvent:
    """Maps with given measured coefficients on one grid; volumes are (..., D, D, D) with the solvent at 0."""

    def __init__(self, fsc_filter: np.ndarray, band_mask: np.ndarray, device: str = "cpu") -> None:
        """
        Args:
            fsc_filter: (D, D, D) filter A, centred.
            band_mask: (D, D, D) band B up to which coefficients are filled in, A <= B.
        """
        self.fsc_filter = half_layout(fsc_filter).to(device)
        self.rest = half_layout(np.clip(band_mask - fsc_filter, 0, None)).to(device)

    def measured(self, volumes: Tensor) -> Tensor:
        """Coefficients A x in the layout of ``rfftn``."""
        coefficients: Tensor = torch.fft.rfftn(volumes, dim=AXES) * self.fsc_filter
        return coefficients

    def joined(self, measured: Tensor, estimate: Tensor) -> Tensor:
        """A x + (B - A) f: the measured part from the data, the rest from an estimate f of the whole map."""
        return _back(measured + self.rest * torch.fft.rfftn(estimate, dim=AXES), estimate.shape)

    def inferred(self, estimate: Tensor) -> Tensor:
        """(B - A) f."""
        return _back(self.rest * torch.fft.rfftn(estimate, dim=AXES), estimate.shape)

    def filled(
        self,
        measured: Tensor,
        box_px: int,
        steps: int,
        between: Callable[[], None] = lambda: None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Coefficients A x completed by so many steps of f = max(f, 0), f = A x + (B - A) f; none: A x.

        Neither step takes f farther from a map that has these coefficients and no negative density, wherever f begins.

        Args:
            between: called before every step.
            start: (..., D, D, D) the first f; None: A x.
        """
        volume = _back(measured, (*measured.shape[:-3], box_px, box_px, box_px)) if start is None else start
        for _ in range(steps):
            between()
            volume = self.joined(measured, volume.clamp(min=0))
        return volume


def on_device(data: np.ndarray, device: str) -> Tensor:
    """The same numbers as a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(device)


def _back(coefficients: Tensor, shape: tuple[int, ...]) -> Tensor:
    volume: Tensor = torch.fft.irfftn(coefficients, s=tuple(shape[-3:]), dim=AXES)
    return volume


def noise_amplitude(data: np.ndarray, fsc_filter: np.ndarray, width_px: float = 1.5) -> Tensor:
    """Amplitude of a half-map's noise by its power and the FSC of its direction: sqrt((1 - A) <|X|^2>).

    The FSC of half-maps is S / (S + N), so 1 - FSC is the share of the noise in a coefficient's power; that is smoothed
    over neighbours by a Gaussian.

    Args:
        data: (D, D, D) half-map, unfiltered. fsc_filter: (D, D, D) A, its 3DFSC.

    Returns:
        (D, D, D//2+1) in the layout of ``rfftn``; white noise of variance 1 in real space, multiplied by it there, has
        the spectrum of the map's noise.
    """
    from scipy.ndimage import gaussian_filter

    power = np.abs(np.fft.fftshift(np.fft.fftn(np.asarray(data, np.float32)))) ** 2 / data.size
    smooth = gaussian_filter(power.astype(np.float32), width_px, mode="wrap")
    return half_layout(np.sqrt(np.clip(1 - fsc_filter, 0, 1) * smooth))
