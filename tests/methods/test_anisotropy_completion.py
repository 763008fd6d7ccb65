"""Completion: the solvent constraint, what the network is trained on, and corrected maps nearer to the truth."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from cryoiso.core.config import CorrectSection
from cryoiso.core.types import DensityMap
from cryoiso.methods.anisotropy.completion import CompletionTask
from cryoiso.methods.anisotropy.correct import correct_halves
from cryoiso.methods.anisotropy.filter import filtered, missing_cone, radii
from cryoiso.methods.anisotropy.settings import resolve
from cryoiso.methods.anisotropy.solvent import Solvent, noise_amplitude
from cryoiso.methods.anisotropy.submaps import GreyScale
from cryoiso.parallel.context import Context
from cryoiso.physics.masks import density_threshold, otsu, soft_mask_from_map
from cryoiso.physics.phantom import phantom_map

BOX = 32
CONE = missing_cone(BOX, 45.0)
ALL = np.ones((BOX,) * 3, np.float32)
TINY = CorrectSection(cube_px=16, sub_maps=16, batch=4, epochs=4)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """The phantom, without density below the solvent."""
    return np.clip(np.asarray(phantom_map(BOX, 6.0, 14.0).data, np.float32), 0, None)


def in_cone(found: np.ndarray, truth: np.ndarray) -> float:
    """Correlation of the coefficients in the missing cone."""
    where = (CONE < 0.01) & (radii(BOX) < 12)
    a, b = (np.fft.fftshift(np.fft.fftn(m))[where] for m in (found, truth))
    return float((a * b.conj()).real.sum() / np.sqrt((np.abs(a) ** 2).sum() * (np.abs(b) ** 2).sum()))


def filled(data: np.ndarray, transfer: np.ndarray, steps: int) -> np.ndarray:
    solvent = Solvent(transfer, ALL)
    return solvent.filled(solvent.measured(torch.from_numpy(data)), len(data), steps).numpy()


def test_the_solvent_constraint_keeps_what_was_measured_and_finds_some_of_the_rest(truth):
    seen = filtered(truth, CONE)
    np.testing.assert_allclose(filled(truth, CONE, 0), seen, atol=1e-5 * truth.max())
    found = filled(truth, CONE, 40)
    sure = (CONE > 0.999).astype(np.float32)
    np.testing.assert_allclose(filtered(found, sure), filtered(truth, sure), atol=1e-4 * truth.max())
    assert found.min() > 0.5 * seen.min(), "less below the solvent than before"
    assert in_cone(found, truth) > 0.5 > 0.1 > abs(in_cone(seen, truth))
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > np.corrcoef(seen.ravel(), truth.ravel())[0, 1] + 0.03
    np.testing.assert_allclose(filled(truth, ALL, 5), truth, atol=1e-5 * truth.max())


@pytest.mark.parametrize("transfer", [CONE, (0.5 + 0.5 * CONE).astype(np.float32)])
def test_no_step_of_the_solvent_leads_away_from_the_truth(truth, transfer):
    """From any beginning with the measured coefficients: each step is nearer than the one before, and stays there."""
    solvent = Solvent(transfer, ALL)
    measured = solvent.measured(torch.from_numpy(truth))
    noise = torch.from_numpy(np.random.default_rng(2).normal(size=truth.shape).astype(np.float32))
    found = solvent.joined(measured, torch.from_numpy(truth) + float(truth.std()) * noise)
    distances = []
    for _ in range(12):
        distances.append(float((found - torch.from_numpy(truth)).norm()))
        found = solvent.filled(measured, BOX, 1, start=found)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(distances))
    assert distances[-1] < 0.8 * distances[0]
    same = solvent.filled(measured, BOX, 3, start=torch.from_numpy(truth)).numpy()
    np.testing.assert_allclose(same, truth, atol=1e-5 * truth.max())


def test_noise_is_what_the_fsc_says_of_the_power():
    data = 3.0 * np.random.default_rng(0).normal(size=(BOX,) * 3).astype(np.float32)
    assert not noise_amplitude(data, ALL).any()
    whole, half = noise_amplitude(data, 0 * ALL), noise_amplitude(data, 0.75 * ALL)
    assert float(whole.square().mean().sqrt()) == pytest.approx(3.0, rel=0.03)
    torch.testing.assert_close(half, 0.5 * whole)


def task(estimates: list[np.ndarray], settings=None, **options) -> CompletionTask:
    settings = settings or resolve(TINY, "cpu")
    return CompletionTask(estimates, Solvent(CONE, ALL), radii(BOX) < 9, settings, 3, **options)


def test_the_network_sees_a_measured_copy_of_its_target(truth):
    """Turned, then measured: the given volume is the target without the cone, completed by the solvent."""
    made = task([truth], replace(resolve(TINY, "cpu"), solvent_steps=0))
    given, target = made._volumes(5)
    np.testing.assert_allclose(given.numpy(), filtered(target.numpy(), CONE), atol=1e-4 * truth.max())
    assert np.corrcoef(target.numpy().ravel(), truth.ravel())[0, 1] < 0.95, "it was turned"
    r = radii(BOX)
    sums = [float(volume[r < 14].sum()) for volume in (target.numpy(), truth)]
    assert sums[0] == pytest.approx(sums[1], rel=0.02)


def test_paired_targets_are_the_other_half(truth):
    made = task([truth, 2 * truth], replace(resolve(TINY, "cpu"), solvent_steps=0))
    ratios = set()
    for turn in range(8):
        given, target = made._volumes(turn)
        ratios.add(round(float(target.norm() / given.norm()), 0))
    assert len(ratios) == 2, "each half is seen, and the other one aimed at"


def test_ranks_share_the_sub_maps_of_one(truth):
    whole = task([truth]).prepare(3)["corner"]
    parts = [task([truth], index=i, size=3).prepare(3)["corner"] for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (whole >= 0).all() and (whole <= BOX - 16).all()
    one, two = task([truth]), task([truth])
    one._volumes(0)
    two._volumes(7)
    for a, b in zip(one._volumes(7), two._volumes(7), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("box", [BOX, 20])
def test_a_step_has_a_gradient_in_boxes_larger_and_smaller_than_a_sub_map(truth, box):
    start = (BOX - box) // 2
    small = np.ascontiguousarray(truth[(slice(start, start + box),) * 3])
    settings = resolve(TINY.model_copy(update={"cube_px": 24}), "cpu")
    solvent = Solvent(missing_cone(box, 45.0), np.ones((box,) * 3, np.float32))
    noise = [noise_amplitude(small, missing_cone(box, 45.0))]
    made = CompletionTask([small], solvent, radii(box) < 6, settings, 3, noise=noise)
    made.start(0)
    loss, terms = made.loss(made.module, made.prepare(0), 0, 0)
    loss.backward()
    assert loss.item() == pytest.approx(terms["without_network"].item()) and loss.item() > 0, "a new network is none"
    assert float(made.module.last.weight.grad.norm()) > 0


def corrected(maps, transfer, folder, settings):
    """Corrected maps and records."""
    halves = {i + 1: DensityMap(m, 6.0) for i, m in enumerate(maps)}
    return correct_halves(halves, transfer, None, settings, Context(), folder, seed=4)


def test_a_missing_cone_is_filled_with_what_the_truth_has_there(truth, tmp_path):
    seen = filtered(truth, CONE) + 5.0  # the solvent's level is not known
    alone = replace(resolve(TINY.model_copy(update={"epochs": 0}), "cpu"), mode="single")
    section = TINY.model_copy(update={"epochs": 16, "sub_maps": 32, "learning_rate": 2e-3})
    learnt = replace(resolve(section, "cpu"), mode="single")
    found = {}
    for name, settings in (("solvent", alone), ("network", learnt)):
        (tmp_path / name).mkdir()
        found[name] = corrected([seen], CONE, tmp_path / name, settings)
        assert in_cone(found[name].maps[1], truth) > 0.5
        np.testing.assert_allclose(
            filtered(found[name].maps[1] - seen, (CONE > 0.999).astype(np.float32)), 0, atol=1e-3 * truth.max()
        )
    records = found["network"].history["both"]
    assert [record["round"] for record in records[:: len(records) - 1]] == [1, 2]
    assert records[-1]["step"] == learnt.steps == 128
    assert np.mean([r["loss"] for r in records[-5:]]) < 0.97 * np.mean([r["without_network"] for r in records[-5:]])
    near = [np.corrcoef(m.ravel(), truth.ravel())[0, 1] for m in (seen, *(f.maps[1] for f in found.values()))]
    assert near[0] + 0.03 < near[1], "the solvent tells most where there is much of it"
    assert near[2] > near[1] - 0.005


@pytest.mark.parametrize("mode", ["independent", "paired"])
def test_noisy_halves_come_nearer_to_the_truth(truth, tmp_path, mode):
    rng = np.random.default_rng(2)
    fsc = np.clip(CONE * (radii(BOX) < 11) * 0.9, 0, 1).astype(np.float32)
    halves = []
    for _ in (1, 2):
        noise = rng.normal(size=truth.shape).astype(np.float32) * truth.std()
        halves.append(filtered(truth + noise, CONE))
    made = corrected(halves, fsc, tmp_path, resolve(TINY.model_copy(update={"mode": mode}), "cpu"))
    before, after = sum(halves) / 2, sum(made.maps.values()) / 2
    assert in_cone(after, truth) > 0.4
    near = [np.corrcoef(filtered(m, (radii(BOX) < 11) * ALL).ravel(), truth.ravel())[0, 1] for m in (before, after)]
    assert near[1] > near[0]


def test_the_solvent_level_is_that_around_the_particle():
    """Not of the corners of the box, which a reconstruction leaves empty."""
    inside = radii(BOX) < 8
    data = np.where(inside, 3.0, 1.0).astype(np.float32)
    data[inside] += np.random.default_rng(1).normal(size=inside.sum()).astype(np.float32)
    data[radii(BOX) > BOX / 2] = 0.0
    assert GreyScale.of([data], inside).level == pytest.approx(1.0)


def test_a_mask_of_a_map_without_a_cone_holds_the_particle(truth):
    """Streaks around the particle raise every measure of the solvent's noise; the mask must not shrink to a spot."""
    whole = np.asarray(soft_mask_from_map(truth, 6.0))
    for deg in (45.0, 60.0):
        found = np.asarray(soft_mask_from_map(filtered(truth, missing_cone(BOX, deg)), 6.0))
        assert (found * whole).sum() > 0.5 * whole.sum(), deg
        assert found.sum() < 2 * whole.sum()


def test_otsu_parts_two_levels_and_says_how_clearly():
    rng = np.random.default_rng(4)
    noise = rng.normal(size=20000)
    two = np.concatenate([noise, 8 + rng.normal(size=5000)])
    level, clearness = otsu(two)
    assert 2 < level < 6 and clearness > 0.9
    assert otsu(noise)[1] == pytest.approx(2 / np.pi, abs=0.03)
    volume = rng.normal(size=(24,) * 3)
    assert density_threshold(volume) > 4, "pure noise is not cut in two"
    assert otsu(np.zeros(10)) == (pytest.approx(0.0, abs=1.0), 0.0)
