"""Scores a refinement against the truth: one scorer for every program.

The maps are not aligned but for a slide along the symmetry axis, and poses only by a rotation about it (the one freedom
that a Cn map of given hand has), so a refinement that has lost its reference's frame scores badly here.

    python score.py SET STAR HALF1 HALF2        # SET: a folder with truth.star and signal_map.mrc
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
TOP_DEG = 36.0
"""Views within this of the axis (either end) are top views."""


def score(folder: Path, star: Path, half1: Path, half2: Path, symmetry: str = "C3") -> dict[str, Any]:
    """Pose errors and resolutions.

    Args:
        folder: holds truth.star and signal_map.mrc, the true map.
        star: estimated poses; particles that are not in truth.star are left out.
        half1, half2: unregularised half-maps.
    """
    from cryoiso.io import read_particle_file
    from cryoiso.io.mrc import read_map

    true = read_particle_file(folder / "truth.star", require=("pose",))
    found = read_particle_file(star, require=("pose",))
    _, i, j = np.intersect1d(found.uid, true.uid, return_indices=True)
    truth = read_map(folder / "signal_map.mrc")
    maps = [read_map(path, truth.pixel_size_A).data for path in (half1, half2)]
    return {
        **pose_scores(found.rotation[i], true.rotation[j], symmetry),
        "shift_median_A": float(np.median(np.linalg.norm(found.shift_A[i] - true.shift_A[j], axis=1))),
        **map_scores(*maps, truth.data, truth.pixel_size_A),
    }


def pose_scores(estimated: np.ndarray, true: np.ndarray, symmetry: str) -> dict[str, Any]:
    """Errors of poses (n, 3, 3) after the best spin about z, tried every 2 degrees over a sixth of a turn each way."""
    from cryoiso.physics.so3 import angular_distance_deg, euler_to_matrix
    from cryoiso.physics.symmetry import point_group

    operations = point_group(symmetry)
    spins = np.arange(-60.0, 60.0, 2.0)

    def errors(spin_deg: float) -> np.ndarray:
        return angular_distance_deg(estimated @ euler_to_matrix(spin_deg, 0.0, 0.0)[0], true, operations)

    spin = min(spins, key=lambda s: np.minimum(errors(s), 60).mean())
    error = errors(spin)
    top, put_top = (np.abs(r[:, 2, 2]) > np.cos(np.radians(TOP_DEG)) for r in (true, estimated))
    result: dict[str, Any] = {
        "particles": len(error),
        "spin_deg": float(spin),
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


def map_scores(half1: np.ndarray, half2: np.ndarray, truth: np.ndarray, pixel_size_A: float) -> dict[str, Any]:
    """Resolutions in Å: half-maps at 0.143; their mean against the true map at 0.5, all and in two parts of space."""
    from cryoiso.metrics.fsc import fsc, resolution_at, shell_correlation, transform

    box = len(truth)
    mask = soft_mask(truth, pixel_size_A)
    full = (half1 + half2) / 2
    overlap = np.fft.ifftn(np.conj(np.fft.fftn(truth)) * np.fft.fftn(full)).real[:, 0, 0]
    slide = (int(overlap.argmax()) + box // 2) % box - box // 2
    full = np.roll(full, -slide, 0)

    def at(curve: np.ndarray, threshold: float) -> float:
        return resolution_at(curve, threshold, box, pixel_size_A)

    def within(keep) -> float:
        pair = transform(full, mask), transform(truth, mask)
        return at(shell_correlation(*pair, box, lambda z, y, x, r: keep(np.abs(z) / np.maximum(r, 1e-9))), 0.5)

    inside = mask > 0.1
    return {
        "slide_px": slide,
        "half_unmasked_A": at(fsc(half1, half2), 0.143),
        "half_masked_A": at(fsc(half1, half2, mask), 0.143),
        "truth_A": at(fsc(full, truth, mask), 0.5),
        "truth_axial_A": within(lambda cosine: cosine > np.cos(np.radians(20))),
        "truth_equatorial_A": within(lambda cosine: cosine < np.sin(np.radians(20))),
        "correlation": float(np.corrcoef((full * mask)[inside], (truth * mask)[inside])[0, 1]),
    }


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
