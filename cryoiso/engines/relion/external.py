"""RELION's external-reconstruct arrays, and the map that follows from them.

For each half RELION writes the Fourier sums of its M-step (Scheres, J. Struct. Biol. 180 (2012) 519, eq. 7): the
numerator sum_i CTF_i x_i / sigma_i^2 and the weight sum_i CTF_i^2 / sigma_i^2, both as half-complex transforms on a
grid ``padding`` times finer than the map's, and the prior's power tau^2 of every shell. The regularised map is their
Wiener quotient numerator / (weight + 1 / (padding^3 tau^2)), without the prior the unregularised one.

The division is done as RELION does it, so that the maps agree to the precision of the files: by version 3 with the
weights of Pipe & Menon (Magn. Reson. Med. 41 (1999) 179, eq. 14), iterated ten times with a Kaiser-Bessel kernel
(Lewitt, J. Opt. Soc. Am. A 7 (1990) 1834), by relion_refine from version 4 on directly. Either way the map is divided
by sinc^2, the transform of the trilinear interpolation that filled the grid.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.engines.relion.files import SUFFIX, Name, Star, parse_name
from cryoiso.io.mrc import read_raw_map

GENERAL, SPECTRUM = "external_reconstruct_general", "external_reconstruct_tau2"
MOST_PIXELS, MOST_PADDING = 2**14, 8
PRODUCTS = ("DataReal", "DataImag", "Weight", "Result")
"""What follows rlnExtRecons in the columns that name files."""
PIPE_MENON_ITERATIONS = 10
KERNEL_RADIUS, KERNEL_ALPHA = 3.8, 15.0
"""Points of the grid, whatever the padding."""
KERNEL_STEPS = 10_000
"""RELION looks the kernel's transform up in a table of so many values between 0 and half a cycle a pixel."""
UNKNOWN_PRIOR = 1e-3
"""Without a tau^2 of its shell a point gets this share of its weight for one, as RELION does."""
LEAST_WEIGHT = 1e-3
"""Direct division: no weight counts less than this share of the mean of its shell."""
CORNER_EDGE_PX = 3.0


@dataclass(frozen=True)
class ReconstructionTask:
    """One call of RELION: what it wants reconstructed."""

    star: Path
    name: Name
    real: Path
    imaginary: Path
    weight: Path
    result: Path
    tau2: np.ndarray
    """(D//2+1,) prior's power, times ``fudge``"""
    fsc: np.ndarray
    """(D//2+1,)"""
    padding: float
    box_px: int
    current_px: int
    """Data reach to this size's Nyquist."""
    pixel_size_A: float | None
    """from version 5 on"""
    fudge: float = 1.0
    """RELION's tau2_fudge"""

    @property
    def arrays(self) -> tuple[Path, Path, Path]:
        return self.real, self.imaginary, self.weight


def read_task(star: Path, folder: Path) -> ReconstructionTask:
    """RELION's ``..._external_reconstruct.star``.

    Args:
        star: as RELION names it.
        folder: where RELION runs; its paths start there.

    Raises:
        InputError: not such a file, something of it is missing or impossible, or no 3D reference.
    """
    path = folder / star
    table = _read_table(path)
    files = [folder / table.text(GENERAL, f"rlnExtRecons{what}") for what in PRODUCTS]
    for file in files:
        if os.path.realpath(file.parent) != os.path.realpath(path.parent):  # RELION writes them side by side
            raise InputError(
                "names a file in another folder", file=path, expected=path.parent, found=file,
                code="relion-file-invalid",
            )  # fmt: skip
    fudge = table.number(GENERAL, "rlnTau2FudgeFactor")
    box = table.integer(GENERAL, "rlnOriginalImageSize", 2, MOST_PIXELS)
    padding = table.number(GENERAL, "rlnPaddingFactor")
    if not 1 <= padding <= MOST_PADDING:
        raise InputError(
            "impossible padding",
            file=path,
            expected=f"1 to {MOST_PADDING}",
            found=f"{padding:g}",
            code="relion-file-invalid",
        )
    tau2 = table.numbers(SPECTRUM, "rlnReferenceTau2") * fudge
    if len(tau2) != box // 2 + 1:
        raise InputError(
            "wrong number of shells", file=path, expected=box // 2 + 1, found=len(tau2), code="relion-file-invalid"
        )
    return ReconstructionTask(
        star=path,
        name=parse_name(path),
        real=files[0],
        imaginary=files[1],
        weight=files[2],
        result=files[3],
        tau2=tau2,
        fsc=table.numbers(SPECTRUM, "rlnGoldStandardFsc"),
        padding=padding,
        box_px=box,
        current_px=table.integer(GENERAL, "rlnCurrentImageSize", 1, box),
        pixel_size_A=table.number(GENERAL, "rlnPixelSize") if table.has(GENERAL, "rlnPixelSize") else None,
        fudge=fudge,
    )


