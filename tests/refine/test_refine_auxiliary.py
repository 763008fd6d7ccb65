"""Co-refinement on the terms of the raw particles: sums apart, weight of the auxiliaries, the refusal of noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from errors_helper import raises_code
from mpi_helper import run_mpi
from test_refine_engine import BOX, DIAMETER_A, PIXEL_A, StoppingContext, blind, contents, in_memory, request_for

from cryoiso.core.errors import InputError, Interrupted
from cryoiso.core.protocols import RefineRequest, RefineResult
from cryoiso.core.types import DensityMap
from cryoiso.engines.native import NativeEngine
from cryoiso.io.mrc import read_map
from cryoiso.io.sources import ArraySource
from cryoiso.methods.auxiliary.corefine import CoRefined, co_refine
from cryoiso.methods.auxiliary.particles import auxiliary_particles, both_halves
from cryoiso.metrics.fsc_curve import fsc
from cryoiso.parallel.context import Context
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.resample import resample_matrix
from cryoiso.physics.simulation import Projector, simulate
from cryoiso.refine import batches, initial_model
from cryoiso.refine.identity import of_request
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.reconstruct import reconstruct_halves, reconstruct_references
from cryoiso.refine.sums import HalfSums

ONCE = {"max_iterations": 2, "healpix_order": 1}


def raw_set(n: int = 120, seed: int = 9, snr_db: float = -3.0) -> ArraySource:
    return in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), n, snr_db=snr_db, shift_sd_A=4.0, seed=seed))


@pytest.fixture(scope="module")
def raw() -> ArraySource:
    return raw_set()


def ring() -> np.ndarray:
    """(D, D, D) about the axis, where the trimer has nothing."""
    z, y, x = np.indices((BOX,) * 3) - BOX // 2
    return np.exp(-((np.hypot(x, y) - 8) ** 2 + (z + 4) ** 2) / 4).astype(np.float32)


def auxiliaries_of(raw: ArraySource, volume: DensityMap, count: int = 60, noise: float = 0.7) -> ArraySource:
    sets = [
        auxiliary_particles(
            raw.particles, half, count, round_=1, seed=1, symmetry="C3", box_px=BOX, pixel_size_A=PIXEL_A
        )
        for half in (1, 2)
    ]
    made = both_halves(*sets)
    clean = Projector(volume).images(made, np.arange(len(made))).numpy()
    return ArraySource(clean + noise * np.random.default_rng(3).normal(size=clean.shape).astype(np.float32), made)


@pytest.fixture(scope="module")
def others(raw) -> ArraySource:
    """120 auxiliaries of another particle than that of the images: with a ring about its axis."""
    truth = raw.truth
    return auxiliaries_of(raw, replace(truth, data=truth.data + truth.data.max() * ring()))


def together(
    raw, auxiliary, folder: Path, weight: float = 1.0, resume: bool = False, comm: Context | None = None, **settings
) -> CoRefined:
    request = replace(request_for(raw, folder, **{**ONCE, **settings}), resume=resume)
    return co_refine(NativeEngine(), request, auxiliary, comm or Context(), weight=weight)


def alone(raw, folder: Path, **settings) -> RefineResult:
    return NativeEngine().refine(request_for(raw, folder, **{**ONCE, **settings}), Context())


def halves_in(folder: Path) -> list[np.ndarray]:
    return [read_map(folder / f"half{h}.mrc").data for h in (1, 2)]


# --- what steers


def test_auxiliaries_without_weight_change_nothing(raw, others, tmp_path):
    """Every number that a co-refinement records, its half-maps and poses have the bits of the raw particles alone."""
    one, both = alone(raw, tmp_path / "alone"), together(raw, others, tmp_path / "both", weight=0.0)
    for mine, theirs in zip(one.iterations, both.result.iterations, strict=True):
        assert theirs["auxiliary_weight_share"] == 0
        assert {k: v for k, v in mine.items() if k != "seconds"} == {
            k: v for k, v in theirs.items() if k not in ("seconds", "auxiliary_weight_share")
        }
    np.testing.assert_array_equal(halves_in(tmp_path / "alone"), halves_in(tmp_path / "both"))
    np.testing.assert_array_equal(one.particles.rotation, both.raw.rotation)
    np.testing.assert_array_equal(one.particles.shift_A, both.raw.shift_A)
    noise = [json.loads((tmp_path / name / "refine.json").read_text())["noise_variance"] for name in ("alone", "both")]
    assert len(noise[1]) == 2 and noise[0][0] == noise[1][0]


def test_auxiliaries_are_in_the_references_and_in_no_half_map(raw, others, tmp_path):
    """The first iteration, with one reference for all, records what the raw particles alone do; its references show the
    ring that only auxiliaries have, the half-maps do not, not even after the second."""
    whole = {"solvent_mask": False}
    one, both = alone(raw, tmp_path / "alone", **whole), together(raw, others, tmp_path / "both", 4.0, **whole)
    first, second = both.result.iterations
    assert {k: v for k, v in one.iterations[0].items() if k != "seconds"} == {
        k: v for k, v in first.items() if k not in ("seconds", "auxiliary_weight_share")
    }
    assert first["auxiliary_weight_share"] < second["auxiliary_weight_share"] < 1  # as their noise comes to light
    state = np.load(tmp_path / "both" / "checkpoint" / "state.npz", allow_pickle=False)
    inside = ring() > 0.5
    for half, made in zip((1, 2), halves_in(tmp_path / "both"), strict=True):
        peak = np.sort(made.ravel())[-100:].mean()
        assert state[f"reference{half}"][inside].mean() > 0.1 * peak
        assert abs(made[inside].mean()) < 0.01 * peak


def test_raw_half_maps_are_those_of_a_reconstruction_at_the_same_poses(raw, others, tmp_path):
    """Up to the spread of the posterior; auxiliaries weigh as much as the raw particles and show another map."""
    found = together(raw, others, tmp_path)
    held = ArraySource(raw.read(np.arange(120)), found.raw)
    expected = reconstruct_halves(held, found.raw, Context(), symmetry="C3")
    for half, made in zip((1, 2), halves_in(tmp_path), strict=True):
        assert fsc(made, expected[half].data)[1:9].min() > 0.97


def test_the_fsc_is_that_of_the_raw_half_maps(raw, others, tmp_path):
    """Auxiliaries with little noise agree to the last shell; what is printed is what the half-maps say. As many as the
    raw particles, with a third of their noise variance, they hold three quarters of the weight at most (what the
    poses miss counts as noise)."""
    clean = auxiliaries_of(raw, raw.truth, noise=0.577)
    found = together(raw, clean, tmp_path)
    assert found.result.iterations[-1]["auxiliary_weight_share"] == pytest.approx(0.72, abs=0.03)
    run = Refinement(request_for(raw, None, **ONCE), Context(), "cpu", DIAMETER_A)
    curve = fsc(*halves_in(tmp_path), run.sphere)
    at = BOX * PIXEL_A / found.result.resolution_A
    assert np.interp(at, np.arange(len(curve)), curve) == pytest.approx(0.143, abs=0.02)


def test_weight_and_share_of_sums_that_are_known():
    """Raw voxels weigh 3, auxiliaries 1: at a weight of 2 they hold 2/5, and the quotient is the weighted mean."""
    grid = (9, 9, 5)

    def sums(value: float, weight: float) -> FourierSums:
        w = torch.full(grid, weight)
        return FourierSums((value * w).to(torch.complex64), w, 8, 1, 2)

    held = HalfSums(2.0, {1: sums(1.0, 3.0), 2: sums(1.0, 3.0)}, {1: sums(6.0, 1.0), 2: sums(6.0, 1.0)})
    assert held.auxiliary_share(2, Context()) == pytest.approx(0.4)
    joined = held.joined()
    assert torch.allclose((joined[1].numerator / joined[1].weight).real, torch.tensor(3.0))
    assert torch.allclose(joined[2].weight, torch.tensor(5.0)) and torch.allclose(held.raw[1].weight, torch.tensor(3.0))
    plain = HalfSums(raw={1: sums(1.0, 3.0)})
    assert plain.joined()[1] is plain.raw[1]


# --- the same on any ranks, after any interruption, and of nothing else


RANKS_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_refine_auxiliary import together_on
from cryoiso.parallel.context import get_context
together_on(get_context(), Path(sys.argv[2]))
"""


