"""Classification: laws of the posterior over classes, of the images' own shares, of ranks and interruptions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi_helper import run_mpi
from pipeline_helper import cryoiso_here, simulate
from test_refine_engine import BOX, DIAMETER_A, PIXEL_A, contents, in_memory
from test_refine_local import turned

from cryoiso.core.config import ClassifySection, RefineSection
from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE, InputError, Interrupted
from cryoiso.core.protocols import RefineRequest
from cryoiso.core.types import DensityMap
from cryoiso.engines.classify import classify, remove_further_classes
from cryoiso.io import read_particle_file
from cryoiso.io.sources import ArraySource
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import pseudo_atoms_to_map, trimer
from cryoiso.physics.simulation import SimulatedSource
from cryoiso.physics.simulation import simulate as simulate_images
from cryoiso.physics.so3 import angular_distance_deg
from cryoiso.physics.symmetry import point_group
from cryoiso.pipeline.stages.engines import class_request
from cryoiso.refine.classes.expectation import class_posterior
from cryoiso.refine.classes.initial import initial_classes
from cryoiso.refine.classes.iterate import Classification
from cryoiso.refine.classes.model import ClassModel, ClassRequest, assigned_classes
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.reconstruct import reconstruct_halves
from cryoiso.refine.search_cache import SearchCache

GRID = DensityMap(np.zeros((BOX,) * 3, np.float32), PIXEL_A)


class TwoStates(ArraySource):
    """300 images, 30 % of them of the trimer without one head."""

    state: np.ndarray
    maps: tuple[DensityMap, DensityMap]


def two_states(n: int = 300, snr_db: float = -3.0, seed: int = 5) -> TwoStates:
    atoms = trimer(1)
    keep = np.ones(len(atoms.coords_A), bool)
    keep[: len(keep) // 3] = atoms.coords_A[: len(keep) // 3, 2] < 20
    whole, part = (
        pseudo_atoms_to_map(*(a[rows] for a in atoms), BOX, PIXEL_A, 14.0) for rows in (np.ones(len(keep), bool), keep)
    )
    first = simulate_images(whole, n, snr_db=snr_db, shift_sd_A=4.0, seed=seed)
    scale = np.float32(first.volume.data.max() / whole.data.max())
    maps = first.volume, replace(part, data=part.data * scale)
    second = SimulatedSource(maps[1], first.particles, seed, first.spectrum)
    state = (np.random.default_rng(seed).random(n) < 0.3).astype(int)
    images = np.choose(state[:, None, None], [one.read(np.arange(n)) for one in (first, second)])
    source = TwoStates(images, first.particles)
    source.state, source.maps = state, maps
    return source


@pytest.fixture(scope="module")
def mixed() -> TwoStates:
    return two_states()


def request_for(source, folder: Path | None, maps: tuple = (), symmetry: str = "C1", **settings) -> ClassRequest:
    engine = RefineSection(solvent_mask=False, healpix_order=1)
    base = RefineRequest(source, GRID, symmetry, folder, engine, seed=1, diameter_A=DIAMETER_A)
    section = ClassifySection(**settings)
    if section.align == "local":
        base = replace(base, local_deg=section.local_deg)
    return ClassRequest(base, section, maps)


def task_for(source, maps: tuple = (), **settings) -> Classification:
    return Classification(request_for(source, None, maps, **settings), Context(), "cpu", DIAMETER_A)


def first_steps(task: Classification, steps: int) -> ClassModel:
    model = initial_classes(task)
    for _ in range(steps):
        model = task.step(model)
    return model


def accuracy(state: np.ndarray, assigned: np.ndarray) -> float:
    return float(max((assigned == 1 + (state ^ swap)).mean() for swap in (0, 1)))


# --- it works


def test_two_states_from_random_subsets(mixed, tmp_path):
    """99 % right without any map to begin with (with the true maps 100 %); the files say what was found."""
    model = classify(request_for(mixed, tmp_path), Context())
    assigned = model.assigned(False)
    assert accuracy(mixed.state, assigned) > 0.97
    summary = json.loads((tmp_path / "classify.json").read_text())
    assert summary["settled"] and summary["iterations"][-1]["changed"] < 0.01
    assert sum(one["occupancy"] for one in summary["classes"]) == pytest.approx(1, abs=1e-5)
    assert sum(one["particles"] for one in summary["classes"]) == 300
    for name in ("1", "2"):
        in_cones = sum(one[name] for one in summary["cones"])
        assert in_cones == pytest.approx(300 * summary["classes"][int(name) - 1]["occupancy"], abs=0.1)
    written = read_particle_file(tmp_path / "particles.star")
    np.testing.assert_array_equal(written.table["rlnClassNumber"].astype(int), assigned)
    for name in ("cryoisoClassProbability", "rlnMaxValueProbDistribution"):
        np.testing.assert_allclose(written.table[name].astype(float), model.posterior.max(1), rtol=1e-6)
    np.testing.assert_allclose(written.rotation, mixed.particles.rotation, atol=1e-6)
    maps = {f"class{k:03d}{part}.mrc" for k in (1, 2) for part in ("", "_half1", "_half2")}
    assert maps < {f.name for f in tmp_path.iterdir()}


def test_a_local_search_finds_poses_and_classes(mixed):
    """Poses 4 degrees off: nearer to the truth afterwards, none beyond the limit, and 97 % in the right class."""
    given = turned(mixed.particles, 4.0, 0.5)
    source = ArraySource(mixed.read(np.arange(300)), given)
    model = first_steps(task_for(source, mixed.maps, align="local", local_deg=8.0, lowpass_A=20.0), 1)
    assert accuracy(mixed.state, model.assigned(False)) > 0.97
    before, after = (
        np.median(angular_distance_deg(r, mixed.particles.rotation)) for r in (given.rotation, model.rotation)
    )
    assert after < 0.85 * before
    assert angular_distance_deg(model.rotation, given.rotation).max() <= 8.01


def test_a_global_search_needs_maps_but_no_poses(mixed):
    rows = np.arange(0, 300, 3)
    blind = replace(mixed.particles.take(rows), rotation=None, shift_A=None)
    task = task_for(ArraySource(mixed.read(rows), blind), mixed.maps, align="global", lowpass_A=20.0)
    model = first_steps(task, 1)
    assert accuracy(mixed.state[rows], model.assigned(False)) > 0.85
    errors = angular_distance_deg(model.rotation, mixed.particles.rotation[rows], point_group("C3"))
    assert np.median(errors) < 10  # two of three protomers are alike, and so are their views


# --- laws of the posterior


def test_the_posterior_is_a_distribution():
    log_joint = np.random.default_rng(1).normal(0, 4, (50, 4))
    posterior, total = class_posterior(log_joint)
    np.testing.assert_allclose(posterior.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(total, np.log(np.exp(log_joint).sum(1)), rtol=1e-12)
    exact = np.exp(log_joint - total[:, None])
    assert np.abs(posterior - exact).max() < 4e-3 and (posterior[exact < 5e-4] == 0).all()
    shifted, _ = class_posterior(log_joint + 1e4)  # no constant of the image matters, however large
    np.testing.assert_allclose(shifted, posterior, atol=1e-9)


def test_identical_references_share_all_particles(mixed):
    model = first_steps(task_for(mixed, (mixed.maps[0],) * 3, classes=3), 1)
    np.testing.assert_allclose(model.posterior, 1 / 3, rtol=1e-12)
    np.testing.assert_allclose(model.occupancy, 1 / 3, rtol=1e-12)
    np.testing.assert_array_equal(model.references[0][1], model.references[2][1])


def test_permuted_references_permute_the_classes(mixed):
    one, two = (first_steps(task_for(mixed, maps), 2) for maps in (mixed.maps, mixed.maps[::-1]))
    np.testing.assert_array_equal(two.posterior, one.posterior[:, ::-1])
    np.testing.assert_array_equal(two.occupancy, one.occupancy[::-1])
    for k in (0, 1):
        np.testing.assert_array_equal(two.half_maps[k][2], one.half_maps[1 - k][2])
        np.testing.assert_array_equal(two.maps[k], one.maps[1 - k])


def test_one_class_at_given_poses_is_the_reconstruction(mixed):
    """The same but for the weights of the noise spectra and the mean, which an engine leaves out."""
    model = first_steps(task_for(mixed, classes=1), 2)
    assert (model.posterior == 1).all()
    maps = reconstruct_halves(mixed, mixed.particles, Context())
    for half in (1, 2):
        known, made = maps[half].data, model.half_maps[0][half]
        curve = fsc(known - known.mean(), made - made.mean())
        assert curve[1 : BOX // 2].min() > 0.999
        assert np.vdot(known, made) / np.vdot(known, known) == pytest.approx(1, abs=0.02)


def test_half_sets_are_independent(mixed):
    """Other images in half 2 leave the bits of half 1's maps, unless the halves share their low resolution."""
    other = mixed.read(np.arange(300)).copy()
    other[mixed.particles.half == 2] *= 0.5
    models = []
    for source in (mixed, ArraySource(other, mixed.particles)):
        request = request_for(source, None, mixed.maps)
        base = replace(request.base, settings=request.base.settings.model_copy(update={"join_halves_A": 0.0}))
        task = Classification(replace(request, base=base), Context(), "cpu", DIAMETER_A)
        model = initial_classes(task_for(mixed, mixed.maps))
        models.append(task.step(model))
    for k in (0, 1):
        np.testing.assert_array_equal(models[0].half_maps[k][1], models[1].half_maps[k][1])
        assert (models[0].half_maps[k][2] != models[1].half_maps[k][2]).any()


