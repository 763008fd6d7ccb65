"""Agreement of one map with another at any rotation and shift: exhaustive search and local refinement.

Both maps are reduced to their Fourier coefficients inside a sphere, with each shell scaled to the same power (so grey
scale, temperature factor and filter of a shell have no effect). With T the target's coefficients and M those of the
moving map, the score of rotation R and shift u is their normalised cross-correlation

    c(R, u) = Re sum_k conj(T_k) M(R^T k) exp(-2 pi i k.u) / (|T| |M|),

a Pearson correlation of the two flattened maps, and the mean of their FSC over all coefficients in the sphere. For one
rotation all shifts cost one inverse FFT of the smallest grid that contains the sphere (Colores: Chacon and Wriggers, J.
Mol. Biol. 317, 375, 2002). The mirror image enters as the inversion through the centre, conj(M): it differs from any
other mirror image by a rotation, and preserves all proper symmetry axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.types import DensityMap
from cryoiso.physics.filters import apply_radial, power_spectrum
from cryoiso.physics.fourier import fourier_to_volume, pad_volume, volume_to_fourier
from cryoiso.physics.masks import density_threshold, sphere_mask
from cryoiso.physics.projection import FourierVolume, flat_pairs, pairs
from cryoiso.physics.so3 import rotvec_to_matrix

PADDING = 2
SMALLEST_GAIN = 1e-6
"""A refinement ends when a step adds less to the score."""
WEAKEST = 1e-4
"""Shells whose amplitude is below this fraction of the strongest contain only rounding errors and are not amplified
more."""
FULL, AXIS, FIXED = "full", "axis", "fixed"
"""Freedom of a placement: any; spin and slide along z; none."""
_FREEDOM: dict[str, list[int]] = {FULL: [0, 1, 2, 3, 4, 5], AXIS: [2, 5], FIXED: []}


@dataclass(frozen=True)
class Body:
    """A moving map, prepared for sampling at any rotation about its centre."""

    fourier: FourierVolume
    pixel_size_A: float
    centre_A: np.ndarray
    """(3,) x, y, z of its centre in its own map"""
    radius_A: float
    """of the sphere about the centre that contains its density"""

    @property
    def spacing(self) -> float:
        """Distance of grid points of its transform in 1/Å."""
        return 1 / (PADDING * self.fourier.box_px * self.pixel_size_A)


@dataclass(frozen=True)
class Pair:
    """A body and the coefficients of a target, all inside one sphere of frequencies."""

    body: Body
    target: Tensor
    """(K,) complex64, unit norm under ``weight``"""
    index: np.ndarray
    """(K, 3) int64 (kx, ky, kz), kx >= 0, zero frequency left out"""
    weight: Tensor
    """(K,) 1 where both Friedel mates are in the list, else 2"""
    side_A: float
    """edge of the target's box; frequencies are index / side_A"""

    @property
    def scale(self) -> float:
        """Grid units of the body's transform per unit of ``index``."""
        return 1 / (self.side_A * self.body.spacing)

    @property
    def finest_A(self) -> float:
        return self.side_A / float(np.linalg.norm(self.index[-1]))

    def sample(self, rotation: np.ndarray) -> Tensor:
        """The body's coefficients at these rotations, about its centre: (n, 3, 3) -> (n, K), unit norm each."""
        from cryoiso.physics._fit_kernels import extract_points

        grid, turn = self.body.fourier.grid, np.ascontiguousarray(rotation, np.float32)
        values = torch.empty(len(turn), len(self.index), dtype=torch.complex64)
        points = self.index.astype(np.float32)
        extract_points(flat_pairs(grid), grid.shape[0], turn, points, np.float32(self.scale), pairs(values))
        power = torch.view_as_real(values).square().flatten(1) @ self.weight.repeat_interleave(2)
        return values / power.clamp(min=1e-30).sqrt()[:, None]

    def phases(self, shift_A: np.ndarray) -> Tensor:
        """exp(-2 pi i k.u): (n, 3) -> (n, K)."""
        cycles = np.asarray(shift_A, np.float64).reshape(-1, 3) @ self.index.T / self.side_A
        return torch.from_numpy(np.exp(-2j * np.pi * cycles).astype(np.complex64))

    def placed(self, rotation: np.ndarray, shift_A: np.ndarray, mirrored: bool = False) -> Tensor:
        """Coefficients of the body after rotation and shift of its centre: (n, 3, 3), (n, 3) -> (n, K)."""
        values = self.sample(rotation)
        return (values.conj() if mirrored else values) * self.phases(shift_A)

    def agreement(self, rotation: np.ndarray, shift_A: np.ndarray, mirrored: bool = False) -> np.ndarray:
        """(n, K) float64 terms that add up to the scores."""
        terms = (self.target.conj() * self.placed(rotation, shift_A, mirrored)).real * self.weight
        return terms.double().numpy()

    def score(self, rotation: np.ndarray, shift_A: np.ndarray, mirrored: bool = False) -> np.ndarray:
        """(n,) normalised cross-correlations."""
        score: np.ndarray = self.agreement(rotation, shift_A, mirrored).sum(1)
        return score


