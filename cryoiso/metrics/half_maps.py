"""Validate a pair of half-maps; one check for every place where a pair is read.

Errors: a map that is constant or not finite, one map given twice (also scaled, shifted by a constant, inverted or
sharpened), and one half-map inverted. Warnings, for cases that may be intended but distort the numbers: dark protein,
maps that agree too well, that were filtered or masked, that have different spectra or grey scales, or that are
displaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.metrics.fsc_curve import check_pair, shell_correlation, transform

if TYPE_CHECKING:
    from jaxtyping import Float, Real

SAME = 1e-3
"""Residual of a linear fit of one map to the other, over its standard deviation; below, they are one map. Rounding to
float16 leaves 3e-4; half-maps with an FSC of 0.999 in every shell leave 0.04."""
SAME_PHASES = 0.99999
"""Cosine of the phase differences, weighted by the amplitudes, in every shell; above, one map is a filtered copy of the
other."""
TOO_ALIKE = 0.95
"""FSC in every shell up to the Nyquist frequency; above, the half-maps are hardly independent."""
INVERTED = -0.5
"""FSC of the coarsest shells, by their numbers of coefficients; below, one map is inverted."""
DARK = -0.1
"""`tail_asymmetry` below which protein is dark. For 20 maps of protein and RNA (real ones of 40 to 100 px, models,
simulated half-maps), as they are and with noise of 1 and 3 times their standard deviation, it is 0.14 to 0.89, for
noise alone -0.03 to 0.03; inverting a map changes its sign."""
NO_POWER = 1e-10
"""Power of a coefficient over that of the strongest shell; below, there are only rounding errors."""
UNLIKE_POWER = 4.0
"""Factor between the power of both maps, or between that of their shells; above, one was scaled or filtered."""
EMPTY = 0.2
"""Share of the voxels within the box's sphere that have one value; above, the map is masked."""


def check_half_maps(
    half1: Real[np.ndarray, "box box box"],
    half2: Real[np.ndarray, "box box box"],
    names: tuple[object, object] = ("half-map 1", "half-map 2"),
) -> list[str]:
    """Refuse maps that are not a pair of half-maps, and report what is unusual about a pair.

    Args:
        half1, half2: (D, D, D). names: of the files.

    Returns:
        Warnings, one sentence each; empty for the half-maps of a refinement as it wrote them.

    Raises:
        InputError: values that are not finite, a constant map, one map twice, or one of them inverted.
    """
    box_px = check_pair(half1, half2)
    pair = [np.asarray(half, np.float32) for half in (half1, half2)]
    for half, name in zip(pair, names, strict=True):
        _check_values(half, name)
    _refuse_one_map_twice(pair[0], pair[1], names)
    transforms = [transform(half) for half in pair]
    curve = shell_correlation(transforms[0], transforms[1], box_px)
    power = [_shell_power(f, box_px) for f in transforms]
    filled = [np.flatnonzero(p[1:] > NO_POWER * p[1:].max()) + 1 for p in power]
    common_shells = np.intersect1d(filled[0], filled[1])
    _refuse_filtered(transforms, power, box_px, names)
    _refuse_one_inverted(curve, box_px, names)
    problems = [
        *_agreement(curve, common_shells, box_px),
        *(_filtered(shells, box_px, name) for shells, name in zip(filled, names, strict=True)),
        *(_masked(half, name) for half, name in zip(pair, names, strict=True)),
        _spectra(power, common_shells),
        _beside(transforms, box_px),
        _dark(pair[0] / pair[0].std() + pair[1] / pair[1].std()),
    ]
    return [words for words in problems if words]


def _check_values(half: np.ndarray, name: object) -> None:
    if not np.isfinite(half).all():
        bad = int(half.size - np.isfinite(half).sum())
        raise InputError(
            "the half-map has voxels that are NaN or infinite", file=name, found=f"{bad} of them", code="map-not-finite"
        )
    size = np.abs(half)
    largest = float(size.max())
    if float(half.max()) - float(half.min()) <= 1e-6 * largest:
        raise InputError(
            "the half-map is constant",
            file=name,
            expected="a density",
            found=f"{float(half.flat[0]):g} in every voxel",
            code="map-without-density",
        )
    typical = float(np.median(size[size > 0]))
    if largest > 1e12 * typical:
        raise InputError(
            "the values are not densities", file=name, expected="values of one order of magnitude or some",
            found=f"{typical:.3g} typically, {largest:.3g} at most",
            hint="Their bytes may be in another order than the header says; write the map again.",
            code="map-not-finite",
        )  # fmt: skip


