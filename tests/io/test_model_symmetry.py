"""The point group of a model's chains."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest

from cryoiso.io.models import load_model
from cryoiso.io.modelsymmetry import EXACT_A, model_group
from cryoiso.physics.so3 import random_rotations
from cryoiso.physics.symmetry import point_group


def assembly(group: str, seed: int = 1, extra: bool = False, spread_A: float = 0.0) -> gemmi.Model:
    """Copies of a random chain of 30 residues under a group, turned and shifted; with one more chain of another kind."""
    rng = np.random.default_rng(seed)
    chain = np.cumsum(rng.normal(size=(30, 3)) * 2, 0) + [25, 15, 20]
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


@pytest.mark.parametrize("group", ["C2", "C3", "C7", "D2", "D3", "D7", "T", "O"])
def test_the_group_of_copies(group):
    found = model_group(assembly(group))
    assert (found.group, found.nearly) == (group, "") and found.apart_A < 0.1


def test_another_chain_breaks_the_symmetry():
    found = model_group(assembly("C3", extra=True))
    assert found.group == "C1" and "no operations" in found.words


def test_copies_that_are_nearly_in_place():
    found = model_group(assembly("C4", spread_A=1.6))
    assert found.nearly == "C4" and EXACT_A < found.apart_A < 5 and "only within" in found.words


def test_one_chain_says_nothing():
    found = model_group(assembly("C1"))
    assert found.group == "C1" and "says nothing of an assembly" in found.words


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("ha/6wxb.pdb.gz", "C3"), ("ha/1ti8.pdb.gz", "C3"), ("ha/2ypg.pdb.gz", "C3"), ("8bk7.cif.gz", "D2"),
        ("7l2i.cif.gz", "C4"), ("8uv2.cif.gz", "C6"), ("1aon_groel_groes.pdb.gz", "C7"), ("1oel_groel.pdb.gz", "D7"),
        ("7a4m.cif.gz", "O"), ("5ara.cif.gz", "C1"), ("6bqn.cif.gz", "C1"),
    ],
)  # fmt: skip
def test_real_models(shared_data, name, group):
    assert model_group(load_model(shared_data / "models" / name)[0]).group == group
