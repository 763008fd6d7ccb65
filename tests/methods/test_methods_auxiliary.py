"""Auxiliary particles: who they are, their images, co-refinement's book-keeping, the balanced subset."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from errors_helper import raises_code

from cryoiso.core.errors import CryoisoError, InputError
from cryoiso.core.protocols import RefineRequest, RefineResult
from cryoiso.io import shardset
from cryoiso.io.shards import ShardSource
from cryoiso.io.sources import ArraySource, JoinedSource, SubsetSource
from cryoiso.methods.auxiliary.balance import balanced_subset
from cryoiso.methods.auxiliary.condition import Condition, fit_scale
from cryoiso.methods.auxiliary.corefine import co_refine, movement
from cryoiso.methods.auxiliary.generate import Maker, batches
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.methods.auxiliary.noise import on_grid, residual_spectra
from cryoiso.methods.auxiliary.particles import FLAG, apart, auxiliary_particles, both_halves, require_poolable
from cryoiso.methods.auxiliary.transfer import measure as measure_transfer
from cryoiso.nets.hvae import ConditionalHvae
from cryoiso.nets.hvae_parts import HvaeConfig
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import apply_radial, lowpass, power_spectrum
from cryoiso.physics.noise import colour_noise, noise_spectrum
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.symmetry import in_asymmetric_unit
from cryoiso.physics.views import Views

BOX, PIXEL = 32, 5.0


@pytest.fixture(scope="module")
def raw():
    volume = phantom_map(BOX, PIXEL, 15.0)
    return simulate(volume, 300, snr_db=-5.0, views=Views("preferred", 0.95), shift_sd_A=6.0, seed=2)


def made(raw, half=1, count=200, **options):
    settings = {"round_": 1, "seed": 1, "symmetry": "C3", "box_px": BOX, "pixel_size_A": PIXEL, **options}
    return auxiliary_particles(raw.particles, half, count, **settings)


def test_views_are_even_in_the_asymmetric_unit_and_ctfs_are_those_of_the_half(raw):
    p = made(raw, count=4000)
    assert in_asymmetric_unit(p.rotation[:, 2], "C3").all()
    z = np.sort(p.rotation[:, 2, 2])
    even = (np.arange(len(z)) + 0.5) / len(z) * 2 - 1
    assert np.abs(z - even).max() < 1.63 / np.sqrt(len(z)) * 2  # Kolmogorov-Smirnov at 1 %, in z of width 2
    mine = raw.particles.half == 1
    known = set(zip(raw.particles.defocus_u_A[mine], raw.particles.defocus_angle_deg[mine], strict=True))
    assert set(zip(p.defocus_u_A, p.defocus_angle_deg, strict=True)) <= known
    spread = raw.particles.shift_A.std()
    assert 0.8 * spread < p.shift_A.std() < 1.25 * spread


def test_a_particle_is_itself_whatever_the_count_and_nobody_else(raw):
    few, many = made(raw, count=50), made(raw, count=200)
    for name in ("uid", "rotation", "shift_A", "defocus_u_A", "optics"):
        assert np.array_equal(getattr(few, name), getattr(many, name)[:50])
    others = [made(raw, half=2), made(raw, round_=2), made(raw, seed=2)]
    uids = np.concatenate([raw.particles.uid, many.uid, *[o.uid for o in others]])
    assert len(np.unique(uids)) == len(uids)
    assert (many.half == 1).all() and (many.results[FLAG] == 1).all()
    assert not set(many.stack) & set(raw.particles.stack)


def test_no_particles_from_an_empty_half(raw):
    one = raw.particles.take(raw.particles.half == 1)
    with raises_code("particles-too-few", InputError, match="half 2"):
        auxiliary_particles(one, 2, 10, round_=1, seed=1, symmetry="C1", box_px=BOX, pixel_size_A=PIXEL)


def test_the_scale_is_that_of_the_images_group_by_group(raw):
    p = raw.particles
    groups = (p.groups[0], replace(p.groups[0], number=2, name="other"))
    optics = (np.arange(len(p)) % 2).astype(np.int32)
    split = replace(p, groups=groups, optics=optics)
    images = raw.read(np.arange(len(p)))
    factor = np.where(optics == 0, 0.5, 2.0)[:, None, None]
    noise_free = raw.signal(np.arange(len(p)))
    source = ArraySource((images + (factor - 1) * noise_free).astype(np.float32), split)
    dim = replace(raw.volume, data=raw.volume.data / 3)
    scale = fit_scale(source, split, np.arange(len(p)), dim, Context(), 1)
    assert np.allclose(scale, [1.5, 6.0], rtol=0.08)
    with raises_code("reference-does-not-match-images", InputError):
        fit_scale(source, split, np.arange(len(p)), replace(dim, data=-dim.data), Context(), 1)


def test_the_condition_is_the_noise_free_image(raw):
    rows = np.arange(5)
    seen = Condition(raw.volume, np.ones(1)).images(raw.particles, rows)
    assert np.allclose(seen[:, 0].numpy(), raw.signal(rows), atol=1e-5)


@pytest.fixture(scope="module")
def generator(raw):
    torch.manual_seed(0)
    network = ConditionalHvae(HvaeConfig(BOX, (1, 1), 8, 4, 2, 4, 8)).eval()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    facts = {"half": 1, "inverted": False}
    return Generator(network, raw.volume, np.ones(1), 0.2, facts)


def test_a_generator_comes_back_from_its_file(generator, tmp_path, raw):
    generator.save(tmp_path / "a.npz")
    generator.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = Generator.load(tmp_path / "a.npz")
    p, rows = made(raw), np.arange(7)
    first = generator.images(generator.condition("cpu"), p, rows, 1.0, 3)[0]
    assert torch.equal(first, again.images(again.condition("cpu"), p, rows, 1.0, 3)[0])
    assert not list(tmp_path.glob("*.previous*"))
    with raises_code("file-not-found", InputError):
        Generator.load(tmp_path / "missing.npz")


@pytest.mark.parametrize(("box", "pixel", "inverted"), [(40, PIXEL, False), (BOX, 4.0, False), (BOX, PIXEL, True)])
def test_a_generator_refuses_other_data_and_names_both(generator, box, pixel, inverted):
    generator.check(BOX, PIXEL, False, "g.npz", "particles.star")
    with pytest.raises(InputError) as error:
        generator.check(box, pixel, inverted, "g.npz", "particles.star")
    text = str(error.value)
    assert "g.npz" in text and "particles.star" in text and f"{box} px" in text and f"{BOX} px" in text
    assert ("dark" in text) == inverted


def test_images_follow_from_seed_and_uid_alone(generator, raw):
    p = both_halves(made(raw, 1, 70), made(raw, 2, 50))
    maker = Maker(p, {1: generator, 2: generator}, 1.0, 5)
    whole = np.concatenate(list(maker.blocks(0, 120)))
    assert [len(b) for b in batches(p.half, 0, 120)] == [32, 32, 6, 26, 24]
    parts = np.concatenate([np.concatenate(list(maker.blocks(a, b))) for a, b in ((0, 64), (64, 96), (96, 120))])
    assert np.array_equal(whole, parts)
    other = Maker(p, {1: generator, 2: generator}, 1.0, 6).images(np.arange(3))[0]
    assert not np.allclose(other, whole[:3], atol=0.1)
    alone = maker.images(np.arange(3))[0]
    assert np.allclose(alone, whole[:3], atol=1e-4)


def test_cold_images_have_no_noise(generator, raw):
    p = made(raw, 1, 10)
    cold = [Maker(p, {1: generator}, 0.0, seed).images(np.arange(10))[0] for seed in (1, 2)]
    warm = [Maker(p, {1: generator}, 1.0, seed).images(np.arange(10))[0] for seed in (1, 2)]
    assert np.array_equal(*cold) and not np.allclose(*warm, atol=0.05)


def coloured(raw, n_groups=1, seed=4):
    """300 particles in coloured noise of two strengths, and their spectra: (source, particles, (n_groups, S))."""
    p = raw.particles
    optics = (np.arange(len(p)) % n_groups).astype(np.int32)
    split = replace(p, groups=tuple(replace(p.groups[0], number=i + 1) for i in range(n_groups)), optics=optics)
    spectra = np.stack([(i + 1) * noise_spectrum(BOX, "coloured", knee=0.15) for i in range(n_groups)])
    white = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(p), BOX, BOX), np.float32))
    noise = np.stack([colour_noise(white[i : i + 1], spectra[g])[0].numpy() for i, g in enumerate(optics)])
    return ArraySource(0.5 * raw.signal(np.arange(len(p))) + noise, split), split, spectra


def test_the_noise_of_each_optics_group_is_measured_against_the_reference(raw):
    """At the true poses what is left is the noise, 8 % in every shell; without the reference it is not."""
    source, p, spectra = coloured(raw, 2)
    rows = np.arange(len(p))
    found = residual_spectra(source, p, rows, raw.volume, np.full(2, 0.5), Context(), 1)
    assert found.shape == (2, BOX // 2 + 1)
    assert np.abs(found[:, 3:] / spectra[:, 3:] - 1).max() < 0.08
    low = slice(1, 5)
    with_signal = residual_spectra(source, p, rows, raw.volume, np.zeros(2), Context(), 1)
    assert (with_signal[:, low].mean(1) > 1.3 * spectra[:, low].mean(1)).all()
    few = residual_spectra(source, p, rows[:100], raw.volume, np.full(2, 0.5), Context(), 1)  # 50 of each: too few
    assert np.array_equal(few[0], few[1])


def test_spectra_are_brought_to_the_grid_of_the_images_that_are_made(raw):
    p = raw.particles
    groups = (p.groups[0], replace(p.groups[0], pixel_size_A=2 * PIXEL))
    spectra = np.stack([np.arange(17.0)] * 2)
    spectra[:, 16] = np.inf
    found = on_grid(spectra, replace(p, groups=groups), PIXEL)
    assert np.array_equal(found[0], [*range(16), 0.0])  # no power in the images: none is made
    assert np.array_equal(found[1, :8], np.arange(0, 16, 2.0)) and (found[1, 8:] == 0).all()


def test_coloured_noise_has_the_spectrum_of_its_group_and_scales_with_the_temperature(raw, tmp_path):
    _, p, spectra = coloured(raw, 2)
    facts = {"half": 0, "inverted": False}
    Generator(None, raw.volume, np.ones(2), 1.0, facts, spectra).save(tmp_path / "g.npz")
    maker = Maker(p, dict.fromkeys((1, 2), Generator.load(tmp_path / "g.npz")), 1.0, 5)
    rows = np.flatnonzero(p.half == 1)
    (made, clean), (cold, _) = (m.images(rows[:64]) for m in (maker, maker.at_temperature(0.5)))
    assert np.allclose(cold - clean, 0.5 * (made - clean), atol=1e-5)
    blocks = [maker.images(rows[i : i + 16]) for i in range(0, len(rows), 16)]
    power = power_spectrum(np.concatenate([m - c for m, c in blocks]))
    for group in (0, 1):
        own = power[p.optics[rows] == group].mean(0)
        assert np.abs(own[3:] / spectra[group, 3:] - 1).max() < 0.15
    white = Maker(p, dict.fromkeys((1, 2), Generator(None, raw.volume, np.ones(2), 1.0, facts)), 1.0, 5)
    other, same = white.images(rows[:64])
    assert np.array_equal(same, clean) and power_spectrum(other - same).mean(0)[10:].min() > 0.9


class Made:
    """Images in memory that go with auxiliary particles."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.images[rows]


