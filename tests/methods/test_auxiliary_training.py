"""The generator is a variational autoencoder that learns what the images look like: trained for ten seconds here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cryoiso.core.config import AuxiliarySection
from cryoiso.io.sources import ArraySource
from cryoiso.methods.auxiliary.condition import Condition
from cryoiso.methods.auxiliary.generate import Maker
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.methods.auxiliary.particles import auxiliary_particles
from cryoiso.methods.auxiliary.settings import PRESETS, SMALL_ANNEALED, network, training
from cryoiso.methods.auxiliary.task import GeneratorTask, collapsed_layers
from cryoiso.methods.auxiliary.training import GeneratorTraining, curves, train_generators
from cryoiso.metrics.imagestats import compare_images
from cryoiso.nets.hvae import ConditionalHvae
from cryoiso.nets.losses import negative_elbo
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.physics.views import Views
from cryoiso.train.decision import TrainingDecision

BOX, PIXEL, N, HELD_OUT = 48, 4.0, 600, 256
SETTINGS = PRESETS["small"]


@pytest.fixture(scope="module")
def data():
    """Particles with noise whose power falls eightfold, most seen from the top, and their homologue."""
    volume = phantom_map(BOX, PIXEL, 12.0)
    source = simulate(volume, N + HELD_OUT, snr_db=-14, views=Views("preferred", 0.9), shift_sd_A=4.0, noise="coloured")
    images = source.read(np.arange(N + HELD_OUT))
    homologue = phantom_map(BOX, PIXEL, 12.0, variant=1)
    scale = np.linalg.norm(source.volume.data) / np.linalg.norm(homologue.data)
    return source.particles, images, replace(homologue, data=homologue.data * np.float32(scale))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    particles, images, homologue = data
    folder = tmp_path_factory.mktemp("generator")
    course = GeneratorTraining("1", np.arange(N), homologue, folder / "half1", folder / "generator1.npz", {})
    outcomes = train_generators(
        [course], ArraySource(images, particles), particles, SETTINGS, Context(), seed=3, resume=False
    )
    return Generator.load(course.file), curves(outcomes["1"])


def without_training(trained: Generator) -> Generator:
    torch.manual_seed(1)
    return replace(trained, network=ConditionalHvae(network(SETTINGS, BOX)).eval())


def spectrum_error(generator: Generator, data) -> float:
    """Largest |ln(power of made / power of held-out images)| of a shell finer than 20 Å."""
    particles, images, _ = data
    raw = particles.take(np.arange(N, N + HELD_OUT))
    # views like the raw ones', so that only what the generator has learnt can differ
    made = auxiliary_particles(
        particles, 1, HELD_OUT, round_=1, seed=1, symmetry="C3", box_px=BOX, pixel_size_A=PIXEL
    ).with_poses(raw.rotation, raw.shift_A)
    maker = Maker(made, {1: generator}, 1.0, 1)
    found = compare_images(images[N:], np.concatenate(list(maker.blocks(0, HELD_OUT))), PIXEL, 0.5 * BOX)
    return abs(found["finer"]["largest"])


def test_generated_images_have_the_raw_power_spectrum(trained, data):
    assert spectrum_error(trained[0], data) < 0.10


def test_an_untrained_or_collapsed_network_has_not(trained, data):
    assert spectrum_error(without_training(trained[0]), data) > 0.2
    silent = without_training(trained[0])
    silent.network.load_state_dict(trained[0].network.state_dict())
    for layer in silent.network.layers:
        layer.inject.weight.data.zero_()
    assert spectrum_error(silent, data) > 0.2


def held_out(generator: Generator, data) -> tuple[float, np.ndarray]:
    """Bound in nats per pixel, and KL a pixel by layer, of images that were not trained on."""
    particles, images, _ = data
    rows = np.arange(N, N + HELD_OUT)
    condition = Condition(generator.reference, generator.scale)
    noise = torch.randn(HELD_OUT, generator.network.config.latent_size, generator=torch.Generator().manual_seed(5))
    x = torch.from_numpy(images[rows])[:, None]
    with torch.no_grad():
        out = generator.network(x, condition.images(particles, rows), condition.poses(particles, rows), noise)
        terms = negative_elbo(out, x, generator.likelihood_sd, 1.0)
    return float(terms.loss), terms.kl_per_layer.numpy()


def test_the_bound_improves_on_held_out_images(trained, data):
    before, after = held_out(without_training(trained[0]), data)[0], held_out(trained[0], data)[0]
    assert after < before - 0.02
    assert after == pytest.approx(trained[1]["bound"][-1], abs=0.02)


def test_most_layers_tell_something(trained, data):
    kl = held_out(trained[0], data)[1]
    assert collapsed_layers(kl, BOX).sum() <= len(kl) // 4
    assert kl.min() >= 0 and kl.sum() > 0.5


def test_the_records_have_what_is_plotted(trained):
    record = trained[1]
    assert record["steps"][-1] == SETTINGS.steps and record["attempts"] == 1
    assert len(record["kl_per_layer"][0]) == network(SETTINGS, BOX).latent_layers
    assert set(record["kl_weight"]) == {1.0}


def task(data, **changes) -> GeneratorTask:
    particles, images, homologue = data
    settings = replace(SETTINGS, **changes)
    source = ArraySource(images, particles)
    return GeneratorTask(
        source, particles, np.arange(N), Condition(homologue, np.ones(1)), network(settings, BOX), settings, 1
    )


def test_annealing_always_fits_and_is_slower_in_every_attempt(data):
    for fraction in (0.3, 0.5, 1.0):
        t = task(data, kl_anneal_fraction=fraction)
        ends = [t.annealed_at(attempt) for attempt in range(4)]
        assert ends == sorted(ends) and ends[-1] < SETTINGS.steps
        assert t.kl_weight(ends[0], 0) == 1.0 and t.kl_weight(0, 0) < 0.01


def test_without_annealing_only_later_attempts_are_annealed(data):
    t = task(data, kl_anneal_fraction=0.0)
    assert t.annealed_at(0) == 0 and t.kl_weight(0, 0) == 1.0
    assert 0 < t.annealed_at(1) < t.annealed_at(2) == t.annealed_at(3) < SETTINGS.steps
    assert t.kl_weight(0, 1) < 0.01


def test_a_training_without_annealing_fails_if_it_ends_above_its_start_and_not_if_it_stays_there(data):
    def at_the_end(bound: float, step: int = SETTINGS.steps, **changes) -> str:
        history = [{"step": 1 + i, "attempt": 0, "bound": 1.42} for i in range(9)]
        return task(data, **changes).judge([*history, {"step": step, "attempt": 0, "bound": bound}]).reason

    assert at_the_end(1.42) == "" and at_the_end(1.55) == ""
    assert at_the_end(2.5) == "the bound rose from 1.42 to 2.5"
    assert at_the_end(2.5, step=SETTINGS.steps - 1) == ""
    assert at_the_end(2.5, kl_anneal_fraction=0.5) == ""  # the flat bound speaks of it


def test_images_of_white_noise_leave_nothing_to_learn_and_are_no_failure(tmp_path):
    volume = phantom_map(16, 12.0, 30.0)
    source = simulate(volume, 64, snr_db=-20)
    course = GeneratorTraining("1", np.arange(64), volume, tmp_path / "half1", tmp_path / "generator1.npz", {})
    (tmp_path / "half1").mkdir()
    outcomes = train_generators([course], source, source.particles, SETTINGS, Context(), seed=3, resume=False)
    assert outcomes["1"].attempts == 1 and outcomes["1"].step == SETTINGS.steps


def test_the_preset_decides_on_the_annealing_where_the_job_does_not():
    assert training(AuxiliarySection(), "cpu") == PRESETS["small"]
    assert training(AuxiliarySection(), "cpu").kl_anneal_fraction == 0.0
    assert training(AuxiliarySection(), "cuda").kl_anneal_fraction == 0.5
    annealed = training(AuxiliarySection(kl_anneal_fraction=0.3), "cpu")
    assert annealed.kl_anneal_fraction == 0.3 and annealed.steps == 300 and annealed.learning_rate == 3e-3
    assert training(AuxiliarySection(kl_anneal_fraction=0.5), "cpu") == SMALL_ANNEALED
    assert training(AuxiliarySection(kl_anneal_fraction=0.0), "cuda").kl_anneal_fraction == 0.0


def test_a_collapse_is_seen_when_the_annealing_is_over_and_not_before(data):
    t = task(data, kl_anneal_fraction=0.5)
    layers = network(SETTINGS, BOX).latent_layers
    dead, alive = [1e-9] * layers, [0.1] * layers

    def after(step: int, kl: list[float]) -> TrainingDecision:
        return t.judge([{"step": step, "attempt": 0, "kl_per_layer": kl}])

    end = t.annealed_at(0)
    assert after(end, dead).action == "go on"
    verdict = after(end + 1, dead)
    assert verdict.action == "restart" and f"{layers} of {layers} layers" in verdict.reason
    assert after(end + 1, alive).action == "go on"
    assert after(end + 1, [1e-9, *alive[1:]]).action == "go on"
    t = task(data, kl_anneal_fraction=0.0)
    assert after(SETTINGS.steps // 2, dead).action == "go on"
    assert after(SETTINGS.steps // 2 + 1, dead).action == "restart"
