"""Local refinement: a search that stays near given poses, and a first reference of its own for each half-set."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi_helper import run_mpi
from pipeline_helper import cryoiso_here, simulate
from test_refine_engine import (
    BOX,
    DIAMETER_A,
    PIXEL_A,
    agree,
    contents,
    errors_of,
    in_memory,
    request_for,
    torch_scores,
)

from cryoiso.core.config import RefineSection
from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE, InputError, Interrupted
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import Particles
from cryoiso.engines.native import NativeEngine
from cryoiso.io import read_particle_file
from cryoiso.io.sources import ArraySource
from cryoiso.parallel.context import Context
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.filters import lowpass
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import simulate as simulate_images
from cryoiso.physics.so3 import angular_distance_deg, random_rotations, rotvec_to_matrix
from cryoiso.refine import batches, maximise, search
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.initial_model import initial_model
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.likelihood import global_scores, local_scores, near_scores, near_scores_torch, whiten
from cryoiso.refine.schedule import ScheduleState, local_grid, search_plan
from cryoiso.refine.search import PriorPoses, Searcher

LOCAL_DEG = 8.0
ROUNDING = 1.001
"""Rotations are float32 inside the search."""


def turned(particles: Particles, angle_deg, shift_px: float, seed: int = 0) -> Particles:
    """The particles with every pose turned about a random axis and every shift moved in a random direction."""
    rng, n = np.random.default_rng(seed), len(particles)
    axis = rng.normal(size=(n, 3))
    axis *= np.radians(np.broadcast_to(angle_deg, n))[:, None] / np.linalg.norm(axis, axis=1, keepdims=True)
    where = rng.uniform(0, 2 * np.pi, n)
    away = shift_px * PIXEL_A * np.stack([np.cos(where), np.sin(where)], 1)
    return particles.with_poses(rotvec_to_matrix(axis) @ particles.rotation, particles.shift_A + away)


def small_source(n: int = 120, **options) -> ArraySource:
    """Images of the C3 phantom with their true poses."""
    options = {"snr_db": -3.0, "shift_sd_A": 4.0, "seed": 9, **options}
    return in_memory(simulate_images(phantom_map(BOX, PIXEL_A, 14.0), n, **options))


def with_given(source: ArraySource, particles: Particles) -> ArraySource:
    given = ArraySource(source.read(np.arange(len(particles))), particles)
    given.truth = source.truth
    return given


def local_request(source, folder: Path | None, local_deg: float | None = LOCAL_DEG, **settings) -> RefineRequest:
    return replace(request_for(source, folder, **settings), source=source, local_deg=local_deg)


@pytest.fixture(scope="module")
def trimers() -> ArraySource:
    """200 images of -5 dB, with their true poses."""
    return small_source(200, snr_db=-5.0, shift_sd_A=5.0, seed=3)


@pytest.fixture(scope="module")
def few() -> ArraySource:
    """120 images of -3 dB whose given poses are 4 degrees and a pixel off."""
    source = small_source()
    return with_given(source, turned(source.particles, 4.0, 1.0))


class Counter:
    """How many numbers a function returned in all its calls."""

    def __init__(self, function) -> None:
        self.function, self.count = function, 0

    def __call__(self, *arguments, **named):
        return self.counted(self.function(*arguments, **named))

    def counted(self, found):
        self.count += found.numel()
        return found


def count_scores(monkeypatch) -> tuple[Counter, Counter]:
    """Counts scored samples (view x shift) from now on: of the first grid, of the levels."""
    counters = Counter(global_scores), Counter(local_scores)
    monkeypatch.setattr(search, "global_scores", counters[0])
    monkeypatch.setattr(search, "near_scores", lambda *a: counters[0].counted(near_scores(*a)))
    monkeypatch.setattr(search, "local_scores", counters[1])
    return counters


# --- it works


def test_it_corrects_small_errors_with_few_samples(trimers, tmp_path, monkeypatch):
    """4 degrees and 6 Å off: 2.4 degrees and 0.8 Å after it (global search: 3.4, 0.8) with a hundredth of the
    samples of the first grid."""
    given = turned(trimers.particles, 4.0, 1.0)
    before = errors_of(given, trimers.particles, "C3")
    assert before.median_deg > 3.5 and before.median_shift_A > 5
    everywhere = count_scores(monkeypatch)
    found = NativeEngine().refine(request_for(trimers, tmp_path / "global"), Context())
    near = count_scores(monkeypatch)
    local = NativeEngine().refine(local_request(with_given(trimers, given), tmp_path / "local"), Context())
    reached, errors = (errors_of(result.particles, trimers.particles, "C3") for result in (found, local))
    assert errors.median_deg <= reached.median_deg and errors.median_deg < 0.75 * before.median_deg
    assert errors.fraction_over(10) == 0 and errors.median_shift_A < 1.1 * reached.median_shift_A < 1
    assert local.resolution_A <= found.resolution_A
    assert len(local.iterations) <= len(found.iterations) and near[0].count < 0.02 * everywhere[0].count
    assert near[0].count + near[1].count < 0.05 * (everywhere[0].count + everywhere[1].count)
    moved = angular_distance_deg(local.particles.rotation, given.rotation)
    assert np.median(moved) > 2 and moved.max() <= LOCAL_DEG * ROUNDING


def test_nobody_leaves_the_ball(trimers, tmp_path):
    """A fifth of the poses are 90 degrees off and stay so: the search is bounded, whatever the images say."""
    n = len(trimers.particles)
    wrong = np.arange(n) % 5 == 0
    given = turned(trimers.particles, np.where(wrong, 90.0, 4.0), 1.0)
    seen = []
    request = local_request(with_given(trimers, given), tmp_path, max_iterations=3)
    result = NativeEngine().refine(replace(request, on_checkpoint=seen.append), Context())
    moved = angular_distance_deg(result.particles.rotation, given.rotation)
    assert moved.max() <= LOCAL_DEG * ROUNDING and np.median(moved[wrong]) > 2
    left = angular_distance_deg(result.particles.rotation, trimers.particles.rotation)
    assert left[wrong].min() > 90 - LOCAL_DEG * ROUNDING and np.median(left[~wrong]) < 3
    assert len(seen) >= 2 and max(r["changes_deg"] for r in seen) <= 2 * LOCAL_DEG


@pytest.mark.parametrize("local_deg", [1.0, 5.0, 40.0])
def test_samples_of_the_posterior_are_in_the_ball(trimers, local_deg):
    """Not only the best pose: every view that is back-projected; from poses that are all wrong."""
    reader = BatchReader(trimers, trimers.particles, PIXEL_A)
    batch = reader.read(np.arange(60), 12)
    given = PriorPoses(
        torch.as_tensor(random_rotations(np.random.default_rng(1), 60), dtype=torch.float32), torch.zeros(60, 2)
    )
    settings, grid = RefineSection(), local_grid(2, local_deg)
    plan = search_plan(ScheduleState(radius_px=12), settings, grid, BOX, PIXEL_A, DIAMETER_A, local_deg)
    volume = FourierVolume.from_volume(torch.as_tensor(trimers.truth.data))
    found = Searcher(plan, volume).search(batch, whiten(batch, np.ones((1, BOX // 2 + 1))), given)
    start = given.rotation.double().numpy()
    samples = angular_distance_deg(found.rotation.double().numpy(), start[found.particle.numpy()])
    assert samples.max() <= local_deg * ROUNDING and samples.max() > 0.7 * local_deg
    assert angular_distance_deg(found.best_rotation.numpy(), start).max() <= local_deg * ROUNDING
    assert torch.isfinite(found.log_evidence).all() and float(found.max_weight.min()) > 0


def test_the_first_grid_is_the_ball():
    """Its first turn is none; all are within the limit, and no turn inside is farther than a cell from one."""
    inside = rotvec_to_matrix(np.radians(np.random.default_rng(0).normal(size=(300, 3)) * 2))
    for order, local_deg, step in ((2, 6.0, 3.0), (2, 45.0, 15.0), (1, 45.0, 22.5)):
        grid = local_grid(order, local_deg).double().numpy()
        np.testing.assert_array_equal(grid[0], np.eye(3))
        assert angular_distance_deg(grid, np.eye(3)).max() <= local_deg * ROUNDING and len(grid) >= 33
        nearest = [angular_distance_deg(grid, turn).min() for turn in inside]
        near = angular_distance_deg(inside, np.eye(3)) < local_deg
        assert np.array(nearest)[near].max() < step


def test_scores_near_given_poses_are_those_of_a_global_grid(trimers):
    """Views of its own for every image give the numbers that one common grid of the same views gives."""
    batch = BatchReader(trimers, trimers.particles, PIXEL_A).read(np.arange(6), 10)
    white = whiten(batch, np.ones((1, BOX // 2 + 1)))
    volume = FourierVolume.from_volume(torch.as_tensor(trimers.truth.data))
    rotation = torch.as_tensor(trimers.particles.rotation[:6], dtype=torch.float32)
    shift = torch.as_tensor(-trimers.particles.shift_A[:6] / PIXEL_A, dtype=torch.float32)
    prior, rotations = PriorPoses(rotation, shift), local_grid(2, 10.0)
    views = prior.turned(rotations)
    own = search.ReferenceSlices.of(volume, views, white.disc, None)
    offsets = torch.tensor([[0.0, 0.0], [1.5, -0.5], [-2.0, 1.0]])
    found = global_scores(prior.centre(white), own, offsets, torch.zeros(3))
    for i in range(6):
        common = search.ReferenceSlices.of(volume, views[i], white.disc, None)
        expected = global_scores(white, common, offsets + shift[i], torch.zeros(3))[i]
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=0.02)
        np.testing.assert_allclose(views[i, 5], rotations[5] @ rotation[i], atol=1e-6)


def test_shifts_stay_near_the_given_ones(trimers, tmp_path):
    """5 pixels off with a range of 1.5: they move towards the truth and no farther than the levels can step."""
    far = trimers.particles.with_poses(trimers.particles.rotation, trimers.particles.shift_A + np.array([30.0, 0]))
    request = local_request(with_given(trimers, far), tmp_path, max_iterations=2)
    request = replace(request, settings=request.settings.model_copy(update={"shift_range_A": 9.0, "shift_step_A": 4.5}))
    result = NativeEngine().refine(request, Context())
    moved = result.particles.shift_A - far.shift_A
    assert np.abs(moved).max() <= 9 + 4.5 and np.median(moved[:, 0]) < -2
    # the prior's width is that of the moves, not of the shifts themselves
    rms = float(np.sqrt(np.mean(moved**2)))
    assert result.iterations[-1]["shift_sd_A"] == pytest.approx(rms, rel=1e-3)


def test_shifts_go_as_far_as_the_turns_move_the_rim():
    """At most a tenth of the box, and at least one step."""

    def reach_A(local_deg: float, **settings) -> float:
        state = ScheduleState(radius_px=14, shift_sd_px=30.0)
        plan = search_plan(
            state, RefineSection(**settings), local_grid(2, local_deg), BOX, PIXEL_A, DIAMETER_A, local_deg
        )
        assert plan.local_deg == local_deg and plan.levels[0].cell_deg == min(15.0, local_deg / 2)
        return float(plan.shifts_px.norm(dim=1).max()) * PIXEL_A

    step = 3.5
    assert 10.1 - step < reach_A(8.0) <= 10.13 and 5 - step < reach_A(4.0) <= 5.07
    assert 19.2 - step < reach_A(60.0) <= 19.2 and 0 < reach_A(0.5) <= step
    assert 14 - step < reach_A(4.0, shift_range_A=14.0) <= 14


# --- a reference of its own for each half


def test_half_references_are_independent(few):
    """Another reference of half 2 leaves the bits of half 1 (nothing joined): start, poses, sums."""
    half = few.particles.half
    mirror = replace(few.truth, data=np.ascontiguousarray(few.truth.data[:, :, ::-1]))

    def first_step(second):
        request = local_request(few, None, join_halves_A=0.0)
        request = replace(request, half_references={1: few.truth, 2: second})
        run = Refinement(request, Context(), "cpu", DIAMETER_A)
        start = initial_model(run, 40.0)
        return start, run.step(start)

    (start, one), (other_start, other) = first_step(few.truth), first_step(mirror)
    np.testing.assert_array_equal(start.references[1], other_start.references[1])
    np.testing.assert_array_equal(one.rotation[half == 1], other.rotation[half == 1])
    np.testing.assert_array_equal(one.shift_A[half == 1], other.shift_A[half == 1])
    np.testing.assert_array_equal(one.half_maps[1], other.half_maps[1])
    assert np.abs(start.references[2] - other_start.references[2]).max() > 0.1 * start.references[2].max()
    assert not np.array_equal(one.rotation[half == 2], other.rotation[half == 2])
    assert not np.array_equal(one.half_maps[2], other.half_maps[2])


@pytest.mark.parametrize("local_deg", [None, LOCAL_DEG])
def test_the_common_reference_for_both_halves_is_the_default(few, local_deg):
    """With the references of both halves equal to the common one nothing changes; grey scale is the common one's."""
    request = local_request(few, None, local_deg)
    run = Refinement(request, Context(), "cpu", DIAMETER_A)
    own = Refinement(replace(request, half_references={1: few.truth, 2: few.truth}), Context(), "cpu", DIAMETER_A)
    one, other = initial_model(run, 40.0), initial_model(own, 40.0)
    for h in (1, 2):
        np.testing.assert_array_equal(one.references[h], other.references[h])
    scale = float(np.vdot(one.references[1], few.truth.data) / np.vdot(few.truth.data, few.truth.data))
    assert 0.5 < scale < 1.2
    local = local_deg is not None
    np.testing.assert_array_equal(one.rotation, few.particles.rotation if local else np.tile(np.eye(3), (120, 1, 1)))
    np.testing.assert_array_equal(one.shift_A, few.particles.shift_A if local else 0)


