"""Two models compared: known motions, renamed and split chains, real relatives."""

from __future__ import annotations

import numpy as np
import pytest
from errors_helper import raises_code
from scipy.spatial.transform import Rotation

from cryoiso.core.errors import InputError
from cryoiso.io.atoms import read_atoms
from cryoiso.methods.assess.model_map import comparison
from cryoiso.metrics.model_comparison import Trace, compare_models, superposition

LETTERS = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV"


def chain(name, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return Trace(name, LETTERS, np.cumsum(rng.normal(0, 2.2, (len(LETTERS), 3)), 0) + shift)


def test_a_rigid_motion_is_taken_out():
    turn = Rotation.from_euler("zyx", (40, -70, 15), degrees=True).as_matrix()
    a = [chain("A"), chain("B", 40.0, 1)]
    b = [Trace(c.name, c.letters, c.positions_A @ turn.T + (5, 6, -70)) for c in a]
    found = compare_models(a, b)
    assert found.rmsd_A < 1e-9 and found.tm_score == pytest.approx(1) and found.pairs == found.length == 140
    assert found.in_place_A > 10 and found.identity == 1
    rotation, shift = superposition(b[0].positions_A, a[0].positions_A)
    assert np.allclose(rotation, turn) and np.allclose(shift, (5, 6, -70))


def test_mirror_images_are_not_superposed():
    points = np.random.default_rng(4).normal(size=(30, 3))
    rotation, _ = superposition(points, -points)
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_chains_are_found_whatever_their_names():
    a = [chain("A"), chain("B", 40.0, 0)]
    b = [Trace("x", a[1].letters, a[1].positions_A), Trace("y", a[0].letters, a[0].positions_A)]
    found = compare_models(a, b)
    assert found.rmsd_A < 1e-9, "one fold twice: either order superposes, and both chains do"


def test_a_moved_part_lowers_the_score_less_than_the_rmsd():
    a, b = chain("A"), chain("A")
    moved = b.positions_A.copy()
    moved[-10:] += 30.0
    found = compare_models([a], [Trace("A", b.letters, moved)])
    assert found.rmsd_A > 10 and found.tm_score == pytest.approx(60 / 70, abs=0.03) and found.median_A < 0.5


def test_a_gap_in_the_sequence_is_bridged():
    a = chain("A")
    keep = np.r_[0:20, 30:70]
    b = Trace("A", "".join(a.letters[i] for i in keep), a.positions_A[keep])
    found = compare_models([a], [b])
    assert found.pairs == 60 and found.rmsd_A < 1e-9 and found.tm_score == pytest.approx(60 / 70)


def test_unlike_chains_are_refused():
    other = Trace("A", "GGGGGPPPPPGGGGGPPPPP", np.random.default_rng(0).normal(size=(20, 3)))
    with raises_code("models-differ", InputError):
        compare_models([Trace("A", "WWWWWHHHHHWWWWWHHHHH", other.positions_A)], [other])


def test_relatives_of_haemagglutinin(shared_data):
    """RMSD of 1.2 Å and 93 % identity of one protomer, as other programs give them for this pair."""
    folder = shared_data / "models" / "ha"
    first, second = (read_atoms(folder / f"{name}.pdb.gz") for name in ("6wxb", "6xpo"))
    found = comparison(first, second)
    assert found["pairs"] == 1455 and found["identity"] == pytest.approx(0.93, abs=0.005)
    assert 1.1 < found["rmsd_A"] < 1.5 and found["tm_score"] > 0.97
