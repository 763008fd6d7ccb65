"""The weight of auxiliary particles that the raw particles of a first iteration confirm."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_realign_engine import Recorder
from test_refine_auxiliary import (
    BOX,
    DIAMETER_A,
    ONCE,
    auxiliaries_of,
    blind,
    contents,
    halves_in,
    raw_set,
    request_for,
    ring,
    together,
)
from test_refine_engine import PIXEL_A, in_memory

from cryoiso.core.protocols import RefineRequest, RefineResult
from cryoiso.core.types import DensityMap
from cryoiso.engines.native import NativeEngine
from cryoiso.io.sources import ArraySource
from cryoiso.methods.auxiliary import corefine
from cryoiso.methods.auxiliary.reference_check import homologue_evidence
from cryoiso.metrics.fsc_curve import randomise_phases
from cryoiso.parallel.context import Context
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.views import Views
from cryoiso.refine import initial_model
from cryoiso.refine.homologue import LARGEST, HalfSide, HomologueCorrelation, judged
from cryoiso.refine.identity import of_request
from cryoiso.refine.reconstruct import reconstruct_references
from cryoiso.refine.sums import HalfSums


@pytest.fixture(scope="module")
def raw() -> ArraySource:
    return raw_set()


@pytest.fixture(scope="module")
def made(raw) -> ArraySource:
    """60 auxiliary particles of the images' own particle."""
    return auxiliaries_of(raw, raw.truth, 30)


@pytest.fixture
def unguarded(monkeypatch):
    """Noise is refined, on a grey scale of 1."""
    monkeypatch.setattr(initial_model, "grey_scale", lambda *args: 1.0)


def noise_like(raw: ArraySource, seed: int, n: int = 120) -> ArraySource:
    images = np.random.default_rng(seed).normal(size=(n, BOX, BOX)).astype(np.float32)
    source = blind(ArraySource(images, raw_set(n).particles if n != 120 else raw.particles))
    source.truth = raw.truth
    return source


def found_in(source: ArraySource, homologue: DensityMap | None = None) -> HomologueCorrelation:
    request = replace(request_for(source, None, **ONCE), homologue=homologue)
    return HomologueCorrelation.of_record(homologue_evidence(request, Context())["homologue"])


# --- what is confirmed


def test_noise_confirms_nothing_though_it_resembles_the_homologue_inside(raw, unguarded):
    """Six sets of white noise, each refined to the homologue: deviations as those of a normal variable or smaller,
    and a weight of exactly zero."""
    found = [found_in(noise_like(raw, seed, 240)) for seed in range(6)]
    deviations = np.array([one.deviation for one in found])
    assert np.abs(deviations).max() < 2.5 and abs(deviations.mean()) < 2.5 / np.sqrt(6)
    assert not any(one.confirmed or one.precision.any() for one in found)


def test_a_homologue_is_confirmed_by_how_alike_it_is(raw):
    """The truth more than a map with half of its power unrelated; a map with the truth's amplitudes alone is not."""
    truth = raw.truth
    other = randomise_phases(truth.data, 1, seed=5)
    half = replace(truth, data=truth.data + other * np.linalg.norm(truth.data) / np.linalg.norm(other))
    same, alike, foreign = (found_in(raw, map_) for map_ in (truth, half, replace(truth, data=other)))
    compared = slice(same.first_shell, same.first_shell + 3)
    assert same.confirmed and same.deviation > 20
    assert (same.rho[compared] > alike.rho[compared]).all() and alike.rho[compared].max() < 0.8
    assert (alike.rho[1 : alike.first_shell] == alike.rho[1]).all() and alike.rho[1] > 0.2
    assert not foreign.confirmed and foreign.deviation < 4


def sides(correlation: np.ndarray, coefficients: float) -> dict[int, HalfSide]:
    shells = len(correlation)
    n = np.full(shells, coefficients)
    one = HalfSide(correlation * n, n / 2, n, correlation, np.ones(shells))
    return {1: one, 2: one}