def test_a_class_without_particles_stays_empty(mixed):
    """A map of nothing the images show, with no prior: no map, no occupancy, no division by zero."""
    task = task_for(mixed, mixed.maps)
    model = initial_classes(task)
    model.occupancy = np.array([1.0, 0.0])
    for _ in range(2):
        model = task.step(model)
    assert model.occupancy.tolist() == [1.0, 0.0] and (model.assigned(False) == 1).all()
    assert model.history[-1]["resolution_A"][1] is None and not model.half_maps[1][1].any()


def test_auxiliary_particles_join_the_maps_alone(mixed, tmp_path):
    """They are shared by all classes; files, shares and classes are those of the raw particles."""
    rows = np.arange(120)
    raw = ArraySource(mixed.read(rows), mixed.particles.take(rows))
    made = simulate_images(mixed.maps[0], 120, snr_db=-3.0, seed=77)
    more = ArraySource(made.read(rows), made.particles)
    base = request_for(raw, tmp_path).base
    model = classify(class_request(base, ClassifySection(lowpass_A=20.0), mixed.maps, more), Context())
    assigned = model.assigned(False)[:120]
    assert (model.posterior[120:] == 0.5).all() and accuracy(mixed.state[:120], assigned) > 0.95
    written = read_particle_file(tmp_path / "particles.star")
    np.testing.assert_array_equal(written.uid, raw.particles.uid)
    np.testing.assert_array_equal(written.table["rlnClassNumber"].astype(int), assigned)
    summary = json.loads((tmp_path / "classify.json").read_text())
    assert summary["auxiliary"] == 120 and summary["particles"] == 120
    assert sum(one["particles"] for one in summary["classes"]) == 120
    np.testing.assert_allclose(model.occupancy, model.posterior[:120].mean(0), atol=1e-9)
    alone = classify(request_for(raw, tmp_path / "alone", mixed.maps, lowpass_A=20.0), Context())
    true = mixed.maps[1].data - mixed.maps[1].data.mean()
    with_more, without = (fsc(m.maps[1], true) for m in (model, alone))
    assert with_more[3:12].mean() > without[3:12].mean(), "the map of the smaller class gains views"


