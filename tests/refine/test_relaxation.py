"""Relaxation of a pseudo-symmetry: particles find their register among the copies of poses known modulo the group."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from errors_helper import raises_code
from test_refine_engine import BOX, PIXEL_A, in_memory, request_for, require_same_bits

from cryoiso.core.config import parse_job
from cryoiso.core.errors import UsageError
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.engines.native import NativeEngine
from cryoiso.io.sources import ArraySource
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import pseudo_atoms_to_map, trimer
from cryoiso.physics.simulation import simulate
from cryoiso.physics.so3 import angular_distance_deg, random_rotations
from cryoiso.physics.symmetry import point_group
from cryoiso.pipeline.inputs.standard_frame import symmetrised
from cryoiso.pipeline.stages.engines import require_engine
from cryoiso.refine import batches
from cryoiso.refine.relaxation import Relaxation, _rotated
from cryoiso.refine.search import PriorPoses
from cryoiso.refine.view_density import view_grid

OPERATIONS = point_group("C3")


@lru_cache(maxsize=4)
def pseudo_trimer(n: int, snr_db: float = -3.0) -> tuple[ArraySource, np.ndarray]:
    """Images of the trimer without one of its heads, with their true poses in a register drawn at random, and the true
    poses (n, 3, 3)."""
    atoms = trimer(1)
    keep = np.ones(len(atoms.coords_A), bool)
    third = len(keep) // 3
    keep[:third] = atoms.coords_A[:third, 2] < 20
    truth = pseudo_atoms_to_map(*(a[keep] for a in atoms), BOX, PIXEL_A, 14.0)
    source = in_memory(simulate(truth, n, snr_db=snr_db, shift_sd_A=4.0, seed=3))
    particles = source.particles
    register = np.random.default_rng(1).integers(0, 3, n)
    given = particles.with_poses(particles.rotation @ OPERATIONS[register], particles.shift_A)
    made = ArraySource(source.read(np.arange(n)), given)
    made.truth = truth
    return made, particles.rotation


def relaxed(n: int, folder: Path | None, symmetric: bool, **settings) -> RefineRequest:
    source, _ = pseudo_trimer(n)
    reference: DensityMap = symmetrised(source.truth, "C3") if symmetric else source.truth
    settings = {"relax_symmetry": "C3", "max_iterations": 10, **settings}
    return replace(request_for(source, folder, "C1", reference, **settings), source=source, local_deg=8.0)


def registers(rotation: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(n,) the operation S whose A S is nearest."""
    return np.argmin([angular_distance_deg(true @ op, rotation) for op in OPERATIONS], axis=0)


def test_registers_are_found_with_a_reference_that_has_one(tmp_path):
    """A third of the given poses is right, 99 % of the found ones."""
    source, true = pseudo_trimer(100)
    assert np.mean(registers(source.particles.rotation, true) == 0) < 0.5
    result = NativeEngine().refine(relaxed(100, tmp_path, symmetric=False, max_iterations=3), Context())
    assert np.mean(registers(result.particles.rotation, true) == 0) > 0.95


def test_a_symmetric_reference_ends_in_one_register_for_both_halves(tmp_path):
    """Which one is chance. Without bringing the second half to the first one's the halves end in two."""
    _, true = pseudo_trimer(160)
    result = NativeEngine().refine(relaxed(160, tmp_path, symmetric=True), Context())
    found = registers(result.particles.rotation, true)
    assert np.bincount(found).max() / len(found) > 0.95
    modulo = np.min([angular_distance_deg(true @ op, result.particles.rotation) for op in OPERATIONS], axis=0)
    assert np.median(modulo) < 5.5, "the poses modulo C3 are as good as those of a refinement in C1"


