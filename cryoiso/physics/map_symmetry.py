"""Test whether a map has a point group in its standard frame, and find its axes otherwise.

A map V has the operation S of a group if V(S x) = V(x). The score of an operation is the normalised correlation of the
map with its rotated copy, both with flattened spectra up to a resolution (``physics.fit_search``). Measured at 20 Å on
13 maps and models of C3, C4, C6, C7, D2, D3, D7 and O: 0.92 to 1.00 in the right frame, 0.46 to 0.88 with axes tilted
by 5 degrees, under 0.30 by 25 degrees (apoferritin, nearly a sphere: 0.49), under 0.15 with a shift of 7 Å off the
axis, and under 0.55 for groups that the object does not have. Noise lowers the score of a right map as well, but then
no other frame scores better, and rotations outside the group score worse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from cryoiso.core.types import DensityMap
from cryoiso.physics import fit_search as fs
from cryoiso.physics.filters import shell_index
from cryoiso.physics.fit import apply_fit, own_frame, rotation_search
from cryoiso.physics.fit_result import Placement
from cryoiso.physics.so3 import angular_distance_deg, fibonacci_sphere, rotvec_to_matrix
from cryoiso.physics.symmetry import cryosparc_turn, generators, normalise_name, point_group

CHECKED_AT_A = (20.0, 30.0)
"""Resolutions of the check; the second is used if noise hides the symmetry at the first."""
CLEAR = 0.85
"""Score above which a map has the group, without further search."""
BETTER = 0.15
"""A frame that scores higher by this than the standard one is the true frame."""
SEEN, CONTRAST, EVEN = 0.3, 0.1, 0.75
"""A noisy map still has the group if its score is this high, this much above that of other spins about the axis, and
this fraction of the best class's: noise hides all operations alike."""
FOUND, DOUBTFUL = 0.6, 0.42
"""Another frame with at least the first score is accepted without that further test; below the second it is always
rejected, because asymmetric objects have such axes."""
ALIKE = 0.03
"""Frames whose scores differ by less are equally good; the one with the smallest rotation is taken."""
AXIS_STEP_DEG = 10.0
NOTHING = 1e-8
"""Share of the strongest shell's mean power below which a shell holds rounding errors (low-passed and padded maps)."""
REDUCED_TO_A = 8.0
"""Nothing finer than this is used: large boxes are reduced to it first."""
Verdict = Literal["has it", "noisy", "elsewhere", "none"]


@dataclass(frozen=True)
class MapSymmetry:
    """Result of the symmetry test."""

    group: str
    verdict: Verdict
    score: float
    """lowest mean score of a class of operations (those of equal angle) in the standard frame"""
    resolution_A: float
    frame: Placement | None = None
    """if the axes are elsewhere: the placement that brings the map into the standard frame, with its score"""
    cryosparc: bool = False
    """the map is in cryoSPARC's frame, with a two-fold axis of Dn on y"""

    @property
    def tilt_deg(self) -> float:
        """Angle between the map's main axis and z."""
        cosine = 1.0 if self.frame is None else float(self.frame.rotation[2, 2])
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    @property
    def turned_deg(self) -> float:
        """Angle of the rotation that brings the map into the standard frame."""
        return 0.0 if self.frame is None else _angle_deg(self.frame)

    @property
    def offset_A(self) -> float:
        """Distance of the box centre from the axis (Cn), or from the point where all axes meet."""
        return 0.0 if self.frame is None else float(np.linalg.norm(self.frame.shift_A))


def symmetry_score(density: DensityMap, group: str, resolution_A: float) -> float:
    """Lowest mean score of the classes of operations of equal angle, in the standard frame.

    Args:
        density: any map.
        group: point group; C1 gives 1.
        resolution_A: finest information used; at least 2.5 pixels.

    Raises:
        InputError: unknown group, an empty map.
    """
    return _score(_self_pair(density, resolution_A), point_group(group)[1:])


