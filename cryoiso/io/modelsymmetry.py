"""Which point group the chains of an atomic model have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryoiso.core.errors import InputError
from cryoiso.io.symmetryframe import COPY_RMSD_A, Trace, equal_chains, farthest, symmetry_frame
from cryoiso.physics.symmetry import point_group

EXACT_A = 2.5
"""Copies that differ by less, in place and shape, have the group; up to ``COPY_RMSD_A`` they have it only nearly.
Measured on 18 models of C3, C4, C6, C7, D2, D7 and O: 0.0 to 0.3 Å in cryo-EM models, up to 2.3 Å in crystals."""
CUBIC = (("I", 60), ("O", 24), ("T", 12))


@dataclass(frozen=True)
class ModelGroup:
    """The largest point group of a model's chains."""

    group: str
    """C1 if there is no other"""
    nearly: str
    """a larger one that the chains have only nearly; else empty"""
    apart_A: float
    """largest RMSD of a chain, moved by an operation of ``group``, or of ``nearly`` if there is one, from another"""
    counts: tuple[tuple[int, int], ...]
    """(number, residues) of equal chains"""

    @property
    def words(self) -> str:
        """In one sentence."""
        chains = ", ".join(f"{n} x {residues} residues" for n, residues in self.counts) or "none"
        if len(self.counts) == 1 and self.counts[0][0] == 1:
            return f"the model has one chain ({self.counts[0][1]} residues), which says nothing of an assembly"
        if not self.counts:
            return "the model has no chain of 10 residues or more"
        if self.nearly:
            return (
                f"equal chains: {chains}; operations of {self.nearly} bring them onto each other only within "
                f"{self.apart_A:.1f} Å"
                + ("" if self.group == "C1" else f", those of {self.group} within {EXACT_A:g} Å")
            )
        if self.group == "C1":
            return f"equal chains: {chains}; no operations were found that bring them all onto each other"
        return f"equal chains: {chains}; operations bring them onto each other within {self.apart_A:.1f} Å"


def model_group(model: Any) -> ModelGroup:
    """Tests I, O, T, Dn and Cn, the largest first, on all chains of 10 residues or more.

    Args:
        model: gemmi.Model of the whole assembly.
    """
    groups = equal_chains(model)
    counts = tuple((len(group), len(group[0])) for group in groups)
    nearly, apart = "", 0.0
    for name in _candidates([len(group) for group in groups]):
        deviation = _apart(model, name, groups)
        if deviation is None:
            continue
        if deviation <= EXACT_A:
            return ModelGroup(name, nearly, apart if nearly else deviation, counts)
        if not nearly:
            nearly, apart = name, deviation
    return ModelGroup("C1", nearly, apart, counts)


def _candidates(sizes: list[int]) -> list[str]:
    """Point groups whose order divides the number of copies of every chain, the largest first."""
    if not sizes:
        return []
    common = int(np.gcd.reduce(sizes))
    names = [(order, name) for name, order in CUBIC if common % order == 0]
    names += [(2 * n, f"D{n}") for n in range(2, common // 2 + 1) if common % (2 * n) == 0]
    names += [(n, f"C{n}") for n in range(2, common + 1) if common % n == 0]
    return [name for _, name in sorted(names, key=lambda pair: -pair[0])]


def _apart(model: Any, name: str, groups: list[list[Trace]]) -> float | None:
    """Largest RMSD under the operations of a group; None if it exceeds ``COPY_RMSD_A`` or there is no frame."""
    try:
        frame, centre = symmetry_frame(model, name)
    except InputError:
        return None
    operators = frame.T @ point_group(name) @ frame
    largest = max(farthest(group, operators, centre) for group in groups)
    return largest if largest <= COPY_RMSD_A else None