@pytest.mark.parametrize("noise", ["white", "coloured"])
def test_the_transfer_of_a_projection_with_noise_is_one(raw, noise):
    """Within its own standard deviation, of 500 images; the half whose signal was taken down to 0.6 beyond a shell is
    found out, and nothing is said where the reference has no power."""
    smooth = replace(raw.volume, data=lowpass(raw.volume.data, PIXEL, 12.0))
    spectrum = noise_spectrum(BOX, "coloured")[None] if noise == "coloured" else None
    generator = Generator(None, smooth, np.full(1, 1.3), 1.0, {"half": 0, "inverted": False}, spectrum)
    p = both_halves(made(raw, 1, 500), made(raw, 2, 500))
    maker = Maker(p, {1: generator, 2: generator}, 1.0, 5)
    pairs = [maker.images(rows) for rows in batches(p.half, 0, 1000)]
    images, clean = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    curve = np.where(np.arange(17) > 7, 0.6, 1.0)
    images[500:] += apply_radial(clean[500:], curve, dims=2) - clean[500:]
    found = measure_transfer(Made(images), p, maker.conditions, Context(), 1)
    assert np.allclose(found["frequency_invA"], np.arange(1, 17) / (BOX * PIXEL))
    one, two = ({k: np.array(found["halves"][h][k], float) for k in ("value", "sd")} for h in "12")
    known = np.flatnonzero(one["sd"] < 0.15)
    assert len(known) >= 9 and found["halves"]["1"]["images"] == 500
    assert (np.abs(one["value"][known] - 1) < 4 * one["sd"][known]).all()
    assert np.sqrt(np.mean(((one["value"] - 1) / one["sd"])[known] ** 2)) == pytest.approx(1, abs=0.6)
    assert np.abs(two["value"][[1, 2, 3, 4, 5]] - 1).max() < 0.05 and abs(two["value"][8] - 0.6) < 0.15
    assert np.isnan(one["value"][-1]) and np.isnan(one["sd"][-1])