def map_symmetry(density: DensityMap, group: str, lowpass_A: float = 0.0) -> MapSymmetry:
    """Test whether a map has a point group in the standard frame, and find its axes if not.

    Args:
        density: any map with the box's centre at voxel D//2.
        group: point group.
        lowpass_A: resolution at which the map will be used; if coarser than 20 Å, nothing finer is used.

    Raises:
        InputError: unknown group, an empty map.
    """
    name = normalise_name(group)
    if name == "C1":
        return MapSymmetry(name, "has it", 1.0, max(CHECKED_AT_A[0], 2.5 * density.pixel_size_A))
    ops = point_group(name)[1:]
    density = fs.reduced_map(density, REDUCED_TO_A)
    finest = finest_A(density)
    score = _score(_self_pair(density, finest), ops)
    if score >= CLEAR:
        return MapSymmetry(name, "has it", score, finest)
    frame = find_frame(density, name, finest)
    if frame is not None and frame.score > score + BETTER and is_real(density, frame, name, lowpass_A):
        turn = cryosparc_turn(name)
        theirs = turn is not None and _score(_self_pair(density, finest), turn.T @ ops @ turn) > score + BETTER
        return MapSymmetry(name, "elsewhere", score, finest, frame, theirs)
    noisy = _seen_through_noise(density, name, lowpass_A)
    if noisy is not None:
        return MapSymmetry(name, "noisy", *noisy)
    return MapSymmetry(name, "none", score, finest)