def test_assigned_classes():
    posterior, particle = np.array([[0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]), np.array([1.0, 0.9, 0.3])
    assert assigned_classes(posterior, None).tolist() == [1, 2, 1]
    assert assigned_classes(posterior, particle).tolist() == [1, 2, 3]


# --- an image's own share


def own_and_other(task: Classification, model: ClassModel, own_share: bool) -> np.ndarray:
    """(N,) log-likelihood of each image in the class whose map it is part of, less that in the other."""
    found = np.zeros((len(task.particles), 2))
    for half in (1, 2):
        expect = task._expectation(model, half, None)
        if own_share:
            expect.leverage = None
        for batch in task.run.batches(half, False, model.state.radius_px, 0, SearchCache(None)):
            white = whiten(batch, model.sigma2)
            scores = [expect._of_class(k, batch, white, task.prior_poses(batch.rows))[1] for k in (0, 1)]
            found[batch.rows] = torch.stack(scores, 1).numpy()
    sign = 2 * model.posterior - 1
    return (sign * found).sum(1)


@pytest.mark.parametrize(("n", "snr_db"), [(300, -10.0), (600, -3.0)])
def test_own_shares_are_taken_out(n, snr_db):
    """Random classes of one state: an image fits its own class better, by its noise alone; without its share it does
    not."""
    source = in_memory(simulate_images(two_states(2).maps[0], n, snr_db=snr_db, shift_sd_A=4.0, seed=5))
    task = task_for(source)
    model = initial_classes(task)
    raw, corrected = (own_and_other(task, model, own) for own in (True, False))
    error = corrected.std() / np.sqrt(n)
    assert raw.mean() > 6 * raw.std() / np.sqrt(n)
    assert abs(corrected.mean()) < 0.15 * raw.mean() + 2 * error


# --- ranks, interruptions, wrong input

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import test_classes as t
from cryoiso.parallel.context import get_context
source = t.two_states(160)
t.classify(t.request_for(source, Path({out!r}), junk=True, max_iterations=3), get_context())
"""


@pytest.mark.mpi
def test_the_same_bits_on_any_number_of_ranks(tmp_path):
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        out.mkdir()
        run_mpi(ranks, SCRIPT.format(tests=str(Path(__file__).parent), out=str(out)), timeout=600)
    one = contents(tmp_path / "1")
    assert {"class001.mrc", "class002_half2.mrc", "particles.star", "classify.json", "checkpoint/state.npz"} <= set(one)
    assert contents(tmp_path / "2") == one and contents(tmp_path / "3") == one


class Stopping(Context):
    """Told to stop at the n-th time of asking."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_resumed_classification_has_the_same_bits(tmp_path):
    source = two_states(160)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"junk": True, "max_iterations": 3}
    classify(request_for(source, whole, **settings), Context())
    with pytest.raises(Interrupted):
        classify(request_for(source, parts, **settings), Stopping(17))
    assert (parts / "checkpoint" / "state.npz").exists() and not (parts / "particles.star").exists()
    request = request_for(source, parts, **settings)
    classify(replace(request, base=replace(request.base, resume=True)), Context())
    assert contents(parts) == contents(whole)
    other = request_for(source, parts, **settings, lowpass_A=25.0)
    with pytest.raises(InputError, match=r"another classification: .*lowpass_A was 30\.0, is 25\.0"):
        classify(replace(other, base=replace(other.base, resume=True)), Context())