def test_the_transfer_is_the_same_on_any_number_of_ranks(raw, generator):
    """Ranks share the images in blocks; the sums are over images in the order of the rows."""
    p = both_halves(made(raw, 1, 150), made(raw, 2, 100))
    maker = Maker(p, {1: generator, 2: generator}, 1.0, 5)
    images = np.concatenate([maker.images(rows)[0] for rows in batches(p.half, 0, 250)])
    alone = measure_transfer(Made(images), p, maker.conditions, Context(), 1)
    with ThreadPoolExecutor(2) as pool:
        ranks = Ranks.of(2)
        found = [pool.submit(measure_transfer, Made(images), p, maker.conditions, comm, 1) for comm in ranks]
        assert [f.result(60) for f in found] == [alone, alone]


@dataclass
class Ranks:
    """Ranks that are threads."""

    rank: int
    size: int
    meeting: threading.Barrier
    table: list

    @classmethod
    def of(cls, size: int) -> list[Ranks]:
        meeting, table = threading.Barrier(size), [None] * size
        return [cls(rank, size, meeting, table) for rank in range(size)]

    def allgather(self, item):
        self.meeting.wait()
        self.table[self.rank] = item
        self.meeting.wait()
        return list(self.table)


@pytest.mark.parametrize("wrong", [np.ones((2, 17)), np.ones((1, 16)), -np.ones((1, 17)), np.full((1, 17), np.nan)])
def test_a_damaged_spectrum_of_noise_is_refused(raw, tmp_path, wrong):
    Generator(None, raw.volume, np.ones(1), 1.0, {"half": 1}, wrong).save(tmp_path / "g.npz")
    with raises_code("network-file-damaged", InputError, match="damaged: noise"):
        Generator.load(tmp_path / "g.npz")


