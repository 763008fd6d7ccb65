"""The point group of a model's chains."""

from __future__ import annotations

import pytest
from model_helper import assembly

from cryoiso.io.models import load_model
from cryoiso.io.modelsymmetry import EXACT_A, model_group


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
