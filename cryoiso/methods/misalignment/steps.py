"""What is done to a half-map on its way to becoming the next reference. Pure functions, phases in and phases out.

Order, purpose and defaults follow spIsoNet's misalignment correction (Liu et al. 2024, doi 10.1038/s41592-024-02505-1,
Methods). Every factor is a radial curve found on one map alone and relative to it: none depends on the grey scale, and
all work in odd and even boxes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.methods.anisotropy.filter import half_layout
from cryoiso.physics.filters import (
    apply_radial,
    friedel_weights,
    lowpass,
    lowpass_curve,
    power_spectrum,
    radial_average,
)

if TYPE_CHECKING:
    from jaxtyping import Float

NOTHING = 1e-6
"""Amplitudes below this share of the map's largest count as none."""


def shell_amplitude(
    volume: Float[np.ndarray, "box box box"], mask: Float[np.ndarray, "box box box"] | None = None
) -> Float[np.ndarray, " box//2+1"]:
    """Root mean square amplitude of every shell.

    Args:
        volume: (D, D, D). mask: (D, D, D), multiplies it.

    Returns:
        (D//2+1,) float64.
    """
    inside = volume if mask is None else volume * np.asarray(mask, volume.dtype)
    amplitude: np.ndarray = np.sqrt(power_spectrum(inside, dims=3))
    return amplitude


def keep_low_resolution(
    volume: Float[np.ndarray, "box box box"],
    initial: Float[np.ndarray, "box box box"],
    pixel_size_A: float,
    resolution_A: float,
    *,
    mask: Float[np.ndarray, "box box box"] | None = None,
    edge_shells: float = 3.0,
) -> Float[np.ndarray, "box box box"]:
    """The map with its low resolution taken from the initial reference.

    F = L s F_initial + (1 - L) F_map, L a raised cosine centred on ``resolution_A``, s the ratio of the two maps'
    amplitudes shell by shell, so that no step of grey scale arises at the crossover.

    Args:
        volume: (D, D, D) map.
        initial: (D, D, D) reference, on any grey scale.
        pixel_size_A: Å.
        resolution_A: coarser information comes from the reference.
        mask: (D, D, D), where amplitudes are compared; None: everywhere.
        edge_shells: width of the crossover.

    Returns:
        (D, D, D) float32, on the grey scale of the map.

    Raises:
        InputError: the two have different shapes.
    """
    _same_shape(volume, initial)
    want, have = shell_amplitude(volume, mask), shell_amplitude(initial, mask)
    matched = np.where(have > NOTHING * have.max(), want / np.maximum(have, 1e-300), 0.0)
    low = lowpass_curve(len(volume), pixel_size_A, resolution_A, edge_shells).numpy()
    change = apply_radial(np.asarray(initial, np.float32), low * matched) - apply_radial(volume, low)
    changed: np.ndarray = (volume + change).astype(np.float32)
    return changed


def whiten(
    volume: Float[np.ndarray, "box box box"],
    pixel_size_A: float,
    from_A: float,
    to_A: float,
    *,
    mask: Float[np.ndarray, "box box box"] | None = None,
) -> Float[np.ndarray, "box box box"]:
    """The map with a flat spectrum between two resolutions: each shell's amplitude becomes that of ``from_A``'s.

    Coarser shells stay; finer ones than ``to_A`` are multiplied by the factor found there. A shell is amplified by
    1 / NOTHING at most.

    Args:
        volume: (D, D, D).
        pixel_size_A: Å.
        from_A, to_A: where the flattening begins and ends; nothing happens if ``to_A`` is not the finer one.
        mask: (D, D, D), where amplitudes are measured.

    Returns:
        (D, D, D) float32.
    """
    amplitude = shell_amplitude(volume, mask)
    extent = len(volume) * pixel_size_A
    last = len(amplitude) - 1
    first, end = (int(np.clip(round(extent / resolution), 1, last)) for resolution in (from_A, to_A))
    factor = np.ones(last + 1)
    if end <= first or amplitude[first] == 0:
        return volume.astype(np.float32)
    floor = NOTHING * amplitude[first]
    factor[first : end + 1] = amplitude[first] / np.maximum(amplitude[first : end + 1], floor)
    factor[end + 1 :] = factor[end]
    return apply_radial(volume, factor).astype(np.float32)


