"""Decisions between iterations, and checkpoints."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.config import RefineSection
from cryoiso.core.errors import InputError
from cryoiso.io import checkpoint
from cryoiso.refine.iteration_log import log_ending
from cryoiso.refine.schedule import (
    SETTLED_STEP_DEG,
    ScheduleState,
    advance,
    agreement_shell,
    disc_of_shifts,
    global_grid,
    search_plan,
    with_finer_steps,
)
from cryoiso.refine.search import SearchPlan


def test_agreement_shell():
    assert agreement_shell(np.array([1, 0.9, 0.5, 0.2, 0.1, 0.5, 0.0])) == 3
    assert agreement_shell(np.array([1, 0.9, 0.8])) == 2
    assert agreement_shell(np.array([1, 0.1, 0.8])) == 0


def step(state: ScheduleState, shell: int, change: float, **settings) -> ScheduleState:
    return advance(state, shell, change, 2.0, 1.5, RefineSection(**settings), 64, 31)


def test_resolution_grows_with_agreement_and_within_the_limit():
    state = ScheduleState(radius_px=5)
    radii = [step(state, s, 30.0).radius_px for s in (4, 8, 15, 31)]
    assert radii == sorted(radii) and radii[-1] == 31 and all(r > s for r, s in zip(radii[:3], (4, 8, 15)))
    assert step(state, 0, 30.0).radius_px >= 3
    assert step(state, 20, 30.0).best_shell == 20 and step(replace(state, best_shell=25), 20, 30.0).best_shell == 25


def test_it_stops_when_nothing_improves_and_particles_are_still():
    state = ScheduleState(radius_px=10)
    for shell, change in ((5, 90.0), (8, 20.0), (9, 5.0), (9, 2.0)):
        state = step(state, shell, change)
        assert not state.done
    state = step(state, 9, 1.9)  # same shell, no better movement
    assert state.done and state.iteration == 5
    # better agreement keeps it going although nothing moves
    assert not step(ScheduleState(best_shell=9, last_change_deg=1.0), 10, 0.1).done
    # and an upper bound ends it in any case
    assert step(ScheduleState(iteration=24), 30, 90.0, max_iterations=25).done


def test_it_always_stops():
    """Whatever the half-maps do, within max_iterations."""
    for seed in range(20):
        rng, state = np.random.default_rng(seed), ScheduleState()
        while not state.done:
            state = step(state, int(rng.integers(0, 31)), float(rng.uniform(0, 180)), max_iterations=9)
        assert state.iteration <= 9


def test_shifts_cover_a_disc_evenly():
    shifts = disc_of_shifts(3.0, 1.0).numpy()
    assert len(shifts) == 29 and tuple(shifts[0]) == (0, 0) and np.hypot(*shifts.T).max() <= 3
    np.testing.assert_allclose(shifts.mean(0), 0, atol=1e-6)
    assert len(np.unique(shifts, axis=0)) == 29


@pytest.mark.parametrize("radius", [4, 10, 25])
def test_search_plans(radius):
    """Finer levels for finer references, ending with the whole radius; coarse ones see no more than their grid can."""
    settings = RefineSection(healpix_order=2)
    plan = search_plan(ScheduleState(radius_px=radius), settings, global_grid(1, "C1"), 64, 4.0, 150.0)
    cells = [level.cell_deg for level in plan.levels]
    assert cells == [15.0 / 2**i for i in range(len(cells))]
    assert plan.levels[-1].radius_px == radius
    radii = [plan.coarse_radius_px, *(level.radius_px for level in plan.levels)]
    assert radii == sorted(radii) and radii[0] <= 16
    resolution = 64 * 4.0 / radius
    finest = np.radians(cells[-1] / 2) * 150.0 / 2
    assert finest < 0.25 * resolution, "one step moves the edge by a quarter of the resolution at most"
    finer = search_plan(ScheduleState(radius_px=31), settings, global_grid(1, "C1"), 64, 4.0, 150.0)
    assert len(finer.levels) >= len(plan.levels)
    limited = RefineSection(healpix_order=2, finest_step_deg=4.0)
    coarse = search_plan(ScheduleState(radius_px=31), limited, global_grid(1, "C1"), 64, 4.0, 150.0)
    assert coarse.levels[-1].cell_deg / 2 >= 4.0 / 1.5


def last_step(uncertainty_deg: float, radius_px: int = 127, diameter_A: float = 250.0, **settings) -> float:
    """Of a box of 256 px of 1.2 Å."""
    state = ScheduleState(radius_px=radius_px, uncertainty_deg=uncertainty_deg)
    plan = search_plan(state, RefineSection(**settings), global_grid(1, "C1"), 256, 1.2, diameter_A)
    return plan.levels[-1].cell_deg / 2


def test_the_finest_step_follows_resolution_and_diameter_where_poses_are_certain():
    """2.4 Å over 250 Å: 0.3 of it is 0.17 degrees, which steps of 15 / 2^n reach at 0.23."""
    asked = np.degrees(0.3 * 256 * 1.2 / 127 / 250)
    assert asked < last_step(0.01) <= 1.42 * asked
    assert last_step(0.01, diameter_A=800.0) < last_step(0.01) and last_step(0.01, radius_px=20) > 0.8
    for uncertain in (0.6, 3.0, 180.0):
        assert last_step(uncertain) == last_step(180.0, finest_step_deg=0.5) == pytest.approx(15 / 32)
    assert last_step(180.0, finest_step_deg=0.1) == last_step(0.01), "a number is taken whatever the posteriors say"
    assert last_step(0.01, finest_step_deg=2.0) == pytest.approx(15 / 8)


@pytest.mark.parametrize("uncertainty", [0.0, 0.3, 2.0, 180.0])
def test_where_resolution_asks_for_no_finer_step_nothing_changes(uncertainty):
    for radius in range(3, 24):
        state = ScheduleState(radius_px=radius, uncertainty_deg=uncertainty)
        auto, before = (
            search_plan(state, RefineSection(**s), global_grid(1, "C1"), 48, 4.5, 150.0)
            for s in ({}, {"finest_step_deg": 0.5})
        )
        assert auto.levels == before.levels


@pytest.mark.parametrize("true_deg", [0.02, 0.1, 0.2, 0.4])
def test_steps_halve_until_the_poses_are_as_uncertain_and_no_further(true_deg):
    """An iteration cannot tell more than half of its step; a posterior over several cells ends the halving."""
    state, steps = ScheduleState(radius_px=127), []
    for _ in range(8):
        state = replace(state, radius_px=127)
        steps.append(last_step(state.uncertainty_deg, diameter_A=2000.0))
        seen = max(true_deg * np.sqrt(3), steps[-1] / 2)
        state = advance(state, 120, 0.1, 0.2, 1.0, RefineSection(), 256, 127, seen)
    assert steps == sorted(steps, reverse=True) and steps[-1] == steps[-2]
    assert all(a / b < 2.01 for a, b in itertools.pairwise(steps)), "one halving an iteration"
    asked = np.degrees(0.3 * 256 * 1.2 / 127 / 2000)
    assert steps[-1] > min(0.5, max(asked, true_deg * np.sqrt(3))) / 1.42


def test_it_does_not_converge_while_steps_become_finer():
    settings = RefineSection(stalled_iterations=1, max_iterations=9)
    still = ScheduleState(iteration=4, stalled=1, done=True)
    assert with_finer_steps(still, 0.469, 0.234, settings) == replace(still, stalled=0, done=False)
    assert with_finer_steps(still, 0.234, 0.234, settings).done and with_finer_steps(still, 0.234, 0.469, settings).done
    assert with_finer_steps(still, 0.94, SETTLED_STEP_DEG, settings).done, "coarser steps come with the resolution"
    assert with_finer_steps(replace(still, iteration=9), 0.469, 0.234, settings).done


@pytest.mark.parametrize("value", [0, -1, "nan", "fine", True])
def test_a_finest_step_is_auto_or_a_positive_number(value):
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="Input should be 'auto' or a finite number above 0"):
        RefineSection(finest_step_deg=value)
    assert RefineSection().finest_step_deg == "auto" and RefineSection(finest_step_deg="0.25").finest_step_deg == 0.25


def test_shift_range_follows_the_settings_and_the_data():
    grid = global_grid(1, "C1")

    def plan(shift_sd_px: float, **settings) -> SearchPlan:
        state = ScheduleState(radius_px=12, shift_sd_px=shift_sd_px)
        return search_plan(state, RefineSection(**settings), grid, 64, 4.0, 150.0)

    narrow, wide, asked = plan(0.5), plan(9.0), plan(9.0, shift_range_A=12, shift_step_A=4)
    reach = [float(p.shifts_px.norm(dim=1).max()) for p in (narrow, asked, wide)]
    assert reach[1] == pytest.approx(3.0) and reach[2] <= 6.4
    assert len(narrow.shifts_px) >= 5


# --- checkpoints


ARRAYS = {"a b": np.arange(6.0).reshape(2, 3), "half1": np.zeros((3, 3, 3), np.float32)}


def test_checkpoints_come_back(tmp_path):
    path = tmp_path / "deep" / "state.npz"
    assert checkpoint.load(path) is None
    checkpoint.save(path, ARRAYS, {"iteration": 1, "nested": {"x": [1, 2.5]}})
    arrays, values = checkpoint.load(path)
    assert values == {"iteration": 1, "nested": {"x": [1, 2.5]}} and set(arrays) == set(ARRAYS)
    for k, v in ARRAYS.items():
        np.testing.assert_array_equal(arrays[k], v)
        assert arrays[k].dtype == v.dtype


def test_the_generation_before_is_kept(tmp_path):
    path = tmp_path / "state.npz"
    for i in range(3):
        checkpoint.save(path, ARRAYS, {"iteration": i})
    assert checkpoint.load(path)[1]["iteration"] == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["state.npz", "state.previous.npz"]
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:100] + b"x" * 200 + whole[300:]):
        path.write_bytes(damaged)
        assert checkpoint.load(path)[1]["iteration"] == 1
    path.unlink()  # stopped between the two renames
    assert checkpoint.load(path)[1]["iteration"] == 1
    checkpoint.previous(path).write_bytes(b"nothing")
    assert checkpoint.load(path) is None


def test_checkpoints_of_another_format_are_not_taken(tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    checkpoint.save(path, ARRAYS, {"iteration": 0})
    monkeypatch.undo()
    with raises_code("version-mismatch", InputError, match="a later version of the program wrote this file"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("iteration", "moved_deg", "stalled", "words"),
    [
        (5, 2.0, 1, []),
        (5, 2.0, 0, ["ended by refine.max_iterations = 5, not converged"]),
        (2, 85.0, 1, ["still moved by a median of 85° in the last iteration"]),
        (1, 85.0, 0, ["ended by refine.max_iterations = 5, not converged"]),
    ],
    ids=["converged", "ended by the limit", "unsettled", "first iteration: every pose is new"],
)
def test_a_refinement_whose_poses_are_not_settled_says_so(caplog, iteration, moved_deg, stalled, words):
    record = {"iteration": iteration, "changes_deg": moved_deg}
    with caplog.at_level(logging.INFO, "cryoiso"):
        log_ending(record, stalled, RefineSection(max_iterations=5))
    assert len(caplog.messages) == len(words) and all(w in m for w, m in zip(words, caplog.messages, strict=True))


def test_unsettled_poses_of_images_that_need_not_match_are_no_warning(caplog):
    """A control refines noise: its poses are not settled, and the user's particles are not meant."""
    record = {"iteration": 4, "changes_deg": 85.0}
    with caplog.at_level(logging.INFO, "cryoiso"):
        for expected in (False, True):
            log_ending(record, 1, RefineSection(), expected=expected)
    assert [entry.levelname for entry in caplog.records] == ["WARNING", "INFO"]