def _refuse_one_map_twice(first: np.ndarray, second: np.ndarray, names: tuple[object, object]) -> None:
    a, b = (half.astype(np.float64) - half.mean(dtype=np.float64) for half in (first, second))
    r = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    if np.sqrt(max(0.0, 1 - r * r)) >= SAME:
        return
    how = "inverted" if r < 0 else "scaled or shifted by a constant" if not np.array_equal(first, second) else ""
    raise InputError(
        "the half-maps are the same map" + (f", {how}" if how else ""), file=names[1],
        expected=f"the other half of {names[0]}", found=f"a correlation of {r:.6f}",
        hint="Give the two maps that the refinement wrote from its half-sets of particles.", code="half-maps-identical",
    )  # fmt: skip


def _refuse_filtered(
    transforms: list[np.ndarray], power: list[np.ndarray], box_px: int, names: tuple[object, object]
) -> None:
    """Refuse a filtered copy: a filter changes amplitudes and no phases, which the FSC does not reveal where the filter
    is steep."""
    fa, fb = transforms
    shell = _shells(box_px)
    cross = np.bincount(shell, (fa.real * fb.real + fa.imag * fb.imag).ravel())
    size = np.bincount(shell, (np.abs(fa) * np.abs(fb)).ravel())
    known = [s for s in range(1, box_px // 2 + 1) if all(p[s] > 1e-8 * p[1:].max() for p in power)]
    if len(known) < 3 or (least := float((cross[known] / size[known]).min())) < SAME_PHASES:
        return
    raise InputError(
        "the half-maps are the same map, filtered or sharpened", file=names[1],
        expected=f"the other half of {names[0]}",
        found=f"the same phases in every shell (cosine {least:.6f} or more)",
        hint="Give the two maps that the refinement wrote from its half-sets of particles.", code="half-maps-identical",
    )  # fmt: skip


def _refuse_one_inverted(curve: np.ndarray, box_px: int, names: tuple[object, object]) -> None:
    coarse = np.arange(1, max(5, box_px // 8) + 1)
    mean = float((curve[coarse] * coarse**2).sum() / (coarse**2).sum())
    if mean < INVERTED:
        raise InputError(
            "one half-map is inverted", file=names[1], expected=f"protein of the same sign as in {names[0]}",
            found=f"an FSC of {mean:.2f} in the coarsest shells", hint="Multiply the dark one by -1.",
            code="half-map-inverted",
        )  # fmt: skip


def _agreement(curve: np.ndarray, common_shells: np.ndarray, box_px: int) -> list[str]:
    last = box_px // 2
    if len(common_shells) < last - 1 or curve[1:].min() < TOO_ALIKE:
        return []
    return [
        f"the half-maps agree up to Nyquist's frequency (FSC {curve[1:].min():.3f} or more): too well for halves of "
        "one data set, unless the pixels are large; were both made from the same particles, or filtered together?"
    ]


def _filtered(shells: np.ndarray, box_px: int, name: object) -> str:
    last = int(shells.max()) if len(shells) else 0
    if last >= box_px // 2 - 1:
        return ""
    return (
        f"{name} has no power beyond shell {last} of {box_px // 2}: it was low-pass filtered, and the FSC says nothing "
        "there. Give half-maps as they were reconstructed"
    )


def _masked(half: np.ndarray, name: object) -> str:
    from cryoiso.physics.masks import sphere_mask

    inside = half[sphere_mask(len(half), len(half) / 2 - 2).numpy() > 0.5]
    _, counts = np.unique(inside[:: 1 + len(inside) // 200_000], return_counts=True)
    share = float(counts.max() / counts.sum())
    if share < EMPTY:
        return ""
    return (
        f"{name} is masked already ({100 * share:.0f} % of its voxels have one value): the FSC without the mask cannot "
        "be had, and what the mask adds is not known. Give half-maps as they were reconstructed"
    )


def _spectra(power: list[np.ndarray], common_shells: np.ndarray) -> str:
    shells = common_shells[common_shells >= 3]
    if len(shells) < 3:
        return ""
    ratio = np.log(power[1][shells] / power[0][shells])
    level = float(np.median(ratio))
    if np.abs(ratio - level).max() > np.log(UNLIKE_POWER):
        worst = int(shells[np.abs(ratio - level).argmax()])
        return (
            f"the spectra of the half-maps differ (by a factor of {np.exp(np.abs(ratio - level).max()):.1f} in power, "
            f"shell {worst}): one of them was filtered or sharpened"
        )
    if abs(level) > np.log(UNLIKE_POWER):
        return (
            f"the half-maps have different grey scales (a factor of {np.exp(level / 2):.3g}): their mean is that of "
            "the stronger one"
        )
    return ""


def _beside(transforms: list[np.ndarray], box_px: int) -> str:
    """Position of the peak of the cross-correlation."""
    from scipy import fft

    cross = fft.irfftn(transforms[0] * transforms[1].conj(), s=(box_px,) * 3)
    own = [fft.irfftn(np.abs(f) ** 2, s=(box_px,) * 3)[0, 0, 0] for f in transforms]
    peak = np.unravel_index(int(cross.argmax()), cross.shape)
    highest, here = (float(cross[at] / np.sqrt(own[0] * own[1])) for at in (peak, (0, 0, 0)))
    if highest < 0.2 or here > 0.9 * highest:
        return ""
    shift = [int((p + box_px // 2) % box_px) - box_px // 2 for p in peak][::-1]
    return (
        f"the half-maps agree better when the second is moved by {tuple(shift)} px (x, y, z; correlation {highest:.2f} "
        f"instead of {here:.2f}): they are not in one frame"
    )


def tail_asymmetry(volume: Float[np.ndarray, "box box box"]) -> tuple[float, float]:
    """(u - d) / (u + d) of a map low-passed at 8 px, and its skewness; both are positive for white protein.

    u and d are the distances of the mean of the highest and of the lowest 1/500 of the voxels from the median.
    """
    from cryoiso.physics.filters import lowpass

    step = 1 + len(volume) // 128  # of a smooth map some of the voxels tell as much as all
    smooth = np.asarray(lowpass(np.asarray(volume, np.float32), 1.0, 8.0)[::step, ::step, ::step], np.float64)
    smooth = np.sort(smooth, axis=None)
    n = max(8, smooth.size // 500)
    middle = smooth[smooth.size // 2]
    up, down = smooth[-n:].mean() - middle, middle - smooth[:n].mean()
    spread = max(float(smooth.std()), 1e-30)
    skewness = float((((smooth - smooth.mean()) / spread) ** 3).mean())
    return float((up - down) / max(up + down, 1e-30)), skewness


def _dark(full: np.ndarray) -> str:
    asymmetry, skewness = tail_asymmetry(full)
    if asymmetry > DARK or skewness > -0.5:
        return ""
    return (
        f"protein seems to be dark in both half-maps (asymmetry of densities {asymmetry:.2f}, of white protein 0.14 to "
        "0.89): masks and corrections expect it white; multiply both maps by -1"
    )


def _shell_power(spectrum: np.ndarray, box_px: int) -> np.ndarray:
    """(D//2+1,) mean power of the coefficients of each shell."""
    shell = _shells(box_px)
    power = (spectrum.real**2 + spectrum.imag**2).ravel()
    return (np.bincount(shell, power) / np.maximum(np.bincount(shell), 1))[: box_px // 2 + 1]


def _shells(box_px: int) -> np.ndarray:
    """Shell of every coefficient of a half-complex transform, flattened."""
    k2 = (np.fft.fftfreq(box_px) * box_px) ** 2
    radius = np.sqrt(k2[:, None, None] + k2[None, :, None] + np.arange(box_px // 2 + 1) ** 2)
    return np.rint(radius).astype(np.intp).ravel()
