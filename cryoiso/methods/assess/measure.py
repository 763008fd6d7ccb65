"""What is measured of a finished run, as one dictionary that goes to a JSON file and from there into the report.

Keys of `diagnose` (lists are curves; a number that could not be had is null, a part that was not asked for is absent):
    schema, box_px, pixel_size_A, symmetry, particles, half_counts, notes
    frequency_invA, fsc_unmasked, fsc_masked, fsc_randomised, fsc_corrected: one value a shell
    data_to_A: the resolution beyond which the half-maps hold nothing; null: they reach the last shell
    randomise_from_shell, resolution_0143_A, resolution_05_A (of fsc_corrected), resolution_0143_masked_A,
    resolution_0143_unmasked_A
    views: cells_per_ring; estimated and true: n, entropy, top_fraction, peak_over_mean, empty_fraction, counts
    posterior: max_probability and entropy_nats, each: mean, edges, counts
    directional and sampling: see `cryoiso.methods.assess.directional`
    verdict: verdict, sentence, evidence, advice: see `cryoiso.methods.assess.verdict.Verdict.as_dict`
    pose_errors: see `cryoiso.metrics.pose_error.PoseErrors.summary`; histogram: edges_deg, all, top, side
    map_to_truth and true_poses: fsc, axial, equatorial, resolution_05_A, axial_A, equatorial_A, correlation,
    frame_rotation, frame_shift_A
Added by `pipeline.stages.map_numbers`:
    emdb_flags: list of name, value, threshold, raised, says (`cryoiso.methods.assess.emdb_flags`)
    local_resolution: window_A, threshold, coarsest_A, percentiles_A (5, 25, 50, 75, 95, inside the mask),
    share_at_coarsest; frequency_invA and least_fsc of each band
    model: see `cryoiso.methods.assess.model_map`
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.records import DiagnoseRecord
from cryoiso.core.types import Particles
from cryoiso.methods.assess import verdict
from cryoiso.methods.assess.directional import directional, sampling
from cryoiso.metrics.fsc_curve import fsc_corrected, resolution_at, shell_frequencies
from cryoiso.metrics.half_maps import check_half_maps
from cryoiso.metrics.mapmodel import Axis, best_slide, compare_maps, correlation, to_frame, truth_mask
from cryoiso.metrics.orientation import view_distribution
from cryoiso.metrics.pose_error import PoseErrors, pose_errors, symmetry_operations
from cryoiso.parallel import signals
from cryoiso.physics.filters import lowpass
from cryoiso.physics.masks import density_threshold

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger("cryoiso")
ERROR_EDGES_DEG = np.concatenate([[0.0], np.geomspace(0.25, 180, 39)])


def diagnose(
    half1: Float[np.ndarray, "box box box"],
    half2: Float[np.ndarray, "box box box"],
    mask: Float[np.ndarray, "box box box"] | None,
    pixel_size_A: float,
    particles: Particles | None,
    symmetry: str = "C1",
    *,
    truth_particles: Particles | None = None,
    truth_map: Float[np.ndarray, "box box box"] | None = None,
    truth_pose_map: Float[np.ndarray, "box box box"] | None = None,
    seed: int = 0,
) -> DiagnoseRecord:
    """Measures half-maps and poses, against the truth where it is known.

    Args:
        half1, half2: (D, D, D) half-maps, neither masked nor filtered. mask: (D, D, D) solvent mask.
        particles: with the estimated poses.
        truth_particles: the same particles (matched by uid) with their true poses.
        truth_map: the true map on the same grid.
        truth_pose_map: what the same images give with the true poses.
        seed: of the phase randomisation.

    Raises:
        InputError: these are no two half-maps (`cryoiso.metrics.half_maps`).
    """
    box_px = int(np.shape(half1)[0])
    result: dict[str, Any] = {"schema": 1, "box_px": box_px, "pixel_size_A": pixel_size_A, "symmetry": symmetry}
    notes = [f"{words[0].upper()}{words[1:]}." for words in check_half_maps(half1, half2)]
    if mask is not None and (words := _left_out(half1, half2, mask, pixel_size_A)):
        logger.warning("%s", words)
        notes.append(f"{words[0].upper()}{words[1:]}")
    result.update(_half_map_curves(half1, half2, mask, pixel_size_A, seed))
    if result["data_to_A"] is not None:
        notes.append(
            f"The half-maps hold nothing beyond {result['data_to_A']:.2f} Å (low-passed or padded?); no resolution is "
            "claimed there."
        )
    rotation = None if particles is None or not len(particles) else particles.rotation
    signals.heed()
    result["directional"], _ = directional(half1, half2, mask, pixel_size_A, rotation, symmetry, seed=seed)
    errors = None
    if particles is not None:
        half = particles.half if particles.half is not None else np.zeros(len(particles))
        result["particles"] = len(particles)
        result["half_counts"] = [int(np.sum(half == h)) for h in (1, 2)]
        result["posterior"] = _posterior(particles)
        signals.heed()
        errors = _errors(particles, truth_particles, symmetry, notes) if truth_particles is not None else None
        signals.heed()
        result["views"] = _views(particles, errors, symmetry)
        result["sampling"] = _sampling(rotation, errors, symmetry)
    if errors is not None:
        result["pose_errors"] = {**errors.summary(), "histogram": _error_histogram(errors)}
    signals.heed()
    if truth_map is not None:
        full = (np.asarray(half1, np.float32) + half2) / 2
        result["map_to_truth"] = _against_truth(full, truth_map, pixel_size_A, symmetry, errors)
        if truth_pose_map is not None:
            result["true_poses"] = compare_maps(
                truth_pose_map, truth_map, pixel_size_A, truth_mask(truth_map, pixel_size_A)
            )
    result["verdict"] = verdict.judge(result).as_dict()
    if "unmasked" in result["directional"]:
        logger.warning("the mask makes much of the half-maps' agreement; the verdict is on the maps without it")
    record: DiagnoseRecord = plain({**result, "notes": notes})
    return record


LEFT_OUT = 0.3
"""Share of the particle's density outside the mask that is said."""


