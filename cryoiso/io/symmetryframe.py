"""The symmetry frame of an atomic model: found by superposing its equal chains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

Trace = dict[tuple[str, str], np.ndarray]
"""(number, residue) -> position of CA or P, of one chain."""
Axis = tuple[np.ndarray, float]
"""Unit vector and angle (rad) of a rotation."""

TOLERANCE_DEG = 6.0
COPY_RMSD_A = 5.0
"""Copies that differ by more, in place or shape, are not related by the symmetry."""
TRACE_ATOMS = ("CA", "P")


def superpose(
    moving: Float[np.ndarray, "n 3"], target: Float[np.ndarray, "n 3"]
) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"], float]:
    """Rotation R and shift t with R moving + t nearest to target (Kabsch, Acta Cryst. A32, 922, 1976), and the RMSD.

    Args:
        moving, target: (n, 3).
    """
    m, t = moving.mean(0), target.mean(0)
    u, _, vt = np.linalg.svd((moving - m).T @ (target - t))
    flip = np.sign(np.linalg.det(vt.T @ u.T))
    rotation = vt.T @ np.diag([1.0, 1.0, flip]) @ u.T
    shift = t - rotation @ m
    rmsd = float(np.sqrt(np.mean(np.sum((moving @ rotation.T + shift - target) ** 2, axis=1))))
    return rotation, shift, rmsd


def equal_chains(model: Any) -> list[list[Trace]]:
    """Groups of chains with (nearly) the same residues; each chain as {(number, residue): position of CA or P}."""
    traces = []
    for chain in model:
        trace = {}
        for residue in chain:
            for atom in residue:
                if atom.name in TRACE_ATOMS:
                    trace[(str(residue.seqid), residue.name)] = np.array([atom.pos.x, atom.pos.y, atom.pos.z])
                    break
        if len(trace) >= 10:
            traces.append(trace)
    groups: list[list[Trace]] = []
    for trace in traces:
        for group in groups:
            if len(trace.keys() & group[0].keys()) >= 0.8 * max(len(trace), len(group[0])):
                group.append(trace)
                break
        else:
            groups.append([trace])
    return sorted(groups, key=lambda g: -len(g) * len(g[0]))


def _axis_angle(rotation: np.ndarray) -> tuple[np.ndarray, float]:
    from scipy.spatial.transform import Rotation

    vector = Rotation.from_matrix(rotation).as_rotvec()
    angle = float(np.linalg.norm(vector))
    return (vector / angle if angle > 1e-6 else np.array([0.0, 0.0, 1.0])), angle


def symmetry_frame(
    model: Any, group_name: str, file: object = None
) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"]]:
    """The rotation that turns a model into the standard frame of a point group, and a point all its axes go through.

    Args:
        model: gemmi.Model with all the protomers.
        group_name: Cn, Dn, T, O, I ...
        file: for messages.

    Returns:
        (3, 3): rows are the new axes; (3,): for Cn a point on the axis.

    Raises:
        InputError: the chains are not related by that symmetry.
    """
    from cryoiso.physics.symmetry import point_group

    operators = point_group(group_name)
    for group in equal_chains(model):
        if len(group) < len(operators):
            continue
        frame = _fit_frame(_pair_rotations(group, len(operators)), operators)
        if frame is None:
            continue
        centre = np.mean([np.mean(list(trace.values()), axis=0) for trace in group], axis=0)
        away = farthest(group, frame.T @ operators @ frame, centre)
        if away <= COPY_RMSD_A:
            return frame, centre
        raise InputError(
            f"the chains of the model are related by the rotations of {group_name} plus a shift (a screw axis, or a "
            "misplaced chain)", file=file,
            expected=f"chains that operations bring onto each other within {COPY_RMSD_A:g} Å",
            found=f"{away:.1f} Å", hint="Check the file and the point group.", code="symmetry-mismatch",
        )  # fmt: skip
    counts = ", ".join(f"{len(g)} x {len(g[0])} residues" for g in equal_chains(model)[:4]) or "none"
    raise InputError(
        f"the chains of the model do not have the symmetry {group_name}",
        file=file,
        expected=f"{len(operators)} equal chains related by {group_name}",
        found=f"equal chains: {counts}",
        hint="Use the whole assembly, or leave the alignment out.",
        code="symmetry-mismatch",
    )


def farthest(group: list[Trace], operators: np.ndarray, centre: np.ndarray) -> float:
    """Largest RMSD of a chain, moved by an operation about the centre, from the chain that it comes nearest to."""
    middles = np.array([np.mean(list(trace.values()), axis=0) for trace in group])
    worst = 0.0
    for op in operators:
        moved = (middles - centre) @ op.T + centre
        nearest = np.linalg.norm(moved[:, None] - middles[None], axis=2).argmin(1)
        for i, j in enumerate(nearest):
            keys = sorted(group[i].keys() & group[j].keys(), key=str)
            if len(keys) < 10:
                continue
            a, b = (np.array([g[k] for k in keys]) for g in (group[i], group[j]))
            distance = (a - centre) @ op.T + centre - b
            worst = max(worst, float(np.sqrt(np.mean(np.sum(distance**2, axis=1)))))
    return worst


def _pair_rotations(group: list[Trace], order: int) -> list[np.ndarray]:
    """Rotations from chain to chain, without the pairs that do not superpose. All ordered pairs of up to 12 chains."""
    firsts = range(len(group) if len(group) <= 12 else 1)
    rotations = []
    for i in firsts:
        for j in range(len(group)):
            keys = sorted(group[i].keys() & group[j].keys(), key=str)
            if i == j or len(keys) < 10:
                continue
            a, b = (np.array([g[k] for k in keys]) for g in (group[i], group[j]))
            rotation, _, rmsd = superpose(a, b)
            if rmsd < 5.0:
                rotations.append(rotation)
    return rotations


def _fit_frame(rotations: list[np.ndarray], operators: np.ndarray) -> np.ndarray | None:
    """Q with Q R Q^T in the group for the rotations R that were found, or None if they do not generate it."""
    tolerance = np.radians(TOLERANCE_DEG)
    axes = [_axis_angle(r) for r in rotations]
    wanted = [_axis_angle(g) for g in operators[1:]]
    if not axes or not wanted:
        return None
    u1, angle1 = max(wanted, key=lambda w: (abs(w[0][2]), -w[1]))
    second = next((w for w in wanted if np.linalg.norm(np.cross(u1, w[0])) > 0.1), None)
    for v1, a1 in axes:
        if abs(a1 - angle1) > tolerance:
            continue
        others = [(v, a) for v, a in axes if second and abs(a - second[1]) < tolerance] if second else [(v1, a1)]
        for v2, _ in others:
            start = _frame_of_axes(u1, second[0] if second else None, v1, v2)
            if start is None:
                continue
            frame = _refined(start, axes, wanted, tolerance)
            if frame is not None:
                return frame
    return None


def _frame_of_axes(u1: np.ndarray, u2: np.ndarray | None, v1: np.ndarray, v2: np.ndarray) -> np.ndarray | None:
    from scipy.spatial.transform import Rotation

    if u2 is None:
        return _shortest_rotation(v1, u1)
    if abs(np.dot(u1, u2) - np.dot(v1, v2)) > np.radians(TOLERANCE_DEG):
        return None
    aligned: np.ndarray = Rotation.align_vectors(np.stack([u1, u2]), np.stack([v1, v2]))[0].as_matrix()
    return aligned


def _shortest_rotation(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    cross, dot = np.cross(source, target), float(np.dot(source, target))
    if dot < -1 + 1e-9:
        other = np.eye(3)[np.argmin(np.abs(source))]
        axis = np.cross(source, other)
        axis /= np.linalg.norm(axis)
        return 2 * np.outer(axis, axis) - np.eye(3)
    k = np.array([[0, -cross[2], cross[1]], [cross[2], 0, -cross[0]], [-cross[1], cross[0], 0]])
    rotation: np.ndarray = np.eye(3) + k + k @ k / (1 + dot)
    return rotation


def _refined(start: np.ndarray, axes: list[Axis], wanted: list[Axis], tolerance: float) -> np.ndarray | None:
    """Least-squares frame over all axes that agree with ``start``; None unless every operator of the group is met."""
    sources, targets, met = [], [], set()
    for v, angle in axes:
        turned = start @ v
        for number, (u, a) in enumerate(wanted):
            signed_differences = ((1.0, abs(a - angle)), (-1.0, abs(2 * np.pi - a - angle)))
            for sign, miss in signed_differences:
                if miss < tolerance and np.dot(turned, sign * u) > np.cos(tolerance):
                    sources.append(v)
                    targets.append(sign * u)
                    met.add(number)
    if len(met) < len(wanted):
        return None
    covariance = np.array(sources).T @ np.array(targets)
    if (
        np.linalg.matrix_rank(covariance, tol=1e-3 * np.linalg.norm(covariance)) < 2
    ):  # one axis only: turn onto its mean
        mean = np.sum([s * np.sign(np.dot(s, sources[0])) for s in sources], axis=0)
        mean /= np.linalg.norm(mean)
        return _shortest_rotation(mean, targets[0])
    u, _, vt = np.linalg.svd(covariance)
    rotation: np.ndarray = vt.T @ np.diag([1.0, 1.0, np.sign(np.linalg.det(vt.T @ u.T))]) @ u.T
    return rotation
