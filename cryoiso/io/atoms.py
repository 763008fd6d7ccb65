"""The atoms of a model as arrays, residue by residue, and their density in the frame of a map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cryoiso.core.types import DensityMap
from cryoiso.io.models import fine_density, read_model

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BACKBONE = {"N", "CA", "C", "O", "OXT"}
PHOSPHATE_SUGAR = {
    "P", "OP1", "OP2", "OP3", "O1P", "O2P", "O5'", "C5'", "C4'", "O4'", "C3'", "O3'", "C2'", "O2'", "C1'",
}  # fmt: skip
PROTEIN, NUCLEIC, OTHER = "protein", "nucleic", "other"


@dataclass(frozen=True)
class Atoms:
    """Atoms of a model, without hydrogens, waters and alternative conformations."""

    positions_A: Float[np.ndarray, "n 3"]
    """(x, y, z) of the file"""
    masses: Float[np.ndarray, " n"]
    residue: Int[np.ndarray, " n"]
    """row of the residue that each belongs to"""
    backbone: np.ndarray
    """(n,) bool: of the main chain of a protein, or sugar and phosphate of a nucleic acid"""
    traced: np.ndarray
    """(n,) bool: CA of a protein, C4' of a nucleic acid"""
    chains: list[str]
    """of each residue; so are the following"""
    numbers: list[str]
    """with insertion code"""
    names: list[str]
    kinds: list[str]
    letters: list[str]
    model: Any
    """gemmi.Model"""

    @property
    def centre_A(self) -> np.ndarray:
        """Centre of mass."""
        centre: np.ndarray = np.average(self.positions_A, axis=0, weights=self.masses)
        return centre


def read_atoms(path: object) -> Atoms:
    """The atoms of a file as a viewer shows them: no biological assembly is built, see `cryoiso.io.models.read_model`.

    Raises:
        InputError: as ``read_model``.
    """
    import gemmi

    model = read_model(path, "none")
    atoms: list[tuple[float, float, float, float, int, bool, bool]] = []
    chains: list[str] = []
    numbers: list[str] = []
    names: list[str] = []
    kinds: list[str] = []
    letters: list[str] = []
    for chain in model:
        for residue in chain:
            facts = gemmi.find_tabulated_residue(residue.name)
            kind = PROTEIN if facts.is_amino_acid() else NUCLEIC if facts.is_nucleic_acid() else OTHER
            main = {PROTEIN: BACKBONE, NUCLEIC: PHOSPHATE_SUGAR, OTHER: set()}[kind]
            trace = {PROTEIN: "CA", NUCLEIC: "C4'", OTHER: ""}[kind]
            row = len(names)
            for atom in residue:
                p = atom.pos
                atoms.append((p.x, p.y, p.z, atom.element.weight, row, atom.name in main, atom.name == trace))
            chains.append(chain.name)
            numbers.append(f"{residue.seqid.num}{residue.seqid.icode.strip()}")
            names.append(residue.name)
            kinds.append(kind)
            letters.append((facts.one_letter_code or "X").strip().upper() or "X")
    table = np.array(atoms, np.float64)
    return Atoms(
        table[:, :3], table[:, 3], table[:, 4].astype(np.int64), table[:, 5] > 0, table[:, 6] > 0,
        chains, numbers, names, kinds, letters, model,
    )  # fmt: skip


def density_of(
    atoms: Atoms,
    box_px: int,
    pixel_size_A: float,
    resolution_A: float,
    rotation: Float[np.ndarray, "3 3"],
    offset_A: Float[np.ndarray, " 3"],
) -> DensityMap:
    """Density of a model on a grid: an atom at x goes to R x + d, counted from voxel D//2.

    Args:
        resolution_A: of the density, see `cryoiso.io.models.model_to_map`.
        rotation: (3, 3) R. offset_A: (3,) d. Atoms that come to lie outside the box are left out.
    """
    half_A = box_px * pixel_size_A / 2
    inside = np.abs(atoms.positions_A @ np.asarray(rotation).T + offset_A).max(1) < half_A
    model = atoms.model.clone()
    if not inside.all():
        _drop(model, ~inside)
    return DensityMap(
        fine_density(model, box_px, pixel_size_A, resolution_A, rotation, np.asarray(offset_A)), float(pixel_size_A)
    )


def _drop(model: Any, gone: np.ndarray) -> None:
    """Removes atoms by their number, in the order in which they are read."""
    number = len(gone)
    for chain in reversed(list(model)):
        for residue in reversed(list(chain)):
            for index in range(len(residue) - 1, -1, -1):
                number -= 1
                if gone[number]:
                    del residue[index]
