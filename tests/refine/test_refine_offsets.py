"""Searches around known offsets: particles that sit off centre, and offsets that cannot be."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from test_refine_engine import BOX, PIXEL_A, errors_of, in_memory, request_for

from cryoiso.core.errors import InputError
from cryoiso.core.types import Particles
from cryoiso.engines.native import NativeEngine
from cryoiso.io.sources import ArraySource
from cryoiso.methods.auxiliary.corefine import co_refine
from cryoiso.methods.auxiliary.particles import auxiliary_particles, both_halves
from cryoiso.methods.auxiliary.reference_check import require_evidence
from cryoiso.parallel.context import Context
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import Projector, simulate
from cryoiso.refine import initial_model
from cryoiso.refine.intensity import Intensity
from cryoiso.refine.iterate import Refinement
from cryoiso.refine.model import Model
from cryoiso.refine.offsets import check_poses

N, OFF_PX = 120, 5


@pytest.fixture(scope="module")
def off_centre() -> tuple[ArraySource, Particles]:
    """Images of -3 dB, 5 px off centre in random directions, and their true poses."""
    source = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), N, snr_db=-3.0, shift_sd_A=4.0, seed=9))
    where = np.random.default_rng(1).uniform(0, 2 * np.pi, N)
    moves = np.rint(OFF_PX * np.stack([np.cos(where), np.sin(where)], 1)).astype(int)
    images = source.read(np.arange(N))
    moved = np.stack([np.roll(image, (y, x), (0, 1)) for image, (x, y) in zip(images, moves, strict=True)])
    true = replace(source.particles, shift_A=source.particles.shift_A - PIXEL_A * moves)
    held = ArraySource(moved, true)
    held.truth = source.truth
    return held, true


def with_offsets(source: ArraySource, shift_A: np.ndarray | None) -> ArraySource:
    other = ArraySource(source.read(np.arange(N)), replace(source.particles, rotation=None, shift_A=shift_A))
    other.truth = source.truth
    return other


def given_of(true: Particles) -> np.ndarray:
    """The true offsets but for half a pixel, as a 2D classification leaves them."""
    return true.shift_A + np.random.default_rng(2).normal(0, 0.5 * PIXEL_A, (N, 2))


def refined(source: ArraySource, folder: Path, **settings):
    request = replace(request_for(source, folder, **{"max_iterations": 2, **settings}), source=source)
    return NativeEngine().refine(request, Context())


def test_a_global_search_goes_around_the_given_offsets(off_centre, tmp_path, caplog):
    """56 % of the poses were wrong when the offsets were thrown away; none need be."""
    source, true = off_centre
    with caplog.at_level(logging.INFO, "cryoiso"):
        result = refined(with_offsets(source, given_of(true)), tmp_path / "known")
    errors = errors_of(result.particles, true, "C3")
    assert errors.median_deg < 5 and errors.fraction_over(20) < 0.03 and errors.median_shift_A < 1.5
    assert "searched around the given offsets (median 5." in caplog.text and "ended at the edge" not in caplog.text
    record = result.iterations[-1]
    assert record["at_shift_limit"] < 0.05
    # the prior's width is that of what was found, not of the offsets
    found = result.particles.shift_A - given_of(true)
    assert record["shift_sd_A"] == pytest.approx(np.sqrt(np.mean(found**2)), rel=1e-3)


def test_unknown_offsets_beyond_the_range_are_told_of(off_centre, tmp_path, caplog):
    source, _ = off_centre
    with caplog.at_level(logging.WARNING, "cryoiso"):
        result = refined(with_offsets(source, None), tmp_path, max_iterations=1)
    share = result.iterations[-1]["at_shift_limit"]
    assert share > 0.5
    assert f"{round(share * N)} of {N} particles ended at the edge of the search for shifts, 19.2 Å" in caplog.text
    assert "refine.shift_range_A" in caplog.text
    assert json.loads((tmp_path / "refine.json").read_text())["iterations"][-1]["at_shift_limit"] == share


def test_offsets_of_zero_are_no_offsets(off_centre, tmp_path):
    """The same bits as without."""
    source, _ = off_centre
    results = [
        refined(with_offsets(source, shift), tmp_path / name, max_iterations=1, healpix_order=1)
        for name, shift in (("zero", np.zeros((N, 2))), ("none", None))
    ]
    assert np.array_equal(results[0].particles.rotation, results[1].particles.rotation)
    assert np.array_equal(results[0].particles.shift_A, results[1].particles.shift_A)


def test_a_co_refinement_keeps_the_offsets_of_the_raw_particles(off_centre, tmp_path):
    source, true = off_centre
    raw = with_offsets(source, given_of(true))
    made = auxiliary_particles(
        true, 1, 40, round_=1, seed=1, symmetry="C3", box_px=BOX, pixel_size_A=PIXEL_A, known_shift_A=given_of(true)
    )
    # as the shifts that a search has to find (3 Å of error), not as the offsets (21 Å)
    assert 1.5 < made.shift_A.std() < 5
    other = auxiliary_particles(
        true, 2, 40, round_=1, seed=1, symmetry="C3", box_px=BOX, pixel_size_A=PIXEL_A, known_shift_A=true.shift_A
    )
    assert other.shift_A.std() < 2 * PIXEL_A * 1.3  # nothing found yet: no more than a search expects at first
    known = both_halves(made, other)
    both = ArraySource(noisy_images(source, known), known)
    request = replace(request_for(source, tmp_path, max_iterations=2), source=raw)
    found = co_refine(NativeEngine(), request, both, Context())
    errors = errors_of(found.raw, true, "C3")
    assert errors.median_deg < 5.5 and errors.fraction_over(20) < 0.05
    mates = errors_of(found.auxiliary, known, "C3")
    assert mates.median_deg < 5.5 and mates.median_shift_A < 2


def noisy_images(source: ArraySource, particles: Particles) -> np.ndarray:
    clean = Projector(source.truth).images(particles, np.arange(len(particles))).numpy()
    return clean + np.random.default_rng(3).normal(size=clean.shape).astype(np.float32)


def test_noise_with_offsets_that_it_was_refined_to_is_still_refused():
    """Searched around them, this noise reached by "chance" 1.7e-5, as noise does in one of 60,000 sets."""
    source = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), 400, snr_db=-3.0, shift_sd_A=4.0, seed=9))
    noise = np.random.default_rng(0).normal(size=(400, BOX, BOX)).astype(np.float32)
    held = ArraySource(noise, replace(source.particles, rotation=None, shift_A=None))
    held.truth = source.truth
    run = Refinement(replace(request_for(source, None), source=held), Context(), "cpu", 145.0)
    images = initial_model.mean_power(run)
    state = initial_model.first_state(run, 40.0)
    references = dict.fromkeys((1, 2), run.first_reference(source.truth, 40.0))
    n = len(noise)
    found = run.step(
        Model(state, references, images, Intensity.ones(n), np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 2)))
    )
    held.particles = replace(held.particles, shift_A=found.shift_A)
    with raises_code("reference-does-not-match-images", InputError):
        require_evidence(replace(request_for(source, None), source=held), Context())


# --- offsets and poses that cannot be


def test_impossible_poses_are_named(off_centre, tmp_path):
    source, true = off_centre

    def refuse(match: str, **changes) -> None:
        with pytest.raises(InputError, match=match):
            check_poses(replace(true, **changes), BOX)

    far = true.shift_A.copy()
    far[17] = (3.0, -500.0)
    refuse(r"row 18: the offset of a particle leads out of its image: .*half a box, 96 Å.*\(3, -500\) Å", shift_A=far)
    with pytest.raises(InputError, match="row 18"):
        refined(with_offsets(source, far), tmp_path)
    far[3, 0] = np.inf
    refuse("row 4: the offset of a particle is not a number", shift_A=far)
    turned = true.rotation.copy()
    turned[[5, 9]] = np.nan
    refuse(r"row 6: the angles of a particle are not numbers.*\(2 particles in all\)", rotation=turned)
    assert check_poses(true, BOX) is None
    assert check_poses(replace(true, rotation=None, shift_A=None), BOX) is None
