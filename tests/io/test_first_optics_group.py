"""Optics groups without images: the grid of maps is that of the first particle, and the images end where they end."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cryoiso.core.config import RefineSection
from cryoiso.core.protocols import RefineRequest
from cryoiso.io.mrc import read_map
from cryoiso.io.sources import ArraySource, SubsetSource
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.pipeline.stages.half_maps import write_reconstruction
from cryoiso.pipeline.stages.ingest import _ingest_facts
from cryoiso.refine.initial_model import initial_model, mean_power
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.reconstruct import reconstruct_halves, reconstruct_references

BOX, PIXEL_A, N = 28, 6.0, 60


@pytest.fixture(scope="module")
def plain() -> ArraySource:
    source = simulate(phantom_map(BOX, PIXEL_A, 16.0), N, snr_db=0.0, seed=2)
    return ArraySource(source.read(np.arange(N)), source.particles)


def behind_another_group(source: ArraySource, first_rows: int = 0) -> ArraySource:
    """The same images in the second optics group; the first is of another pixel size, and has the first rows."""
    group = source.particles.groups[0]
    other = replace(group, number=7, name="other", pixel_size_A=4.0, box_px=42)
    optics = (np.arange(N) >= first_rows).astype(np.int32)
    return ArraySource(source.read(np.arange(N)), replace(source.particles, groups=(other, group), optics=optics))


def test_maps_do_not_take_the_grid_of_a_group_without_images(plain):
    """Selecting particles leaves all optics groups in the file."""
    changed = behind_another_group(plain)
    expected = reconstruct_halves(plain, plain.particles, Context())
    found = reconstruct_halves(changed, changed.particles, Context())
    one, two = (reconstruct_references(s, s.particles, Context()) for s in (plain, changed))
    for half in (1, 2):
        for mine, theirs in ((found, expected), (two[0], one[0]), (two[1], one[1])):
            assert mine[half].pixel_size_A == PIXEL_A
            np.testing.assert_array_equal(mine[half].data, theirs[half].data)


def test_maps_of_a_subset_stay_on_the_grid_of_the_whole_set(plain, tmp_path):
    """A subset may begin with a particle of another pixel size than the set."""
    mixed = behind_another_group(plain, first_rows=10)
    rows = np.flatnonzero(mixed.particles.optics == 1)
    subset, (box, pixel) = SubsetSource(mixed, rows), (BOX, mixed.particles.groups[0].pixel_size_A)
    write_reconstruction(
        subset, subset.particles, tmp_path, Context(), symmetry="C1", padding=2, pixel_size_A=pixel
    )  # fmt: skip
    found = read_map(tmp_path / "map.mrc")
    assert (found.box_px, found.pixel_size_A) == (box, pytest.approx(4.0))
    halves = reconstruct_halves(subset, subset.particles, Context(), pixel_size_A=4.0)
    np.testing.assert_array_equal(read_map(tmp_path / "half1.mrc").data, halves[1].data)


def test_a_run_says_how_many_groups_have_images(plain):
    decision, settings = SimpleNamespace(inverted=False, reason=""), SimpleNamespace(storage="float16")
    for rows, number in ((0, 1), (10, 2)):
        particles = behind_another_group(plain, rows).particles
        plan = SimpleNamespace(particles=particles, decision=decision, settings=settings, box_px=BOX, shards=[0])
        assert _ingest_facts(plan)["optics_groups"] == number


def test_a_group_without_images_does_not_lift_the_limit_of_low_passed_ones(plain):
    """Nothing may be claimed beyond the shell where the images end."""
    changed, cut = behind_another_group(plain), 8
    f = np.fft.fftfreq(BOX) * BOX
    keep = np.hypot(f[:, None], np.arange(BOX // 2 + 1)[None]) <= cut
    images = np.fft.irfft2(np.fft.rfft2(changed.read(np.arange(N))) * keep, s=(BOX, BOX)).astype(np.float32)
    source = ArraySource(images, replace(changed.particles, rotation=None, shift_A=None))
    run = Refinement(_request(source), Context(), "cpu", 145.0)
    record = run.step(initial_model(run, 40.0)).history[-1]
    assert run.limit == cut
    assert min(record["resolution_A"], record["resolution_unmasked_A"]) >= BOX * PIXEL_A / cut - 1e-9


def test_images_in_no_half_set_are_not_taken_for_constant(plain):
    """They are never read, so nothing is known of their power."""
    half = plain.particles.half.copy()
    half[:5] = 0
    source = ArraySource(plain.read(np.arange(N)), replace(plain.particles, half=half, rotation=None, shift_A=None))
    spectra = [
        mean_power(Refinement(_request(s), Context(), "cpu", 145.0)) for s in (source, SubsetSource(source, half > 0))
    ]
    np.testing.assert_array_equal(*spectra)


def _request(source) -> RefineRequest:
    return RefineRequest(
        source=source, reference=phantom_map(BOX, PIXEL_A, 16.0), symmetry="C3", folder=None, diameter_A=145.0,
        settings=RefineSection(max_iterations=1), seed=1, lowpass_A=40.0,
    )  # fmt: skip
