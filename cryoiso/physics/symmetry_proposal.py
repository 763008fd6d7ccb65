"""Which point group a map has, and where its axes are: a proposal, made without any given group.

For each fold n the rotations by 360/n degrees about all axes that best map the density onto itself are searched
(``physics.map_symmetry``). A fold is a candidate if its score exceeds what random rotations reach. The groups that
candidates can make up are then scored as a whole, each in its own frame.

A high score alone does not tell a symmetric object from one that is nearly so, and noise lowers it. Two half-maps do
tell: if the object has the operation S, the FSC of one half-map with the other one rotated by S is, in every shell,
that of the half-maps themselves. Their ratio is 1 for a true symmetry at any noise, and lower for a pseudo-symmetry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.core.rng import generator
from cryoiso.core.types import DensityMap
from cryoiso.physics import fit_search as fs
from cryoiso.physics.filters import friedel_weights, shell_index
from cryoiso.physics.fit import apply_fit
from cryoiso.physics.fit_result import Placement
from cryoiso.physics.map_symmetry import (
    BETTER,
    CLEAR,
    DOUBTFUL,
    EVEN,
    REDUCED_TO_A,
    SelfRotations,
    axis_of,
    find_frame,
    finest_A,
    is_real,
    self_rotations,
)
from cryoiso.physics.masks import sphere_mask
from cryoiso.physics.resample import place_map
from cryoiso.physics.so3 import angular_distance_deg, matrix_to_euler, random_rotations
from cryoiso.physics.symmetry import point_group

if TYPE_CHECKING:
    from jaxtyping import Float

MAX_FOLD = 12
RANDOM_ROTATIONS, NULL_QUANTILE = 200, 0.9
"""The null, and the part of it that is passed. Of random rotations a few come near one of a large group."""
ALIKE_FSC, LEAST_RATIO, NEARLY_RATIO = 0.3, 0.95, 0.65
"""Shells are compared where the half-maps' FSC is above the first; a ratio below the second is a pseudo-symmetry, and
below the third none."""
LEAST_ANGLE_DEG = 30.0
"""Of a random rotation: smaller ones leave any map nearly as it is."""
MOST_OPERATIONS = 12
"""Of a group whose curves are computed."""
Finding = Literal["has it", "nearly", "no"]


@dataclass(frozen=True)
class FoldTest:
    """Self-correlation of a map for rotations by 360/fold degrees."""

    fold: int
    score: float
    """of the best axis, refined"""
    axis: tuple[float, float, float]
    null_mean: float
    """of random rotations, each at its best shift"""
    null_high: float
    """that most of them stay below (``NULL_QUANTILE``)"""

    @property
    def stands_out(self) -> bool:
        """Whether it exceeds what random rotations reach."""
        return self.score > max(DOUBTFUL, self.null_high + BETTER)


@dataclass(frozen=True)
class GroupTest:
    """A point group in the frame where the map has it best."""

    group: str
    frame: Placement
    """takes the map to the standard frame; its score is the lowest mean of a class of operations"""
    finding: Finding
    shell_A: Float[np.ndarray, " shells"]
    self_fsc: Float[np.ndarray, " shells"]
    """mean FSC with the rotated copies: of one half-map with the other's, or of the map with its own"""
    half_fsc: Float[np.ndarray, " shells"] | None
    """of the half-maps; None for a single map"""
    ratio: float | None
    """of the two, over the shells in which the half-maps agree"""

    @property
    def order(self) -> int:
        return len(point_group(self.group))

    def facts(self) -> dict[str, Any]:
        """Plain values for a file. ``rot_tilt_psi_deg`` are RELION's angles of the rotation that is applied to the
        map's coordinates, x -> R x + d."""
        shells = [[round(float(v), 4) for v in row] for row in (self.shell_A, self.self_fsc)]
        return {
            "group": self.group, "finding": self.finding, "score": round(self.frame.score, 4),
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "rotation": self.frame.rotation.tolist(), "shift_A": self.frame.shift_A.tolist(),
            "rot_tilt_psi_deg": matrix_to_euler(self.frame.rotation)[0].round(3).tolist(),
            "axis": self.frame.rotation[2].round(5).tolist(), "shell_A": shells[0], "self_fsc": shells[1],
            "half_fsc": None if self.half_fsc is None else [round(float(v), 4) for v in self.half_fsc],
        }  # fmt: skip