def test_what_does_not_fit_is_refused(mixed, tmp_path):
    def refuse(match: str, source=mixed, maps: tuple = (), **settings) -> None:
        with pytest.raises(InputError, match=match):
            classify(request_for(source, tmp_path, maps, **settings), Context())

    blind = ArraySource(mixed.read(np.arange(300)), replace(mixed.particles, rotation=None, shift_A=None))
    refuse("the particles have no poses", blind)
    refuse("the particles have no poses", blind, align="global")
    refuse("every class needs a map.*3, found 2", maps=mixed.maps, classes=3)
    small = DensityMap(mixed.maps[0].data[2:, 2:, 2:], PIXEL_A)
    refuse("map 2 is on another grid", maps=(mixed.maps[0], small))
    few = ArraySource(mixed.read(np.arange(6)), mixed.particles.take(np.arange(6)))
    refuse("too small for 4 classes", few, classes=4)
    inverted = tuple(replace(one, data=-one.data) for one in mixed.maps)
    refuse("inverted contrast", maps=inverted)
    noise = np.random.default_rng(1).normal(size=(300, BOX, BOX)).astype(np.float32)
    refuse("does not match the images", ArraySource(noise, mixed.particles), maps=mixed.maps)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path):
    folder = simulate(tmp_path / "set").parent
    out, truth = tmp_path / "out", folder / "truth.star"
    for words, code, match in (
        ((truth, "--classes", 0), EXIT_USAGE, "--classes: "),
        ((truth, "--align", "some"), EXIT_USAGE, "--align: "),
        ((truth, "--refine", "no_key=1"), EXIT_USAGE, "no_key"),
        ((truth, "--refine", "junk=true"), EXIT_USAGE, "give --junk"),
        ((truth, "--refine", "scale=particle"), EXIT_USAGE, "options-conflict"),
        ((truth, "--ref", folder / "truth_map.mrc"), EXIT_USAGE, "one for each class"),
        ((folder / "particles.star",), EXIT_INPUT, "no poses"),
        ((folder / "missing.star",), EXIT_INPUT, "missing.star"),
        ((truth, "--symmetry", "X3"), EXIT_INPUT, "X3"),
    ):
        failed = cryoiso_here("classify", *words, "--out", out)
        assert failed.returncode == code and match in failed.stderr, failed.stderr
        assert not out.exists()
    words = ("--symmetry", "C3", "--junk", "--max-iterations", 2, "--out", out)
    done = cryoiso_here("classify", truth, *words)
    assert done.returncode == 0, done.stderr
    assert str(out / "class002.mrc") in done.stdout
    classes = read_particle_file(out / "particles.star").table["rlnClassNumber"].astype(int)
    assert set(classes) <= {1, 2, 3} and len(classes) == 40