def test_shards_of_made_images_are_read_back(generator, raw, tmp_path):
    p = both_halves(made(raw, 1, 200), made(raw, 2, 150))
    maker = Maker(p, {1: generator, 2: generator}, 1.0, 5)
    plan = maker.plan("digest")
    assert len(plan.shards) == 3 and plan.shards == Maker(p, maker.generators, 1.0, 5).plan("digest").shards
    with raises_code("shards-missing", CryoisoError):
        shardset.finish(plan, tmp_path)
    for number, (start, stop) in enumerate(plan.shards):
        shardset.write_one(plan, tmp_path, number, maker.blocks(start, stop))
    shardset.finish(plan, tmp_path)
    source = ShardSource(tmp_path)
    assert np.array_equal(source.particles.uid, p.uid) and np.array_equal(source.particles.half, p.half)
    assert np.allclose(source.read(np.arange(350)), np.concatenate(list(maker.blocks(0, 350))), rtol=1e-3, atol=1e-4)
    assert not shardset.is_written(Maker(p, maker.generators, 0.5, 5).plan("digest"), tmp_path, 0)


class Shuffler:
    """An engine that gives back poses in another order, and a wrong one on request."""

    name = "shuffler"

    def __init__(self, lose: bool = False) -> None:
        self.lose = lose

    def refine(self, request: RefineRequest, comm) -> RefineResult:
        p = request.source.particles
        assert p.rotation is None and set(p.results) == {FLAG}
        self.flags, self.images = p.results[FLAG], request.source.read(np.arange(len(p)))
        order = np.random.default_rng(1).permutation(len(p))[: len(p) - self.lose]
        angle = np.zeros((len(p), 3, 3))
        angle[:] = np.eye(3)
        posed = p.with_poses(angle, np.stack([np.arange(len(p))] * 2, 1))
        posed = posed.with_results(rlnMaxValueProbDistribution=p.uid)
        return RefineResult(posed.take(order), {}, [], 8.0)


