"""Rigid alignment of a map to another: position, uncertainty and hand.

Coordinates are (x, y, z) in Å from voxel D//2. A placement takes a point x of the moving map to R x + d of the target;
its mirror image takes it to R (-x) + d (the inversion through the centre is a mirror image that preserves the symmetry
axes). In terms of ``metrics.mapmodel.to_frame``, the fitted map is to_frame(moving, R^T, -R^T d).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.physics import fit_search as fs
from cryoiso.physics.fit_result import Fit, Hand, Placement
from cryoiso.physics.resample import place_map
from cryoiso.physics.so3 import angular_distance_deg, grid_step_deg, so3_grid
from cryoiso.physics.symmetry import normalise_name, point_group

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

COARSE_CANDIDATES, FINE_CANDIDATES = 40, 8
"""Placements that are refined at the coarse and at the fine resolution, per hand."""
SURE = 3.0
"""Two scores differ clearly if they are this many standard errors apart, ..."""
WORTH = 0.01
"""... and by this much: smaller differences of correlations are irrelevant."""
SYMMETRIC = 0.6
"""Correlation of a map with its own copy, rotated by the point group, above which it counts as symmetric."""
NEAR_DEG, NEAR = 0.2, 0.05
"""A map whose axes are this close (degrees; shift in resolutions) to the standard frame is not moved."""
AXIS_STEP_DEG = 5.0


def fit_into(
    moving: DensityMap,
    target: DensityMap,
    *,
    resolution_A: float,
    symmetry: str = "C1",
    mirror: bool = True,
    order: int = 2,
) -> Fit:
    """Find the rotation and shift that align a map to another one.

    Every rotation of a grid over SO(3) (15 degrees apart at order 2) is combined with every shift, at a resolution
    coarse enough for the grid (the step times the particle's radius); the best distinct placements are refined there,
    the best of those at ``resolution_A``. With a symmetry, a moving map that has it is then placed with its axes
    exactly on the target's (Cn: only spin about z, slide along z and flip remain free).

    Args:
        moving: any grid.
        target: any grid; with a symmetry, in its standard frame (``physics.symmetry.point_group``).
        resolution_A: finest information used, at least two pixels of either map.
        symmetry: point group of the target.
        mirror: also try the mirror image. The fit returned is never mirrored.
        order: of the search grid; 3 halves the step and takes more than eight times as long.

    Raises:
        InputError: unknown group, a map that is empty or too coarse.
    """
    group = normalise_name(symmetry)
    hands = (False, True) if mirror else (False,)
    task = _Task(target, float(resolution_A), point_group(group), hands)
    # R and S R are one placement in a target of symmetry S, so the grid is taken modulo S from the left
    free = task.run(moving, np.swapaxes(so3_grid(order, group), 1, 2), fs.FULL, grid_step_deg(order))
    if group == "C1":
        return task.judge(moving, free, group, None)
    base = own_frame(moving, group, resolution_A)
    if base is not None and _is_small(base, resolution_A):
        base = Placement(np.eye(3), np.zeros(3), 1.0)  # it is there already, to within what can be measured
    if base is None:
        laid = apply_fit(moving, free[False][0], target.box_px, target.pixel_size_A)
        base = own_frame(laid, group, resolution_A)
        base = base and base.after(free[False][0])
    if base is None:
        return task.judge(moving, free, group, None)
    return task.judge(moving, _about_axes(task, moving, base, group), group, free[False][0])


def fit_about_axis(
    moving: DensityMap,
    target: DensityMap,
    *,
    resolution_A: float,
    symmetry: str,
    mirror: bool = True,
) -> Fit:
    """Align a map whose symmetry axes already coincide with the target's: for Cn only spin, slide along z and flip are
    free.

    The other groups have no continuous freedom, and the few rotations that map the axes onto one another are tried.

    Args:
        moving, target: both in the standard frame of the group.
        resolution_A, mirror: as for :func:`fit_into`.
        symmetry: Cn with n > 1, Dn, T, O, I.

    Raises:
        InputError: unknown group, a map that is empty or too coarse.
    """
    group = normalise_name(symmetry)
    if group == "C1":
        return fit_into(moving, target, resolution_A=resolution_A, mirror=mirror)
    task = _Task(target, float(resolution_A), point_group(group), (False, True) if mirror else (False,))
    by_handedness = _about_axes(task, moving, Placement(np.eye(3), np.zeros(3), 0.0), group)
    return replace(task.judge(moving, by_handedness, group, None), on_axes=True)


def apply_fit(
    moving: DensityMap, fit: Fit | Placement, box_px: int | None = None, pixel_size_A: float | None = None
) -> DensityMap:
    """The moving map in the target's frame.

    Args:
        moving: the map that was fitted.
        fit: the result of :func:`fit_into`, or one of its placements.
        box_px, pixel_size_A: grid of the result, by default the moving map's.

    Returns:
        DensityMap, interpolated by ``physics.resample.place_map``, which states the error.
    """
    placement = fit.best if isinstance(fit, Fit) else fit
    data = inverted(moving.data) if placement.mirrored else moving.data
    pixel = pixel_size_A or moving.pixel_size_A
    box = box_px or moving.box_px
    return DensityMap(place_map(data, moving.pixel_size_A, placement.rotation, placement.shift_A, box, pixel), pixel)


def inverted(data: Shaped[np.ndarray, "box box box"]) -> Shaped[np.ndarray, "box box box"]:
    """The mirror image through the centre voxel D//2: out(x) = map(-x). In even boxes the edge at -D/2 is unchanged."""
    flipped = data[::-1, ::-1, ::-1]
    return np.ascontiguousarray(flipped if len(data) % 2 else np.roll(flipped, 1, (0, 1, 2)))


@dataclass(frozen=True)
class _Task:
    """Data shared by all searches of one fit."""

    target: DensityMap
    resolution_A: float
    ops: np.ndarray
    hands: tuple[bool, ...]
    pairs: dict[tuple[int, float, str], fs.Pair] = field(default_factory=dict)

    def pair(self, moving: DensityMap, resolution_A: float, hold: str = fs.FULL) -> fs.Pair:
        key = (id(moving), resolution_A, hold)
        if key not in self.pairs:
            body = fs.make_body(moving, resolution_A, hold=hold)
            self.pairs[key] = fs.make_pair(body, self.target, resolution_A)
        return self.pairs[key]

    def run(
        self, moving: DensityMap, rotation: np.ndarray, allowed: str, step_deg: float
    ) -> dict[bool, list[Placement]]:
        """The distinct optima of each hand from a grid of rotations, best first."""
        fine = self.pair(moving, self.resolution_A, allowed)
        coarse_A = max(self.resolution_A, math.radians(max(step_deg, AXIS_STEP_DEG * 2)) * fine.body.radius_A)
        coarse = self.pair(moving, coarse_A, allowed) if coarse_A > 1.05 * self.resolution_A else fine
        searched = fs.search(coarse, rotation, allowed, self.hands)
        placements = {}
        for hand in self.hands:
            shift, score = searched[hand]
            rows = self._distinct(rotation, shift, score, COARSE_CANDIDATES, step_deg, coarse_A)
            r, u, score = fs.refine(coarse, rotation[rows], shift[rows], hand, allowed, 8)
            rows = self._distinct(r, u, score, FINE_CANDIDATES, 0.5 * step_deg, 0.5 * coarse_A)
            u = u[rows] - _middle(coarse, r[rows], hand) + _middle(fine, r[rows], hand)
            r, u, score = fs.refine(fine, r[rows], u, hand, allowed, 15)
            rows = self._distinct(r, u, score, FINE_CANDIDATES, 0.5 * step_deg, self.resolution_A)
            d = u - _middle(fine, r, hand)
            placements[hand] = [Placement(r[i], d[i], float(score[i]), hand) for i in rows]
        return placements

    def _distinct(
        self, rotation: np.ndarray, shift_A: np.ndarray, score: np.ndarray, count: int, deg: float, near_A: float
    ) -> np.ndarray:
        """Rows of the best placements that differ by more than an angle or a distance, modulo the symmetry."""
        chosen: list[int] = []
        for row in np.argsort(-score, kind="stable")[: 50 * count]:
            for other in chosen:
                copies = self.ops @ rotation[other]
                angle = angular_distance_deg(copies, rotation[row])
                away = np.linalg.norm(self.ops @ shift_A[other] - shift_A[row], axis=1)
                if np.any((angle < deg) & (away < near_A)):
                    break
            else:
                chosen.append(int(row))
            if len(chosen) == count:
                break
        return np.array(chosen, int)

    def least_turned(self, placement: Placement) -> Placement:
        """Among equivalent placements the one with the smallest rotation, so that an aligned map is not moved."""
        turns = self.ops @ placement.rotation
        nearest = int(np.argmax(np.round(np.einsum("gii->g", turns), 9)))
        return replace(placement, rotation=turns[nearest], shift_A=self.ops[nearest] @ placement.shift_A)

    def judge(
        self, moving: DensityMap, placements: dict[bool, list[Placement]], group: str, free: Placement | None
    ) -> Fit:
        """Compare the best placements with their errors."""
        best, *others = (self.least_turned(p) for p in placements[False])
        mirror = self.least_turned(placements[True][0]) if placements.get(True) else None
        runner_up = others[0] if others else None
        pair = self.pair(moving, self.resolution_A)
        hand: Hand = "not tried"
        error_mirror = error_runner_up = float("nan")
        if mirror is not None:
            gap, error_mirror = self._difference(pair, best, mirror)
            sure = abs(gap) > max(SURE * error_mirror, WORTH)
            hand = "undecided" if not sure else "same" if gap > 0 else "mirrored"
        ambiguous = False
        if runner_up is not None:
            gap, error_runner_up = self._difference(pair, best, runner_up)
            ambiguous = gap < max(SURE * error_runner_up, WORTH)
        return Fit(
            best, mirror, runner_up, (best, *others), free, hand, ambiguous, free is not None, group,
            self.resolution_A, error_mirror, error_runner_up,
        )  # fmt: skip

    def _difference(self, pair: fs.Pair, a: Placement, b: Placement) -> tuple[float, float]:
        """Difference of two scores and its standard error.

        The terms of the scores are summed in cubes of Fourier space about as wide as the correlation length of the
        particle's transform, so that the sums are independent except for the symmetry; the error is that of a sum of
        independent terms of unknown mean, times the square root of the order of the group.
        """
        terms = []
        for p in (a, b):
            shift = p.shift_A + _middle(pair, p.rotation[None], p.mirrored)[0]
            terms.append(pair.agreement(p.rotation[None], shift[None], p.mirrored)[0])
        width = max(2, math.ceil(pair.side_A / (2 * pair.body.radius_A) * 1.5))
        cube = np.floor(pair.index / width).astype(int)
        _, block = np.unique(cube, axis=0, return_inverse=True)
        sums = np.bincount(block.ravel(), weights=terms[0] - terms[1])
        error = math.sqrt(len(self.ops) * len(sums)) * float(sums.std(ddof=1)) if len(sums) > 1 else float("inf")
        return float(sums.sum()), error


def _middle(pair: fs.Pair, rotation: np.ndarray, mirrored: bool) -> np.ndarray:
    """(n, 3): position of the body's centre after rotations about the moving map's centre."""
    centre_A: np.ndarray = (-1 if mirrored else 1) * rotation @ pair.body.centre_A
    return centre_A


def _about_axes(task: _Task, moving: DensityMap, base: Placement, group: str) -> dict[bool, list[Placement]]:
    """Placements that keep the axes, of a map that ``base`` puts into the standard frame."""
    still = np.allclose(base.rotation, np.eye(3)) and not np.any(base.shift_A)
    laid = moving if still else apply_fit(moving, base, task.target.box_px, task.target.pixel_size_A)
    rotation = _normaliser(group)
    allowed = fs.AXIS if group[0] == "C" else fs.FIXED
    candidates = task.run(laid, rotation, allowed, AXIS_STEP_DEG)
    return {hand: [p.after(base) for p in placements] for hand, placements in candidates.items()}


def _normaliser(group: str) -> np.ndarray:
    """Rotations that map a group's axes onto themselves, modulo the group; for Cn a grid of spins, and flips."""
    from cryoiso.physics.so3 import rotvec_to_matrix

    def about(axis: Any, deg: float) -> np.ndarray:
        rotation: np.ndarray = rotvec_to_matrix(np.radians(deg) * np.asarray(axis, np.float64))[0]
        return rotation

    fold = int(group[1:]) if group[0] in "CD" else 0
    if group[0] == "C":
        spins = np.arange(math.ceil(360 / fold / AXIS_STEP_DEG)) * AXIS_STEP_DEG
        return np.stack([about((0, 0, 1), s) @ f for f in (np.eye(3), np.diag([1.0, -1.0, -1.0])) for s in spins])
    if group == "D2":
        return np.stack([about((0, 0, 1), s) @ about(np.ones(3) / 3**0.5, t) for s in (0, 90) for t in (0, 120, 240)])
    if group[0] == "D":
        return np.stack([np.eye(3), about((0, 0, 1), 180 / fold)])
    if group == "T":
        return np.stack([np.eye(3), about((0, (2 / 3) ** 0.5, 3**-0.5), 90)])
    return np.eye(3)[None]


def _is_small(placement: Placement, resolution_A: float) -> bool:
    angle = float(angular_distance_deg(placement.rotation, np.eye(3))[0])
    return angle < NEAR_DEG and float(np.linalg.norm(placement.shift_A)) < NEAR * resolution_A


def rotation_search(
    density: DensityMap, rotation: Float[np.ndarray, "n 3 3"], resolution_A: float, step_deg: float
) -> list[Placement]:
    """The best distinct placements of a map on itself from a grid of rotations, best first.

    Args:
        density: any map.
        rotation: (n, 3, 3) the grid; every shift is tried with each.
        resolution_A: finest information used.
        step_deg: of the grid; candidates are selected at a coarser resolution if the grid requires it.

    Raises:
        InputError: a map that is empty or too coarse.
    """
    task = _Task(density, resolution_A, np.eye(3)[None], (False,))
    return task.run(density, rotation, fs.FULL, step_deg)[False]


def own_frame(density: DensityMap, group: str, resolution_A: float, least: float = SYMMETRIC) -> Placement | None:
    """The small rotation and shift that bring a map's own symmetry axes into the standard frame.

    The map is aligned to itself, starting from each operation of the group: the resulting rotations have the map's own
    axes. None if the map does not have the symmetry nearby: a score below ``least``, or axes more than 20 degrees away.
    """
    from scipy.spatial.transform import Rotation

    ops = point_group(group)[1:]
    ops = ops[:: max(1, len(ops) // 12)]
    finest = max(resolution_A, 2 * density.pixel_size_A)
    pair = fs.make_pair(fs.make_body(density, finest, hold=fs.FIXED), density, finest)
    turn, shift, score = fs.refine(pair, ops, np.zeros((len(ops), 3)), False)
    if score.min() < least or float(angular_distance_deg(turn, ops).max()) > 20:
        return None
    wanted, own = (Rotation.from_matrix(r).as_rotvec() for r in (ops, turn))
    own *= np.sign((own * wanted).sum(1))[:, None]
    own, wanted = (v / np.linalg.norm(v, axis=1)[:, None] for v in (own, wanted))
    if group[0] == "C":  # one axis, along which some rotate one way and some the other
        own, wanted = (own * np.sign(wanted[:, 2:])).mean(0, keepdims=True), np.array([[0.0, 0.0, 1.0]])
    frame = Rotation.align_vectors(wanted, own)[0].as_matrix()
    # the point that the operations leave where it is: (1 - R) p = u; along the axis of Cn it stays undetermined
    point = np.linalg.lstsq((np.eye(3) - turn).reshape(-1, 3), shift.ravel(), rcond=0.05)[0]
    return Placement(frame, -frame @ point, 1.0)
