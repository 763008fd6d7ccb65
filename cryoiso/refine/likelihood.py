"""The likelihood of an image at a view and a shift, in the two forms used by the search.

With x = c exp(-2 pi i k.s / D) P + n and Gaussian noise of variance sigma^2 = E|n|^2 per coefficient, up to a constant
of the image, log p(x | view, s) = sum_k [2 Re conj(c P) x exp(2 pi i k.s / D) - |c P|^2] / sigma^2, the sum over
Friedel pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.physics import gpu_kernels
from cryoiso.physics.fourier import Disc, fourier_disc
from cryoiso.physics.projection import FourierVolume, check_reach, flat_pairs, magnified, pairs
from cryoiso.refine.batches import Batch

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Int


VIEWS_AT_ONCE = 32
"""Views of one particle that the CPU kernel scores together: few enough for its sums to stay in the cache."""

MOST_SQUARES = 64
"""Of 3 x 3 shifts that are scored from one slice; beyond, matrix products are used."""


@dataclass(frozen=True)
class Whitened:
    """A batch divided by the noise: the input of the likelihood."""

    data: Complex[Tensor, "n k"]
    """(B, K) complex64: 2 x c / sigma^2."""
    weight: Float[Tensor, "n k"]
    """(B, K) float32: 2 c^2 / sigma^2."""
    disc: Disc
    magnification: Float[np.ndarray, "2 2"] | None

    def cut(self, size: int, disc: Disc) -> Whitened:
        """The first ``size`` coefficients: a smaller radius."""
        return Whitened(self.data[:, :size], self.weight[:, :size], disc, self.magnification)

    def within(self, radius_px: float) -> Whitened:
        """The coefficients up to a radius on the reference's grid; all where there are no more."""
        ratio = 1.0 if self.magnification is None else float(np.linalg.norm(self.magnification, 2))
        disc = fourier_disc(self.disc.box_px, radius_px / ratio)
        return self.cut(disc.size, disc) if disc.size < self.disc.size else self


def whiten(batch: Batch, sigma2: Float[np.ndarray, "groups shells"]) -> Whitened:
    """Divide by the noise spectra sigma2 (G, S), variance E|n|^2 of a coefficient by optics group and shell."""
    device = batch.ctf.device
    of_group = torch.as_tensor(2.0 / sigma2, dtype=torch.float32, device=device)
    shell = batch.disc.on(device).shell.clamp(max=sigma2.shape[1] - 1)
    inverse = of_group[torch.as_tensor(batch.group, device=device)][:, shell]
    weighted = batch.ctf * inverse
    return Whitened(batch.coefficients * weighted, batch.ctf * weighted, batch.disc, batch.magnification)


def shift_factors(disc: Disc, shift_px: Float[Tensor, "*n 2"]) -> Complex[Tensor, "*n k"]:
    """exp(2 pi i k.s / D): moves content at ``shift_px`` (..., 2) back to the centre; (..., K) complex64."""
    there = disc.on(shift_px.device)
    angle = (2 * np.pi / disc.box_px) * (shift_px[..., :1] * there.kx + shift_px[..., 1:] * there.ky)
    return torch.polar(torch.ones_like(angle), angle)


def as_real(x: Complex[Tensor, "*n k"]) -> Float[Tensor, "*n 2*k"]:
    """(..., K) complex -> (..., 2K) real, so that a real product is Re conj(a) b."""
    return torch.cat([x.real, x.imag], dim=-1)


@dataclass(frozen=True)
class ReferenceSlices:
    """Views as matrices: those of the global grid, common to all images, or separate ones for each of B images."""

    real: Float[Tensor, "*n parts j"]
    """(2K, J) float32, or (B, 2K, J)."""
    power: Float[Tensor, "*n k j"]
    """(K, J) float32: |P|^2, or (B, K, J)."""
    disc: Disc

    @classmethod
    def of(
        cls,
        volume: FourierVolume,
        rotations: Float[Tensor, "*n j 3 3"],
        disc: Disc,
        magnification: Float[np.ndarray, "2 2"] | None,
    ) -> ReferenceSlices:
        """Slices of every rotation (J, 3, 3) or (B, J, 3, 3) at the coefficients of ``disc``."""
        slices = volume.slices(with_magnification(rotations.reshape(-1, 3, 3), magnification), disc)
        slices = slices.reshape(*rotations.shape[:-2], disc.size)
        return cls(as_real(slices).mT.contiguous(), slices.abs().square().mT.contiguous(), disc)


