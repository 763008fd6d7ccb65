"""The 3DFSC: agreement of two half-maps at every point of Fourier space (Tan et al. 2017, doi 10.1038/nmeth.4347).

Each coefficient k of shell s = rint(|k|) gets the Fourier shell correlation of that part of its shell which lies within
``cone_deg`` of its direction or of the opposite one,
    sum Re(A conj B) / sqrt(sum |A|^2 sum |B|^2).

The planes of an even box at the Nyquist frequency are excluded from the sums, since their coefficients have no
direction: +D/2 and -D/2 are the same.

Shells up to `EXACT_SHELL` are summed coefficient by coefficient. Beyond, a shell has k^2 coefficients and k^4 pairs of
them, so its three sums are first accumulated in small cells of direction (`Sphere`). A cone then takes the share of
each cell that lies inside it. For cells along one ring this share depends only on the difference of azimuth, and the
cone sum is a convolution in azimuth: a Fourier transform along the rings, then one small matrix per azimuthal order.
Between the nodes of the cells the 3DFSC is interpolated linearly. The deviation from the plain sums is measured in
``tests/metrics/test_metrics_fsc3d.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.metrics.fsc_curve import check_pair, transform

if TYPE_CHECKING:
    from jaxtyping import Complex, Float, Real

EXACT_SHELL = 32
"""Default of the last shell that is summed coefficient by coefficient; all of a 64 px box."""
_BLOCK = 16
"""Shells convolved at a time, which bounds the memory."""
NO_POWER = 1e-11
"""Power of a cone over that of its shell that counts as none: what a Fourier transform leaves of a zero."""


def fsc3d(
    half1: Real[np.ndarray, "box box box"],
    half2: Real[np.ndarray, "box box box"],
    mask: Real[np.ndarray, "box box box"] | None = None,
    *,
    cone_deg: float = 20.0,
    max_shell: int | None = None,
    exact_shell: int = EXACT_SHELL,
) -> Float[np.ndarray, "box box box"]:
    """3DFSC of two half-maps (Tan et al. 2017, equation 1 with one cone per coefficient).

    Args:
        half1, half2: (D, D, D) half-maps. mask: (D, D, D), multiplies both.
        cone_deg: half angle of the double cone; 90 gives the FSC in every direction.
        max_shell: last shell that is filled; D//2 by default.
        exact_shell: last shell that is summed coefficient by coefficient; the run time grows with its fourth power.

    Returns:
        (D, D, D) float32, origin at D//2, equal at k and -k; 1 at the origin, 0 beyond ``max_shell`` and where a cone
        has no power.

    Raises:
        InputError: invalid shapes or angle.
    """
    box_px = check_pair(half1, half2, mask)
    return fsc3d_of_transforms(
        transform(half1, mask),
        transform(half2, mask),
        box_px,
        cone_deg=cone_deg,
        max_shell=max_shell,
        exact_shell=exact_shell,
    )


def fsc3d_of_transforms(
    fa: Complex[np.ndarray, "box box box//2+1"],
    fb: Complex[np.ndarray, "box box box//2+1"],
    box_px: int,
    *,
    cone_deg: float = 20.0,
    max_shell: int | None = None,
    exact_shell: int = EXACT_SHELL,
) -> Float[np.ndarray, "box box box"]:
    """As `fsc3d`, of half-complex transforms (D, D, D//2+1) from `cryoiso.metrics.fsc_curve.transform`."""
    from cryoiso.metrics import _directional_kernels as kernels

    if not 0 < cone_deg <= 90:
        raise InputError(
            "impossible half angle of a cone",
            expected="above 0 and up to 90 degrees",
            found=cone_deg,
            code="option-out-of-range",
        )
    last = box_px // 2 if max_shell is None else max(0, min(int(max_shell), box_px // 2))
    out = np.zeros((box_px,) * 3, np.float32)
    out[(box_px // 2,) * 3] = 1.0
    exact = min(last, exact_shell)
    _paint_exact(fa, fb, box_px, exact, cone_deg, out)
    if last > exact:
        sphere = Sphere()
        cells = np.zeros((last - exact, sphere.rings, sphere.columns, 3), np.float32)
        kernels.bin_directions(fa, fb, exact + 1, last, cells)
        nodes = sphere.cone_ratios(cells, cone_deg)
        kernels.in_threads(kernels.paint_shells, box_px // 2 + 1, nodes, exact + 1, out)
    return out


def low_shells(fa: np.ndarray, fb: np.ndarray, box_px: int, last: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Coefficients of the shells 1..last, one of each pair k, -k.

    Returns:
        A pair for every shell from 0 on (the first is empty): indices (n, 3) int as (kz, ky, kx), and values (3, n)
        float64: Re(A conj B), |A|^2, |B|^2, each as often as it occurs in the full transform; 0 on the Nyquist planes.
    """
    last = min(last, box_px // 2)
    k, kx = np.arange(-last, last + 1), np.arange(last + 1)
    a, b = (f[np.ix_(k % box_px, k % box_px, kx)].astype(np.complex128) for f in (fa, fb))
    index = np.stack(np.meshgrid(k, k, kx, indexing="ij"), -1).reshape(-1, 3)
    counts = np.where(index[:, 2] == 0, 1.0, 2.0) * (2 * np.abs(index).max(1) < box_px)
    values = np.stack([(a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2]).reshape(3, -1) * counts
    shell = np.rint(np.sqrt((index**2).sum(1))).astype(int)
    order = np.argsort(shell, kind="stable")
    ends = np.searchsorted(shell[order], np.arange(last + 2))
    parts = [order[ends[s] : ends[s + 1]] for s in range(last + 1)]
    parts[0] = parts[0][:0]
    return [(index[rows], values[:, rows]) for rows in parts]


def _paint_exact(fa: np.ndarray, fb: np.ndarray, box_px: int, last: int, cone_deg: float, out: np.ndarray) -> None:
    """Write the shells 1..last of the 3DFSC, summed coefficient by coefficient."""
    from cryoiso.metrics._directional_kernels import double_cone_ratios, in_threads

    centre = box_px // 2
    cosine = np.cos(np.radians(cone_deg)) - 1e-12
    for index, values in low_shells(fa, fb, box_px, last)[1:]:
        points = (index / np.linalg.norm(index, axis=1)[:, None])[:, ::-1].copy()
        ratio = np.empty(len(points))
        least = NO_POWER * values[1:].sum(1)
        values = np.ascontiguousarray(values)
        in_threads(double_cone_ratios, len(points), points, values, points, cosine, least, ratio)
        for sign in (1, -1):
            at = centre + sign * index
            inside = ((at >= 0) & (at < box_px)).all(1)
            out[tuple(at[inside].T)] = ratio[inside]


@dataclass(frozen=True)
class Sphere:
    """Cells of direction on the half sphere: rings of constant tilt about its nodes, all with the same azimuths."""

    step_deg: float = 0.75

    @property
    def rings(self) -> int:
        """Rings with their nodes at tilts from 0 to 90 degrees, both included."""
        return round(90 / self.step_deg) + 1

    @property
    def columns(self) -> int:
        """Cells of a ring, an even number."""
        return 2 * round(180 / self.step_deg)

    def cone_ratios(self, cells: np.ndarray, cone_deg: float) -> np.ndarray:
        """Correlation within the double cone about every node.

        Args:
            cells: (shells, rings, columns, 3): Re(A conj B), |A|^2 and |B|^2 summed over each cell.

        Returns:
            (shells, rings, columns) float32; 0 where a cone holds no power.
        """
        from scipy import fft

        from cryoiso.metrics._directional_kernels import in_threads, mix_rings

        shares = _shares(self, cone_deg)
        out = np.zeros(cells.shape[:3], np.float32)
        for start in range(0, len(cells), _BLOCK):
            block = cells[start : start + _BLOCK].astype(np.float64)
            total = block.sum((1, 2))
            orders = fft.rfft(block.transpose(2, 1, 0, 3), axis=0)  # (columns/2+1, rings, shells, 3)
            plain = np.ascontiguousarray(orders).reshape(len(orders), self.rings, -1).view(np.float64)
            summed = np.empty_like(plain)
            in_threads(mix_rings, len(plain), shares, plain, summed)
            summed = summed.view(np.complex128).reshape(orders.shape)
            cross, power1, power2 = np.moveaxis(fft.irfft(summed, self.columns, axis=0), 3, 0)
            some = (power1 > NO_POWER * total[:, 1]) & (power2 > NO_POWER * total[:, 2])
            ratio = np.divide(cross, np.sqrt(np.abs(power1 * power2)), out=np.zeros_like(cross), where=some)
            out[start : start + _BLOCK] = np.clip(ratio, -1, 1).transpose(2, 1, 0)
        return out


@lru_cache(maxsize=2)
def _shares(sphere: Sphere, cone_deg: float) -> np.ndarray:
    """Share of each cell of ring j inside the double cone about the node (i, 0), transformed along the azimuth.

    Returns:
        (columns//2+1, rings i, rings j) float64.
    """
    node = np.linspace(0, np.pi / 2, sphere.rings)
    width = 2 * np.pi / sphere.columns
    azimuth = np.arange(sphere.columns // 2 + 1) * width
    points, weights = np.polynomial.legendre.leggauss(4)
    share = np.zeros((len(azimuth), len(node), len(node)))
    edges = np.clip(np.stack([node, node]) + np.array([[-0.5], [0.5]]) * node[1], 0, np.pi / 2)
    cell_weight = np.zeros(len(node))
    for point, weight in zip(points, weights, strict=True):
        tilt = edges.mean(0) + 0.5 * point * (edges[1] - edges[0])
        area = weight * np.sin(tilt)
        cell_weight += area
        for turned in (False, True):  # the cone, and the opposite one, whose cells lie half a turn further on
            reach = _azimuth_reach(node[:, None], (np.pi - tilt if turned else tilt)[None, :], cone_deg)
            away = np.pi - azimuth if turned else azimuth
            share += area * _covered(away[:, None, None], width, reach)
    share /= cell_weight
    mirrored = np.concatenate([share, share[-2:0:-1]])  # even in the azimuth
    return np.ascontiguousarray(np.fft.rfft(mirrored, axis=0).real)


def _azimuth_reach(tilt: np.ndarray, other: np.ndarray, cone_deg: float) -> np.ndarray:
    """Largest difference of azimuth at which directions of two tilts are within the cone; negative if none is."""
    sines = np.sin(tilt) * np.sin(other)
    missing = np.cos(np.radians(cone_deg)) - np.cos(tilt) * np.cos(other)
    cosine = np.divide(missing, sines, out=np.where(missing > 0, 2.0, -2.0), where=sines > 1e-12)
    return np.where(cosine > 1, -1.0, np.arccos(np.clip(cosine, -1, 1)))


def _covered(azimuth: np.ndarray, width: float, reach: np.ndarray) -> np.ndarray:
    """Share of a cell of this width about ``azimuth`` (0..pi) that lies within -reach..reach on the circle."""
    low, high = azimuth - width / 2, azimuth + width / 2
    share = np.minimum(high, reach) - np.maximum(low, -reach)
    around = np.maximum(reach - (2 * np.pi - high), 0)  # the far end of the interval, beyond half a turn
    return np.where(reach >= np.pi, 1.0, np.clip((np.maximum(share, 0) + around) / width, 0, 1)) * (reach > 0)