def test_the_precision_grows_with_the_evidence_to_that_of_the_correlation():
    """With few coefficients nothing is confirmed; with ever more, rho approaches A / sqrt(R) from below, and the
    precision that of a prior with variance 1 - rho^2; a homologue equal to the signal is believed to a limit."""
    curve, half_maps = np.full(12, 0.6), np.full(12, 0.5)
    true = 0.6 / np.sqrt(0.5)
    found = [judged(sides(curve, n), half_maps, 5) for n in (1.0, 1e2, 1e4, 1e8)]
    assert not found[0].confirmed
    values = [one.rho[7] for one in found[1:]]
    assert values == sorted(values) and values[-1] == pytest.approx(true, abs=1e-3) and max(values) <= true
    assert found[-1].precision[7] == pytest.approx(true**2 / (1 - true**2), rel=0.02)
    equal = judged(sides(np.full(12, np.sqrt(0.5)), 1e12), half_maps, 5)
    assert equal.rho[7] == LARGEST and equal.precision.max() < 50
    assert not judged(sides(-curve, 1e6), half_maps, 5).confirmed, "a homologue of opposite sign"


def test_nothing_is_believed_from_the_first_shell_without_agreement_on():
    """A shell is judged with its two neighbours."""
    curve = np.array([1, 1, 1, 1, 1, 0.8, 0.7, 0.6, -0.9, -0.9, 0.9, 0.9])
    found = judged(sides(curve, 1e4), np.ones(12), 5)
    assert (found.rho[5:8] > 0.1).all() and not found.rho[8:].any()
    assert found.rho[1:5] == pytest.approx(np.full(4, found.rho[5:8].mean())) and found.rho[0] == 0
    again = HomologueCorrelation.of_record(json.loads(json.dumps(found.record(200.0))))
    assert np.array_equal(again.rho, found.rho) and again.deviation == found.deviation


# --- what it weighs


def test_auxiliary_weight_never_exceeds_the_precision_however_many_there_are():
    """Sums of a shell's mean weight 50 count 2 where that is the precision, and their own 1 where they weigh less;
    zero where nothing is confirmed."""

    def sums(weight: float) -> FourierSums:
        w = torch.full((9, 9, 5), weight)
        return FourierSums(w.to(torch.complex64), w, 8, 1, 2)

    for own, expected in ((50.0, 2.0), (1.0, 1.0)):
        held = HalfSums(0.0, {h: sums(3.0) for h in (1, 2)}, {h: sums(own) for h in (1, 2)})
        held.limit_weight({h: torch.tensor([0.0, 2.0, 0.0]) for h in (1, 2)})
        factor = held.factor(1)
        assert float(factor[1]) * own == pytest.approx(expected) and factor[0] == factor[2] == 0
        share = held.auxiliary_share(1, Context())
        assert share == pytest.approx(expected / (3 + expected))
        weight, shell = held.joined()[1].weight, sums(1.0).shells()
        assert torch.allclose(weight[shell == 1], torch.tensor(3 + expected)) and (weight[shell == 2] == 3).all()


def test_a_homologue_stronger_than_the_signal_is_believed_by_its_own_power():
    """Where tau^2 is small, for want of signal or of evidence of it, an observation of precision 1 / tau^2 would set
    the map to the homologue in full."""
    rho, shells = 0.6, 4
    found = HomologueCorrelation(np.full(shells, rho), np.zeros(shells), np.full(shells, 2.0), 2, 10.0)
    p = rho**2 / (1 - rho**2)
    made = found.precision_of(torch.tensor([0.1, 1.0, 50.0, 1e3, 1.0, 1.0]), scale=2.0)
    assert made.tolist() == pytest.approx([0.1 * p, 1.0 * p, 4.0 * p, 4.0 * p, 0, 0])


def test_the_power_of_the_true_map_is_that_of_the_signal(raw):
    """On whatever grey scale it is given, 1 / tau^2 of the half-maps and of the map agree in shells that were measured
    well, within what a coarse search blurs."""
    request = replace(request_for(raw, None, **ONCE), homologue=replace(raw.truth, data=7 * raw.truth.data))
    record = homologue_evidence(request, Context())
    found, relative = HomologueCorrelation.of_record(record["homologue"]), np.array(record["homologue_precision"])
    seen = slice(3, found.first_shell + 2)
    believed = relative[seen] / found.precision[seen]
    assert (believed < 1 + 1e-9).all() and believed.min() > 0.4


class Mixed(Recorder):
    """A correction whose references come from all that it is told."""

    def __call__(self, state, comm):
        super().__call__(state, comm)
        made = {half: (state.references[half] + state.maps[half] + state.maps[3 - half]) / 3 for half in state.maps}
        return made, {"applied": True, "resolution_A": state.resolution_A}


