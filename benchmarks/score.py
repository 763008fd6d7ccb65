"""Scores a refinement against the truth: one scorer for every program.

The maps are not aligned but for a slide along the symmetry axis (in C1: along all), and poses only by a rotation about
it (the one freedom that a Cn map of given hand has), so a refinement that has lost its reference's frame scores badly
here.

    python score.py SET STAR HALF1 HALF2        # SET: a folder with truth.star and signal_map.mrc
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
TOP_DEG = 36.0
"""Views within this of the axis (either end) are top views."""


@dataclass(frozen=True)
class Preferred:
    """The preferred view directions of a set; views within ``within_deg`` of one are frequent, the others rare."""

    directions: np.ndarray
    """(m, 3) unit vectors in the frame of the true map."""
    both_ends: bool = True
    """The opposite directions are preferred as well (an axis, not a pole)."""
    within_deg: float = TOP_DEG

    def frequent(self, views: np.ndarray, operations: np.ndarray) -> np.ndarray:
        """(n,) bool of view directions (n, 3), modulo the operations (g, 3, 3) of the point group."""
        mates = np.einsum("mi,gij->gmj", self.directions, operations).reshape(-1, 3)
        cosine = views @ mates.T
        return (np.abs(cosine) if self.both_ends else cosine).max(1) > np.cos(np.radians(self.within_deg))


def score(
    folder: Path, star: Path, half1: Path, half2: Path, symmetry: str = "C3", preferred: Preferred | None = None
) -> dict[str, Any]:
    """Pose errors and resolutions.

    Args:
        folder: holds truth.star and signal_map.mrc, the true map.
        star: estimated poses; particles that are not in truth.star, or are junk there, are left out.
        half1, half2: unregularised half-maps.
        preferred: adds the counts of `view_counts`.
    """
    from cryoiso.io import read_particle_file
    from cryoiso.io.mrc import read_map

    true = without_junk(read_particle_file(folder / "truth.star", require=("pose",)))
    found = read_particle_file(star, require=("pose",))
    _, i, j = np.intersect1d(found.uid, true.uid, return_indices=True)
    truth = read_map(folder / "signal_map.mrc")
    maps = [read_map(path, truth.pixel_size_A).data for path in (half1, half2)]
    return {
        **pose_scores(found.rotation[i], true.rotation[j], symmetry),
        **view_counts(found.rotation[i], true.rotation[j], symmetry, preferred),
        "shift_median_A": float(np.median(np.linalg.norm(found.shift_A[i] - true.shift_A[j], axis=1))),
        **map_scores(*maps, truth.data, truth.pixel_size_A, symmetry),
    }


def without_junk(true: Any) -> Any:
    """The particles of a simulated set that show the object, whole and alone."""
    if true.table is None or "cryoisoKind" not in true.table.columns:
        return true
    return true.take(np.array([kind == "particle" for kind in true.table["cryoisoKind"].tolist()]))


def scale_scores(folder: Path, star: Path) -> dict[str, Any]:
    """Estimated intensities, signal over noise, against the true ones, both with mean 1; empty where either has none.

    ``scale_sd`` and ``scale_true_sd``, ``scale_correlation`` (of micrographs' means: ``scale_micrograph_correlation``),
    ``scale_error`` (root mean square), and ``scale_bias_top``, ``scale_bias_side``: [estimated over true mean, standard
    error] of the views within 36 degrees of z and the others.
    """
    from cryoiso.io import read_particle_file

    true = without_junk(read_particle_file(folder / "truth.star", require=("pose",)))
    found = read_particle_file(star, require=("pose",))
    known = true.table is not None and "cryoisoSignalScale" in true.table
    if not known or found.signal_scale is None:
        return {}
    _, i, j = np.intersect1d(found.uid, true.uid, return_indices=True)
    signal, noise = (true.table[f"cryoiso{name}Scale"].astype(float).to_numpy()[j] for name in ("Signal", "Noise"))
    level = np.ones(len(found)) if found.noise_level is None else found.noise_level
    expected, scale = signal / noise, (found.signal_scale / np.sqrt(level))[i]
    expected, scale = expected / expected.mean(), scale / scale.mean()
    top = np.abs(true.rotation[j, 2, 2]) > np.cos(np.radians(TOP_DEG))
    result: dict[str, Any] = {
        "scale_sd": float(scale.std()), "scale_true_sd": float(expected.std()),
        "scale_error": float(np.sqrt(np.mean(np.square(scale - expected)))),
    }  # fmt: skip
    if expected.std() > 1e-6:
        result["scale_correlation"] = float(np.corrcoef(scale, expected)[0, 1])
        if true.micrograph is not None:
            of = true.micrograph[j]
            means = [np.bincount(of, values) / np.maximum(np.bincount(of), 1) for values in (scale, expected)]
            result["scale_micrograph_correlation"] = float(np.corrcoef(*means)[0, 1])
    for name, rows in (("top", top), ("side", ~top)):
        if rows.any():
            mean = expected[rows].mean()
            error = (scale - expected)[rows].std() / np.sqrt(rows.sum())
            result[f"scale_bias_{name}"] = [float(scale[rows].mean() / mean), float(error / mean)]
    return result


def best_spin(estimated: np.ndarray, true: np.ndarray, symmetry: str) -> tuple[float, np.ndarray]:
    """Rotation about z that brings poses (n, 3, 3) nearest to the true ones, tried every 2 degrees over a sixth of a
    turn each way, and the errors (n,) in degrees after it. Only Cn with n > 1 has this freedom."""
    from cryoiso.physics.so3 import angular_distance_deg, euler_to_matrix
    from cryoiso.physics.symmetry import normalise_name, point_group

    operations = point_group(symmetry)
    free = normalise_name(symmetry)[0] == "C" and len(operations) > 1
    spins = np.arange(-60.0, 60.0, 2.0) if free else np.zeros(1)

    def errors(spin_deg: float) -> np.ndarray:
        return angular_distance_deg(estimated @ euler_to_matrix(spin_deg, 0.0, 0.0)[0], true, operations)

    spin = float(min(spins, key=lambda s: np.minimum(errors(s), 60).mean()))
    return spin, errors(spin)


def pose_scores(estimated: np.ndarray, true: np.ndarray, symmetry: str) -> dict[str, Any]:
    """Errors of poses (n, 3, 3) after the best spin; top views are those near the axis z, either end."""
    spin, error = best_spin(estimated, true, symmetry)
    top, put_top = (np.abs(r[:, 2, 2]) > np.cos(np.radians(TOP_DEG)) for r in (true, estimated))
    result: dict[str, Any] = {
        "particles": len(error),
        "spin_deg": spin,
        "median_deg": float(np.median(error)),
        **{f"over_{d}": float(np.mean(error > d)) for d in (10, 20, 30)},
    }
    for name, rows, moved in (("top", top, ~put_top), ("side", ~top, put_top)):
        if rows.any():
            other = "side" if name == "top" else "top"
            result[f"{name}_n"] = int(rows.sum())
            result[f"{name}_median_deg"] = float(np.median(error[rows]))
            result[f"{name}_over_20"] = float(np.mean(error[rows] > 20))
            result[f"{name}_to_{other}"] = float(np.mean(moved[rows]))
    return result


def view_counts(
    estimated: np.ndarray, true: np.ndarray, symmetry: str, preferred: Preferred | None
) -> dict[str, dict[str, int]]:
    """How many particles of each class are placed wrongly: {"counts": {"n": ..., "n_over_20": ..., ...}}.

    ``rare_to_frequent`` and ``frequent_to_rare`` are views that were put to the other class, whatever their error;
    ``frequent_upside_down`` those whose view direction is wrong by more than 150 degrees, modulo the symmetry. Counts,
    not shares, so that sets of several seeds can be pooled exactly.

    Args:
        estimated, true: (n, 3, 3).
        preferred: None where no view is rare; then there are only ``n`` and ``n_over_20``.
    """
    from cryoiso.physics.so3 import euler_to_matrix, view_direction
    from cryoiso.physics.symmetry import point_group

    spin, error = best_spin(estimated, true, symmetry)
    severe = error > 20
    counts = {"n": len(error), "n_over_20": int(severe.sum())}
    if preferred is None:
        return {"counts": counts}
    operations = point_group(symmetry)
    views, put = view_direction(true), view_direction(estimated @ euler_to_matrix(spin, 0.0, 0.0)[0])
    frequent, put_frequent = preferred.frequent(views, operations), preferred.frequent(put, operations)
    cosine = np.einsum("ni,gij,nj->ng", put, operations, views).max(1)
    upside_down = cosine < np.cos(np.radians(150))
    return {
        "counts": {
            **counts,
            "rare": int((~frequent).sum()),
            "rare_over_20": int((severe & ~frequent).sum()),
            "rare_to_frequent": int((put_frequent & ~frequent).sum()),
            "frequent": int(frequent.sum()),
            "frequent_over_20": int((severe & frequent).sum()),
            "frequent_to_rare": int((~put_frequent & frequent).sum()),
            "frequent_upside_down": int((upside_down & frequent).sum()),
        }
    }


def map_scores(
    half1: np.ndarray, half2: np.ndarray, truth: np.ndarray, pixel_size_A: float, symmetry: str = "C3"
) -> dict[str, Any]:
    """Half-maps at 0.143, and their mean against the true map (see `truth_scores`)."""
    from cryoiso.metrics.fsc_curve import fsc, resolution_at

    box = len(truth)
    mask = soft_mask(truth, pixel_size_A)
    return {
        "half_unmasked_A": resolution_at(fsc(half1, half2), 0.143, box, pixel_size_A),
        "half_masked_A": resolution_at(fsc(half1, half2, mask), 0.143, box, pixel_size_A),
        **truth_scores((half1 + half2) / 2, truth, pixel_size_A, symmetry, mask),
    }


def truth_scores(
    full: np.ndarray, truth: np.ndarray, pixel_size_A: float, symmetry: str = "C3", mask: np.ndarray | None = None
) -> dict[str, Any]:
    """A map against the true one, after a slide along the axes on which the symmetry leaves its place open.

    ``truth_A``: resolution in Å at FSC 0.5; ``truth_area``: mean of the FSC over the shells from 1 to Nyquist (the area
    under the curve), which does not jump when one noisy shell crosses a threshold. Each of all coefficients, of those
    within 20 degrees of z (axial) and of those within 20 degrees of the plane across it (equatorial).
    """
    from cryoiso.metrics.fsc_curve import resolution_at, shell_correlation, transform

    box = len(truth)
    mask = soft_mask(truth, pixel_size_A) if mask is None else mask
    full, slide_px = slid(full, truth, symmetry)
    pair = transform(full, mask), transform(truth, mask)
    edge = np.sin(np.radians(20))
    parts: dict[str, Any] = {
        "": None,
        "_axial": lambda z, y, x, r: np.abs(z) > np.sqrt(1 - edge**2) * np.maximum(r, 1e-9),
        "_equatorial": lambda z, y, x, r: np.abs(z) < edge * np.maximum(r, 1e-9),
    }
    curves = {name: shell_correlation(*pair, box, select) for name, select in parts.items()}
    inside = mask > 0.1
    return {
        "slide_px": slide_px,
        **{f"truth{name}_A": resolution_at(curve, 0.5, box, pixel_size_A) for name, curve in curves.items()},
        **{f"truth{name}_area": float(curve[1:].mean()) for name, curve in curves.items()},
        "correlation": float(np.corrcoef((full * mask)[inside], (truth * mask)[inside])[0, 1]),
    }


def slid(full: np.ndarray, truth: np.ndarray, symmetry: str) -> tuple[np.ndarray, list[float]]:
    """A map shifted, by fractions of a pixel, to where it overlaps most with another, and the shift (z, y, x).

    Cn fixes the place across z, C1 nothing, the other groups all of it.
    """
    from cryoiso.physics.symmetry import normalise_name

    group = normalise_name(symmetry)
    axes = {"C1": (0, 1, 2)}.get(group, (0,) if group[0] == "C" else ())
    box = len(truth)
    spectrum = np.fft.fftn(full)
    cross = np.conj(np.fft.fftn(truth)) * spectrum
    k = np.fft.fftfreq(box) * box
    open_ = [slice(None) if axis in axes else slice(1) for axis in range(3)]
    overlap = np.fft.ifftn(cross).real[tuple(open_)]
    peak = np.array(np.unravel_index(overlap.argmax(), overlap.shape), float)
    shift = -((peak + box // 2) % box - box // 2)

    def ramp(axis: int, by: np.ndarray | float) -> np.ndarray:
        """exp(-2 pi i k by / D) along an axis, (D,) or (trials, D)."""
        return np.exp(-2j * np.pi * np.multiply.outer(by, k) / box)

    for axis in axes * (2 if len(axes) > 1 else 1):
        others = [a for a in range(3) if a != axis]
        part = cross
        for other in others:
            part = part * np.expand_dims(ramp(other, shift[other]), [a for a in range(3) if a != other])
        trials = shift[axis] + np.arange(-1.0, 1.001, 0.05)
        shift[axis] = trials[(ramp(axis, trials) @ part.sum(tuple(others))).real.argmax()]
    for axis in axes:
        spectrum = spectrum * np.expand_dims(ramp(axis, shift[axis]), [a for a in range(3) if a != axis])
    moved = np.fft.ifftn(spectrum).real if axes else full
    return moved.astype(np.float32), [round(float(s), 2) for s in shift]


def soft_mask(volume: np.ndarray, pixel_size_A: float) -> np.ndarray:
    """1 where the blurred map (sd 3 Å) exceeds a tenth of its maximum and 6 Å around, then a cosine edge of 8 Å."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    blurred = gaussian_filter(volume, 3.0 / pixel_size_A)
    distance = distance_transform_edt(blurred <= 0.1 * blurred.max()) * pixel_size_A
    edge = np.clip((distance - 6) / 8, 0, 1)
    return (0.5 * (1 + np.cos(np.pi * edge))).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "star", "half1", "half2"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--symmetry", default="C3")
    a = parser.parse_args()
    print(json.dumps(score(a.folder, a.star, a.half1, a.half2, a.symmetry), indent=1))


if __name__ == "__main__":
    main()
