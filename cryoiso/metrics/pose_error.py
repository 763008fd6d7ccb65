"""Pose errors against known poses, modulo the point group and modulo the frame of the estimate.

A pose A takes map coordinates to image coordinates; A and A S are equivalent poses if S is a symmetry of the map. A
refinement may end in a frame of its own, y = G x + d (x true, y estimated coordinates of one point). Then
    A_true = A_est G S    and    origin_est = origin_true + (A_est d)_xy,
because a point is projected to (A x)_xy - origin. G and d are fitted robustly: most particles may be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

_TRUNCATE_DEG = 30.0

OPPOSITE_DEG = 150.0
"""A view direction that is wrong by more than this is assigned to the opposite end of the axis."""


@dataclass(frozen=True)
class PoseErrors:
    """Errors of n poses. Angles in degrees, lengths in Å."""

    errors_deg: Float[np.ndarray, " n"]
    """(n,) angle of the rotation between estimated and true pose, modulo symmetry."""
    direction_errors_deg: Float[np.ndarray, " n"]
    """(n,) angle between the viewing directions (the swing part of that rotation)."""
    inplane_errors_deg: Float[np.ndarray, " n"]
    """(n,) rotation about the viewing direction (its twist part)."""
    shift_errors_A: Float[np.ndarray, " n"] | None
    """(n,) distance between the origins after removing the displacement of the frame; None if no shifts were given."""
    frame_rotation: Float[np.ndarray, "3 3"]
    """(3, 3) G: aligned estimated poses are A_est G."""
    frame_shift_A: Float[np.ndarray, " 3"]
    """(3,) d in Å: estimated coordinates of the true origin."""
    estimated: Float[np.ndarray, "n 3 3"]
    """(n, 3, 3) A_est G."""
    true: Float[np.ndarray, "n 3 3"]
    """(n, 3, 3)."""
    mirrored_median_deg: float
    """Median error if the estimated map had the opposite hand; far below ``median_deg`` if it does."""

    @property
    def median_deg(self) -> float:
        return float(np.median(self.errors_deg))

    @property
    def p90_deg(self) -> float:
        return float(np.percentile(self.errors_deg, 90))

    @property
    def median_shift_A(self) -> float:
        return float("nan") if self.shift_errors_A is None else float(np.median(self.shift_errors_A))

    def fraction_over(self, deg: float) -> float:
        """Fraction of particles whose error exceeds this angle."""
        return float(np.mean(self.errors_deg > deg))

    def by_view(self, axis: tuple[float, float, float] = (0.0, 0.0, 1.0), cut_deg: float = 36.0) -> dict[str, Any]:
        """Numbers for top views (within ``cut_deg`` of ``axis`` or its opposite, by the true pose) and for the rest.

        Returns:
            Per ``top_`` and ``side_``: n, median_deg, over_10, over_20; ``top_to_side`` and ``side_to_top``: fraction
            of the true views of one kind assigned to the other; ``top_fraction_true`` and ``top_fraction_estimated``.
            Numbers of an empty kind are NaN.
        """
        top, top_estimated = (_is_top(r, axis, cut_deg) for r in (self.true, self.estimated))
        result: dict[str, Any] = {}
        for name, rows, moved in (("top", top, ~top_estimated), ("side", ~top, top_estimated)):
            errors = self.errors_deg[rows]
            result[f"{name}_n"] = int(rows.sum())
            result[f"{name}_median_deg"] = float(np.median(errors)) if len(errors) else float("nan")
            for deg in (10, 20):
                result[f"{name}_over_{deg}"] = float(np.mean(errors > deg)) if len(errors) else float("nan")
            result["top_to_side" if name == "top" else "side_to_top"] = (
                float(np.mean(moved[rows])) if len(errors) else float("nan")
            )
        result["top_fraction_true"], result["top_fraction_estimated"] = float(top.mean()), float(top_estimated.mean())
        return result

    def summary(self) -> dict[str, Any]:
        """The numbers that go into a report: plain floats and lists."""
        from scipy.spatial.transform import Rotation

        result: dict[str, Any] = {"n": len(self.errors_deg), "median_deg": self.median_deg, "p90_deg": self.p90_deg}
        result.update({f"fraction_over_{d}": self.fraction_over(d) for d in (5, 10, 20, 30)})
        result["direction_median_deg"] = float(np.median(self.direction_errors_deg))
        result["fraction_opposite"] = float(np.mean(self.direction_errors_deg > OPPOSITE_DEG))
        result["inplane_median_deg"] = float(np.median(self.inplane_errors_deg))
        result["shift_median_A"] = self.median_shift_A
        result["frame_rotation_deg"] = float(np.degrees(Rotation.from_matrix(self.frame_rotation).magnitude()))
        result["frame_rotation"] = self.frame_rotation.tolist()
        result["frame_shift_A"] = self.frame_shift_A.tolist()
        result["mirrored_median_deg"] = self.mirrored_median_deg
        return {**result, **self.by_view()}


def pose_errors(
    estimated: Float[np.ndarray, "n 3 3"],
    true: Float[np.ndarray, "n 3 3"],
    symmetry: str | Float[np.ndarray, "g 3 3"] = "C1",
    *,
    align: bool | str = True,
    shift_estimated_A: Float[np.ndarray, "n 2"] | None = None,
    shift_true_A: Float[np.ndarray, "n 2"] | None = None,
) -> PoseErrors:
    """Errors of estimated poses against true ones, modulo symmetry and frame.

    Args:
        estimated, true: (n, 3, 3) rotations A, row by row of the same particles.
        symmetry: point group name, or its (g, 3, 3) operations.
        align: True or "any" lets the frames differ by any rotation; "axis" (for refinements that imposed Cn about z)
            only by a spin about z, with or without turning z over; False or "none" compares as given. Without
            alignment the frame displacement is not fitted either.
        shift_estimated_A, shift_true_A: (n, 2) RELION origins in Å.

    Raises:
        InputError: shapes do not fit, no particles, or an unknown ``align``.
    """
    from scipy.spatial.transform import Rotation

    estimated, true = np.asarray(estimated, np.float64), np.asarray(true, np.float64)
    if estimated.shape != true.shape or estimated.ndim != 3 or len(estimated) == 0:
        shapes = (estimated.shape, true.shape)
        raise InputError(
            "poses to compare do not fit", expected="two arrays (n, 3, 3)", found=shapes, code="arrays-do-not-fit"
        )
    mode = ("any" if align else "none") if isinstance(align, bool) else align
    if mode not in ("any", "axis", "none"):
        raise InputError("unknown frame alignment", expected="any, axis or none", found=align, code="choice-unknown")
    ops = symmetry_operations(symmetry)
    if mode == "axis" and not _is_cyclic_z(ops):
        mode = "any"
    ops_q = _quaternions(ops)
    relative = _quaternions(np.einsum("nji,njk->nik", estimated, true))
    frame_q = fit_frame(relative, ops_q, mode)
    frame = Rotation.from_quat(frame_q).as_matrix()
    best, which = _closest(frame_q, relative, ops_q)
    aligned = estimated @ frame
    swing, twist = _swing_twist(np.einsum("nij,nkj->nik", true, aligned @ ops[which]))
    half_turn = np.diag([-1.0, -1.0, 1.0])
    mirrored = _quaternions(np.einsum("nji,njk->nik", half_turn @ estimated, true))
    shifts, displacement = None, np.zeros(3)
    if shift_estimated_A is not None and shift_true_A is not None:
        offset = np.asarray(shift_estimated_A, np.float64) - np.asarray(shift_true_A, np.float64)
        if mode != "none":
            displacement = fit_displacement(estimated, offset, frame @ ops.mean(0) @ frame.T, 1 / (1 + (best / 5) ** 4))
        shifts = np.linalg.norm(offset - (estimated @ displacement)[:, :2], axis=1)
    mirrored_best = _closest(fit_frame(mirrored, ops_q, mode), mirrored, ops_q)[0]
    mirrored_median = float(np.median(mirrored_best))
    return PoseErrors(best, swing, twist, shifts, frame, displacement, aligned, true, mirrored_median)


def symmetry_operations(symmetry: str | Float[np.ndarray, "g 3 3"]) -> Float[np.ndarray, "g 3 3"]:
    """(g, 3, 3) proper rotations of a point group given by name or already as operations."""
    if not isinstance(symmetry, str):
        return np.asarray(symmetry, np.float64)
    if symmetry.upper() == "C1":
        return np.eye(3)[None]
    from cryoiso.physics.symmetry import point_group

    return np.asarray(point_group(symmetry), np.float64)


def fit_frame(
    relative: Float[np.ndarray, "n 4"], ops: Float[np.ndarray, "g 4"], mode: str = "any"
) -> Float[np.ndarray, " 4"]:
    """The frame rotation G with which most particles agree, as a quaternion (x, y, z, w); deterministic.

    Minimises the mean of min(error, 30 degrees): first over the frames suggested by single particles, then by
    iteratively reweighted averaging (Welsch weights that narrow down to the spread of the particles that agree).

    Args:
        relative: (n, 4) quaternions of A_est^T A_true. ops: (g, 4). mode: "any", "axis" or "none" as in `pose_errors`.
    """
    identity = np.array([0.0, 0.0, 0.0, 1.0])
    if mode == "none":
        return identity
    sample = relative[_spread(len(relative), 4000)]
    proposals = [identity, *_proposals(relative[_spread(len(relative), 400)], mode)]
    costs = np.array([_cost(_closest(q, sample, ops)[0]) for q in proposals])
    refined = [_refine(proposals[i], relative, ops, mode) for i in np.argsort(costs, kind="stable")[:5]]
    return min(refined, key=lambda q: _cost(_closest(q, relative, ops)[0]))


def fit_displacement(
    rotation: Float[np.ndarray, "n 3 3"],
    offset_A: Float[np.ndarray, "n 2"],
    allowed: Float[np.ndarray, "3 3"],
    weight: Float[np.ndarray, " n"] | None = None,
) -> Float[np.ndarray, " 3"]:
    """Displacement d of the frame that explains origin differences: offset = (A d)_xy, by least absolute deviations.

    Args:
        rotation: (n, 3, 3) estimated poses. offset_A: (n, 2) estimated minus true origins.
        allowed: (3, 3) projector on the directions in which a map of this symmetry can move (Cn: its axis).
        weight: (n,) trust in each particle.

    Returns:
        (3,) Å; components that the views do not determine stay near zero.
    """
    values, vectors = np.linalg.eigh((allowed + allowed.T) / 2)
    basis = vectors[:, values > 0.5]
    if basis.shape[1] == 0:
        return np.zeros(3)
    design = rotation[:, :2] @ basis
    solution = np.zeros(basis.shape[1])
    trust = np.ones(len(rotation)) if weight is None else np.asarray(weight, np.float64)
    robust = trust
    for _ in range(30):
        normal = np.einsum("n,nij,nik->jk", robust, design, design)
        normal += 1e-6 * robust.sum() * np.eye(len(normal))
        solution = np.linalg.solve(normal, np.einsum("n,nij,ni->j", robust, design, offset_A))
        residual = np.linalg.norm(offset_A - design @ solution, axis=1)
        robust = trust / np.maximum(residual, max(0.1 * float(np.median(residual)), 1e-6))
    return basis @ solution


def _is_top(rotation: np.ndarray, axis: tuple[float, float, float], cut_deg: float) -> np.ndarray:
    unit = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    near: np.ndarray = np.abs(rotation[:, 2] @ unit) > np.cos(np.radians(cut_deg))
    return near


def _is_cyclic_z(ops: np.ndarray) -> bool:
    return len(ops) > 1 and bool(np.allclose(ops[:, 2, 2], 1, atol=1e-6))


def _quaternions(rotation: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return np.atleast_2d(Rotation.from_matrix(rotation).as_quat())


def _multiply(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Hamilton product of quaternions (..., 4) in the order x, y, z, w."""
    px, py, pz, pw = np.moveaxis(p, -1, 0)
    qx, qy, qz, qw = np.moveaxis(q, -1, 0)
    return np.stack(
        [
            pw * qx + px * qw + py * qz - pz * qy,
            pw * qy - px * qz + py * qw + pz * qx,
            pw * qz + px * qy - py * qx + pz * qw,
            pw * qw - px * qx - py * qy - pz * qz,
        ],
        axis=-1,
    )