@pytest.mark.parametrize("corrected", [False, True])
def test_without_evidence_a_co_refinement_has_the_bits_of_the_raw_particles(raw, made, unguarded, tmp_path, corrected):
    """Noise: maps, poses and every number but those of the weight, with a correction of the references (as in the
    workflow both) or not; auxiliary particles keep their first poses."""
    images = noise_like(raw, 3)

    def request(name: str, iterations: int) -> RefineRequest:
        settings = {**ONCE, "max_iterations": iterations}
        return replace(request_for(images, tmp_path / name, **settings), correction=Mixed() if corrected else None)

    one = NativeEngine().refine(request("alone", 3), Context())
    both, first = (
        corefine.co_refine(NativeEngine(), request(name, n), made, Context(), weight="measured")
        for name, n in (("both", 3), ("first", 1))
    )
    extra = ("seconds", "auxiliary_weight_share", "auxiliary_factor", "homologue", "homologue_precision")
    for mine, theirs in zip(one.iterations, both.result.iterations, strict=True):
        assert theirs["auxiliary_weight_share"] == 0 and not any(theirs["auxiliary_factor"])
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k not in extra}
    np.testing.assert_array_equal(halves_in(tmp_path / "alone"), halves_in(tmp_path / "both"))
    np.testing.assert_array_equal(one.particles.rotation, both.raw.rotation)
    np.testing.assert_array_equal(first.auxiliary.rotation, both.auxiliary.rotation)


def test_with_evidence_auxiliaries_weigh_less_than_their_own_weight_and_resume_with_the_same_bits(raw, made, tmp_path):
    straight = together(raw, made, tmp_path / "straight", weight="measured")
    records = straight.result.iterations
    assert "homologue" in records[0] and "homologue" not in records[1]
    assert records[0]["homologue"]["confirmed"] and 0 < records[1]["auxiliary_weight_share"] < 0.5
    assert 0 < max(records[1]["auxiliary_factor"]) <= 1
    together(raw, made, tmp_path / "resumed", weight="measured", max_iterations=1)
    together(raw, made, tmp_path / "resumed", weight="measured", resume=True)
    ends = [contents(tmp_path / name) for name in ("straight", "resumed")]
    for end in ends:
        del end["checkpoint/state.previous.npz"]  # says whether another iteration was to follow
    assert ends[0] == ends[1]


def test_a_correction_sees_no_homologue_at_a_measured_weight(tmp_path):
    """190 top views and 10 others do not measure the directions about the axis. Maps without regularisation show there
    what auxiliary particles show, a ring that the images do not have, be their share a thousandth: 0.45 of it in the
    first iteration, when both half-maps agree on it in two thirds of all directions, 0.8 at weight 1. At the measured
    weight the correction therefore gets the raw particles' half-maps; what the references have of the ring beyond
    those of the raw particles is less than the share rho^2 to which the homologue is believed."""
    top = in_memory(
        simulate(phantom_map(BOX, PIXEL_A, 14.0), 200, snr_db=-8.0, shift_sd_A=4.0, seed=9,
                 views=Views(mode="preferred", fraction=0.95))
    )  # fmt: skip
    ringed = replace(top.truth, data=top.truth.data + top.truth.data.max() * ring())
    images = auxiliaries_of(top, ringed, 100)
    maps, references = {}, {}
    for weight in (None, 1.0, "measured"):
        correction = Recorder()
        request = replace(
            request_for(top, tmp_path / str(weight), healpix_order=2, max_iterations=2, solvent_mask=False),
            reference=ringed, homologue=ringed, correction=correction,
        )  # fmt: skip
        if weight is None:
            NativeEngine().refine(request, Context())
        else:
            first = corefine.co_refine(NativeEngine(), request, images, Context(), weight=weight).first
        maps[weight] = correction.states[0].maps[1]
        references[weight] = ring_about_the_axis(correction.states[0].references[1], top.truth)
    assert first["homologue"]["confirmed"] and first["auxiliary_weight_share"] > 0
    np.testing.assert_array_equal(maps["measured"], maps[None])
    assert ring_about_the_axis(maps[1.0], top.truth) > 0.6 and abs(ring_about_the_axis(maps[None], top.truth)) < 0.1
    believed = first["homologue"]["rho"][1] ** 2
    assert 0 < references["measured"] - references[None] < believed < 0.1 < references[1.0] - references[None]