def with_magnification(
    rotations: Float[Tensor, "n 3 3"], magnification: Float[np.ndarray, "2 2"] | None
) -> Float[Tensor, "n 3 3"]:
    return rotations if magnification is None else magnified(rotations, torch.as_tensor(magnification))


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in TF32 on a GPU, ten times as fast.

    Numbers are rounded to 11 bits: scores of a batch change by 0.03 at -10 dB and 0.1 at 5 dB, where candidates worse
    than the best by 10 are left out. The levels that follow score in float32.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def cross_and_norm(
    white: Whitened, slices: ReferenceSlices, shift_px: Float[Tensor, "shifts 2"]
) -> tuple[Float[Tensor, "n shifts j"], Float[Tensor, "n j"]]:
    """Terms 2 Re conj(c P) x / sigma^2 (B, S, J) and 2 |c P|^2 / sigma^2 (B, J), summed over Friedel pairs.

    Two matrix products: tensor cores on a GPU, BLAS on a CPU.

    Args:
        shift_px: (S, 2) shifts (x, y) of the content.
    """
    moved = white.data[:, None, :] * shift_factors(white.disc, shift_px)
    b, s, k = moved.shape
    with tensor_cores(moved.device):
        if slices.real.ndim == 3:
            return as_real(moved) @ slices.real, (white.weight[:, None] @ slices.power)[:, 0]
        cross = as_real(moved).reshape(b * s, 2 * k) @ slices.real
        return cross.reshape(b, s, -1), white.weight @ slices.power


def global_scores(
    white: Whitened, slices: ReferenceSlices, shift_px: Float[Tensor, "shifts 2"], log_prior: Float[Tensor, " shifts"]
) -> Float[Tensor, "n shifts j"]:
    """Log-likelihood plus the log prior of the shift, of every image at every view and every shift.

    Args:
        shift_px: (S, 2) shifts (x, y) of the content.
        log_prior: (S,).

    Returns:
        (B, S, J) float32.
    """
    cross, norm = cross_and_norm(white, slices, shift_px)
    return cross - 0.5 * norm[:, None, :] + log_prior[:, None]


