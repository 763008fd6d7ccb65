"""The native engine with a correction of its references: what is searched with, resuming, any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mpi_helper import run_mpi
from realign_helper import use_quick_networks
from test_realign import BOX, HALVES, TINY, away
from test_refine_engine import DIAMETER_A, PIXEL_A, contents, request_for, small_set

from cryoiso.core.config import RealignSection
from cryoiso.core.errors import Interrupted
from cryoiso.core.protocols import HalfMaps
from cryoiso.engines.native import NativeEngine
from cryoiso.io import checkpoint
from cryoiso.methods.anisotropy import correction_run
from cryoiso.methods.misalignment.correction import MapCorrection
from cryoiso.metrics.fsc_curve import resolution_at
from cryoiso.parallel import group_stop
from cryoiso.parallel.context import Context
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group
from cryoiso.refine.initial_model import initial_model
from cryoiso.refine.iterate import Refinement


@pytest.fixture(scope="module")
def few():
    return small_set()


@pytest.fixture
def quick(monkeypatch):
    """Corrections of this process use the stand-in for the networks; the list of its calls."""
    return use_quick_networks(monkeypatch)


# --- the native engine with it


def realigned(source, folder: Path, realign: RealignSection | None = None, **settings):
    correction = MapCorrection(realign or RealignSection(), TINY, 1)
    folder.mkdir(exist_ok=True)
    return replace(
        request_for(source, folder, **{"max_iterations": 3, "healpix_order": 1, **settings}), correction=correction
    )


def test_an_iteration_searches_with_corrected_references(few, tmp_path, quick):
    """Half-maps and poses of the first iteration are the plain engine's; its references are not."""
    request = realigned(few, tmp_path)
    (tmp_path / "correction").mkdir()
    plain = Refinement(replace(request, correction=None), Context(), "cpu", DIAMETER_A)
    model = initial_model(plain, 40.0)
    one, other = plain.step(model), Refinement(request, Context(), "cpu", DIAMETER_A).step(model)
    for half in HALVES:
        np.testing.assert_array_equal(one.half_maps[half], other.half_maps[half])
        assert away(other.references[half], one.references[half]) > 0.005
        outside = plain.sphere == 0
        assert np.abs(other.references[half][outside]).max() == 0
    np.testing.assert_array_equal(one.rotation, other.rotation)
    record = other.history[-1]["correction"]
    assert record["applied"] and record["networks"] == ["network-001-1.npz", "network-001-2.npz"]
    assert record["loss"]["1"][0] == 2.0 and "correction" not in one.history[-1]


def test_what_the_engine_says_and_leaves(few, tmp_path, quick):
    seen = []
    request = replace(realigned(few, tmp_path, max_iterations=5), on_checkpoint=seen.append)
    (tmp_path / "correction").mkdir()
    (tmp_path / "correction/inputs.txt").write_text("of another refinement")
    result = NativeEngine().refine(request, Context())
    assert [r["correction"]["applied"] for r in result.iterations] == [True] * (len(seen) - 1) + [False]
    assert "no further iteration" in result.iterations[-1]["correction"]["why_not"]
    assert quick[0]["warm"] is None
    summary = json.loads((tmp_path / "refine.json").read_text())
    assert summary["correction"]["halves_share_a_network"] is False
    assert summary["iterations"][0]["correction"]["mean_transfer"] > 0.5
    left = {p.name for p in (tmp_path / "correction").iterdir()}
    kept = range(max(1, len(seen) - 3), len(seen))
    assert left == {f"network-{i:03d}-{half}.npz" for i in kept for half in HALVES}


class Recorder:
    """A correction that changes nothing and remembers what it was told."""

    def __init__(self) -> None:
        self.states: list[HalfMaps] = []

    def wants(self, state: HalfMaps) -> bool:
        return True

    def why_not(self, state: HalfMaps) -> str:
        return ""

    def facts(self) -> dict:
        return {}

    def __call__(self, state: HalfMaps, comm) -> tuple[dict, dict]:
        self.states.append(state)
        return state.references, {"applied": True}


def test_what_a_correction_is_told(few, tmp_path):
    """Raw half-maps, the plain engine's references, its FSC, the sampling before the last halving, the start."""
    recorder = Recorder()
    request = replace(realigned(few, tmp_path, max_iterations=3), correction=recorder)
    run = Refinement(request, Context(), "cpu", DIAMETER_A)
    model = initial_model(run, 40.0)
    after = run.step(model)
    (state,), record = recorder.states, after.history[0]
    assert (state.iteration, state.pixel_size_A, state.folder) == (1, PIXEL_A, tmp_path / "correction")
    assert state.step_deg == 2 * record["step_deg"] and state.resolution_A == record["resolution_A"]
    assert resolution_at(state.fsc, 0.143, BOX, PIXEL_A) == state.resolution_A
    plain = Refinement(replace(request, correction=None), Context(), "cpu", DIAMETER_A).step(model)
    for half in HALVES:
        np.testing.assert_array_equal(state.maps[half], plain.half_maps[half])
        np.testing.assert_array_equal(state.references[half], plain.references[half])
        ratio = model.references[half] / np.where(state.initial[half] == 0, np.inf, state.initial[half])
        inside = np.abs(state.initial[half]) > 0.1 * state.initial[half].max()
        np.testing.assert_allclose(ratio[inside], ratio[inside][0], rtol=1e-5)