def test_intensities_of_the_file_are_used(mixed):
    """Images whose signals differ by a factor of nine, with the intensities that say so: classes and maps are those of
    equal images, once the noise is known; without them they are not."""
    rng = np.random.default_rng(4)
    scale = np.exp(rng.uniform(-1.1, 1.1, 300))
    images = mixed.read(np.arange(300)) * scale[:, None, None].astype(np.float32)
    given = mixed.particles.with_intensity(scale, np.square(scale))  # the noise was multiplied as well
    equal, told, not_told = (
        first_steps(task_for(source, mixed.maps, lowpass_A=20.0), 3)
        for source in (mixed, ArraySource(images, given), ArraySource(images, mixed.particles))
    )
    np.testing.assert_allclose(told.posterior, equal.posterior, atol=0.02)
    assert np.abs(not_told.posterior - equal.posterior).max() > 0.1
    true = equal.half_maps[0][1] - equal.half_maps[0][1].mean()
    assert fsc(true, told.half_maps[0][1])[1:12].min() > 0.999 > fsc(true, not_told.half_maps[0][1])[1:12].min()


def test_maps_of_an_earlier_classification_into_more_classes_do_not_stay(tmp_path):
    names = ("class002.mrc", "class003.mrc", "class003_half1.mrc", "class003_half2.mrc", "class004.mrc", "class006.mrc")
    for name in names:
        (tmp_path / name).touch()
    remove_further_classes(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class002.mrc", "class006.mrc"]