def together_on(comm, folder: Path) -> None:
    """60 raw particles and 40 auxiliaries, in batches of 16."""
    few = raw_set(60)
    batches.BATCH_IMAGES = 16
    folder.mkdir(exist_ok=True)
    made = auxiliaries_of(few, few.truth, 20)
    co_refine(NativeEngine(), request_for(few, folder, **ONCE), made, comm, weight="measured")


@pytest.mark.mpi
def test_the_same_bits_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_IMAGES", 16)
    together_on(Context(), tmp_path / "1")
    run_mpi(2, ["-c", RANKS_SCRIPT, str(Path(__file__).parent), tmp_path / "2"])
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_resumed_co_refinement_has_the_same_bits_and_one_with_other_auxiliaries_is_refused(raw, others, tmp_path):
    together(raw, others, tmp_path / "straight")
    together(raw, others, tmp_path / "resumed", max_iterations=1)
    with pytest.raises(Interrupted, match="what was found so far is kept"):  # in the auxiliaries of half-set 1
        together(raw, others, tmp_path / "resumed", resume=True, comm=StoppingContext(1))
    together(raw, others, tmp_path / "resumed", resume=True)
    ends = [contents(tmp_path / name) for name in ("straight", "resumed")]
    for end in ends:
        del end["checkpoint/state.previous.npz"]  # says whether another iteration was to follow
    assert ends[0] == ends[1] and "half1.mrc" in ends[0]
    with pytest.raises(InputError, match="auxiliary"):
        together(raw, others, tmp_path / "resumed", weight=0.5, resume=True)


def test_the_identity_knows_which_particles_are_auxiliary(raw):
    request = request_for(raw, None)
    mask = np.arange(120) < 30
    found = [of_request(replace(request, auxiliary=m), 1.0)["auxiliary"] for m in (None, mask, ~mask)]
    assert found[0] == "none" and found[1] != found[2]