def test_before_it_works_the_engine_is_the_plain_one(few, tmp_path, quick):
    late = RealignSection(start_resolution_A=0.5)
    result = NativeEngine().refine(realigned(few, tmp_path / "late", late), Context())
    plain = NativeEngine().refine(replace(realigned(few, tmp_path / "plain"), correction=None), Context())
    np.testing.assert_array_equal(result.particles.rotation, plain.particles.rotation)
    assert all("not better than 0.5" in r["correction"]["why_not"] for r in result.iterations[:-1]) and not quick
    # the grid of the last level before it is halved: 30, 15 and 7.5 degrees were searched, then 3.75
    assert {"step_deg", "correction"} <= set(result.iterations[0])


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["after the checkpoint", "before the checkpoint"])
def test_resuming_gives_the_same_bits(few, tmp_path, quick, monkeypatch, moment):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    NativeEngine().refine(realigned(few, straight), Context())
    request = realigned(few, resumed)

    def kill(record) -> None:
        if record["iteration"] == 1:
            raise Killed

    with monkeypatch.context() as patch:
        if moment == "before the checkpoint":  # of iteration 2, whose networks are there already
            plain = MapCorrection.__call__

            def kill_later(self, state, comm):
                made = plain(self, state, comm)
                if state.iteration == 2:
                    raise Killed
                return made

            patch.setattr(MapCorrection, "__call__", kill_later)
        else:
            request = replace(request, on_checkpoint=kill)
        with pytest.raises(Killed):
            NativeEngine().refine(request, Context())
    NativeEngine().refine(replace(request, resume=True, on_checkpoint=None), Context())
    assert contents(resumed) == contents(straight)


def test_stopped_in_the_middle_of_a_training(few, tmp_path, monkeypatch):
    """The real networks, tiny: the training goes on where it was, and everything ends with the same bits."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    settings = {"max_iterations": 2}
    NativeEngine().refine(realigned(few, straight, RealignSection(epochs=4), **settings), Context())
    request = realigned(few, resumed, RealignSection(epochs=4), **settings)
    began = []
    for questions in (3, 4, 5):  # each attempt is told to stop after so many questions of a training whether to
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            left = [questions]

            def ring(left=left) -> bool:
                left[0] -= 1
                return left[0] < 0

            patch.setattr(group_stop.StopSignal, "received", lambda self: ring() or self._sent)
            patch.setattr(correction_run._Trainer, "heed", lambda self: None)  # asks between the trainings
            NativeEngine().refine(replace(request, resume=True), Context())
        began.append(sorted(p.parts[-3] for p in resumed.glob("correction/correction-001/training_*/checkpoint/*")))
    assert began[0] and began[-1] != began[0]
    NativeEngine().refine(replace(request, resume=True), Context())
    assert contents(resumed) == contents(straight)


RANKS_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_realign_engine as t
from cryoiso.parallel.context import get_context
t.realign_on_ranks(Path(sys.argv[2]), get_context(), int(sys.argv[3]))
"""


def realign_on_ranks(folder: Path, comm, ranks: int) -> None:
    """Three iterations with the real networks, tiny, and four batches a half-set."""
    from cryoiso.refine import batches

    if comm.size != ranks:
        raise RuntimeError(f"{comm.size} ranks instead of {ranks}")
    batches.BATCH_IMAGES = 16
    if comm.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    comm.barrier()
    NativeEngine().refine(realigned(small_set(), folder), comm)


@pytest.mark.mpi
def test_any_number_of_ranks(tmp_path):
    """One rank trains one half after the other, two side by side: the same bits. On four, two share a training, whose
    sums are rounded otherwise (found: references 6e-7 of their maximum, poses 1e-4 degrees)."""
    here = str(Path(__file__).parent)
    for n in (1, 2, 4):
        run_mpi(n, ["-c", RANKS_SCRIPT, here, tmp_path / str(n), str(n)])
    one = contents(tmp_path / "1")
    assert {"half1.mrc", "particles.star", "correction/network-002-1.npz"} <= set(one)
    assert contents(tmp_path / "2") == one
    (arrays, _), (others, _) = (checkpoint.load(tmp_path / n / "checkpoint/state.npz") for n in "14")
    for name in ("reference1", "reference2", "half1", "half2"):
        assert away(others[name], arrays[name]) < 1e-4
    moved = angular_distance_deg(arrays["rotation"], others["rotation"], point_group("C3"))
    assert np.mean(moved > 0.01) < 0.02