def test_the_grey_scale_is_that_at_the_given_poses():
    """True poses with shifts far beyond the range that is searched around them: a factor of 1."""
    source = small_source(snr_db=0.0, shift_sd_A=20.0)
    run = Refinement(local_request(source, None, 2.0), Context(), "cpu", DIAMETER_A)
    found = initial_model(run, 20.0).references[1]
    plain = np.asarray(lowpass(torch.as_tensor(source.truth.data), PIXEL_A, 20.0)) * run.sphere
    assert float(np.vdot(found, plain) / np.vdot(plain, plain)) == pytest.approx(1, abs=0.06)


# --- the same bits after an interruption and on any number of ranks


def test_resuming_gives_the_same_bits(few, tmp_path):
    iterations = {"max_iterations": 3, "join_halves_A": 0.0}

    def request(name: str) -> RefineRequest:
        halves = {1: few.truth, 2: replace(few.truth, data=0.9 * few.truth.data)}
        return replace(local_request(few, tmp_path / name, **iterations), half_references=halves)

    straight = NativeEngine().refine(request("straight"), Context())

    class StoppingContext(Context):
        left = 6 + 3  # three passes before the first iteration, two halves each; then as many questions an iteration

        def stop_requested(self) -> bool:
            self.left -= 1
            return self.left < 0

    with pytest.raises(Interrupted, match="what was found so far is kept"):
        NativeEngine().refine(request("resumed"), StoppingContext())
    seen = []
    resumed = NativeEngine().refine(replace(request("resumed"), resume=True, on_checkpoint=seen.append), Context())
    assert [r["iteration"] for r in seen] == list(range(2, len(straight.iterations) + 1)) and len(seen) >= 1
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")
    np.testing.assert_array_equal(resumed.particles.rotation, straight.particles.rotation)


