"""Scale and noise level of each image: recovered where they are known, near 1 where they are equal, and bounded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ctf_applied_helper import of_kind
from likelihood_helper import true_posterior
from test_refine_auxiliary import auxiliaries_of, together
from test_refine_engine import BOX, PIXEL_A, in_memory, request_for, require_same_bits

from cryoiso.core.types import Particles, concatenate
from cryoiso.engines.native import NativeEngine
from cryoiso.io import read_particle_file
from cryoiso.io.sources import ArraySource
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.projection import FourierVolume
from cryoiso.physics.simulation import SimulatedSource, simulate
from cryoiso.physics.views import Views
from cryoiso.refine import batches
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.identity import of_request
from cryoiso.refine.intensity import LIMITS, ImageTerms, Intensity, estimated, intensity_facts, two_levels
from cryoiso.refine.likelihood import whiten
from cryoiso.refine.maximise import NoiseSums, accumulate
from cryoiso.refine.reconstruct import reconstruct_halves

N, MICROGRAPHS = 600, 20
SPECTRA = np.ones((1, BOX // 2 + 1))


def uneven(n: int = N, snr_db: float = -5.0, views: Views | None = None, equal: bool = False) -> tuple:
    """(source, scales, noise levels): a trimer whose images have scales that differ by micrograph and by image."""
    made = simulate(phantom_map(BOX, PIXEL_A, 14.0), n, snr_db=snr_db, views=views or Views(), shift_sd_A=4.0, seed=5)
    quiet = SimulatedSource(made.volume, made.particles, noise=False).read(np.arange(n))
    noise = made.read(np.arange(n)) - quiet
    rng = np.random.default_rng(7)
    micrograph = np.arange(n) % MICROGRAPHS
    scale, level = np.ones(n), np.ones(n)
    if not equal:
        scale = np.exp(rng.normal(0, 0.3, MICROGRAPHS)[micrograph] + rng.normal(0, 0.3, n))
        level = np.exp(rng.normal(0, 0.2, MICROGRAPHS)[micrograph] + rng.normal(0, 0.2, n))
    for half in (1, 2):
        scale[made.particles.half == half] /= scale[made.particles.half == half].mean()
        level[made.particles.half == half] /= level[made.particles.half == half].mean()
    images = scale[:, None, None] * quiet + np.sqrt(level)[:, None, None] * noise
    source = ArraySource(images.astype(np.float32), replace(made.particles, micrograph=micrograph))
    source.truth = made.volume
    return source, scale, level


def at_true_poses(source: ArraySource, rounds: int = 3, mode: str = "particle") -> Intensity:
    """Intensities estimated against the truth at the true poses."""
    n = len(source.particles)
    batch = BatchReader(source, source.particles, PIXEL_A)._prepare(np.arange(n), 15)
    volume = FourierVolume.from_volume(torch.as_tensor(source.truth.data))
    now = Intensity.ones(n)
    for _ in range(rounds):
        images = ImageTerms(mode, SPECTRA)
        add(now.of(batch), source, volume, images)
        now = images.estimate(now, source.particles, np.ones(n, bool), Context())
    return now


def add(batch, source, volume: FourierVolume, images: ImageTerms) -> NoiseSums:
    from cryoiso.physics.backproject import SliceAccumulator

    noise = NoiseSums.empty(1, BOX // 2 + 1)
    posterior = true_posterior(source, np.arange(len(batch)))
    accumulate(
        batch, whiten(batch, SPECTRA), posterior, volume, SliceAccumulator.empty(BOX), noise, images=images
    )  # fmt: skip
    return noise


# --- what is recovered


def test_scales_and_noise_levels_are_recovered_whatever_the_view():
    """At the true poses; on average over the cones of views there is no bias beyond its standard error."""
    source, scale, level = uneven(views=Views("preferred", 0.8, 36.0))
    found = at_true_poses(source)
    assert np.corrcoef(found.scale, scale)[0, 1] > 0.93 and np.corrcoef(found.noise, level)[0, 1] > 0.9
    assert np.polyfit(scale, found.scale, 1)[0] == pytest.approx(1, abs=0.2)
    top = np.abs(source.particles.rotation[:, 2, 2]) > np.cos(np.radians(36))
    for rows in (top, ~top):
        error = (found.scale - scale)[rows]
        assert rows.sum() > 60 and abs(error.mean()) < 3 * error.std() / np.sqrt(len(error)) + 0.01
    for half in (1, 2):
        assert found.scale[source.particles.half == half].mean() == pytest.approx(1)
    # with the mean intensities alone, the rest of the spread is not seen
    group = at_true_poses(source, mode="group")
    of = source.particles.micrograph + MICROGRAPHS * source.particles.half
    for g in np.unique(of):
        assert np.ptp(group.scale[of == g]) == 0
    assert np.corrcoef(group.scale, scale)[0, 1] < np.corrcoef(found.scale, scale)[0, 1] - 0.1


def test_equal_intensities_stay_near_one():
    source, _, _ = uneven(equal=True)
    found = at_true_poses(source)
    assert found.scale.std() < 0.03 and found.noise.std() < 0.02
    raw = ImageTerms("particle", SPECTRA)
    batch = BatchReader(source, source.particles, PIXEL_A)._prepare(np.arange(N), 15)
    add(batch, source, FourierVolume.from_volume(torch.as_tensor(source.truth.data)), raw)
    cross, norm, *_ = raw._found[0][1].T
    assert (cross / norm).std() > 0.05, "without the prior they would scatter by their errors"


def test_noise_spectra_are_those_of_a_unit_level():
    source, scale, level = uneven()
    batch = BatchReader(source, source.particles, PIXEL_A)._prepare(np.arange(N), 15)
    volume = FourierVolume.from_volume(torch.as_tensor(source.truth.data))
    found = [
        add(one, source, volume, ImageTerms("none", SPECTRA)).spectra(SPECTRA)[0, 3:15]
        for one in (batch, Intensity(scale, level).of(batch))
    ]
    np.testing.assert_allclose(found[1], 1, rtol=0.06)
    assert found[0][0] > 1.05 * found[1][0], "what the wrong scale leaves over was taken for noise"


def test_premultiplied_images_have_the_same_terms():
    source, _, _ = uneven(200)
    kinds = [source, of_kind(source.read(np.arange(200)), source.particles, "premultiplied")]
    volume, terms = FourierVolume.from_volume(torch.as_tensor(source.truth.data)), []
    for one in kinds:
        images = ImageTerms("particle", SPECTRA)
        add(BatchReader(one, one.particles, PIXEL_A)._prepare(np.arange(200), 13), source, volume, images)
        terms.append(images._found[0][1])
    np.testing.assert_allclose(terms[1][:, :2], terms[0][:, :2], rtol=1e-3, atol=0.02)
    assert (terms[1][:, 3] < terms[0][:, 3]).all() and np.corrcoef(terms[0][:, 2], terms[1][:, 2])[0, 1] > 0.7


# --- the prior


def test_shrinkage_has_the_variances_of_the_model():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 50)
    true = 1 + rng.normal(0, 0.2, 40)[group] + rng.normal(0, 0.15, 2000)
    error = rng.uniform(0.1, 0.5, 2000)
    values = true + error * rng.normal(size=2000)
    shown = np.ones(2000)
    mean, _, found = two_levels(values, error**-2, group, shown)
    best = np.polyfit(found, true, 1)
    assert best[0] == pytest.approx(1, abs=0.08), "a posterior mean is neither too bold nor too shy"
    assert np.std(found - true) < 0.75 * np.std(values - true)
    assert np.std(mean - true) == pytest.approx(0.15, abs=0.02)
    unknown = error**-2 * (np.arange(2000) % 50 > 0)
    mean, _, found = two_levels(values, unknown, group, shown)
    assert found[0] == mean[0]


@pytest.mark.parametrize("own", [True, False])
def test_nothing_runs_away(own):
    """Terms without sense, iteration after iteration: within limits, mean 1, finite."""
    source, _, _ = uneven(60)
    particles, rng = source.particles, np.random.default_rng(1)
    now = Intensity.ones(60)
    for i in range(20):
        terms = np.column_stack([
            now.scale * rng.normal(0, 10.0 ** (i % 7), 60), rng.exponential(1e-3, 60), rng.exponential(50, 60),
            np.full(60, 9.0), np.ones(60),
        ])  # fmt: skip
        terms[::7, 1] = 0
        now = estimated(now, terms, particles, np.ones(60, bool), own=own)
        for values in (now.scale, now.noise):
            assert np.isfinite(values).all() and values.min() > 0
            for half in (1, 2):
                some = values[particles.half == half]
                assert some.mean() == pytest.approx(1) and some.max() / some.min() <= 1.001 * LIMITS[1] / LIMITS[0]


# --- the engine


def test_a_refinement_finds_the_scales_and_writes_them(tmp_path):
    source, scale, _ = uneven(240, snr_db=-1.0)
    result = NativeEngine().refine(request_for(source, tmp_path, scale="particle"), Context())
    assert np.corrcoef(result.particles.signal_scale, scale)[0, 1] > 0.85
    back = read_particle_file(tmp_path / "particles.star")
    np.testing.assert_allclose(back.signal_scale, result.particles.signal_scale, atol=1e-6)
    np.testing.assert_allclose(back.noise_level, result.particles.noise_level, atol=1e-6)
    facts = intensity_facts(
        Intensity.of_particles(back), source.particles, back.rotation, np.ones(240, bool), "C3"
    )  # fmt: skip
    assert facts["micrographs"] == MICROGRAPHS and sum(cone["particles"] for cone in facts["by_view"]) == 240
    assert result.iterations[-1]["scale_sd"] == pytest.approx(scale.std(), rel=0.25)


def test_without_estimation_nothing_is_written_or_touched(tmp_path):
    source, _, _ = uneven(60)
    given = source.particles.with_intensity(np.full(60, 2.0), np.full(60, 3.0))
    batch = BatchReader(source, given, PIXEL_A)._prepare(np.arange(60), 9)
    assert Intensity.ones(60).of(batch) is batch
    request = request_for(source, tmp_path, max_iterations=1, healpix_order=1)
    result = NativeEngine().refine(request, Context())
    assert result.particles.signal_scale is None and "cryoisoScale" not in (tmp_path / "particles.star").read_text()
    assert "scale_sd" not in result.iterations[0]
    # but a local search goes on from the file's, which belong to its poses
    posed = ArraySource(source.read(np.arange(60)), given)
    local = replace(
        request_for(source, tmp_path / "local", max_iterations=1, healpix_order=1), source=posed, local_deg=5.0
    )  # fmt: skip
    assert of_request(local, 1.0)["intensities"] != of_request(request, 1.0)["intensities"] == "none"
    assert (NativeEngine().refine(local, Context()).particles.signal_scale == 2).all()


RANKS_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_refine_intensity as t
from cryoiso.parallel.context import get_context
t.refine_in_small_batches(Path(sys.argv[2]), get_context())
"""