# --- noise


@pytest.fixture(scope="module", params=["white", "ice"])
def refined_noise(request, raw) -> tuple[ArraySource, ArraySource, dict[int, DensityMap]]:
    """Images of noise with the poses that a refinement against the trimer gave them, the same without poses, and the
    references that a round of co-refinement would make of them; white, and patches of micrographs without particles."""
    if request.param == "ice":
        noise = patches_of_ice(request.getfixturevalue("shared") / "data/particles/betagal_real_384/background.mrcs")
    else:
        noise = np.random.default_rng(0).normal(size=(400, BOX, BOX)).astype(np.float32)
    return of_a_round(ArraySource(noise, raw_set(len(noise)).particles), raw.truth)


def patches_of_ice(file: Path) -> np.ndarray:
    """(n, D, D): the middle of each patch on the grid of the trimers, normalised."""
    patches = mrcfile.read(file).astype(np.float32)
    size = round(BOX * PIXEL_A / 0.637)
    matrix, edge = resample_matrix(size, 0.637, BOX, size * 0.637 / BOX), (patches.shape[1] - size) // 2
    middle = patches[:, edge : edge + size, edge : edge + size]
    images = matrix @ (middle - middle.mean((1, 2), keepdims=True)) @ matrix.T
    return (images / images.std((1, 2), keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def refined_trimers(raw) -> tuple[ArraySource, ArraySource, dict[int, DensityMap]]:
    return of_a_round(raw_set(240, 3, -5.0), raw.truth)


def of_a_round(images: ArraySource, truth: DensityMap) -> tuple[ArraySource, ArraySource, dict[int, DensityMap]]:
    images = blind(images)
    images.truth = truth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial_model, "require_match", lambda found: None)
        run = Refinement(request_for(images, None, **ONCE, solvent_mask=False), Context(), "cpu", DIAMETER_A)
        model = initial_model.initial_model(run, 40.0)
        for _ in range(2):
            model = run.step(model)
    posed = images.particles.with_poses(model.rotation, model.shift_A)
    held = ArraySource(images.read(np.arange(len(posed))), posed)
    references = reconstruct_references(
        held, posed, Context(), symmetry="C3", diameter_A=DIAMETER_A, prior={1: truth, 2: truth}
    )[1]
    held.truth = images.truth = truth
    return held, images, references


def with_references(source, references: dict[int, DensityMap], **options) -> RefineRequest:
    request = request_for(source, None, reference=references[1], **ONCE)
    return replace(request, source=source, half_references=references, **options)


def by_chance(request: RefineRequest) -> float:
    """How probable it is that noise matches as the images of a request do."""
    run = Refinement(request, Context(), "cpu", DIAMETER_A)
    references = run.first_references(request.lowpass_A)
    return initial_model.match(
        run, references, initial_model.mean_power(run), initial_model.first_state(run, request.lowpass_A)
    ).chance


def test_noise_is_refused_in_a_later_round_though_the_auxiliaries_match(refined_noise, refined_trimers, tmp_path):
    """All images together match the references, which the auxiliaries were made from; the noise alone does not."""
    for found, refused in ((refined_noise, True), (refined_trimers, False)):
        posed, source, references = found
        made = auxiliaries_of(posed, source.truth, 60)
        request = replace(with_references(source, references), folder=tmp_path / str(refused))
        if refused:
            with raises_code("reference-does-not-match-images", InputError):
                co_refine(NativeEngine(), request, made, Context())
        else:
            co_refine(NativeEngine(), request, made, Context())


def test_noise_is_refused_by_a_local_refinement_though_it_matches_at_its_poses(refined_noise, refined_trimers, raw):
    """Against the reference that it was refined to, and against those of a round."""
    for found, expected in ((refined_noise, False), (refined_trimers, True)):
        posed, _, references = found
        common = replace(request_for(posed, None, **ONCE), source=posed, local_deg=8.0, lowpass_A=25.0)
        of_halves = with_references(posed, references, local_deg=8.0, lowpass_A=25.0)
        assert at_given_poses(common) < initial_model.CHANCE
        for request in (common, of_halves):
            assert (by_chance(request) < initial_model.CHANCE) == expected
        run = Refinement(of_halves, Context(), "cpu", DIAMETER_A)
        if expected:
            initial_model.initial_model(run, 25.0)
        else:
            with raises_code("reference-does-not-match-images", InputError):
                initial_model.initial_model(run, 25.0)


def at_given_poses(request: RefineRequest) -> float:
    """How probable it is that noise which chose its poses at random matches as these images do around theirs."""
    run = Refinement(request, Context(), "cpu", DIAMETER_A)
    sigma2, state = initial_model.mean_power(run), initial_model.first_state(run, request.lowpass_A)
    volumes = initial_model._volumes(run, run.first_references(request.lowpass_A), state.radius_px)
    rows = np.arange(len(run.particles))
    return initial_model.Match.of(initial_model._terms(run, rows, volumes, run.plan(state), sigma2, known=True)).chance
