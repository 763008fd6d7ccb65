"""Similarity of generated and real particle images: grey values, signal-to-noise ratio and power spectra.

Images are in units of the standard deviation of their background, which has mean 0 (as made by ``ingest``).

`image_sums` gives one flat vector for a block of images. Vectors of blocks add up to the vector of the whole set, also
across ranks; `image_statistics` computes the numbers from it. Order and size of the blocks are irrelevant except for
the pairs: image i of one set is compared with image i of the other, and real images with their neighbours (0 with 1, 2
with 3, ...), so blocks should hold an even number of images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.metrics.fsc_curve import shell_frequencies

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real

BINS, LIMIT = 1024, 4.0
"""Histograms of grey values: bins between -LIMIT and LIMIT, to which values outside are clipped."""
EMPTY_BIN_PIXELS = 0.5
"""Added to every bin of a histogram, in pixels, so that no probability is zero."""
SHOWN_BINS = 64
BAND_EDGES_A = (math.inf, 40.0, 20.0, 10.0, 5.0, 0.0)
"""Limits of the resolution bands in the summary."""
BLOCK_PIXELS = 2**22
_SETS = ("real", "generated")
_COUNTS = ("n", "left_out")
_PAIRS = ("pairs", "kl_nats", "real_pairs", "kl_real_nats")


@dataclass(frozen=True)
class _Layout:
    """Position of each sum in the flat vector."""

    box_px: int

    @property
    def sizes(self) -> dict[str, int]:
        shells = self.box_px // 2 + 1
        sizes = dict.fromkeys(_PAIRS, 1)
        for name in _SETS:
            sizes.update({f"{name} {c}": 1 for c in (*_COUNTS, "snr_dB")})
            sizes.update({f"{name} counts": BINS, f"{name} power": shells, f"{name} power squared": shells})
        return sizes

    def read(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Views of the parts.

        Raises:
            InputError: a vector of another box size.
        """
        total = sum(self.sizes.values())
        if np.shape(sums) != (total,):
            raise InputError(
                "not the sums of images of this box", expected=(total,), found=np.shape(sums), code="arrays-do-not-fit"
            )
        ends = np.cumsum(list(self.sizes.values()))
        return dict(zip(self.sizes, np.split(sums, ends[:-1]), strict=True))


def histograms(images: Real[np.ndarray, "n box box"]) -> Int[np.ndarray, "n bins"]:
    """(n, BINS) int64: number of pixels of each image (n, D, D) in each bin of [-LIMIT, LIMIT]."""
    flat = np.asarray(images).reshape(len(images), math.prod(np.shape(images)[1:]))
    inside = np.clip(flat, -LIMIT, LIMIT)
    bins = np.minimum(((inside + LIMIT) * (BINS / (2 * LIMIT))).astype(np.int64), BINS - 1)
    bins += BINS * np.arange(len(flat))[:, None]
    return np.bincount(bins.reshape(-1), minlength=BINS * len(flat)).reshape(len(flat), BINS)


def kl_divergence(
    counts_p: Real[np.ndarray, "... bins"], counts_q: Real[np.ndarray, "... bins"]
) -> Float[np.ndarray, " ..."] | np.float64:
    """KL(p || q) = sum p ln(p / q) of histograms given as counts, in nats.

    The cryoPROS paper's number for images (Nat. Commun. 2025, doi 10.1038/s41467-025-59797-w, Methods). The paper does
    not define the treatment of empty bins; here EMPTY_BIN_PIXELS are added to every bin of both before normalisation.
    Two samples of one distribution also differ, by about (occupied bins) / (pixels) for histograms of as many pixels:
    compare with pairs of real images.

    Args:
        counts_p, counts_q: (..., bins).

    Returns:
        (...) float64, not negative.
    """
    p, q = (np.asarray(c, np.float64) + EMPTY_BIN_PIXELS for c in (counts_p, counts_q))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    divergence: np.ndarray = np.maximum((p * np.log(p / q)).sum(-1), 0)
    return divergence