RANKS_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_refine_local as t
t.batches.BATCH_IMAGES = 16
from cryoiso.parallel.context import get_context
t.refine_in_small_batches(Path(sys.argv[2]), get_context(), int(sys.argv[3]))
"""


def refine_in_small_batches(folder: Path, comm, ranks: int) -> None:
    """Two local iterations with four batches a half-set."""
    if comm.size != ranks:
        raise RuntimeError(f"{comm.size} ranks instead of {ranks}")
    assert batches.BATCH_IMAGES == 16
    source = small_source()
    source = with_given(source, turned(source.particles, 4.0, 1.0))
    NativeEngine().refine(local_request(source, folder, max_iterations=2), comm)


@pytest.mark.mpi
def test_one_two_and_three_ranks_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_IMAGES", 16)
    refine_in_small_batches(tmp_path / "1", Context(), 1)
    for n in (2, 3):
        run_mpi(n, ["-c", RANKS_SCRIPT, str(Path(__file__).parent), tmp_path / str(n), str(n)])
    one = contents(tmp_path / "1")
    assert {"half1.mrc", "half2.mrc", "particles.star", "checkpoint/state.npz"} <= set(one)
    assert contents(tmp_path / "2") == one and contents(tmp_path / "3") == one


COMPILED_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_refine_local as t
from cryoiso.parallel.context import Context
source = t.small_source()
source = t.with_given(source, t.turned(source.particles, 4.0, 1.0))
t.NativeEngine().refine(t.local_request(source, Path(sys.argv[2]), max_iterations=1), Context())
"""