def score_and_norm(
    white: Whitened, volume: FourierVolume, rotation: Float[Tensor, "n 3 3"], shift_px: Float[Tensor, "n 2"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-likelihood of each image at one pose, and |c P|^2 / sigma^2 there: (B,) each.

    Args:
        rotation: (B, 3, 3) float32.
        shift_px: (B, 2) float32, of the content.
    """
    slices = volume.slices(with_magnification(rotation, white.magnification), white.disc)
    norm = (white.weight * slices.abs().square()).sum(1)
    cross = (slices.conj() * white.data * shift_factors(white.disc, shift_px)).real.sum(1)
    return cross - 0.5 * norm, norm


def local_scores(
    white: Whitened,
    volume: FourierVolume,
    particle: Int[Tensor, " r"],
    rotation: Float[Tensor, "r 3 3"],
    shift_px: Float[Tensor, "r 2"],
    spacing_px: float,
    together: int = 1,
) -> Float[Tensor, "r 9"]:
    """Log-likelihood of R views, each with a 3 x 3 lattice of shifts.

    Args:
        particle: (R,) row of the batch.
        rotation: (R, 3, 3).
        shift_px: (R, 2) centre of the lattice (x, y).
        spacing_px: of the lattice.
        together: consecutive rows that share particle and shift, a power of two; R is a multiple of it.

    Returns:
        (R, 9) float32, y slow and x fast.
    """
    rotation = with_magnification(rotation, white.magnification)
    if white.data.device.type == "cpu":
        return _local_scores_numba(white, volume, particle, rotation, shift_px, spacing_px)
    module = gpu_kernels.kernels_for("score_local", volume.grid)
    if module is not None:
        return gpu_kernels.score_local(
            module, volume, white.disc, white.data, white.weight, particle, rotation, shift_px,
            spacing_px, together,
        )  # fmt: skip
    return local_scores_torch(white, volume, particle, rotation, shift_px, spacing_px)


def _local_scores_numba(
    white: Whitened, volume: FourierVolume, particle: Tensor, rotation: Tensor, shift_px: Tensor, spacing_px: float
) -> Tensor:
    from cryoiso.physics import _patch_kernels

    out = torch.empty(len(particle), 9)
    rot = np.ascontiguousarray(rotation.numpy(), np.float32)
    check_reach(rot, white.disc, volume.padding, volume.grid.shape[0])
    member, frequency = white.disc.patches
    rows = particle.numpy()
    _patch_kernels.score_local(
        flat_pairs(volume.grid), volume.grid.shape[0], rot, member, frequency, _waves(white.disc, spacing_px),
        np.float32(volume.padding), runs(rows, VIEWS_AT_ONCE), rows, pairs(white.data),
        white.weight.contiguous().numpy(), shift_px.double().numpy() * (2 * np.pi / white.disc.box_px),
        white.disc.reach, out.numpy(),
    )  # fmt: skip
    return out


def _waves(disc: Disc, spacing_px: float) -> Float[np.ndarray, "patches numbers"]:
    """(patches, 4 PATCH) float32: cosine and sine of a lattice step along x, then along y."""
    angle = (spacing_px * 2 * np.pi / disc.box_px) * disc.patches[1].astype(np.float64)
    return np.stack([np.cos(angle), np.sin(angle)], 2).astype(np.float32).reshape(len(angle), -1)


def near_scores(
    white: Whitened,
    volume: FourierVolume,
    rotations: Float[Tensor, "n j 3 3"],
    shift_px: Float[Tensor, "shifts 2"],
    log_prior: Float[Tensor, " shifts"],
) -> Float[Tensor, "n shifts j"]:
    """As ``global_scores``, for J views of each image's own (B, J, 3, 3).

    On CPUs shifts on a square lattice are scored from one slice per view, the lattice in squares of 3 x 3.
    """
    squares = _squares(shift_px.cpu().numpy()) if white.data.device.type == "cpu" else None
    if squares is None:
        return near_scores_torch(white, volume, rotations, shift_px, log_prior)
    from cryoiso.physics import _patch_kernels

    spacing_px, centre_px, place = squares
    b, j = rotations.shape[:2]
    rot = with_magnification(rotations.reshape(-1, 3, 3), white.magnification).numpy()
    check_reach(rot, white.disc, volume.padding, volume.grid.shape[0])
    member, frequency = white.disc.patches
    out = torch.empty(b, j, 9 * len(centre_px))
    _patch_kernels.score_lattices(
        flat_pairs(volume.grid), volume.grid.shape[0], np.ascontiguousarray(rot, np.float32).reshape(b, j, 3, 3),
        member, frequency, _waves(white.disc, spacing_px), np.float32(volume.padding), pairs(white.data),
        white.weight.contiguous().numpy(), centre_px * (2 * np.pi / white.disc.box_px), white.disc.reach,
        VIEWS_AT_ONCE, out.numpy().reshape(b, j, len(centre_px), 9),
    )  # fmt: skip
    return out[:, :, place].transpose(1, 2) + log_prior[:, None]


def near_scores_torch(
    white: Whitened,
    volume: FourierVolume,
    rotations: Float[Tensor, "n j 3 3"],
    shift_px: Float[Tensor, "shifts 2"],
    log_prior: Float[Tensor, " shifts"],
) -> Float[Tensor, "n shifts j"]:
    """The plain torch version of the CPU kernel, for GPUs and as its reference."""
    slices = ReferenceSlices.of(volume, rotations, white.disc, white.magnification)
    return global_scores(white, slices, shift_px, log_prior)


def _squares(
    shift_px: Float[np.ndarray, "shifts 2"],
) -> tuple[float, Float[np.ndarray, "squares 2"], Int[np.ndarray, " shifts"]] | None:
    """Squares of 3 x 3 that cover shifts on a square lattice through 0: spacing, centres (x, y), and the place of each
    shift among the squares' points, y slow. None where the shifts are on no such lattice, or too many."""
    sizes = np.abs(shift_px[np.abs(shift_px) > 1e-6])
    if not len(sizes):
        return None
    spacing = float(sizes.min())
    steps = np.rint(shift_px / spacing).astype(np.int64)
    if np.abs(steps * spacing - shift_px).max() > 1e-4 * spacing:
        return None
    square, inside = np.divmod(steps + 1, 3)
    centres, which = np.unique(square, axis=0, return_inverse=True)
    if len(centres) > MOST_SQUARES:
        return None
    return spacing, 3.0 * spacing * centres, 9 * which.reshape(-1) + 3 * inside[:, 1] + inside[:, 0]


def runs(particle: Int[np.ndarray, " r"], longest: int | None = None) -> Int[np.ndarray, " bounds"]:
    """First row of each run of equal numbers, and the end of the last; runs beyond ``longest`` are cut."""
    starts = np.flatnonzero(np.diff(particle, prepend=-1))
    ends = np.append(starts[1:], len(particle))
    if longest is not None and len(starts):
        starts = np.concatenate([np.arange(a, b, longest) for a, b in zip(starts, ends, strict=True)])
    return np.append(starts, len(particle)).astype(np.int64)


def lattice(spacing_px: float, device: str | torch.device = "cpu") -> Float[Tensor, "9 2"]:
    """(9, 2) offsets (x, y), y slow."""
    axis = torch.tensor([-1.0, 0.0, 1.0], device=device) * spacing_px
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.reshape(-1), y.reshape(-1)], 1)


def local_scores_torch(
    white: Whitened,
    volume: FourierVolume,
    particle: Int[Tensor, " r"],
    rotation: Float[Tensor, "r 3 3"],
    shift_px: Float[Tensor, "r 2"],
    spacing_px: float,
    block: int = 1 << 22,
) -> Float[Tensor, "r 9"]:
    """The plain torch version of the CPU kernel, for GPUs; in blocks of rows that bound its memory."""
    offsets = shift_factors(white.disc, lattice(spacing_px, shift_px.device))
    step = max(1, block // white.disc.size)
    out = []
    for i in range(0, len(particle), step):
        part = slice(i, i + step)
        slices = volume.slices(rotation[part], white.disc)
        data, weight = white.data[particle[part]], white.weight[particle[part]]
        t = slices.conj() * data * shift_factors(white.disc, shift_px[part])
        norm = (weight * slices.abs().square()).sum(1)
        out.append(as_real(t) @ as_real(offsets.conj()).T - 0.5 * norm[:, None])
    return torch.cat(out) if out else torch.zeros(0, 9, device=shift_px.device)