def fsc_weight(
    volume: Float[np.ndarray, "box box box"], fsc: Float[np.ndarray, " box//2+1"]
) -> Float[np.ndarray, "box box box"]:
    """Every shell times the half-map FSC, which is the Wiener filter S / (S + N) of a half-map.

    Args:
        volume: (D, D, D). fsc: (D//2+1,); negative values count as 0.

    Returns:
        (D, D, D) float32.
    """
    return apply_radial(volume, np.clip(np.nan_to_num(fsc), 0.0, 1.0)).astype(np.float32)


def lowpass_at(
    volume: Float[np.ndarray, "box box box"], pixel_size_A: float, resolution_A: float
) -> Float[np.ndarray, "box box box"]:
    """``physics.filters.lowpass`` of a (D, D, D) map; nothing is done where Nyquist comes first."""
    if resolution_A <= 2 * pixel_size_A:
        return volume.astype(np.float32)
    return lowpass(volume, pixel_size_A, resolution_A).astype(np.float32)


def match_scale(
    corrected: Float[np.ndarray, "box box box"],
    original: Float[np.ndarray, "box box box"],
    fsc_filter: Float[np.ndarray, "box box box"] | None = None,
    *,
    mask: Float[np.ndarray, "box box box"] | None = None,
    by_shell: bool = True,
    last_shell: int | None = None,
) -> tuple[Float[np.ndarray, "box box box"], Float[np.ndarray, " box//2+1"]]:
    """A corrected map on the grey scale of the one that it was made from, as an engine's likelihood needs it.

    f becomes g f, shell by shell the least-squares fit to the original x0 where directions were measured:
    g = max(0, sum A Re(x0 conj f) / sum A |f|^2). So measured directions keep their strength, and what was filled in
    has that of its shell. g |f| never has more weighted power than x0 (Cauchy-Schwarz), so g needs no other bound.

    Args:
        corrected: (D, D, D), f.
        original: (D, D, D), x0.
        fsc_filter: (D, D, D) centred filter A in [0, 1], 1 where a direction was measured; None: everywhere.
        mask: (D, D, D), multiplies both before the fit; the result is not masked.
        by_shell: False: one factor for all shells.
        last_shell: finer ones get its factor, so that a filter's edge beyond it is not undone; None: the last of all.

    Returns:
        (D, D, D) float32; (D//2+1,) factors.

    Raises:
        InputError: different shapes.
    """
    _same_shape(corrected, original)
    f, x0 = (_transform(v if mask is None else v * np.asarray(mask, v.dtype)) for v in (corrected, original))
    weight: Tensor | float = 1.0
    if fsc_filter is not None:
        _same_shape(fsc_filter, original)
        weight = half_layout(fsc_filter).double()
    terms = weight * (x0 * f.conj()).real, weight * f.abs().square()
    if by_shell:
        cross, power = (radial_average(term, dims=3).numpy() for term in terms)
    else:
        counts = friedel_weights(len(original))
        cross, power = (np.full(len(original) // 2 + 1, float((counts * term).sum())) for term in terms)
    factor = np.where(power > NOTHING**2 * power.max(), cross / np.maximum(power, 1e-300), 0.0).clip(min=0.0)
    if last_shell is not None:
        factor[last_shell + 1 :] = factor[min(max(last_shell, 1), len(factor) - 1)]
    return apply_radial(corrected, factor).astype(np.float32), factor


def _transform(volume: np.ndarray) -> Tensor:
    transform: Tensor = torch.fft.rfftn(torch.from_numpy(np.ascontiguousarray(volume, np.float64)))
    return transform


def _same_shape(first: np.ndarray, second: np.ndarray) -> None:
    if np.shape(first) != np.shape(second):
        raise InputError(
            "the maps lie on different grids",
            expected=np.shape(first),
            found=np.shape(second),
            code="arrays-do-not-fit",
        )