def test_kernels_just_compiled_and_from_the_cache_give_the_same_bits(tmp_path):
    """A resumed job finds the kernels in numba's cache that the first one had to compile."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for name in ("compiled", "cached"):
        command = [sys.executable, "-c", COMPILED_SCRIPT, str(Path(__file__).parent), str(tmp_path / name)]
        subprocess.run(command, env=env, check=True, capture_output=True)
    assert any((tmp_path / "cache").rglob("*.nbc"))
    assert contents(tmp_path / "cached") == contents(tmp_path / "compiled")


# --- the other implementation of the heavy steps


def test_a_local_iteration_in_plain_torch_is_the_same(few, monkeypatch):
    """What a GPU runs, here on the CPU."""
    run = Refinement(local_request(few, None), Context(), "cpu", DIAMETER_A)
    model = initial_model(run, 40.0)
    one = run.step(model)
    monkeypatch.setattr(FourierVolume, "slices", FourierVolume.slices_torch)
    monkeypatch.setattr(SliceAccumulator, "insert", SliceAccumulator.insert_torch)
    monkeypatch.setattr(search, "local_scores", torch_scores)
    monkeypatch.setattr(search, "near_scores", near_scores_torch)
    monkeypatch.setattr(maximise, "model_terms", maximise.model_terms_torch)
    agree(one, run.step(model), few.particles)


@pytest.mark.gpu
def test_a_local_iteration_on_a_gpu_is_the_same(few):
    run = Refinement(local_request(few, None), Context(), "cpu", DIAMETER_A)
    there = Refinement(local_request(few, None), Context(), "cuda", DIAMETER_A)
    model, started = initial_model(run, 40.0), initial_model(there, 40.0)
    np.testing.assert_allclose(started.references[1], model.references[1], rtol=1e-3, atol=1e-4)
    agree(run.step(model), there.step(model), few.particles)


# --- what does not fit is refused


def test_what_does_not_fit_is_refused(few, tmp_path):
    def refuse(match: str, source=few, **changes) -> None:
        with pytest.raises(InputError, match=match):
            NativeEngine().refine(replace(local_request(source, tmp_path), **changes), Context())

    poseless = with_given(few, replace(few.particles, rotation=None, shift_A=None))
    refuse("the particles have no poses.*Give the output of a refinement", poseless)
    unknown = few.particles.with_poses(
        few.particles.rotation, np.where(np.arange(120) == 7, np.nan, 0.0)[:, None].repeat(2, 1)
    )
    refuse("row 8: the offset of a particle is not a number: 8@particles.mrcs", with_given(few, unknown))
    refuse("not an angle.*0 to 90 degrees, found 120", local_deg=120.0)
    refuse("each half-set needs", half_references={1: few.truth})
    small = replace(few.truth, data=few.truth.data[2:, 2:, 2:])
    refuse("half-set 2 is on another grid.*32 px of 6 Å, found 30 px", half_references={1: few.truth, 2: small})
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path):
    """From the poses of the particle file, no farther than asked; nothing is written where there are none."""
    folder = simulate(tmp_path / "set").parent
    words = ["--ref", folder / "truth_map.mrc", "--symmetry", "C3", "--max-iterations", 1]
    out = tmp_path / "out"
    failed = cryoiso_here("refine", folder / "particles.star", "--local", 5, "--out", out, *words)
    assert failed.returncode == EXIT_INPUT and "particles.star: the particles have no poses" in failed.stderr
    wrong = cryoiso_here("refine", folder / "truth.star", "--local", -5, "--out", out, *words)
    assert wrong.returncode == EXIT_USAGE and "--local: " in wrong.stderr and not out.exists()
    done = cryoiso_here("refine", folder / "truth.star", "--local", 5, "--out", out, *words)
    assert done.returncode == 0, done.stderr
    given, found = (read_particle_file(f) for f in (folder / "truth.star", out / "particles.star"))
    moved = angular_distance_deg(found.rotation, given.rotation)
    assert np.median(moved) > 0.2 and moved.max() <= 5 * ROUNDING
