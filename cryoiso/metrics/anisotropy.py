"""Half-map agreement by direction: conical FSC and cFAR, Fourier shell occupancy with Bingham's test, 3DFSC sphericity.

All numbers are sums of coefficients over double cones (k and -k are one coefficient). For definitions and limitations
see docs/diagnose.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cryoiso.metrics.directional_fsc import NO_POWER, fsc3d_of_transforms
from cryoiso.metrics.fsc_curve import check_pair, require_transforms, resolution_at, transform
from cryoiso.metrics.sampling import fibonacci_half_sphere

if TYPE_CHECKING:
    from jaxtyping import Bool, Complex, Float, Real, Shaped

CFAR_AXES = 256
CFAR_CONE_DEG = 20.0
FSO_AXES = 321
FSO_CONE_DEG = 17.0
FEWEST = 3
"""Smallest number of coefficients in a cone (k and -k are one) for a meaningful correlation."""
_PARTS = 8
"""Slabs that are summed separately and then added: a fixed number, so that threads do not change the last bits."""


def cone_curves(
    fa: Complex[np.ndarray, "box box box//2+1"],
    fb: Complex[np.ndarray, "box box box//2+1"],
    box_px: int,
    axes: Float[np.ndarray, "n 3"],
    cone_deg: float,
    *,
    falloff: float = 0.0,
) -> Float[np.ndarray, "n box//2+1"]:
    """FSC within the double cone about each axis.

    Args:
        fa, fb: (D, D, D//2+1) from `cryoiso.metrics.fsc_curve.transform`.
        axes: (n, 3) unit vectors (x, y, z).
        cone_deg: half angle. falloff: a coefficient at angle t from the axis weighs
            exp(-falloff ((cos t - 1) / (cos cone - 1))^2).

    Returns:
        (n, D//2+1) float64; 1 at shell 0, 0 where a cone holds no power, NaN where it has fewer coefficients
            than `FEWEST`.
    """
    from cryoiso.metrics._directional_kernels import in_threads, sums_about_axes

    sums = np.zeros((_PARTS, box_px // 2 + 1, 4, len(axes)))
    cosine = float(np.cos(np.radians(cone_deg)) - 1e-12)
    columns = np.ascontiguousarray(axes.T, np.float64)
    in_threads(sums_about_axes, _PARTS, fa, fb, columns, cosine, float(falloff), sums)
    cross, power1, power2, coefficients = np.moveaxis(sums.sum(0), 1, 0)
    least = NO_POWER * np.stack([power1, power2]).max(2, keepdims=True)
    curves = np.where(coefficients < FEWEST, np.nan, 0.0)
    known = (coefficients >= FEWEST) & (power1 > least[0]) & (power2 > least[1])
    np.divide(cross, np.sqrt(power1 * power2), out=curves, where=known)
    curves[0] = 1.0
    return curves.T


@dataclass(frozen=True)
class ConicalFSC:
    """FSC curves in cones about evenly spread axes."""

    axes: Float[np.ndarray, "n 3"]
    """(n, 3)."""
    curves: Float[np.ndarray, "n shells"]
    """(n, D//2+1), NaN where a cone has too few coefficients."""
    box_px: int
    pixel_size_A: float

    @property
    def areas(self) -> Float[np.ndarray, " n"]:
        """(n,) sum of cFSC times shell^2 over the shells from 1 to before the first at which it is 0.143 or less.

        Shells with too few coefficients in the cone, the first ones, are skipped.
        """
        shells = np.arange(self.curves.shape[1])
        below = self.curves <= 0.143  # False for NaN
        below[:, 0] = False
        before = np.cumsum(below, axis=1) == 0
        area: np.ndarray = np.where(before & (shells > 0), np.nan_to_num(self.curves) * shells**2, 0.0).sum(1)
        return area

    @property
    def cfar(self) -> float:
        """cFAR by the open definition: smallest over largest area; 1 = isotropic; NaN if all areas are zero."""
        areas = self.areas
        return float(areas.min() / areas.max()) if areas.max() > 0 else float("nan")

    @property
    def evenness(self) -> float:
        """5th over 95th percentile of the areas: as cFAR, but without the two extreme axes, which depend on noise."""
        low, high = np.percentile(self.areas, (5, 95))
        return float(low / high) if high > 0 else float("nan")

    def resolutions_A(self, threshold: float = 0.143) -> Float[np.ndarray, " n"]:
        """(n,) resolution in each direction, where its curve first drops below a threshold."""
        full = np.where(np.isnan(self.curves), 1.0, self.curves)  # too few coefficients say nothing
        return np.array([resolution_at(c, threshold, self.box_px, self.pixel_size_A) for c in full])


def conical_fsc(
    fa: Complex[np.ndarray, "box box box//2+1"],
    fb: Complex[np.ndarray, "box box box//2+1"],
    box_px: int,
    pixel_size_A: float,
    *,
    axes: int = CFAR_AXES,
    cone_deg: float = CFAR_CONE_DEG,
    last_shell: int | None = None,
) -> ConicalFSC:
    """Conical FSC of two half-complex transforms about Fibonacci axes of the half sphere; 0 beyond ``last_shell``,
    where the maps hold nothing and a mask would correlate what leaks there.

    Raises:
        InputError: the transforms are not those of maps of this box.
    """
    require_transforms(fa, fb, box_px)
    directions = fibonacci_half_sphere(axes)
    curves = cone_curves(fa, fb, box_px, directions, cone_deg)
    if last_shell is not None and last_shell < box_px // 2:
        curves[:, last_shell + 1 :] = 0.0
    return ConicalFSC(directions, curves, box_px, pixel_size_A)


@dataclass(frozen=True)
class Occupancy:
    """Fourier shell occupancy (Vilas et al. 2020/2023) and Bingham's test of each shell."""

    occupancy: Float[np.ndarray, " shells"]
    """(D//2+1,) fraction of the directions whose FSC reaches the threshold."""
    bingham_p: Float[np.ndarray, " shells"]
    """(D//2+1,) probability of directions as unevenly spread as those under an even distribution; NaN if none.
    Descriptive only, since neighbouring cones share coefficients."""

    def resolution_A(self, level: float, box_px: int, pixel_size_A: float) -> float | None:
        """Resolution at which the occupancy first drops below a level; None if it never does."""
        if not np.any(self.occupancy[1:] < level):
            return None
        return resolution_at(self.occupancy, level, box_px, pixel_size_A)


def fourier_shell_occupancy(
    fa: Complex[np.ndarray, "box box box//2+1"],
    fb: Complex[np.ndarray, "box box box//2+1"],
    box_px: int,
    *,
    threshold: float = 0.143,
    cone_deg: float = FSO_CONE_DEG,
) -> Occupancy:
    """FSO: of 321 directions, the fraction whose FSC (cone of 17 degrees, weight falling to exp(-4)) is 0.143 or more.

    Directions whose cone has too few coefficients in a shell are not counted in that shell. Bingham's statistic of the
    directions x that reach the threshold is p (p + 2) / 2 * 2n * (tr(T T) - 1/p) with p = 3 and T = sum x x' / n
    (directions and their opposites are 2n points), chi-square distributed with 5 degrees of freedom if they are evenly
    spread.
    """
    from scipy.stats import chi2

    axes = fibonacci_half_sphere(FSO_AXES)
    curves = cone_curves(fa, fb, box_px, axes, cone_deg, falloff=4.0)
    reach = curves >= threshold
    known = ~np.isnan(curves)
    occupancy = np.divide(reach.sum(0), known.sum(0), out=np.ones(curves.shape[1]), where=known.any(0))
    n = reach.sum(0)
    tensor = np.einsum("as,ai,aj->sij", reach, axes, axes) / np.maximum(n, 1)[:, None, None]
    statistic = 15 * n * (np.einsum("sij,sji->s", tensor, tensor) - 1 / 3)
    return Occupancy(occupancy, np.where(n > 0, chi2.sf(statistic, 5), np.nan))


def phase_cosine(
    half1: Real[np.ndarray, "box box box"],
    half2: Real[np.ndarray, "box box box"],
    mask: Real[np.ndarray, "box box box"] | None = None,
    *,
    cone_deg: float = 10.0,
    max_shell: int | None = None,
) -> Float[np.ndarray, "box box box"]:
    """Mean cosine of the phase difference within a cone: what spIsoNet computes under the name 3DFSC.

    It is no Fourier shell correlation: weak coefficients count as much as strong ones, so its values are lower than
    those of `cryoiso.metrics.directional_fsc.fsc3d` where both maps agree. Use it only to compare with that program.

    Returns:
        (D, D, D) float32 as `cryoiso.metrics.directional_fsc.fsc3d`.
    """
    box_px = check_pair(half1, half2, mask)
    fa, fb = (_unit(transform(half, mask)) for half in (half1, half2))
    return fsc3d_of_transforms(fa, fb, box_px, cone_deg=cone_deg, max_shell=max_shell)


def _unit(spectrum: np.ndarray) -> np.ndarray:
    """Every coefficient divided by its modulus; zeros are unchanged."""
    size = np.abs(spectrum)
    mean: np.ndarray = np.divide(spectrum, size, out=np.zeros_like(spectrum), where=size > 0)
    return mean


def resolved_region(
    volume: Real[np.ndarray, "box box box"], pixel_size_A: float, threshold: float = 0.5, highpass_A: float = 200.0
) -> Bool[np.ndarray, "box box box"]:
    """Region in which a 3DFSC reaches a threshold all the way from the origin; coarser than ``highpass_A`` always
    counts.

    Returns:
        (D, D, D) bool.
    """
    from cryoiso.metrics._directional_kernels import connected_to_centre

    box_px = check_pair(volume, volume)
    region = np.zeros(np.shape(volume), bool)
    known = float(box_px * pixel_size_A / highpass_A)
    connected_to_centre(np.ascontiguousarray(volume, np.float32), threshold, known, region)
    return region


def sphericity(region: Shaped[np.ndarray, "box box box"]) -> float:
    """Sphericity pi^(1/3) (6 V)^(2/3) / A of a region of voxels smoothed by a Gaussian of one voxel (Tan et al. 2017).

    A is the area of the surface at one half, V the number of voxels within; 1 for a sphere. Like the published number
    it depends on the size of the region in voxels, hence on box and resolution; below about 10 voxels of radius it is
    unreliable.

    Returns:
        NaN if the region is empty.
    """
    from scipy.ndimage import gaussian_filter

    from cryoiso.metrics._directional_kernels import surface_area

    where = np.argwhere(region)
    if len(where) == 0:
        return float("nan")
    low, high = where.min(0), where.max(0) + 1
    inside = region[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    smooth = gaussian_filter(np.pad(inside.astype(np.float64), 6), 1.0)
    volume = float((smooth >= 0.5).sum())
    area = surface_area(smooth, 0.5)
    return float(np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area) if area > 0 else float("nan")