def test_co_refinement_tells_raw_from_auxiliary_by_uid(raw):
    p = raw.particles
    images = raw.read(np.arange(len(p)))
    aux = made(raw, 1, 40)
    engine = Shuffler()
    request = RefineRequest(ArraySource(images, p), raw.volume, "C3", None, None)
    found = co_refine(engine, request, ArraySource(images[:40] + 1, aux), Context())
    assert np.array_equal(found.raw.uid, p.uid) and np.array_equal(found.auxiliary.uid, aux.uid)
    assert np.array_equal(found.raw.shift_A[:, 0], np.arange(300))
    assert np.array_equal(found.auxiliary.shift_A[:, 0], 300 + np.arange(40))
    assert np.array_equal(found.raw.results["rlnMaxValueProbDistribution"], p.uid)
    assert engine.flags.sum() == 40 and np.array_equal(engine.images[300:], images[:40] + 1)
    with raises_code("relion-particles-lost", CryoisoError, match="all particles"):
        co_refine(Shuffler(lose=True), request, ArraySource(images[:40], aux), Context())


def test_joined_sources_keep_optics_groups_apart_and_refuse_shared_particles(raw):
    images = raw.read(np.arange(300))
    first = ArraySource(images, raw.particles)
    joined = JoinedSource(first, ArraySource(images[:40] + 1, made(raw, 1, 40)))
    assert len(joined.particles.groups) == 2 and [g.number for g in joined.particles.groups] == [1, 2]
    assert set(joined.particles.optics[300:]) == {1}
    rows = np.array([339, 0, 300, 5])
    assert np.array_equal(joined.read(rows), np.stack([images[39] + 1, images[0], images[0] + 1, images[5]]))
    with raises_code("particle-sets-differ", InputError, match="both sets"):
        JoinedSource(first, first)
    with raises_code("box-mismatch", InputError):
        JoinedSource(first, ArraySource(np.zeros((40, 16, 16), np.float32), made(raw, 1, 40)))
    some = SubsetSource(first, raw.particles.half == 1)
    assert np.array_equal(some.read(np.array([2])), images[np.flatnonzero(raw.particles.half == 1)[[2]]])