def _closest(frame: np.ndarray, relative: np.ndarray, ops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest angle (n,) in degrees between G S and each relative rotation, and the (n,) index of that S."""
    candidates = _multiply(frame[None], ops)
    angle, which = np.empty(len(relative)), np.empty(len(relative), np.intp)
    for start in range(0, len(relative), 50_000):
        rows = slice(start, start + 50_000)
        dots = np.abs(relative[rows] @ candidates.T)
        which[rows] = dots.argmax(1)
        angle[rows] = np.degrees(2 * np.arccos(np.minimum(dots.max(1), 1.0)))
    return angle, which


def _cost(errors_deg: np.ndarray) -> float:
    return float(np.minimum(errors_deg, _TRUNCATE_DEG).mean())


def _spread(n: int, at_most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).astype(np.intp))


def _proposals(relative: np.ndarray, mode: str) -> list[np.ndarray]:
    if mode == "any":
        return list(relative)
    result = []
    for keep in ((2, 3), (0, 1)):  # spins about z; spins after turning z over
        part = np.zeros_like(relative)
        part[:, keep] = relative[:, keep]
        size = np.linalg.norm(part, axis=1)
        result += list(part[size > 1e-3] / size[size > 1e-3, None])
    return result


def _refine(frame: np.ndarray, relative: np.ndarray, ops: np.ndarray, mode: str) -> np.ndarray:
    """Reweighted quaternion average from a start; the width of the weights follows the particles that agree."""
    inverse = ops * np.array([-1.0, -1.0, -1.0, 1.0])
    keep = np.arange(4)
    if mode == "axis":
        keep = np.array([2, 3]) if np.hypot(*frame[2:]) > 0.5 else np.array([0, 1])
    for _ in range(20):
        errors, which = _closest(frame, relative, ops)
        agree = errors[errors < _TRUNCATE_DEG]
        width = float(np.clip(2 * np.median(agree), 0.01, 20)) if len(agree) else 20.0
        proposals = _multiply(relative, inverse[which])[:, keep]
        weight = np.exp(-((errors / width) ** 2))
        _, vectors = np.linalg.eigh(np.einsum("n,ni,nj->ij", weight, proposals, proposals))
        new = np.zeros(4)
        new[keep] = vectors[:, -1]
        moved = np.degrees(2 * np.arccos(min(abs(float(new @ frame)), 1.0)))
        frame = new
        if moved < 1e-5:
            break
    return frame


def _swing_twist(relative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Swing (tilt of z) and twist (about z) angles in degrees of rotations (n, 3, 3)."""
    x, y, z, w = _quaternions(relative).T
    swing = 2 * np.arctan2(np.hypot(x, y), np.hypot(z, w))
    twist = 2 * np.arctan2(np.abs(z), np.abs(w))
    return np.degrees(swing), np.degrees(twist)