def image_sums(
    real: Real[np.ndarray, "n box box"], generated: Real[np.ndarray, "m box box"], radius_px: float
) -> Float[np.ndarray, " sums"]:
    """Sums over a block of real and generated images.

    Args:
        real, generated: (n, D, D) and (m, D, D), n and m may be 0; image i of one is paired with image i of the other.
            Images that are constant or not finite are left out and counted.
        radius_px: of the circle that contains the particle; the background is outside.

    Returns:
        (k,) float64; blocks add.

    Raises:
        InputError: the boxes differ.
    """
    shapes = [np.shape(real), np.shape(generated)]
    if any(len(s) != 3 or s[1] != s[2] for s in shapes) or shapes[0][1] != shapes[1][1]:
        raise InputError(
            "real and generated images cannot be compared",
            expected="(n, D, D) both",
            found=shapes,
            code="arrays-do-not-fit",
        )
    box_px = shapes[0][1]
    total = np.zeros(sum(_Layout(box_px).sizes.values()))
    step = max(2, BLOCK_PIXELS // box_px**2 // 2 * 2)
    for start in range(0, max(shapes[0][0], shapes[1][0]), step):
        _add_block(total, box_px, [np.asarray(x[start : start + step]) for x in (real, generated)], radius_px)
    return total


def _add_block(total: np.ndarray, box_px: int, images: list[np.ndarray], radius_px: float) -> None:
    parts = _Layout(box_px).read(total)
    good, counts = [], []
    for name, block in zip(_SETS, images, strict=True):
        good.append(np.isfinite(block).all((1, 2)) & (np.ptp(block, axis=(1, 2)) > 0))
        counts.append(histograms(np.where(good[-1][:, None, None], block, 0)))
        kept = block[good[-1]]
        parts[f"{name} n"] += len(kept)
        parts[f"{name} left_out"] += len(block) - len(kept)
        if len(kept):
            _add_set(parts, name, kept, radius_px)
        parts[f"{name} counts"] += counts[-1][good[-1]].sum(0)
    n = min(len(images[0]), len(images[1]))
    _add_pairs(parts, ("pairs", "kl_nats"), counts[1][:n], counts[0][:n], good[1][:n] & good[0][:n])
    even = len(images[0]) // 2 * 2
    good_pairs = good[0][0:even:2] & good[0][1:even:2]
    _add_pairs(parts, ("real_pairs", "kl_real_nats"), counts[0][0:even:2], counts[0][1:even:2], good_pairs)


def _add_pairs(
    parts: dict[str, np.ndarray], names: tuple[str, str], p: np.ndarray, q: np.ndarray, good: np.ndarray
) -> None:
    parts[names[0]] += good.sum()
    parts[names[1]] += kl_divergence(p[good], q[good]).sum()


def _add_set(parts: dict[str, np.ndarray], name: str, images: np.ndarray, radius_px: float) -> None:
    from cryoiso.physics.filters import power_spectrum
    from cryoiso.physics.simulation import image_to_background_db

    parts[f"{name} snr_dB"] += len(images) * image_to_background_db(images, radius_px)
    power = power_spectrum(np.ascontiguousarray(images, np.float32))
    parts[f"{name} power"] += power.sum(0)
    parts[f"{name} power squared"] += np.square(power).sum(0)


def image_statistics(
    sums: Float[np.ndarray, " sums"], box_px: int, pixel_size_A: float, beyond_A: float = 20.0
) -> dict[str, Any]:
    """The numbers of all images, from their sums.

    Args:
        sums: from `image_sums`, added over blocks and ranks.
        beyond_A: ``finer`` is of the shells finer than this resolution, ``coarser`` of the others.

    Returns:
        What a JSON file can hold (None for a number that could not be had):
        n_real, n_generated, left_out (of each set), pairs;
        kl_nats: KL(generated || real) of grey values, mean over pairs; kl_real_nats: the same between real images, what
        chance alone gives; kl_pooled_nats: of all pixels of each set together;
        snr_real_dB, snr_generated_dB: `cryoiso.physics.simulation.image_to_background_db`;
        histogram: edges, real, generated (share of the pixels, in SHOWN_BINS bins);
        frequency_invA, power_real, power_generated: (D//2+1,); log_ratio: ln(generated / real) of each shell (shell 0
        None) and log_ratio_sd, its standard error;
        beyond_A; finer, coarser: largest (log_ratio of greatest size, with its sign), at_A, rms;
        bands: from_A, to_A, log_ratio (of the power of the whole band), largest.

    Raises:
        InputError: sums of another box.
    """
    part = _Layout(box_px).read(np.asarray(sums, np.float64))
    n = {name: float(part[f"{name} n"][0]) for name in _SETS}
    frequency = shell_frequencies(box_px, pixel_size_A)
    with np.errstate(divide="ignore", invalid="ignore"):
        power = {name: part[f"{name} power"] / n[name] for name in _SETS}
        ratio = np.log(power["generated"] / power["real"])
        ratio[0] = np.nan
        result = {
            **_grey_values(part, n),
            "frequency_invA": frequency,
            **{f"power_{name}": power[name] for name in _SETS},
            "log_ratio": ratio,
            "log_ratio_sd": np.sqrt(sum(_relative_variance(part, name, n[name]) for name in _SETS)),
        }
    fine = frequency > 1 / beyond_A * (1 + 1e-9)
    result["beyond_A"] = float(beyond_A)
    result["finer"], result["coarser"] = (_deviation(ratio, frequency, where) for where in (fine, ~fine))
    result["bands"] = _bands(power, ratio, frequency, box_px)
    record: dict[str, Any] = _json_able(result)
    return record


def compare_images(
    real: Real[np.ndarray, "n box box"],
    generated: Real[np.ndarray, "m box box"],
    pixel_size_A: float,
    radius_px: float,
    beyond_A: float = 20.0,
) -> dict[str, Any]:
    """`image_statistics` of images in memory: (n, D, D) real and (m, D, D) generated ones."""
    sums = image_sums(real, generated, radius_px)
    return image_statistics(sums, int(np.shape(real)[1]), pixel_size_A, beyond_A)


def _grey_values(part: dict[str, np.ndarray], n: dict[str, float]) -> dict[str, Any]:
    """All numbers that do not depend on the position of a pixel in its image."""
    counts = {name: part[f"{name} counts"] for name in _SETS}
    shown = {name: c.reshape(SHOWN_BINS, -1).sum(1) / c.sum() for name, c in counts.items()}
    return {
        "n_real": int(n["real"]),
        "n_generated": int(n["generated"]),
        "left_out": [int(part[f"{name} left_out"][0]) for name in _SETS],
        "pairs": int(part["pairs"][0]),
        "kl_nats": part["kl_nats"][0] / part["pairs"][0],
        "kl_real_nats": part["kl_real_nats"][0] / part["real_pairs"][0],
        "kl_pooled_nats": kl_divergence(counts["generated"], counts["real"]) if min(n.values()) else None,
        **{f"snr_{name}_dB": part[f"{name} snr_dB"][0] / n[name] for name in _SETS},
        "histogram": {"edges": np.linspace(-LIMIT, LIMIT, SHOWN_BINS + 1), **shown},
    }


def _relative_variance(part: dict[str, np.ndarray], name: str, n: float) -> np.ndarray:
    """Variance of the mean power over its square, of every shell."""
    mean = part[f"{name} power"] / n
    spread = np.maximum(part[f"{name} power squared"] / n - mean**2, 0) / (n - 1)
    return spread / mean**2


def _deviation(ratio: np.ndarray, frequency_invA: np.ndarray, where: np.ndarray) -> dict[str, Any]:
    rows = np.flatnonzero(where & np.isfinite(ratio))
    if len(rows) == 0:
        return {"largest": None, "at_A": None, "rms": None}
    worst = rows[np.abs(ratio[rows]).argmax()]
    rms = np.sqrt(np.mean(ratio[rows] ** 2))
    return {"largest": ratio[worst], "at_A": 1 / frequency_invA[worst], "rms": rms}


def _bands(
    power: dict[str, np.ndarray], ratio: np.ndarray, frequency_invA: np.ndarray, box_px: int
) -> list[dict[str, Any]]:
    """Each shell is weighted by its number of coefficients, its circumference."""
    weight = np.arange(box_px // 2 + 1.0)
    bands = []
    for start, end in pairwise(BAND_EDGES_A):
        low, high = 1 / start, 1 / end if end else math.inf
        rows = np.flatnonzero((frequency_invA > low * (1 + 1e-9)) & (frequency_invA <= high * (1 + 1e-9)))
        if len(rows) == 0:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            sums = {name: (weight * power[name])[rows].sum() for name in _SETS}
            log_ratio = np.log(sums["generated"] / sums["real"])
        largest = _deviation(ratio, frequency_invA, np.isin(np.arange(len(ratio)), rows))["largest"]
        bands.append({"from_A": start, "to_A": end, "log_ratio": log_ratio, "largest": largest})
    return bands


def _json_able(value: Any) -> Any:
    """The same in plain Python, None for what is not finite."""
    if isinstance(value, dict):
        return {k: _json_able(v) for k, v in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_json_able(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
