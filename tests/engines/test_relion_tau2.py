"""Signal power from RELION's arrays: the right value where directions were measured unevenly, in every mode."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from errors_helper import raises_code
from pipeline_helper import cryoiso
from relion_helper import job_of, refine, write_task

from cryoiso.core.errors import UsageError
from cryoiso.engines.relion.callback_standalone import reconstruct_alone
from cryoiso.engines.relion.external import FourierArrays, read_arrays, read_task, reconstruct
from cryoiso.engines.relion.files import parse_name
from cryoiso.engines.relion.serve import Setting, serve
from cryoiso.engines.relion.tau2 import noise_of_shells, ratio, summed, with_uneven_tau2
from cryoiso.io.mrc import read_map
from cryoiso.parallel.context import Context
from cryoiso.pipeline.commands.relion_hook import correct_for_relion

TAU2 = 3.0


def task_of(tmp_path, box, padding):
    return replace(read_task(write_task(tmp_path, box, padding, box), tmp_path), fudge=1.0)


def uneven_halves(task, seed=1):
    """Two halves' arrays of one signal of power TAU2, whose weights differ a hundredfold within a shell, and the FSC
    that RELION computes of them: sums over the nearest points of the padded grid, then quotients."""
    rng = np.random.default_rng(seed)
    arrays = read_arrays(task)
    n, p = arrays.weight.shape[0], int(task.padding)
    k = np.where(np.arange(n) > n // 2, np.arange(n) - n, np.arange(n))
    near = (np.sign(k) * np.floor(np.abs(k) / p + 0.5)).astype(int)  # away from zero
    most = near.max()
    # the direction decides the weight: points that are summed have about the same
    shape = (2 * most + 1, 2 * most + 1, most + 1)
    density = np.exp(rng.uniform(np.log(0.1), np.log(10), shape))
    signal = np.sqrt(TAU2 / 2) * (rng.normal(size=shape) + 1j * rng.normal(size=shape))
    index = np.ix_(near + most, near + most, near[: n // 2 + 1])
    weight = density[index] * arrays.inside.numpy()
    made, means = [], []
    for _ in range(2):
        noise = (rng.normal(size=weight.shape) + 1j * rng.normal(size=weight.shape)) / np.sqrt(2)
        numerator = weight * signal[index] + np.sqrt(weight) * noise
        total, data = np.zeros(shape), np.zeros(shape, complex)
        np.add.at(total, index, weight)
        np.add.at(data, index, numerator)
        means.append(np.divide(data, total, out=np.zeros(shape, complex), where=total > 0))
        made.append(replace(arrays, numerator=torch.as_tensor(numerator), weight=torch.as_tensor(weight)))
    axis = np.arange(-most, most + 1)
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, most:] ** 2)
    shell = np.floor(radius + 0.5).astype(int).ravel()
    cross, one, two = (
        np.bincount(shell, v.ravel(), 99)[: len(task.tau2)]
        for v in ((means[0] * means[1].conj()).real, abs(means[0]) ** 2, abs(means[1]) ** 2)
    )
    return made, cross / np.sqrt(one * two), density


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_the_power_of_a_known_signal_is_found(tmp_path, padding):
    """RELION's formula, with the mean weight, makes it several times too small."""
    task = task_of(tmp_path, 40, padding)
    halves, fsc, _ = uneven_halves(task)
    shells = slice(6, 19)
    for arrays in halves:
        found = with_uneven_tau2(replace(task, fsc=fsc), arrays).tau2[shells]
        assert found.mean() == pytest.approx(TAU2, rel=0.1)
        np.testing.assert_allclose(found, TAU2, rtol=0.4)
        shell = (arrays.radius / padding + 0.5).long()
        mean = np.array([float(arrays.weight[(shell == s) & arrays.inside].mean()) for s in range(21)])
        relions = fsc / (1 - fsc) / (padding**3 * mean)
        assert (relions[shells] < 0.5 * TAU2).all()


def test_even_weights_give_what_relion_takes(tmp_path):
    """Far from the axes, where each coefficient has padding^3 points: 1 / (padding^3 w)."""
    task = task_of(tmp_path, 40, 2)
    arrays = read_arrays(task)
    even = replace(arrays, weight=0.25 * arrays.inside.double())
    total = summed(task, even)
    middle = len(total) // 2
    assert float(total[middle + 6, middle - 5, 4]) == pytest.approx(8 * 0.25)
    assert float(total[middle, middle, 4]) == pytest.approx(2 * 0.25)  # on two planes of zero frequency
    noise = noise_of_shells(task, even)
    assert noise[12] == pytest.approx(1 / (8 * 0.25), rel=0.3) and noise[12] >= 1 / (8 * 0.25)
    flat = replace(task, fsc=np.full(21, 0.5), fudge=4.0)
    np.testing.assert_allclose(with_uneven_tau2(flat, even).tau2[5:18], 4.0 * noise[5:18])
    joined = replace(flat, name=parse_name(task.star.with_name("run_class001_external_reconstruct.star")))
    np.testing.assert_allclose(with_uneven_tau2(joined, even).tau2[5:18], 8.0 * noise[5:18])