@dataclass(frozen=True)
class Proposal:
    """Result of the tests."""

    group: str
    """C1 if the map has no other"""
    frame: Placement
    """takes the map to the standard frame of the group"""
    pseudo: str | None
    """a larger group that the map has only nearly"""
    resolution_A: float
    folds: tuple[FoldTest, ...]
    groups: tuple[GroupTest, ...]

    @property
    def words(self) -> str:
        """The proposal in one to three sentences."""
        if self.group == "C1":
            said = "No symmetry was recognised (C1)."
        else:
            angle = float(np.degrees(np.arccos(np.clip((np.trace(self.frame.rotation) - 1) / 2, -1, 1))))
            away = float(np.linalg.norm(self.frame.shift_A))
            where = "already in the standard frame"
            if angle > 0.5 or away > 1.0:
                where = f"{angle:.1f}° and {away:.1f} Å from the standard frame"
            said = (
                f"The map has the symmetry {self.group}, {where} (correlation with its copies {self.frame.score:.2f})."
            )
        if self.pseudo is not None:
            pseudo_group = next(g for g in self.groups if g.group == self.pseudo)
            ratio = (
                "" if pseudo_group.ratio is None else f", {pseudo_group.ratio:.2f} of what the half-maps would allow"
            )
            said += (
                f" It has {self.pseudo} only nearly (correlation {pseudo_group.frame.score:.2f}{ratio}): "
                "a pseudo-symmetry, or noise; do not impose it without a reason."
            )
        return said

    def facts(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {
            "schema": 1, "proposed": self.group, "pseudo_symmetry": self.pseudo, "words": self.words,
            "resolution_A": self.resolution_A,
            "folds": [{**vars(f), "stands_out": f.stands_out} for f in self.folds],
            "groups": [g.facts() for g in self.groups],
        }  # fmt: skip


def propose_symmetry(half1: DensityMap, half2: DensityMap | None = None, max_fold: int = MAX_FOLD) -> Proposal:
    """Test a map, or two half-maps, for Cn and Dn up to a fold, T, O and I.

    Args:
        half1: any map with the box's centre at voxel D//2; with ``half2`` one of two independent half-maps.
        half2: the other one, on the same grid.
        max_fold: largest n.

    Raises:
        InputError: an empty map.
    """
    for half_map in (half1, half2):
        if half_map is not None and not 0 < float(np.std(half_map.data)) < np.inf:
            raise InputError(
                "the map is empty: no symmetry can be looked for in it", expected="finite densities that vary",
                code="map-without-density",
            )  # fmt: skip
    maps = [fs.reduced_map(half_map, REDUCED_TO_A) for half_map in (half1, half2) if half_map is not None]
    full_map = DensityMap(np.mean([half_map.data for half_map in maps], 0), maps[0].pixel_size_A)
    finest = finest_A(full_map)
    searched: SelfRotations = {n: self_rotations(full_map, n, finest) for n in range(2, max_fold + 1)}
    folds = fold_tests(full_map, searched, finest)
    seen = {test.fold for test in folds if test.stands_out}
    groups = [test for name in _groups_of(seen) if (test := _group_test(name, full_map, maps, finest, searched))]
    has = max((g for g in groups if g.finding == "has it"), key=lambda g: (g.order, g.frame.score), default=None)
    order = 1 if has is None else has.order
    nearly = [g for g in groups if g.finding == "nearly" and g.order > order]
    near = max(nearly, key=lambda g: g.frame.score if g.ratio is None else g.ratio, default=None)
    return Proposal(
        "C1" if has is None else has.group, Placement(np.eye(3), np.zeros(3), 1.0) if has is None else has.frame,
        None if near is None else near.group, finest, folds, tuple(groups),
    )  # fmt: skip


def fold_tests(density: DensityMap, searched: SelfRotations, resolution_A: float) -> tuple[FoldTest, ...]:
    """The best axis of each fold beside random rotations."""
    pair = fs.make_pair(fs.make_body(density, resolution_A), density, resolution_A)
    random = random_rotations(generator(0, "symmetry proposal"), RANDOM_ROTATIONS)
    far = random[angular_distance_deg(random, np.eye(3)) > LEAST_ANGLE_DEG]
    null = fs.search(pair, far, fs.FULL, (False,))[False][1]
    tests = []
    for fold, candidates in searched.items():
        score, axis = (candidates[0].score, axis_of(candidates[0].rotation)) if candidates else (0.0, np.zeros(3))
        x, y, z = axis.round(5).tolist()
        high = float(np.quantile(null, NULL_QUANTILE))
        tests.append(FoldTest(fold, float(score), (x, y, z), float(null.mean()), high))
    return tuple(tests)


def _groups_of(folds: set[int]) -> list[str]:
    """Point groups whose axes are all among these folds."""
    groups = [f"C{n}" for n in sorted(folds)]
    if 2 in folds:
        groups += [f"D{n}" for n in sorted(folds)]
        groups += [name for name, needs in (("T", {3}), ("O", {3, 4}), ("I2", {3, 5})) if needs <= folds]
    return groups


def _group_test(
    name: str, full_map: DensityMap, maps: list[DensityMap], resolution_A: float, searched: SelfRotations
) -> GroupTest | None:
    """A group at its best frame; None where nothing speaks for it."""
    frame = find_frame(full_map, name, resolution_A, searched)
    if frame is None or frame.score < DOUBTFUL:
        return None
    shell_A, own, half = _curves(name, frame, maps)
    ratio = None
    if half is not None:
        alike = np.flatnonzero(half > ALIKE_FSC)
        ratio = float(own[alike].sum() / half[alike].sum()) if len(alike) else 0.0
    if ratio is None:
        has, near = frame.score >= CLEAR, frame.score >= EVEN
    else:
        has, near = ratio >= LEAST_RATIO, ratio >= NEARLY_RATIO
    has = has and is_real(full_map, frame, name, 0.0)
    finding: Finding = "has it" if has else "nearly" if near else "no"
    return GroupTest(name, frame, finding, shell_A, own, half, ratio)


def _curves(name: str, frame: Placement, maps: list[DensityMap]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Resolutions of the shells, mean FSC with the rotated copies, and FSC of the half-maps."""
    laid = [apply_fit(half_map, frame) for half_map in maps]
    box, pixel = laid[0].box_px, laid[0].pixel_size_A
    mask = np.asarray(sphere_mask(box, 0.4 * box, 0.08 * box))
    first = np.fft.rfftn(laid[0].data * mask)
    ops = point_group(name)[1:]
    ops = ops[:: max(1, len(ops) // MOST_OPERATIONS)]
    copies = [np.fft.rfftn(place_map(laid[-1].data, pixel, op, np.zeros(3)) * mask) for op in ops]
    shell = np.arange(1, box // 2)
    own = np.mean([_fsc(first, copy, box) for copy in copies], 0)[shell]
    half = _fsc(first, np.fft.rfftn(laid[1].data * mask), box)[shell] if len(laid) > 1 else None
    return box * pixel / shell, own, half


def _fsc(first: np.ndarray, second: np.ndarray, box_px: int) -> np.ndarray:
    """(D//2+1,) correlation of two transforms (D, D, D//2+1) shell by shell."""
    shell = np.minimum(shell_index(box_px, 3).numpy().ravel(), box_px // 2 + 1)
    weight = friedel_weights(box_px).expand(first.shape).numpy().ravel()

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell, weight * values.ravel(), box_px // 2 + 2)[: box_px // 2 + 1]

    norm = sums(np.abs(first) ** 2) * sums(np.abs(second) ** 2)
    curve: np.ndarray = sums((first.conj() * second).real) / np.sqrt(np.maximum(norm, 1e-30))
    return curve
