"""Reconstructions weigh an image by its probability of showing a particle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pipeline_helper import cryoiso_here
from test_junk import with_noise
from test_refine_engine import BOX, PIXEL_A, in_memory

from cryoiso.core.errors import InputError
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map, write_stack
from cryoiso.io.sources import SubsetSource
from cryoiso.io.star.write import write_particles
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.simulation import simulate
from cryoiso.refine.junk import JUNK_COLUMN, learned, with_junk_of_file
from cryoiso.refine.reconstruct import reconstruct_halves

N = 60


@pytest.fixture(scope="module")
def mixed():
    """Images of which a quarter are noise, and which those are."""
    clean = in_memory(simulate(phantom_map(BOX, PIXEL_A, 14.0), N, snr_db=0.0, seed=3))
    made, noise = with_noise(clean, 0.25)
    made.particles = clean.particles
    return made, noise


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_junk_leaves_nothing_in_the_half_maps(mixed):
    """As if its images were not there; without the weights they change the maps."""
    source, noise = mixed
    rows = np.flatnonzero(~noise)
    alone = reconstruct_halves(SubsetSource(source, rows), source.particles.take(rows))
    known = source.particles.with_results(**{JUNK_COLUMN: noise.astype(float)})
    weighed, plain = (reconstruct_halves(source, p) for p in (known, source.particles))
    for half in (1, 2):
        assert relative(weighed[half].data, alone[half].data) < 1e-3
        assert relative(plain[half].data, alone[half].data) > 0.1


def test_an_even_chance_of_all_images_changes_no_map(mixed):
    source, _ = mixed
    half = source.particles.with_results(**{JUNK_COLUMN: np.full(N, 0.5)})
    even, plain = (reconstruct_halves(source, p) for p in (half, source.particles))
    assert relative(even[1].data, plain[1].data) < 1e-4


@pytest.mark.parametrize("value", ["1.2", "-0.1", "nan", "often"])
def test_what_is_no_probability_is_an_error(mixed, tmp_path, value):
    particles = replace(mixed[0].particles, stack=np.full(N, "a.mrcs"))
    texts = np.array(["0.0"] * 4 + [value] + ["0.5"] * (N - 5))
    write_particles(tmp_path / "p.star", particles.with_results(**{JUNK_COLUMN: texts}))
    read = read_particle_file(tmp_path / "p.star", require=("pose",))
    with pytest.raises(InputError, match="row 5: cryoisoJunkProbability is no probability") as refused:
        with_junk_of_file(read, tmp_path / "p.star")
    assert refused.value.code == "value-out-of-range"


def test_the_command_uses_the_column_of_the_file(mixed, tmp_path):
    source, noise = mixed
    with write_stack(tmp_path / "a.mrcs", BOX, PIXEL_A) as stack:
        stack.append(np.asarray(source.read(np.arange(N)), np.float32))
    particles = replace(source.particles, stack=np.full(N, "a.mrcs"), index=np.arange(N))
    write_particles(tmp_path / "all.star", particles.with_results(**{JUNK_COLUMN: noise.astype(float)}))
    write_particles(tmp_path / "rest.star", particles.take(np.flatnonzero(~noise)))
    maps = []
    for name in ("all", "rest"):
        done = cryoiso_here(
            "reconstruct", tmp_path / f"{name}.star", "--out", tmp_path / name, "--project", tmp_path, "--invert", "no"
        )
        assert done.returncode == 0, done.stderr
        maps.append(read_map(tmp_path / name / "half1.mrc").data)
    assert relative(*maps) < 1e-3


def test_junk_that_gathers_in_a_cone_takes_no_particle_with_it():
    """Twenty empty images and five particles that a poor reference fits worse than nothing, by 2 in log evidence. With
    the share of the cone as prior they would be junk."""
    evidence = np.concatenate([np.full(20, -12.0), np.full(5, -2.0)])
    facts = np.zeros((25, 5))
    facts[:, 2] = -evidence  # all of it in one column, so that it is the same at every amplitude
    cone = np.zeros(25, int)
    probability = learned(facts, cone, 1).particle_probability(facts, cone)
    assert probability[:20].max() < 0.01 and probability[20:].min() > 0.5
