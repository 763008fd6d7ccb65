"""Phase-flipped and premultiplied images on their way in and out: normalisation, sign, shards, generators, RELION."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from ctf_applied_helper import filtered, of_kind, with_flags
from errors_helper import raises_code
from typer.testing import CliRunner

from cryoiso.cli.simulate_cmd import simulate as simulate_command
from cryoiso.core.config import AuxiliarySection, RefineSection, RelionSection
from cryoiso.core.errors import InputError, UsageError
from cryoiso.engines.relion import command
from cryoiso.engines.relion.images import all_flipped, image_names, relion_source, write_input
from cryoiso.engines.relion.install import Relion
from cryoiso.io import read_particle_file
from cryoiso.io.contrast_sign import decide_sign
from cryoiso.io.imageprep import IngestSettings, normalise, normalise_particles
from cryoiso.io.ingest import ingest, plan
from cryoiso.io.mrc import write_stack
from cryoiso.io.shards import ShardSource
from cryoiso.io.sources import ArraySource, JoinedSource, as_recorded
from cryoiso.io.stack import StackReader
from cryoiso.io.star.write import write_particles
from cryoiso.methods.auxiliary.condition import Condition, fit_scale
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.methods.auxiliary.particles import auxiliary_particles
from cryoiso.parallel.context import Context
from cryoiso.physics.contrast_transfer import ctf_for
from cryoiso.physics.ctf_applied import apply_ctf, restored
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import make_particles, simulate
from cryoiso.pipeline.stages.train import train_into

BOX, PIXEL_A, N = 32, 6.0, 200
ROWS = np.arange(N)


@pytest.fixture(scope="module")
def truth():
    return phantom_map(BOX, PIXEL_A, 14.0)


@pytest.fixture(scope="module")
def plain(truth):
    """(particles, images) as the microscope gave them, on a scale and level of their own."""
    source = simulate(truth, N, snr_db=-3.0, shift_sd_A=6.0, noise="coloured", seed=5)
    scale = np.random.default_rng(1).uniform(2, 5, (N, 1, 1)).astype(np.float32)
    return source.particles, source.read(ROWS) * scale + 40 * scale


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Of images, below Nyquist's frequency: there an astigmatic CTF has two values for one coefficient."""
    inside = np.hypot(np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX)) < 0.49
    a, b = (np.fft.rfft2(x)[:, inside] for x in (found, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def relative_of(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("ramp", [False, True])
def test_flipped_images_are_normalised_as_before_they_were_flipped(plain, ramp):
    particles, images = plain
    given = of_kind(images, particles, "flipped")
    found, empty = normalise_particles(given.read(ROWS), given.particles, ROWS, IngestSettings(ramp=ramp))
    expected = of_kind(normalise(images, 0.9, ramp)[0], particles, "flipped").read(ROWS)
    # the standard deviation takes in Nyquist's frequency, which was lost in flipping: 0.1 %
    assert relative(found, expected) < 2e-3 and not empty.any()
    assert relative(normalise(given.read(ROWS), 0.9, ramp)[0], expected) > 2e-2


@pytest.mark.parametrize("ramp", [False, True])
def test_premultiplied_images_lose_the_level_and_scale_of_the_microscopes(plain, ramp):
    """Each on its own to a few per cent, the noise of two estimates from 400 pixels; all together to 1 %."""
    particles, images = plain
    given = of_kind(images, particles, "premultiplied")
    found, empty = normalise_particles(given.read(ROWS), given.particles, ROWS, IngestSettings(ramp=ramp))
    expected = of_kind(normalise(images, 0.9, ramp)[0], particles, "premultiplied").read(ROWS)
    gain = (found * expected).sum((1, 2)) / np.square(expected).sum((1, 2))
    assert abs(gain.mean() - 1) < 0.02 and gain.std() < 0.05 and not empty.any()
    level = found.mean((1, 2)) - expected.mean((1, 2))
    assert np.abs(level).max() < 0.01
    # the standard deviation of the background would have been another scale, by image and for all
    naive = normalise(given.read(ROWS), 0.9, ramp)[0]
    assert ((naive * expected).sum((1, 2)) / np.square(expected).sum((1, 2))).mean() > 1.3


def test_an_empty_background_is_seen(truth):
    particles = with_flags(make_particles(3, BOX, PIXEL_A, seed=1), "premultiplied")
    images = np.zeros((3, BOX, BOX), np.float32)
    images[:, 14:18, 14:18] = 1
    found, empty = normalise_particles(images, replace(particles, defocus_u_A=np.full(3, 1e4)), np.arange(3),
                                       IngestSettings())  # fmt: skip
    assert np.isfinite(found).all() and empty.all()


def written(folder: Path, images: np.ndarray, particles, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    source = of_kind(images, particles, kind) if kind else ArraySource(images, particles)
    with write_stack(folder / "p.mrcs", BOX, PIXEL_A) as stack:
        stack.append(source.read(ROWS))
    star = folder / "p.star"
    named = replace(source.particles, stack=np.full(N, str(folder / "p.mrcs")))
    write_particles(star, replace(named, rotation=None, shift_A=None))
    return star


@pytest.mark.parametrize("kind", ["", "flipped", "premultiplied", "mixed"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_is_found_in_all_kinds(plain, tmp_path, kind, sign):
    particles, images = plain
    star = written(tmp_path, sign * images, particles, kind)
    decision = decide_sign(read_particle_file(star), IngestSettings(), star)
    assert (decision.sign == sign).all() and abs(decision.z) > 8


def test_shards_of_another_kind_are_not_taken_for_these(plain, tmp_path):
    particles, images = plain
    star = written(tmp_path / "a", images, particles, "premultiplied")
    settings = IngestSettings(storage="float32")
    ingest(star, tmp_path / "shards", settings)
    before = ShardSource(tmp_path / "shards")
    assert [g.ctf_applied for g in before.particles.groups] == ["premultiplied"]
    blind = tmp_path / "blind.star"
    write_particles(blind, read_particle_file(star).with_ctf_applied(""))
    digests = {plan(read_particle_file(f), settings, f).digest for f in (star, blind)}
    assert len(digests) == 2 and before.index["plan"] in digests
    ingest(blind, tmp_path / "shards", settings)
    after = ShardSource(tmp_path / "shards")
    assert [g.ctf_applied for g in after.particles.groups] == [""]
    assert relative(after.read(ROWS), before.read(ROWS)) > 0.2


# --- simulation


def simulated(folder: Path, *options: str) -> Path:
    app = typer.Typer()
    app.command()(simulate_command)
    arguments = ["phantom", str(folder), "--n", "40", "--box", "32", "--pixel-size", "6", *options]
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return folder


def test_simulate_writes_all_kinds(tmp_path):
    untouched = read_particle_file(simulated(tmp_path / "u") / "particles.star")
    with StackReader() as reader:
        images = reader.read(untouched.stack[0], untouched.index)
        c = ctf_for(untouched, None, BOX).numpy()
        for option, factor, kind in (
            ("--phase-flipped", np.where(c < 0, -1, 1), "flipped"), ("--ctf-premultiplied", c, "premultiplied"),
        ):  # fmt: skip
            folder = simulated(tmp_path / kind, option)
            for name in ("particles.star", "truth.star"):
                found = read_particle_file(folder / name)
                assert [g.ctf_applied for g in found.groups] == [kind]
            assert relative(reader.read(found.stack[0], found.index), filtered(images, factor)) < 1e-5
            again = read_particle_file(simulated(tmp_path / f"from-{kind}", "--ctf-from", str(folder / "truth.star"))
                                       / "particles.star")  # fmt: skip
            assert [g.ctf_applied for g in again.groups] == [""]
    with raises_code("options-conflict", UsageError, match="exclude each other"):
        simulated(tmp_path / "both", "--phase-flipped", "--ctf-premultiplied")


# --- generators


def test_restored_images(plain):
    """Flipping is undone; of premultiplied images all that |c| > 0.05 left, and noise of the same power elsewhere."""
    particles, images = plain
    images = normalise(images)[0]
    flipped = of_kind(images, particles, "flipped")
    assert relative(restored(flipped.read(ROWS), flipped.particles, ROWS), images) < 2e-5
    given = of_kind(images, particles, "premultiplied")
    found = restored(given.read(ROWS), given.particles, ROWS)
    assert np.array_equal(found[7:9], restored(given.read(ROWS[7:9]), given.particles, ROWS[7:9]))
    c = ctf_for(particles, None, BOX).numpy()
    a, b = (np.fft.rfft2(x) for x in (found, images))
    radius = np.hypot(np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX))
    seen, unseen = (np.abs(c) > 0.06) & (radius < 0.46), (np.abs(c) < 0.03) & (radius < 0.46) & (radius > 0.15)
    assert relative_of(a[seen], b[seen]) < 0.02
    power = [np.square(np.abs(x[unseen])).mean() for x in (a, b)]
    assert power[0] == pytest.approx(power[1], rel=0.15) and relative_of(a[unseen], b[unseen]) > 0.5
    assert np.array_equal(apply_ctf(images, particles, ROWS), images)


def test_images_cut_out_of_larger_premultiplied_ones_are_restored_to_the_power_of_the_noise():
    large = make_particles(100, 4 * BOX, PIXEL_A, seed=8)
    c = ctf_for(large, None, 4 * BOX).numpy()
    pixels = filtered(np.random.default_rng(3).normal(size=(100, 4 * BOX, 4 * BOX)), c)
    cut = np.ascontiguousarray(pixels[:, 48:80, 48:80])
    small = with_flags(make_particles(100, BOX, PIXEL_A, seed=8), "premultiplied")
    power = np.square(np.abs(np.fft.rfft2(restored(cut, small, np.arange(100))))).mean(0) / BOX**2
    shell = np.rint(np.hypot(np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX)) * BOX).astype(int)
    means = [float(power[shell == r].mean()) for r in range(3, 16)]
    assert min(means) > 0.8 and max(means) < 3 and np.mean(means) < 1.8  # dividing alone gives 3 to 6 from shell 8 on


@pytest.mark.parametrize("kind", ["flipped", "premultiplied", "mixed"])
def test_a_generator_sees_the_same_condition_and_grey_scale(truth, plain, kind):
    particles, images = plain
    images = normalise(images)[0]
    changed = of_kind(images, particles, kind)
    source, seen = as_recorded(changed, changed.particles)
    conditions = [Condition(truth, np.ones(3)).images(p, ROWS[:20]) for p in (particles, seen)]
    assert torch.allclose(*conditions, rtol=0, atol=1e-6)
    plain_source = ArraySource(images, particles)
    expected = fit_scale(plain_source, particles, ROWS, truth, Context(), 1)
    np.testing.assert_allclose(fit_scale(source, seen, ROWS, truth, Context(), 1)[0], expected[0], rtol=0.02)
    made = auxiliary_particles(changed.particles, 1, 30, round_=1, seed=1, symmetry="C3", box_px=BOX,
                               pixel_size_A=PIXEL_A)  # fmt: skip
    assert [g.ctf_applied for g in made.groups] == [""] * len(changed.particles.groups)
    assert as_recorded(plain_source, particles) == (plain_source, particles)


def test_training_brings_images_back_first(truth, plain, tmp_path):
    """The baseline without a network, whose file holds the grey scale that was fitted."""
    particles, images = plain
    images, found = normalise(images)[0], {}
    for kind in ("untouched", "premultiplied", "flipped"):
        folder = tmp_path / kind
        folder.mkdir()
        source = ArraySource(images, particles) if kind == "untouched" else of_kind(images, particles, kind)
        section = AuxiliarySection(generators="white-noise")
        train_into(folder, source, source.particles, {1: truth, 2: truth}, section, Context(), 1, {"round": 1})
        found[kind] = [Generator.load(folder / f"generator{half}.npz").scale[0] for half in (1, 2)]
    np.testing.assert_allclose(found["premultiplied"], found["untouched"], rtol=0.02)
    np.testing.assert_allclose(found["flipped"], found["untouched"], rtol=1e-3)


# --- RELION


SEARCH = command.Search("p.star", "r.mrc", 1.5, 200, 10_000, "C3", 180.0, 30.0, 7)
RELION = Relion("relion_refine_mpi", "3.1.3", "", "", "")


def words(**changes) -> list[str]:
    return command.first_command(replace(SEARCH, **changes), RefineSection(), RelionSection(), RELION)


def test_relion_is_told_what_its_star_file_does_not_say():
    assert not {"--ctf_phase_flipped", "--dont_check_norm"} & set(words())
    assert "--ctf_phase_flipped" in words(phase_flipped=True) and "--dont_check_norm" in words(premultiplied=True)
    assert "--ctf_phase_flipped" not in words(phase_flipped=True, three_dimensional=True)


def test_relion_gets_images_that_fit_their_flags(plain, tmp_path):
    particles, images = plain
    particles, images = particles.take(ROWS[:12]), normalise(images[:12])[0]
    untouched = ArraySource(images, particles)
    flipped, premultiplied, mixed = (of_kind(images, particles, k) for k in ("flipped", "premultiplied", "mixed"))
    assert all_flipped(flipped.particles)
    assert not any(all_flipped(s.particles) for s in (untouched, premultiplied, mixed))
    for whole in (untouched, flipped, premultiplied):
        assert relion_source(whole) is whole
    for source, kinds in (
        (mixed, ["", "premultiplied", ""]),
        (JoinedSource(flipped, ArraySource(images, replace(particles, uid=particles.uid + np.uint64(1)))), ["", ""]),
    ):
        n = len(source.particles)
        names = image_names(source, tmp_path, "auto", Context())
        write_input(tmp_path / "in.star", relion_source(source).particles, names, with_poses=False)
        found = read_particle_file(tmp_path / "in.star")
        assert [g.ctf_applied for g in found.groups] == kinds
        with StackReader() as reader:
            seen = np.stack([reader.read(found.stack[i], found.index[[i]])[0] for i in range(n)])
        expected = apply_ctf(np.concatenate([images] * (n // 12)), relion_source(source).particles, np.arange(n))
        assert relative(seen, expected) < 2e-5
        with raises_code("relion-images-unreadable", InputError):
            image_names(source, tmp_path, "original", Context())