def make_body(moving: DensityMap, resolution_A: float, *, hold: str = FULL) -> Body:
    """Reduce a map to the required resolution, centre it and flatten its spectrum.

    Args:
        moving: the map.
        resolution_A: finest information used.
        hold: ``AXIS`` keeps the centre on the z axis through the box centre, ``FIXED`` on the box centre itself.

    Raises:
        InputError: the map's grid is too coarse for the resolution, or the map is empty.
    """
    small, pixel = _reduced(moving, resolution_A, "moving")
    middle_px, radius_px = _extent(small, pixel, resolution_A)
    if hold != FULL:
        keep = np.array([0, 0, 1 if hold == AXIS else 0])
        radius_px += float(np.linalg.norm(middle_px * (1 - keep)))
        middle_px = middle_px * keep
    soft_px = 0.5 * resolution_A / pixel
    box = 2 * math.ceil(radius_px + soft_px + 1) + 2
    room = max(box, small.shape[0]) + 2 * int(np.abs(middle_px).max())
    wide = torch.roll(pad_volume(small, room), (-middle_px[::-1]).tolist(), (0, 1, 2))
    inner = pad_volume(wide, box) * sphere_mask(box, radius_px, soft_px)
    grid = FourierVolume.from_volume(flattened(inner), PADDING)
    return Body(grid, pixel, middle_px * pixel, radius_px * pixel)