def test_shells_without_a_prior_or_without_weight_stay(tmp_path):
    star = write_task(tmp_path, 24, 2, 16)
    task = read_task(star, tmp_path)
    arrays = read_arrays(task)
    found = with_uneven_tau2(task, arrays).tau2
    assert (found[9:] == 0).all() and (found[2:8] > 0).all()
    empty = FourierArrays(arrays.numerator, torch.zeros_like(arrays.weight), arrays.radius, arrays.inside)
    np.testing.assert_array_equal(with_uneven_tau2(task, empty).tau2, task.tau2)
    assert ratio(task, task.tau2) == 1.0 and ratio(task, 3 * task.tau2) == 3.0


def expected_map(star, folder, uneven=True):
    task = read_task(star, folder)
    arrays = read_arrays(task)
    task = with_uneven_tau2(task, arrays) if uneven else task
    return reconstruct(task, arrays, regularised=True, iterative=False).numpy()


def with_pixel(star, current):
    star.write_text(star.read_text().replace(f"Size {current}\n", f"Size {current}\n_rlnPixelSize 1.25\n"))
    return star


def test_waiting_ranks_and_the_process_alone_write_the_same_and_say_so(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("ranks", "alone", "relion")]
    results = {}
    for folder in folders:
        folder.mkdir()
        stars = {h: write_task(folder, 24, 2, 20, half=h, seed=h) for h in (1, 2)}
        stars = {h: with_pixel(star, 20) for h, star in stars.items()}
        tasks = {h: read_task(star, folder) for h, star in stars.items()}
        wanted = {h: expected_map(star, folder, folder.name != "relion") for h, star in stars.items()}
        how = Setting(None, folder, 1.25, 2, iterative=False, tau2="relion" if folder.name == "relion" else "uneven")
        if folder.name == "alone":
            monkeypatch.chdir(folder)
            facts = {h: correct_for_relion(star, None, tau2="uneven", limit_s=5.0) for h, star in stars.items()}
            ratios = {h: facts[h]["tau2_over_relion"][str(h)] for h in (1, 2)}
        else:
            facts = serve(tasks, 7.5, how, Context())
            ratios = {h: facts.get("tau2_over_relion", {}).get(str(h)) for h in (1, 2)}
        results[folder.name] = ratios
        for h, task in tasks.items():
            found = read_map(task.result).data
            if folder.name != "alone":  # alone and uncorrected it divides as the RELION of the run does
                np.testing.assert_allclose(found, wanted[h], atol=1e-6 * np.abs(wanted[h]).max())
            assert not task.weight.exists()
    assert results["relion"] == {1: None, 2: None}
    assert results["ranks"] == results["alone"] and all(r != 1.0 for r in results["ranks"].values())


def test_alone_the_last_reconstruction_is_regularised_as_well(tmp_path):
    star = with_pixel(write_task(tmp_path, 24, 2, 20), 20)
    for file in list(tmp_path.iterdir()):
        file.rename(file.with_name(file.name.replace("run_it003_half1", "run")))
    star = star.with_name(star.name.replace("run_it003_half1", "run"))
    star.write_text(star.read_text().replace("run_it003_half1", "run"))
    task = read_task(star, tmp_path)
    arrays = read_arrays(task)
    changed = with_uneven_tau2(task, arrays)
    wanted = reconstruct(changed, arrays, regularised=True, iterative=True).numpy()
    assert "tau2_over_relion" in reconstruct_alone(star, tmp_path, None, tau2="uneven")
    np.testing.assert_allclose(read_map(task.result).data, wanted, atol=1e-6 * np.abs(wanted).max())
    with raises_code("choice-unknown", UsageError):
        correct_for_relion(star, None, tau2="mine", limit_s=1.0)


@pytest.fixture(scope="module")
def relion_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    done = cryoiso("simulate", "phantom", folder, "--n", 60, "--box", 24, "--pixel-size", 7, "--snr-db", 10, "--halves")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.relion
def test_relion_is_regularised_by_ours_without_a_correction(relion_set, tmp_path):
    """RELION calls in every iteration, the record tells, and the poses are not those of its own regularisation."""
    for name, more in (("own", {}), ("ours", {"tau2": "uneven"})):
        refine(1, job_of(relion_set, **more), tmp_path / name, "plain")
    record = json.loads((tmp_path / "ours/refine.json").read_text())
    told = [r["correction"] for r in record["iterations"]]
    assert len(told) == 2 and all(t["tau2"] == "uneven" and not t["applied"] for t in told)
    assert all(set(t["tau2_over_relion"]) == {"1", "2"} for t in told)
    assert "correction" not in record
    own = json.loads((tmp_path / "own/refine.json").read_text())
    assert all("correction" not in r for r in own["iterations"])
    stars = [(tmp_path / name / "particles.star").read_text() for name in ("own", "ours")]
    assert stars[0] != stars[1]
