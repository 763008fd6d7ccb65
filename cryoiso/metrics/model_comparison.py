"""Two atomic models compared by their traced atoms: which residues correspond, RMSD and a TM-like score.

Residues are paired by sequence alignment, chain by chain; then the second model is superposed on the first. The score
is that of Zhang & Skolnick 2004, doi 10.1002/prot.20264: (1/L) sum 1/(1 + (d/d0)^2), d0 = 1.24 (L - 15)^(1/3) - 1.8 Å,
L the residues of the first model, all chains together. Their program searches for the superposition that maximises it;
here superposition and weights are iterated from the least-squares one, which gives at most that value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

LEAST_IDENTITY = 0.25
"""Of aligned residues; chains that have less in common are not the same protein's."""
LEAST_PAIRS = 5
ROUNDS = 30


@dataclass(frozen=True)
class Trace:
    """Traced atoms of one chain: CA of a protein, C4' of a nucleic acid."""

    name: str
    letters: str
    """one a residue"""
    positions_A: Float[np.ndarray, "n 3"]


@dataclass(frozen=True)
class ModelComparison:
    """How the second model differs from the first."""

    pairs: int
    length: int
    """traced residues of the first model"""
    identity: float
    """of the paired residues"""
    rmsd_A: float
    """after least-squares superposition of all pairs"""
    tm_score: float
    median_A: float
    """of the distances after the superposition that gives the TM-like score"""
    in_place_A: float
    """RMSD without any superposition: of models of one map"""
    chains: dict[str, str]
    """chain of the first model -> that of the second"""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def compare_models(first: Sequence[Trace], second: Sequence[Trace]) -> ModelComparison:
    """RMSD and TM-like score of two models.

    Every chain of the second that resembles the longest one of the first is tried as its counterpart; the other chains
    are paired with what then lies nearest. The pairing with the best score counts.

    Raises:
        InputError: no two chains resemble each other.
    """
    aligned = {(i, j): _aligned(a.letters, b.letters) for i, a in enumerate(first) for j, b in enumerate(second)}
    aligned = {key: rows for key, rows in aligned.items() if _alike(rows, first[key[0]], second[key[1]])}
    length = sum(len(chain.letters) for chain in first)
    longest = max({i for i, _ in aligned}, key=lambda i: len(first[i].letters), default=-1)
    best: tuple[float, dict[int, int]] | None = None
    for i, j in aligned:
        if i == longest:
            pairing = _pairing(first, second, aligned, i, j)
            a, b, _ = _points(first, second, aligned, pairing)
            score = _tm_score(a, b, length)[0]
            if best is None or score > best[0] + 1e-9:
                best = (score, pairing)
    if best is None:
        raise InputError(
            "no chain of one model resembles one of the other",
            expected=f"{100 * LEAST_IDENTITY:.0f} % identity over {LEAST_PAIRS} residues",
            code="models-differ",
        )
    pairing = best[1]
    a, b, same = _points(first, second, aligned, pairing)
    rotation, shift = superposition(a, b)
    score, distance = _tm_score(a, b, length)
    return ModelComparison(
        len(a), length, float(same.mean()), _rms(a - (b @ rotation.T + shift)), score, float(np.median(distance)),
        _rms(a - b), {first[i].name: second[j].name for i, j in pairing.items()},
    )  # fmt: skip


def superposition(
    fixed_A: Float[np.ndarray, "n 3"],
    moving_A: Float[np.ndarray, "n 3"],
    weights: Float[np.ndarray, " n"] | None = None,
) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"]]:
    """Rotation R and shift d with R m + d nearest to the fixed points in (weighted) least squares (Kabsch 1976)."""
    w = np.ones(len(fixed_A)) if weights is None else np.asarray(weights, np.float64)
    middle, other = (np.average(points, axis=0, weights=w) for points in (fixed_A, moving_A))
    u, _, vt = np.linalg.svd((moving_A - other).T @ ((fixed_A - middle) * w[:, None]))
    sign = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    rotation: np.ndarray = (u @ sign @ vt).T
    return rotation, middle - rotation @ other


def _tm_score(a: np.ndarray, b: np.ndarray, length: int) -> tuple[float, np.ndarray]:
    """The best score of the iteration, and the distances there."""
    d0 = max(1.24 * np.cbrt(length - 15) - 1.8, 0.5) if length > 15 else 0.5
    weights, best = np.ones(len(a)), (-1.0, np.zeros(len(a)))
    for _ in range(ROUNDS):
        rotation, shift = superposition(a, b, weights)
        distance = np.linalg.norm(a - (b @ rotation.T + shift), axis=1)
        terms = 1 / (1 + (distance / d0) ** 2)
        score = float(terms.sum() / length)
        if score <= best[0] + 1e-7:
            break
        best, weights = (score, distance), terms**2
    return best


def _aligned(a: str, b: str) -> np.ndarray:
    """(n, 2) rows of residues that a global alignment puts side by side."""
    import gemmi

    alignment = gemmi.align_string_sequences(list(a), list(b), [])
    top, bottom = alignment.add_gaps(a, 1), alignment.add_gaps(b, 2)
    rows, i, j = [], 0, 0
    for x, y in zip(top, bottom, strict=True):
        if x != "-" and y != "-":
            rows.append((i, j))
        i, j = i + (x != "-"), j + (y != "-")
    return np.array(rows, np.int64).reshape(-1, 2)


def _alike(rows: np.ndarray, a: Trace, b: Trace) -> bool:
    if len(rows) < LEAST_PAIRS:
        return False
    return sum(a.letters[i] == b.letters[j] for i, j in rows) >= LEAST_IDENTITY * len(rows)


def _pairing(
    first: Sequence[Trace], second: Sequence[Trace], aligned: dict[tuple[int, int], np.ndarray], i: int, j: int
) -> dict[int, int]:
    """Counterparts of all chains, once chain i lies on chain j: the nearest pair first."""
    rows = aligned[i, j]
    rotation, shift = superposition(first[i].positions_A[rows[:, 0]], second[j].positions_A[rows[:, 1]])
    apart = {}
    for (p, q), pairs in aligned.items():
        moved = second[q].positions_A[pairs[:, 1]] @ rotation.T + shift
        apart[p, q] = float(np.median(np.linalg.norm(first[p].positions_A[pairs[:, 0]] - moved, axis=1)))
    pair_of = {i: j}
    for p, q in sorted(apart, key=lambda key: (apart[key], key)):
        if p not in pair_of and q not in pair_of.values():
            pair_of[p] = q
    return pair_of


def _points(
    first: Sequence[Trace], second: Sequence[Trace], aligned: dict[tuple[int, int], np.ndarray], pairing: dict[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paired positions, and whether the residues are the same."""
    a, b, same = [], [], []
    for i, j in sorted(pairing.items()):
        rows = aligned[i, j]
        a.append(first[i].positions_A[rows[:, 0]])
        b.append(second[j].positions_A[rows[:, 1]])
        same += [first[i].letters[p] == second[j].letters[q] for p, q in rows]
    return np.concatenate(a), np.concatenate(b), np.array(same)


def _rms(difference: np.ndarray) -> float:
    return float(np.sqrt((difference**2).sum(1).mean()))
