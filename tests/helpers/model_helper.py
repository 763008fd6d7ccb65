"""Models of known symmetry, and maps with odd headers."""

from __future__ import annotations

import struct
from pathlib import Path

import gemmi
import numpy as np

from cryoiso.io.mrc import write_map
from cryoiso.physics.so3 import random_rotations
from cryoiso.physics.symmetry import point_group


def assembly(group: str, seed: int = 1, extra: bool = False, spread_A: float = 0.0) -> gemmi.Model:
    """Copies of a random chain of 30 residues under a group, turned and shifted; ``extra`` adds another chain."""
    rng = np.random.default_rng(seed)
    chain = np.cumsum(rng.normal(size=(30, 3)) * 2, 0) + np.array([25, 15, 20])
    turn, shift = random_rotations(rng, 1)[0], rng.normal(size=3) * 30
    model = gemmi.Model(1)
    parts = [(chain + rng.normal(size=3) * spread_A) @ op.T for op in point_group(group)]
    parts += [rng.normal(size=(12, 3)) * 8] if extra else []
    for number, xyz in enumerate(parts):
        one = gemmi.Chain(f"C{number}")
        for index, place in enumerate(xyz @ turn.T + shift, start=1):
            residue, atom = gemmi.Residue(), gemmi.Atom()
            residue.name, residue.seqid = "ALA", gemmi.SeqId(index, " ")
            atom.name, atom.element, atom.pos = "CA", gemmi.Element("C"), gemmi.Position(*place)
            residue.add_atom(atom)
            one.add_residue(residue)
        model.add_chain(one)
    return model


def odd(
    path: Path, data: np.ndarray, voxel_A: tuple[float, float, float], order: tuple[int, int, int] = (1, 2, 3),
    start: tuple[int, int, int] = (0, 0, 0),
) -> Path:  # fmt: skip
    """Writes (z, y, x) densities with columns, rows and sections along the given axes (1 = x, 2 = y, 3 = z).

    Args:
        voxel_A: along x, y, z. start: NXSTART and so on: first column, row and section.
    """
    stored = np.transpose(data, [3 - axis for axis in reversed(order)])
    write_map(path, stored, 1.0)
    raw = bytearray(path.read_bytes())
    sizes = data.shape[::-1]
    struct.pack_into("<3i", raw, 16, *start)
    struct.pack_into("<3i3f", raw, 28, *sizes, *(n * v for n, v in zip(sizes, voxel_A, strict=True)))
    struct.pack_into("<3i", raw, 64, *order)
    struct.pack_into("<3f", raw, 196, 0, 0, 0)
    path.write_bytes(raw)
    return path