def make_pair(body: Body, target: DensityMap, resolution_A: float) -> Pair:
    """The target's coefficients from its longest wavelength to a resolution.

    Raises:
        InputError: the target's grid is too coarse for the resolution, or the target is empty.
    """
    small, pixel = _reduced(target, resolution_A, "target")
    # a body may be larger than the target's box: what leaves one side must not come in at the other
    box = max(small.shape[0], 2 * math.ceil(body.radius_A / pixel))
    side_A = box * pixel
    transform = volume_to_fourier(pad_volume(small, box))
    body_reach = side_A * body.spacing * (body.fourier.grid.shape[2] - 1.01)  # its grid ends there
    reach = min(side_A / resolution_A, (box - 1) // 2, body_reach)
    index = _sphere(reach)
    kx, ky, kz = torch.as_tensor(index.T)
    values = transform[kz % box, ky % box, kx].to(torch.complex64)
    weight = torch.where(kx > 0, 2.0, 1.0).to(torch.float32)
    shell = torch.as_tensor(np.rint(np.linalg.norm(index, axis=1))).long()
    size = int(shell.max()) + 1
    power = torch.zeros(size).index_add_(0, shell, weight * values.abs().square())
    power = power / torch.zeros(size).index_add_(0, shell, weight).clamp(min=1)
    values = values / power.clamp(min=float(power.max()) * WEAKEST**2).sqrt()[shell]
    norm = float((values.abs().square() @ weight).sqrt())
    return Pair(body, values / norm, index, weight, side_A)


def flattened(volume: Tensor) -> Tensor:
    """The volume with the same power in every shell."""
    amplitude = power_spectrum(volume, 3).sqrt()
    return apply_radial(volume, 1 / amplitude.clamp(min=float(amplitude[1:].max()) * WEAKEST))


def reduced_map(density: DensityMap, resolution_A: float) -> DensityMap:
    """A map on the coarsest grid that supports a resolution; unchanged if its own grid is no finer.

    Raises:
        InputError: an empty map.
    """
    volume, pixel = _reduced(density, max(resolution_A, 2 * density.pixel_size_A), "given")
    return DensityMap(volume.numpy(), pixel)


def _reduced(density: DensityMap, resolution_A: float, role: str) -> tuple[Tensor, float]:
    """A map on the coarsest grid that holds a resolution, the centre where it was, and that grid's pixel size."""
    from scipy.fft import next_fast_len

    if resolution_A < 2 * density.pixel_size_A:
        raise InputError(
            f"the {role} map's grid is too coarse for this fit", expected=f"pixels of {resolution_A / 2:g} Å or less",
            found=f"{density.pixel_size_A:g} Å", hint="Fit at a lower resolution.", code="grid-too-coarse",
        )  # fmt: skip
    volume = torch.as_tensor(np.asarray(density.data, np.float32))
    if not 0 < float(volume.std()) < float("inf"):  # NaN if any density is not finite
        raise InputError(
            f"the {role} map of the fit is empty", expected="finite densities that vary", code="map-without-density"
        )
    box = volume.shape[0]
    reach = math.ceil(box * density.pixel_size_A / resolution_A)
    small = min(box, next_fast_len(2 * math.ceil(1.15 * reach) + 6, real=True))
    if small == box:
        return volume, density.pixel_size_A
    transform = volume_to_fourier(volume)
    low = torch.fft.fftfreq(small, 1 / small).round().long()
    kept = transform[low % box][:, low % box][:, :, : small // 2 + 1].clone()
    if small % 2 == 0:  # half of a Friedel pair each; they lie beyond the resolution
        kept[small // 2], kept[:, small // 2], kept[:, :, small // 2] = 0, 0, 0
    return fourier_to_volume(kept, small), box * density.pixel_size_A / small


def _extent(volume: Tensor, pixel_size_A: float, resolution_A: float) -> tuple[np.ndarray, float]:
    """Centre (x, y, z) of a map's density in whole pixels from the box centre, and the radius of the density about
    it."""
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(volume.numpy(), 0.25 * max(resolution_A, 15.0) / pixel_size_A)
    density = np.clip(smooth - density_threshold(smooth), 0, None)
    where = np.argwhere(density > 0)
    box = volume.shape[0]
    if not len(where):
        return np.zeros(3, int), box / 2
    mass = density[tuple(where.T)]
    middle = np.rint(np.average(where, axis=0, weights=mass)).astype(int)
    distance = np.linalg.norm(where - middle, axis=1)
    order = np.argsort(distance, kind="stable")
    held = np.searchsorted(np.cumsum(mass[order]), 0.998 * mass.sum())
    radius = float(distance[order][min(held, len(order) - 1)]) + 0.5 * resolution_A / pixel_size_A
    return (middle - box // 2)[::-1].copy(), radius


def _sphere(reach: float) -> np.ndarray:
    """(K, 3) whole (kx, ky, kz) with 0 < |k| <= reach and kx >= 0, by increasing length."""
    top = math.floor(reach)
    full = np.arange(-top, top + 1)
    grid = np.stack(np.meshgrid(np.arange(top + 1), full, full, indexing="ij"), -1).reshape(-1, 3)
    length2 = (grid**2).sum(1)
    grid, length2 = grid[(length2 > 0) & (length2 <= reach**2)], length2[(length2 > 0) & (length2 <= reach**2)]
    ordered: np.ndarray = grid[np.argsort(length2, kind="stable")]
    return ordered


def search(
    pair: Pair, rotation: np.ndarray, allowed: str, hands: tuple[bool, ...]
) -> dict[bool, tuple[np.ndarray, np.ndarray]]:
    """The best shift of every rotation.

    Args:
        rotation: (n, 3, 3).
        allowed: shifts searched: ``FULL``, ``AXIS`` (only along z) or ``FIXED`` (none).
        hands: False for the map as it is, True for its mirror image.

    Returns:
        For each hand: shifts (n, 3) in Å, scores (n,). Shifts lie on a grid of a third to half the resolution.
    """
    from scipy.fft import next_fast_len

    top = int(np.abs(pair.index).max())
    box = next_fast_len(2 * top + 2, real=True)
    kx, ky, kz = pair.index.T
    flat = torch.as_tensor(((kz % box) * box + ky % box) * (box // 2 + 1) + kx)
    candidates: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {hand: [] for hand in hands}
    step = max(1, (1 << 21) // box**3)
    for first in range(0, len(rotation), step):
        values = pair.sample(rotation[first : first + step])
        for hand in hands:
            product = pair.target * (values if hand else values.conj())
            candidates[hand].append(_best_shift(product, flat, box, allowed))
    scale = pair.side_A / box
    return {hand: (np.concatenate([p[0] for p in parts]) * scale, np.concatenate([p[1] for p in parts]))
            for hand, parts in candidates.items()}  # fmt: skip


def _best_shift(product: Tensor, flat: Tensor, box: int, allowed: str) -> tuple[np.ndarray, np.ndarray]:
    """Peak of the correlation over shifts: (n, 3) in grid steps (x, y, z), (n,) values."""
    n, columns = len(product), box // 2 + 1
    plane = torch.zeros(n, box * box * columns, dtype=product.dtype)
    plane[:, flat] = product
    score = torch.fft.irfftn(plane.reshape(n, box, box, columns), s=(box,) * 3, dim=(1, 2, 3), norm="forward")
    line = {FULL: score.flatten(1), AXIS: score[:, :, 0, 0], FIXED: score[:, :1, 0, 0]}[allowed]
    value, where = line.max(1)
    at = where.numpy()
    x, y, z = (at % box, at // box % box, at // box**2) if allowed == FULL else (0 * at, 0 * at, at)
    shift = np.stack([x, y, z], 1)
    return np.where(shift > box // 2, shift - box, shift).astype(np.float64), value.double().numpy()


def refine(
    pair: Pair, rotation: np.ndarray, shift_A: np.ndarray, mirrored: bool, allowed: str = FULL, rounds: int = 12
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Climb to the nearest maximum of the score: Levenberg-Marquardt on |T - a M|^2, all placements in parallel.

    Args:
        rotation, shift_A: (n, 3, 3), (n, 3) starts.
        allowed: ``FULL``, ``AXIS`` (spin about z and slide along z only) or ``FIXED``.

    Returns:
        Rotations, shifts and scores (n,).
    """
    rotation, shift_A = np.array(rotation, np.float64), np.array(shift_A, np.float64)
    # an angle of 1 turns the rim by the radius, so both kinds of parameter are lengths in Å
    free = np.diag([1 / max(pair.body.radius_A, 1.0)] * 3 + [1.0] * 3)[:, _FREEDOM[allowed]]
    if not free.size or not len(rotation):
        return rotation, shift_A, pair.score(rotation, shift_A, mirrored)
    score, normal, slope = _linearised(pair, rotation, shift_A, mirrored, free)
    damping = np.full(len(rotation), 1e-3)
    live = np.arange(len(rotation))
    for _ in range(rounds):
        ridge = damping[live, None] * np.einsum("nii->ni", normal[live]) + 1e-12
        system = normal[live] + ridge[:, :, None] * np.eye(free.shape[1])
        move = np.linalg.solve(system, slope[live][:, :, None])[:, :, 0] @ free.T
        turned, moved = rotvec_to_matrix(move[:, :3]) @ rotation[live], shift_A[live] + move[:, 3:]
        tried, its_normal, its_slope = _linearised(pair, turned, moved, mirrored, free)
        gain = tried - score[live]
        up = gain > 0
        rows = live[up]
        rotation[rows], shift_A[rows], score[rows] = turned[up], moved[up], tried[up]
        normal[rows], slope[rows] = its_normal[up], its_slope[up]
        damping[live] = np.where(up, damping[live] / 5, damping[live] * 8)
        live = live[(gain > SMALLEST_GAIN) | (~up & (damping[live] < 10))]
        if not len(live):
            break
    return rotation, shift_A, score


def _linearised(
    pair: Pair, rotation: np.ndarray, shift_A: np.ndarray, mirrored: bool, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (n,), J^T J (n, m, m) and J^T residual (n, m) of T - a M with its best factor, for parameters (6, m)."""
    from cryoiso.physics._fit_kernels import normal_equations

    turn = 0.1 * pair.finest_A / pair.body.radius_A  # the rim moves by a tenth of the resolution
    small = rotvec_to_matrix(turn * np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)]))
    n = len(rotation)
    sums, normal, slope = np.zeros((n, 2)), np.zeros((n, 6, 6)), np.zeros((n, 2, 6))
    normal_equations(
        flat_pairs(pair.body.fourier.grid), pair.body.fourier.grid.shape[0],
        np.ascontiguousarray(small[None] @ rotation[:, None], np.float32), shift_A / pair.side_A,
        pair.index.astype(np.float32), np.float32(pair.scale), pair.target.numpy(), pair.weight.numpy(), mirrored,
        np.float32(turn), sums, normal, slope,
    )  # fmt: skip
    size = np.sqrt(np.maximum(sums[:, 1], 1e-30))
    score = sums[:, 0] / size
    basis = free / np.array([1, 1, 1, *[pair.side_A] * 3])[:, None]
    residual = slope[:, 0] / np.maximum(score, 0.05)[:, None] - slope[:, 1] / size[:, None]
    return score, basis.T @ (normal / (size**2)[:, None, None]) @ basis, (residual / size[:, None]) @ basis