def _left_out(half1: np.ndarray, half2: np.ndarray, mask: np.ndarray, pixel_size_A: float) -> str:
    """In words, if much of the density that stands out of the solvent is not in the mask."""
    full = (np.asarray(half1, np.float32) + half2) / 2
    smooth = lowpass(full, pixel_size_A, max(15.0, 2 * pixel_size_A))
    above = np.clip(smooth - density_threshold(smooth), 0, None)
    share = float((above * (np.asarray(mask) < 0.5)).sum() / max(float(above.sum()), 1e-30))
    if share < LEFT_OUT:
        return ""
    return f"the mask leaves out {100 * share:.0f} % of the density that stands out from the solvent; is a part meant?"


def plain(value: Any) -> Any:
    """The same with lists for arrays, plain numbers for numpy's and None for NaN and infinity: what JSON can hold."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return round(value, 9) if math.isfinite(value) else None
    return value


def _half_map_curves(
    half1: np.ndarray, half2: np.ndarray, mask: np.ndarray | None, pixel_size_A: float, seed: int
) -> dict[str, Any]:
    box_px = int(np.shape(half1)[0])
    curves = fsc_corrected(half1, half2, mask, seed)
    start, last = curves.pop("randomise_from_shell"), curves.pop("last_shell")
    finest_A = box_px * pixel_size_A / max(last, 1)

    def resolution(name: str, threshold: float) -> float:
        reached_A: float = max(resolution_at(curves[name], threshold, box_px, pixel_size_A), finest_A)
        return reached_A

    return {
        "frequency_invA": shell_frequencies(box_px, pixel_size_A),
        **{f"fsc_{name}": curve for name, curve in curves.items()},
        "randomise_from_shell": start,
        "data_to_A": finest_A if last < box_px // 2 else None,
        "resolution_0143_A": resolution("corrected", 0.143),
        "resolution_05_A": resolution("corrected", 0.5),
        "resolution_0143_masked_A": resolution("masked", 0.143),
        "resolution_0143_unmasked_A": resolution("unmasked", 0.143),
    }


def _posterior(particles: Particles) -> dict[str, Any]:
    """Histograms of the probability of the best pose and of the entropy over poses, where the refinement wrote them."""
    result = {}
    for key, column in (("max_probability", "rlnMaxValueProbDistribution"), ("entropy_nats", "cryoisoPoseEntropy")):
        values = particles.results.get(column)
        if values is None and particles.table is not None and column in particles.table:
            values = particles.table[column]
        if values is None:
            continue
        values = np.asarray(values, np.float64)
        values = values[np.isfinite(values)]
        if len(values) == 0:
            continue
        top = 1.0 if key == "max_probability" else max(float(values.max()), 1e-3)
        counts, edges = np.histogram(values, bins=40, range=(0, top))
        result[key] = {"mean": values.mean(), "edges": edges, "counts": counts}
    return result


def _errors(particles: Particles, truth: Particles, symmetry: str, notes: list[str]) -> PoseErrors | None:
    if particles.rotation is None or truth.rotation is None:
        notes.append("No pose errors: the particles or their truth have no poses.")
        return None
    _, rows, theirs = np.intersect1d(particles.uid, truth.uid, return_indices=True)
    if len(rows) == 0:
        notes.append("No pose errors: no particle of the refinement is found in the truth (image names differ).")
        return None
    if len(rows) < len(particles):
        notes.append(f"Pose errors are of {len(rows)} particles; {len(particles) - len(rows)} are not in the truth.")
    return pose_errors(
        particles.rotation[rows],
        truth.rotation[theirs],
        symmetry,
        align="axis",
        shift_estimated_A=None if particles.shift_A is None else particles.shift_A[rows],
        shift_true_A=None if truth.shift_A is None else truth.shift_A[theirs],
    )


def _error_histogram(errors: PoseErrors) -> dict[str, Any]:
    top = np.abs(errors.true[:, 2, 2]) > np.cos(np.radians(36))
    kinds = {"all": np.ones_like(top), "top": top, "side": ~top}
    counts = {k: np.histogram(errors.errors_deg[rows], ERROR_EDGES_DEG)[0] for k, rows in kinds.items()}
    return {"edges_deg": ERROR_EDGES_DEG, **counts}


def _views(particles: Particles, errors: PoseErrors | None, symmetry: str) -> dict[str, Any]:
    """Estimated views, laid on the frame of the truth where that is known, on the same cells as the true ones."""
    rotations: dict[str, np.ndarray] = {}
    if errors is not None:
        rotations = {"estimated": errors.estimated, "true": errors.true}
    elif particles.rotation is not None and len(particles):
        rotations = {"estimated": particles.rotation}
    result: dict[str, Any] = {}
    for name, rotation in rotations.items():
        views = view_distribution(rotation, symmetry)
        result["cells_per_ring"] = views.grid.cells
        result[name] = {**views.summary(), "counts": views.counts}
    return result


def _sampling(rotation: np.ndarray | None, errors: PoseErrors | None, symmetry: str) -> dict[str, Any]:
    kinds = {"estimated": rotation, "true": None if errors is None else errors.true}
    return {name: sampling(poses, symmetry) for name, poses in kinds.items() if poses is not None}


def _against_truth(
    full: np.ndarray, truth: np.ndarray, pixel_size_A: float, symmetry: str, errors: PoseErrors | None
) -> dict[str, Any]:
    """The map against the true one, in the frame that fits best: as it is, slid, or as the poses say it has moved."""
    mask = truth_mask(truth, pixel_size_A)
    best: tuple[float, np.ndarray, np.ndarray, np.ndarray] | None = None
    for rotation, shift_A in _frames(full, truth, pixel_size_A, symmetry, errors):
        moved = to_frame(full, rotation, shift_A, pixel_size_A)
        score = correlation(moved, truth, mask)
        if best is None or score > best[0] + 1e-4:
            best = (score, rotation, shift_A, moved)
    assert best is not None  # the first frame, the map as it is, always counts
    numbers = compare_maps(best[3], truth, pixel_size_A, mask)
    return {**numbers, "frame_rotation": best[1], "frame_shift_A": best[2]}


def _frames(
    full: np.ndarray, truth: np.ndarray, pixel_size_A: float, symmetry: str, errors: PoseErrors | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Candidate frame changes (G, d): an asymmetric map may have moved anywhere, one of Cn along and about its axis."""
    identity, still = np.eye(3), np.zeros(3)
    yield identity, still
    ops = symmetry_operations(symmetry)
    axis: Axis | None = None if len(ops) == 1 else (0.0, 0.0, 1.0)
    free = len(ops) == 1 or bool(np.allclose(ops[:, 2, 2], 1, atol=1e-6))
    if free and (slide := best_slide(full, truth, axis)).any():
        yield identity, slide * pixel_size_A
    if errors is not None and not np.allclose(errors.frame_rotation, identity, atol=np.radians(0.1)):
        yield errors.frame_rotation, errors.frame_shift_A
    elif errors is not None and np.linalg.norm(errors.frame_shift_A) > 0.1 * pixel_size_A:
        yield identity, errors.frame_shift_A