def test_pooled_sources_share_the_optics_groups_of_the_raw_particles(raw):
    images, p = raw.read(np.arange(300)), raw.particles
    groups = (p.groups[0], replace(p.groups[0], number=7, name="other", voltage_kV=200.0))
    p = replace(p, groups=groups, optics=(np.arange(300) % 2).astype(np.int32))
    aux = auxiliary_particles(p, 1, 40, round_=1, seed=1, symmetry="C3", box_px=BOX, pixel_size_A=PIXEL)
    first, second = ArraySource(images, p), ArraySource(images[:40] + 1, aux)
    joined = JoinedSource(first, second, pooled=True).particles
    assert joined.groups == groups and np.array_equal(joined.optics[300:], aux.optics) and set(aux.optics) == {0, 1}
    flipped = ArraySource(images, p.with_ctf_applied("flipped"))
    with raises_code("particle-sets-differ", InputError, match="cannot join an optics group"):
        JoinedSource(flipped, second, pooled=True)
    engine = Shuffler()
    request = RefineRequest(first, raw.volume, "C3", None, None)
    found = co_refine(engine, request, second, Context(), pooled=True)
    assert found.result.particles.groups == groups and engine.flags.sum() == 40
    assert len(co_refine(engine, request, second, Context()).result.particles.groups) == 4


def test_only_images_of_the_same_kind_can_be_pooled(raw):
    p = raw.particles
    require_poolable(p, PIXEL)
    other = replace(p.groups[0], number=2, name="second", pixel_size_A=2 * PIXEL)
    unused = replace(p, groups=(p.groups[0], other))
    require_poolable(unused, PIXEL)
    optics = (np.arange(len(p)) % 2).astype(np.int32)
    for group, words in (
        (other, r"optics group 2 \(second\).*pixel size of 10 Å, they have 5 Å"),
        (replace(p.groups[0], number=3, phase_flipped=True), "group 3.*phase-flipped"),
        (replace(p.groups[0], number=4, ctf_premultiplied=True), "group 4.*premultiplied"),
    ):
        with raises_code("particle-sets-differ", InputError, match=words):
            require_poolable(replace(p, groups=(p.groups[0], group), optics=optics), PIXEL, "particles.star")


def test_groups_kept_apart_have_other_numbers_and_names(raw):
    p = replace(raw.particles, groups=(replace(raw.particles.groups[0], number=5, name="Krios"),))
    group = apart(made(raw), p).groups[0]
    assert group.number == 6 and group.name == "opticsGroup1_auxiliary"


def test_the_balanced_subset_caps_each_direction_and_keeps_the_most_certain(raw):
    certainty = np.random.default_rng(0).random(300)
    p = raw.particles.with_results(rlnMaxValueProbDistribution=certainty)
    b = balanced_subset(p, "C3", 1.0, 1, step_deg=20.0)
    assert 75 <= b.keep.sum() < 150  # the paper kept a quarter
    assert 150 <= balanced_subset(p, "C3", 1.0, 1, step_deg=20.0, keep=0.5).keep.sum() < 200
    top = np.abs(p.rotation[:, 2, 2]) > np.cos(np.radians(20))
    assert b.keep[~top].mean() > b.keep[top].mean()
    facts = b.facts(p)
    assert facts["kept"] + facts["dropped"] == 300 and facts["dropped_fraction_top"] > 0.9
    assert certainty[top & b.keep].mean() > certainty[top & ~b.keep].mean()
    shuffled = np.random.default_rng(1).permutation(300)
    again = balanced_subset(p.take(shuffled), "C3", 1.0, 1, step_deg=20.0)
    assert np.array_equal(again.keep, b.keep[shuffled])
    assert balanced_subset(p, "C3", 1e6, 1).keep.all()


def test_movement_counts_what_moved(raw):
    p = raw.particles
    turned = p.rotation.copy()
    angle = np.radians(25)
    spin = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    turned[:30] = spin @ turned[:30]
    facts = movement(p, p.with_poses(turned, p.shift_A), "C3")
    assert facts["over_20"] == pytest.approx(0.1) and facts["over_30"] == 0 and facts["median_deg"] < 1e-3
    assert sum(facts["histogram"]["counts"]) == 300