def ring_about_the_axis(made: np.ndarray, truth: DensityMap) -> float:
    """How much of the ring a map has in the coefficients within 15 degrees of z, down to 30 Å, beside the truth."""
    k = np.fft.fftfreq(BOX) * BOX
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    cone = (np.abs(z) > np.cos(np.radians(15)) * radius) & (radius >= 2) & (radius <= BOX * PIXEL_A / 30)
    parts, found = ([np.fft.fftn(v)[cone] for v in maps] for maps in ((truth.data, truth.data.max() * ring()), (made,)))
    real = [np.concatenate([v.real, v.imag]) for v in (*parts, *found)]
    share, _, _, _ = np.linalg.lstsq(np.stack(real[:2], 1), real[2], rcond=None)
    return float(share[1])


def test_the_identity_has_the_homologue_of_a_measured_weight(raw):
    flags = np.arange(120) < 30
    request = replace(request_for(raw, None), auxiliary=flags, auxiliary_weight="measured")
    given = replace(request, homologue=replace(raw.truth, data=2 * raw.truth.data))
    assert of_request(request, 1.0)["auxiliary"] != of_request(given, 1.0)["auxiliary"]


class NeverWeighing:
    """An engine that leaves every particle unturned."""

    name = "recorder"

    def refine(self, request: RefineRequest, comm=None) -> RefineResult:
        self.seen = request
        p = request.source.particles
        return RefineResult(p.with_poses(np.tile(np.eye(3), (len(p), 1, 1)), np.zeros((len(p), 2))), {})


def test_an_engine_that_cannot_weigh_needs_no_auxiliaries_where_nothing_is_confirmed(raw, tmp_path):
    engine, evidence = NeverWeighing(), {"homologue": {"confirmed": False}}
    found = corefine.refine_raw(engine, request_for(raw, tmp_path), Context(), evidence)
    assert engine.seen.auxiliary is None and engine.seen.auxiliary_weight == 1.0
    assert engine.seen.source.particles.rotation is None
    assert np.array_equal(found.raw.uid, raw.particles.uid) and len(found.auxiliary) == 0
    assert found.first is found.last is evidence


@pytest.mark.parametrize("confirmed", [True, False])
def test_an_engine_that_cannot_weigh_refines_what_is_confirmed(raw, made, tmp_path, monkeypatch, confirmed):
    """All particles together, or the raw ones alone, with the evidence of a native iteration."""
    evidence = {"homologue": {"confirmed": confirmed}}
    monkeypatch.setattr(corefine, "homologue_evidence", lambda request, comm: evidence)

    engine = NeverWeighing()
    found = corefine.co_refine(engine, request_for(raw, tmp_path), made, Context(), weight="measured")
    assert len(engine.seen.source.particles) == (180 if confirmed else 120)
    assert np.array_equal(found.raw.uid, raw.particles.uid) and np.array_equal(found.raw.rotation[7], np.eye(3))
    assert (found.auxiliary is made.particles) != confirmed and found.first is found.last is evidence


def test_an_engine_that_cannot_weigh_asks_nothing_that_is_known(raw, made, tmp_path, monkeypatch):
    monkeypatch.setattr(corefine, "homologue_evidence", None)
    evidence = {"homologue": {"confirmed": True}}
    request = request_for(raw, tmp_path)
    found = corefine.co_refine(NeverWeighing(), request, made, Context(), weight="measured", evidence=evidence)
    assert found.first is evidence


# --- references between rounds


def test_a_reference_is_filled_in_only_with_what_is_confirmed(raw):
    truth = raw.truth
    posed = raw_set(60)
    common = {"symmetry": "C3", "diameter_A": DIAMETER_A}
    prior = {1: truth, 2: truth}

    def reference(**options) -> np.ndarray:
        return reconstruct_references(posed, posed.particles, Context(), **common, **options)[1][1].data

    without, full = reference(), reference(prior=prior)
    assert np.array_equal(reference(prior=prior, precision=np.zeros(BOX // 2)), without)
    little, much = (reference(prior=prior, precision=np.full(BOX // 2, p)) for p in (0.5, 1e4))
    distance = [float(np.linalg.norm(made - without)) for made in (little, full, much)]
    assert 0 < distance[0] < distance[1] < distance[2]