def _read_table(path: Path) -> Star:
    """The file, if it asks for the reconstruction of a 3D reference."""
    if not path.name.removesuffix(".star").endswith(SUFFIX):
        raise InputError(
            "not an external-reconstruct file of RELION", file=path, expected=f"a name in {SUFFIX}.star",
            code="relion-file-invalid",
        )  # fmt: skip
    table = Star.read(path)
    if table.integer(GENERAL, "rlnReferenceDimensionality", 2, 3) != 3:
        raise InputError(
            "only 3D references can be reconstructed", file=path, found="rlnReferenceDimensionality 2",
            code="relion-file-invalid",
        )  # fmt: skip
    return table


@dataclass(frozen=True)
class FourierArrays:
    """A task's arrays on the grid that RELION divides on, zero frequency first, x halved; zero beyond the data."""

    numerator: Tensor
    """(n, n, n//2+1) complex128, n = 2 (round(padding x current / 2) + 1) + 1"""
    weight: Tensor
    """(n, n, n//2+1) float64"""
    radius: Tensor
    """(n, n, n//2+1) float64: distance from zero frequency in points of this grid"""
    inside: Tensor
    """(n, n, n//2+1) bool: where there may be data"""


def read_arrays(task: ReconstructionTask, device: str = "cpu") -> FourierArrays:
    """
    Raises:
        InputError: a file is missing, truncated, of a wrong size, or has numbers that are not finite.
    """
    edge = math.floor(task.padding * (task.current_px // 2) + 0.5)
    n = 2 * (edge + 1) + 1
    parts = [_read_half(path, task, n) for path in task.arrays]
    radius = _radius(n, device)
    inside = radius.square() < edge * edge - 0.5  # radii are roots of integers
    numerator = torch.complex(*(torch.as_tensor(part, device=device) for part in parts[:2])) * inside
    return FourierArrays(numerator, torch.as_tensor(parts[2], device=device) * inside, radius, inside)


def _read_half(path: Path, task: ReconstructionTask, n: int) -> np.ndarray:
    """(n, n, n//2+1) float64: the file's half-complex array cut (or extended by zeros) to n points a side."""
    raw, _ = read_raw_map(path)
    side = math.floor(task.padding * task.box_px + 0.5)
    if raw.shape != (side, side, side // 2 + 1):
        raise InputError(
            "an array of another size",
            file=path,
            expected=(side, side, side // 2 + 1),
            found=raw.shape,
            code="relion-file-invalid",
        )
    half = min(n, side - 1 + side % 2) // 2
    k = np.arange(-half, half + 1)
    out = np.zeros((n, n, n // 2 + 1))
    out[np.ix_(k % n, k % n, k[half:])] = raw[np.ix_(k % side, k % side, k[half:])]
    if not np.isfinite(out).all():
        raise InputError("the array has numbers that are not finite", file=path, code="relion-file-invalid")
    return out


def _radius(n: int, device: str) -> Tensor:
    k = torch.arange(n, dtype=torch.float64, device=device)
    k = torch.where(k > n // 2, k - n, k)
    x = torch.arange(n // 2 + 1, dtype=torch.float64, device=device)
    return (k[:, None, None] ** 2 + k[None, :, None] ** 2 + x[None, None, :] ** 2).sqrt()


def reconstruct(
    task: ReconstructionTask, arrays: FourierArrays, *, regularised: bool, iterative: bool, dimensions: int = 2
) -> Tensor:
    """The map.

    Args:
        regularised: with the prior tau^2, as RELION's next reference; without: the plain half-map.
        iterative: weights by Pipe & Menon's iteration (RELION 3); else direct division (RELION 4, 5).
        dimensions: of the particles: 2 for images, 3 for subtomograms, whose transforms RELION scales otherwise.

    Returns:
        (D, D, D) float32 on RELION's grey scale, centre at D//2, corners set to the mean at the sphere's edge.
    """
    weight = arrays.weight
    if regularised:
        weight = weight + _prior(task, arrays)
    factor = _pipe_menon(task, arrays, weight) if iterative else _inverse(task, arrays, weight)
    volume = _to_real_space(task, arrays.numerator * factor, dimensions)
    return _without_corners(volume, task).float()


def _prior(task: ReconstructionTask, arrays: FourierArrays) -> Tensor:
    """1 / (padding^3 tau^2) of every point inside; RELION rounds half shells up."""
    shell = (arrays.radius / task.padding + 0.5).long().clamp(max=len(task.tau2) - 1)
    tau2 = torch.as_tensor(task.tau2, device=shell.device)[shell]
    known = tau2 > 0
    prior = 1.0 / (task.padding**3 * tau2.where(known, torch.ones_like(tau2)))
    unknown = torch.where(arrays.weight > 1e-20, 1.0 / (UNKNOWN_PRIOR * arrays.weight), torch.zeros_like(prior))
    return prior.where(known, unknown) * arrays.inside


def _inverse(task: ReconstructionTask, arrays: FourierArrays, weight: Tensor) -> Tensor:
    """1 / weight, where a weight is not much smaller than others of its shell."""
    last = task.current_px // 2
    shell = (arrays.radius / task.padding).long()
    counted = arrays.radius.square() < math.floor((last * task.padding) ** 2 + 0.5) - 0.5
    size = int(shell.max()) + 1
    total = torch.bincount(shell[counted], weight[counted], size)
    mean = total / torch.bincount(shell[counted], minlength=size).clamp(min=1)
    least = LEAST_WEIGHT * mean[shell.clamp(max=last - 1)]
    weight = torch.maximum(weight, least)
    return torch.where(arrays.inside & (weight > 0), 1.0 / weight.clamp(min=1e-300), torch.zeros_like(weight))


def _pipe_menon(task: ReconstructionTask, arrays: FourierArrays, weight: Tensor) -> Tensor:
    """w with (w weight) * kernel = 1 on the sampled points: w <- w / ((w weight) * kernel)."""
    n = weight.shape[0]
    kernel = _kernel_transform(task, n, weight.device)
    scale = weight.max().clamp(min=1e-300)
    weight = weight / scale
    gridding_weight = arrays.inside.double()
    for _ in range(PIPE_MENON_ITERATIONS):
        spread = torch.fft.rfftn(
            torch.fft.irfftn(gridding_weight * weight, s=(n, n, n), dim=(0, 1, 2)) * kernel, dim=(0, 1, 2)
        )
        gridding_weight = torch.where(
            arrays.inside, gridding_weight / spread.abs().clamp(min=1e-6 / float(scale)), gridding_weight
        )
    return (gridding_weight / scale).where(weight > 0, torch.zeros_like(gridding_weight))


def _kernel_transform(task: ReconstructionTask, n: int, device: torch.device) -> Tensor:
    """(n, n, n) transform of the Kaiser-Bessel kernel over the real-space grid, first point the centre.

    Like RELION's it is looked up by the distance over D x padding (not over n), and zero from half of that on.
    """
    from scipy.special import iv, jv

    frequency = np.arange(KERNEL_STEPS) * 0.5 / KERNEL_STEPS
    argument = KERNEL_ALPHA**2 - (2 * np.pi * KERNEL_RADIUS * frequency) ** 2
    root = np.maximum(np.sqrt(np.abs(argument)), 1e-9)
    values = np.where(argument > 0, iv(1.5, root), jv(1.5, root)) / root**1.5
    table = torch.as_tensor(np.append(values / values[0], 0.0), device=device)
    k = torch.arange(n, dtype=torch.float64, device=device)
    k = torch.where(k < n // 2, k, k - n).square()
    distance = (k[:, None, None] + k[None, :, None] + k[None, None, :]).sqrt_().div_(task.box_px * task.padding)
    return table[(distance / (0.5 / KERNEL_STEPS)).long().clamp_(max=KERNEL_STEPS)]  # rounded as RELION's division is


def _to_real_space(task: ReconstructionTask, transform: Tensor, dimensions: int) -> Tensor:
    """(D, D, D): the transform on the padded grid, its middle cut out; RELION's normalisation of transforms."""
    n, box = transform.shape[0], task.box_px
    side = math.floor(task.padding * box + 0.5)
    side += side % 2  # an odd one would have its centre elsewhere
    k = torch.arange(-(n // 2), n // 2 + 1, device=transform.device)
    k = k[k.abs() <= (side - 1) // 2]
    zero = len(k) // 2
    padded = torch.zeros(side, side, side // 2 + 1, dtype=transform.dtype, device=transform.device)
    rows = k[:, None, None]
    padded[rows % side, k[None, :, None] % side, k[None, None, zero:]] = transform[
        rows % n, k[None, :, None] % n, k[None, None, zero:]
    ]
    volume = torch.fft.irfftn(padded, s=(side, side, side), dim=(0, 1, 2), norm="forward")
    volume = torch.fft.fftshift(volume)
    start = side // 2 - box // 2
    volume = volume[(slice(start, start + box),) * 3]
    scaled: Tensor = volume / (task.padding**3 * (box if dimensions == 2 else 1))
    return scaled


def _without_corners(volume: Tensor, task: ReconstructionTask) -> Tensor:
    """The mean of what lies outside the largest sphere in its place, with a soft edge; then the gridding correction."""
    box = task.box_px
    axis = torch.arange(box, dtype=torch.float64, device=volume.device) - box // 2
    radius = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt_()
    outside = ((radius - box / 2) / CORNER_EDGE_PX).clamp_(0, 1)
    outside = 0.5 - 0.5 * torch.cos(torch.pi * outside)
    mean = (volume * outside).sum() / outside.sum().clamp(min=1e-12)
    volume = volume * (1 - outside) + mean * outside
    return volume / torch.sinc(radius / (box * task.padding)).square()


def uses_iterations(version: str) -> bool:
    """Whether relion_refine of this version divides by iterated weights; 3 where it is not known.

    relion_external_reconstruct does so in all versions (3.1.3 to 5.0.1) unless it is given --skip_gridding.
    """
    match = re.match(r"\d+", version)
    return (int(match[0]) if match else 3) < 4