def request_of_few(folder: Path):
    source = uneven(96, snr_db=-1.0)[0]
    return request_for(source, folder, max_iterations=3, healpix_order=1, scale="particle")


def refine_in_small_batches(folder: Path, comm) -> None:
    batches.BATCH_IMAGES = 16
    NativeEngine().refine(request_of_few(folder), comm)


@pytest.mark.mpi
def test_ranks_and_interruptions_give_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_IMAGES", 16)
    require_same_bits(request_of_few, RANKS_SCRIPT, tmp_path)


def test_auxiliary_particles_keep_theirs(tmp_path):
    raw, _, _ = uneven(120, snr_db=-1.0)
    done = together(raw, auxiliaries_of(raw, raw.truth), tmp_path, scale="particle")
    assert done.raw.signal_scale.std() > 0.1 and (done.auxiliary.signal_scale == 1).all()
    assert (done.auxiliary.noise_level == 1).all()


# --- particle files and maps


def test_a_map_is_made_with_the_images_intensities():
    """Images that differ in scale only, without noise: the map is the one of equal images."""
    equal = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 200, snr_db=20.0, shift_sd_A=4.0, seed=9))
    scale = np.random.default_rng(3).uniform(0.3, 3, 200)
    level = np.random.default_rng(4).uniform(0.5, 2, 200)
    source = ArraySource(equal.read(np.arange(200)) * scale[:, None, None].astype(np.float32), equal.particles)
    expected = reconstruct_halves(equal, equal.particles, symmetry="C3")
    maps = [
        reconstruct_halves(source, particles, symmetry="C3")
        for particles in (source.particles, source.particles.with_intensity(scale, level))
    ]
    norm = np.linalg.norm(expected[1].data)
    left = [np.linalg.norm(m[1].data - expected[1].data) / norm for m in maps]
    assert left[1] < 0.05 < 0.15 < left[0]


def test_intensities_belong_to_the_poses(tmp_path):
    source, _, _ = uneven(20)
    names = [f"{i % 2 + 1}.mrc" for i in range(20)]
    given = replace(source.particles, micrograph=None).with_intensity(np.full(20, 1.5), np.full(20, 0.5))
    write_particles(tmp_path / "a.star", given.with_results(rlnMicrographName=np.array(names)))
    read = read_particle_file(tmp_path / "a.star")
    assert (read.signal_scale == 1.5).all() and (read.noise_level == 0.5).all()
    assert read.micrograph.tolist() == [i % 2 for i in range(20)]
    turned = read.with_poses(read.rotation[::-1], read.shift_A)
    write_particles(tmp_path / "b.star", turned)
    assert turned.signal_scale is None and read_particle_file(tmp_path / "b.star").signal_scale is None
    both: Particles = concatenate(read, source.particles)
    assert both.signal_scale.tolist() == [1.5] * 20 + [1.0] * 20 and both.micrograph[20:].min() == 2