def test_the_second_half_comes_to_the_register_of_the_first():
    source, true = pseudo_trimer(100)
    request = relaxed(100, None, symmetric=True)
    relaxation = Relaxation.of_request(request)
    assert relaxation.at_random and not Relaxation.of_request(relaxed(100, None, symmetric=False)).at_random

    from cryoiso.physics.resample import place_map
    from cryoiso.refine.intensity import Intensity
    from cryoiso.refine.model import Model
    from cryoiso.refine.schedule import ScheduleState

    turned = place_map(source.truth.data, PIXEL_A, OPERATIONS[1], np.zeros(3))
    maps = {1: source.truth.data, 2: turned}
    half = source.particles.half
    poses = np.where((half == 2)[:, None, None], true @ OPERATIONS[1].T, true)
    cells = view_grid()
    views = {h: np.bincount(cells.index(poses[half == h][:, 2]), minlength=len(cells)) for h in maps}
    model = Model(
        ScheduleState(iteration=3, done=True), maps, np.ones((1, 5)), Intensity.ones(100), poses, np.zeros((100, 2)),
        half_maps=maps, views=views,
    )  # fmt: skip
    found = relaxation.settled(model, poses, np.ones(100, bool), Context())
    np.testing.assert_allclose(found.rotation, true, atol=1e-6)
    for made in (found.references, found.half_maps):
        assert np.corrcoef(made[2].ravel(), source.truth.data.ravel())[0, 1] > 0.99
    assert not found.state.done and found.views[2].sum() == views[2].sum()
    back = _rotated(found.views[2].astype(float), OPERATIONS[1])
    assert np.corrcoef(back, views[2])[0, 1] > 0.8
    # halves in one register, and nobody moves: converged
    model = replace(model, rotation=true, references=dict.fromkeys((1, 2), source.truth.data))
    assert relaxation.settled(model, true, np.ones(100, bool), Context()) is model
    assert not relaxation.settled(model, true @ OPERATIONS[1], np.ones(100, bool), Context()).state.done


def test_copies_of_given_poses():
    rng = np.random.default_rng(0)
    given, rotations = random_rotations(rng, 4), random_rotations(rng, 5)
    near = PriorPoses(*(torch.as_tensor(x, dtype=torch.float32) for x in (given, np.zeros((4, 2)), OPERATIONS)))
    turned = near.turned(torch.as_tensor(rotations, dtype=torch.float32))
    assert turned.shape == (4, 15, 3, 3)
    np.testing.assert_allclose(turned[2, 3 * 4 + 1], rotations[4] @ given[2] @ OPERATIONS[1], atol=1e-5)
    index = torch.tensor([[0, 7], [14, 3], [1, 1], [5, 9]])
    taken = near.taken(torch.as_tensor(rotations, dtype=torch.float32), index)
    np.testing.assert_allclose(taken, turned.gather(1, index[..., None, None].expand(-1, -1, 3, 3)), atol=1e-6)
    inside = near.is_near(torch.as_tensor(given[1] @ OPERATIONS, dtype=torch.float32)[None], torch.tensor([1]), 2.0)
    assert inside.all()
    assert not near.is_near(
        torch.as_tensor(given[1] @ rotations, dtype=torch.float32)[None], torch.tensor([1]), 2.0
    ).any()


RANKS_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_relaxation as t
from cryoiso.parallel.context import get_context
t.batches.BATCH_IMAGES = 16
t.NativeEngine().refine(t.relaxed(60, Path(sys.argv[2]), True, max_iterations=3), get_context())
"""


@pytest.mark.mpi
def test_ranks_and_interruptions_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_IMAGES", 16)
    require_same_bits(lambda folder: relaxed(60, folder, True, max_iterations=3), RANKS_SCRIPT, tmp_path)


def test_what_does_not_go_together_is_refused():
    for request in (
        replace(relaxed(60, None, True), symmetry="C3"),
        replace(relaxed(60, None, True), local_deg=None),
        relaxed(60, None, True, junk=True),
    ):
        with raises_code("options-conflict"):
            Relaxation.of_request(request)
    job = parse_job({
        "particles": {"file": "a.star"}, "reference": {"file": "b.mrc"},
        "refine": {"engine": "relion", "relax_symmetry": "C3"},
    })  # fmt: skip
    with pytest.raises(UsageError, match=r"relax_symmetry"):
        require_engine(job)
