"""The learned density of views and the prior made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryoiso.core.config import RefineSection
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import simulate
from cryoiso.physics.so3 import random_rotations
from cryoiso.physics.symmetry import point_group
from cryoiso.physics.views import Views, sample_rotations
from cryoiso.refine import schedule
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.search import Searcher
from cryoiso.refine.view_density import (
    COUNT_UNIT,
    STILL_EVEN,
    ViewCounts,
    ViewPrior,
    density,
    density_facts,
    log_prior,
    view_grid,
)

CELLS = len(view_grid())


def tensor(a) -> torch.Tensor:
    return torch.as_tensor(np.asarray(a, np.float32))


def counts_of(rotation: np.ndarray) -> np.ndarray:
    counts = ViewCounts.empty()
    counts.add(tensor(rotation), torch.ones(len(rotation)), ViewPrior.of(np.zeros(CELLS)))
    return counts.counts


def top_views(n: int = 2000) -> np.ndarray:
    return sample_rotations(Views("preferred", 0.98, 36.0), np.arange(n, dtype=np.uint64), 1)


def test_cells_are_those_of_the_grid():
    rotation = random_rotations(np.random.default_rng(0), 3000)
    prior = ViewPrior.of(np.arange(CELLS))
    expected = view_grid().index(rotation[:, 2])
    assert np.mean(prior(tensor(rotation)).numpy() == expected) > 0.999  # float32 at a border may fall either way
    assert np.array_equal(prior.index(tensor(view_grid().centres())).numpy(), np.arange(CELLS))


def test_counts_are_the_same_in_any_order_and_parts():
    rotation, weight = tensor(top_views(500)), torch.rand(500)
    grid, whole = ViewPrior.of(np.zeros(CELLS)), ViewCounts.empty()
    whole.add(rotation, weight, grid)
    parts = ViewCounts.empty()
    for rows in np.array_split(np.random.default_rng(1).permutation(500), 3):
        parts.add(rotation[rows], weight[rows], grid)
    assert np.array_equal(whole.counts, parts.counts)
    assert whole.counts.sum() / COUNT_UNIT == pytest.approx(float(weight.double().sum()), abs=1e-6)


@pytest.mark.parametrize("symmetry", ["C1", "C3", "D2"])
def test_density_is_smooth_and_symmetric(symmetry):
    views = top_views()
    smooth = density(counts_of(views), symmetry, 10.0)
    assert smooth.mean() == pytest.approx(1.0) and smooth.min() >= 0
    for operation in point_group(symmetry):
        mates = view_grid().index(view_grid().centres() @ operation.T)
        assert np.abs(smooth[mates] - smooth).mean() < 0.02  # a cell's mate is not quite a cell
    top = view_grid().centres()[:, 2] > np.cos(np.radians(20))
    share = np.mean(views[:, 2, 2] > np.cos(np.radians(20))) / top.mean() / (2 if symmetry == "D2" else 1)
    assert 0.7 * share < smooth[top].mean() < share  # the kernel spreads some of it
    assert np.array_equal(density(np.zeros(CELLS), symmetry, 10.0), np.ones(CELLS))


def test_even_views_have_no_prior():
    rotation = random_rotations(np.random.default_rng(2), 20000)
    smooth = density(counts_of(rotation), "C1", 10.0)
    assert np.abs(smooth - 1).max() < 0.15 and np.abs(smooth - 1).mean() < 0.04
    assert np.array_equal(log_prior(np.ones(CELLS), axis_odds=4.0, polarity_floor=0.1), np.zeros(CELLS))


def test_axial_factor_and_polarity():
    smooth = density(counts_of(top_views()), "C1", 10.0)
    mixed = 0.9 * smooth + 0.1
    pole = log_prior(smooth, axis_odds=1.0, polarity_floor=0.1)
    top, bottom, side = (view_grid().index(np.array([v])).item() for v in ((0, 0, 1.0), (0, 0, -1.0), (1.0, 0, 0)))
    # the odds of the two ends of an axis are those of the density; they add up to those of even views
    assert pole[top] - pole[bottom] == pytest.approx(np.log(mixed[top] / mixed[bottom]), abs=2e-2)
    assert np.exp(pole[top]) + np.exp(pole[bottom]) == pytest.approx(2.0, abs=1e-3)
    # a rare axis is as likely as a frequent one: no more than log 2 apart, where the density says log 40 or so
    assert abs(pole[side]) < 0.4 and np.log(mixed[top] / mixed[side]) > 3
    axis = log_prior(smooth, axis_odds=4.0, polarity_floor=1.0)
    assert axis[top] == pytest.approx(np.log(4)) == axis[bottom] and axis[side] == 0 == axis.min()
    # together they are the density itself where an axis is seen more often than even, but for what counts as even
    both = log_prior(smooth, axis_odds=1e9, polarity_floor=1e-9)
    assert both[top] == pytest.approx(np.log(smooth[top] / STILL_EVEN), abs=1e-6)
    slightly = 1 + 0.2 * np.sin(5 * np.arctan2(view_grid().centres()[:, 1], view_grid().centres()[:, 0]))
    assert not log_prior(slightly, axis_odds=4.0, polarity_floor=1.0).any()  # chance favours no axis of an even set


def test_the_search_heeds_the_prior():
    """Noise alone: with even odds about half of the views lie above the equator, with a strong prior all do."""
    truth = phantom_map(32, 6.0, 20.0)
    source = simulate(truth, 40, snr_db=-40.0, seed=3)
    settings = RefineSection(healpix_order=1)
    reader = BatchReader(source, source.particles, 6.0)
    batch = reader.read(np.arange(40), 6)
    white = whiten(batch, np.ones((1, 17)))
    plan = schedule.search_plan(
        schedule.ScheduleState(radius_px=6), settings, schedule.global_grid(1, "C1"), 32, 6.0, 100.0
    )
    volume = FourierVolume.from_volume(torch.as_tensor(truth.data), 2, 6)
    upper = np.where(view_grid().centres()[:, 2] > 0.1, 0.0, -1e3)
    even = Searcher(plan, volume).search(batch, white).best_rotation[:, 2, 2]
    told = Searcher(plan, volume, ViewPrior.of(upper)).search(batch, white)
    assert 0.2 < float((even > 0).float().mean()) < 0.8
    assert float(told.best_rotation[:, 2, 2].min()) > 0.0 and float(told.rotation[:, 2, 2].min()) > 0.0


def test_facts_for_the_report():
    counts = {1: counts_of(top_views()), 2: counts_of(top_views(300))}
    facts = density_facts(counts, "C3", RefineSection())
    assert len(facts["half1"]) == len(facts["half2"]) == CELLS
    assert np.mean(facts["half1"]) == pytest.approx(1.0, abs=1e-3)
    assert {"step_deg", "kernel_deg", "axis_odds", "polarity_floor"} <= set(facts) and facts["used"] is True