def filled_to_A(density: DensityMap) -> float:
    """Resolution of the last shell in which a map contains more than rounding errors, which flattened spectra would
    weight like the density."""
    box_px = density.box_px
    power = torch.fft.rfftn(torch.from_numpy(np.ascontiguousarray(density.data, np.float32))).abs().square()
    shell = shell_index(box_px, 3).numpy().ravel()
    sums = np.bincount(shell, power.numpy().ravel().astype(np.float64))[: box_px // 2 + 1]
    mean = sums / np.maximum(np.bincount(shell)[: box_px // 2 + 1], 1)
    filled = np.flatnonzero(mean[1:] > NOTHING * mean[1:].max()) + 1
    return box_px * density.pixel_size_A / max(int(filled[-1]) if len(filled) else 1, 3)


def finest_A(density: DensityMap) -> float:
    """Resolution of the first check of a map."""
    return max(CHECKED_AT_A[0], 2.5 * density.pixel_size_A, filled_to_A(density))


def is_real(density: DensityMap, frame: Placement, name: str, lowpass_A: float) -> bool:
    """Whether a frame that was found has the group: by its score, or by what noise hides alike."""
    if frame.score >= FOUND or frame.score < DOUBTFUL:
        return frame.score >= FOUND
    return _seen_through_noise(apply_fit(density, frame), name, lowpass_A) is not None


def _seen_through_noise(density: DensityMap, name: str, lowpass_A: float) -> tuple[float, float] | None:
    """Score and resolution at which a noisy map has the group in the standard frame; None if at none."""
    ops = point_group(name)[1:]
    finest = finest_A(density)
    for resolution in sorted({finest, max(finest, *CHECKED_AT_A, lowpass_A)}):
        pair = _self_pair(density, resolution)
        classes = _class_means(pair.score(ops, np.zeros((len(ops), 3))), ops)
        least = max(SEEN, _between(pair, name) + CONTRAST, EVEN * max(classes))
        if min(classes) >= least:
            return min(classes), resolution
    return None


SelfRotations = dict[int, list[Placement]]
"""Fold -> rotations by 360/fold degrees that best map a density onto itself, about its own axes."""


def find_frame(
    density: DensityMap, group: str, resolution_A: float = CHECKED_AT_A[0], searched: SelfRotations | None = None
) -> Placement | None:
    """The placement that brings a map's own symmetry axes into the standard frame; its score is that of the placed map.

    The rotations that map the density onto itself are searched: the angle of a generator of the group, every axis,
    every shift. Axes that include the right angle form a frame; the best frame is refined against all operations.
    Undetermined parameters are unchanged: the spin and slide of Cn, and among equivalent placements the smallest
    rotation.

    Args:
        density: any map.
        group: point group other than C1.
        resolution_A: of the search.
        searched: the map's rotations of this resolution that are known already; others are added.

    Returns:
        None if no rotation of the map onto itself was found.
    """
    name = normalise_name(group)
    density = fs.reduced_map(density, REDUCED_TO_A)
    resolution_A = max(resolution_A, 2.5 * density.pixel_size_A, filled_to_A(density))
    candidates = [Placement(np.eye(3), np.zeros(3), 0.0)]
    turn = cryosparc_turn(name)
    if turn is not None:
        candidates.insert(0, Placement(turn, np.zeros(3), 0.0))
    candidates += _candidates(density, name, resolution_A, {} if searched is None else searched)
    ops = point_group(name)[1:]
    pair = _self_pair(density, resolution_A, fs.FULL)
    middle = pair.body.centre_A
    scored = []
    for candidate in candidates:
        own = candidate.rotation.T @ ops @ candidate.rotation
        point = -candidate.rotation.T @ candidate.shift_A  # of the map, that comes to the box centre
        shift = own @ middle + (np.eye(3) - own) @ point  # where own x + (1 - own) point takes the body's middle
        scored.append(replace(_least_turned(candidate, name), score=min(_class_means(pair.score(own, shift), ops))))
    highest = max(s.score for s in scored)
    if turn is not None and scored[0].score >= max(CLEAR, highest - ALIKE):
        return scored[0]  # exactly as poses from a .cs file are turned
    if highest <= 0:
        return None
    best = min((s for s in scored if s.score >= highest - ALIKE), key=_angle_deg)
    return _refined(density, name, best, resolution_A)


def _refined(density: DensityMap, name: str, start: Placement, resolution_A: float) -> Placement:
    """The frame refined on the operations of the placed map, with the finest information in which they are visible."""
    laid = apply_fit(density, start)
    fine = max(10.0, 2.5 * density.pixel_size_A)
    for resolution in dict.fromkeys((min(fine, resolution_A), resolution_A, max(resolution_A, CHECKED_AT_A[-1]))):
        small = own_frame(laid, name, resolution, least=SEEN)
        if small is not None:
            placed = _least_turned(small.after(start), name)
            after = symmetry_score(apply_fit(density, placed), name, resolution_A)
            if after >= start.score - 0.02:
                return replace(placed, score=after)
    return replace(_least_turned(start, name), score=symmetry_score(laid, name, resolution_A))


def _angle_deg(placement: Placement) -> float:
    return float(angular_distance_deg(placement.rotation, np.eye(3))[0])


def _least_turned(placement: Placement, name: str) -> Placement:
    ops = point_group(name)
    turns = ops @ placement.rotation
    nearest = int(np.argmax(np.round(np.einsum("gii->g", turns), 9)))
    return replace(placement, rotation=turns[nearest], shift_A=ops[nearest] @ placement.shift_A)


def _candidates(density: DensityMap, name: str, resolution_A: float, searched: SelfRotations) -> list[Placement]:
    """Frames compatible with the map's rotations onto itself, the best rotations first."""
    first, *others = generators(name)
    candidates = []
    for fold, _ in (first, *others[:1]):
        if fold not in searched:
            searched[fold] = self_rotations(density, fold, resolution_A)
        candidates.append(searched[fold])
    target1 = np.array(first[1], np.float64)
    frames = []
    for main in candidates[0]:
        for sign in (1.0, -1.0):
            axis = sign * axis_of(main.rotation)
            if not others:
                if axis[2] >= 0:
                    frames.append((_onto(target1, axis), [main]))
                continue
            target2 = np.array(others[0][1], np.float64)
            for second in candidates[1]:
                other = axis_of(second.rotation)
                for axis2 in (other, -other):
                    if abs(np.dot(axis, axis2) - np.dot(target1, target2)) < 0.15:
                        frames.append((_onto(np.stack([target1, target2]), np.stack([axis, axis2])), [main, second]))
    return [Placement(frame, -frame @ _fixed_point(parts), 0.0) for frame, parts in frames]


def self_rotations(density: DensityMap, fold: int, resolution_A: float) -> list[Placement]:
    """Rotations by 360/fold degrees, about any axis at any position, that best map the density onto itself, best
    first.

    Args:
        density: on a grid of at most the finest information that is used (``fit_search.reduced_map``).
    """
    count = round(4 * np.pi / np.radians(AXIS_STEP_DEG) ** 2)
    axes = fibonacci_sphere(count)
    axes = np.concatenate([np.eye(3), axes[axes[:, 2] >= 0] if fold == 2 else axes])
    angle = 2 * np.pi / fold
    scores = rotation_search(density, rotvec_to_matrix(angle * axes), resolution_A, AXIS_STEP_DEG)
    kept = []
    for placement in scores:
        along = abs(float(axis_of(placement.rotation) @ placement.shift_A))
        if (
            abs(_angle_deg(placement) - np.degrees(angle)) < 8 and along < 0.4 * resolution_A
        ):  # else another rotation, or a screw
            kept.append(placement)
    return kept


def axis_of(rotation: np.ndarray) -> np.ndarray:
    """(3,) unit vector about which a rotation (3, 3) turns."""
    from scipy.spatial.transform import Rotation

    vector = Rotation.from_matrix(rotation).as_rotvec()
    direction: np.ndarray = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return direction


def _onto(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The rotation that best takes unit vectors to others; for one vector the smallest such rotation."""
    from scipy.spatial.transform import Rotation

    if target.ndim == 2:
        aligned: np.ndarray = Rotation.align_vectors(target, source)[0].as_matrix()
        return aligned
    cross, cosine = np.cross(source, target), float(source @ target)
    angle = np.arctan2(np.linalg.norm(cross), cosine)
    if np.linalg.norm(cross) < 1e-9:
        cross = np.array([1.0, 0.0, 0.0])
    rotation: np.ndarray = rotvec_to_matrix(angle * cross / np.linalg.norm(cross))[0]
    return rotation


def _fixed_point(parts: list[Placement]) -> np.ndarray:
    """The fixed point of rotations with shifts, as near to the box centre as they allow."""
    system = np.concatenate([np.eye(3) - p.rotation for p in parts])
    shifts = np.concatenate([p.shift_A for p in parts])
    centre: np.ndarray = np.linalg.lstsq(system, shifts, rcond=0.05)[0]
    return centre


def _self_pair(density: DensityMap, resolution_A: float, hold: str = fs.FIXED) -> fs.Pair:
    resolution_A = max(resolution_A, 2.5 * density.pixel_size_A)
    return fs.make_pair(fs.make_body(density, resolution_A, hold=hold), density, resolution_A)


def _score(pair: fs.Pair, ops: np.ndarray) -> float:
    return min(_class_means(pair.score(ops, np.zeros((len(ops), 3))), ops)) if len(ops) else 1.0


def _class_means(score: np.ndarray, ops: np.ndarray) -> list[float]:
    """Mean scores of the operations of equal angle: one by one, noise would always give a low one."""
    angle = np.rint(angular_distance_deg(ops, np.eye(3)))
    return [float(score[angle == a].mean()) for a in np.unique(angle)]


def _between(pair: fs.Pair, name: str) -> float:
    """Highest score of the rotations about the main axis halfway between those of the group."""
    fold, axis = generators(name)[0]
    half = np.pi / fold * (2 * np.arange(fold) + 1)
    spins: Any = rotvec_to_matrix(half[:, None] * np.asarray(axis, np.float64))
    return float(pair.score(spins, np.zeros((fold, 3))).max())
