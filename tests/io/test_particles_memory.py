"""Memory of particles in bytes per particle, which nothing but their number may multiply."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cryoiso.io.imagenames import distinct
from cryoiso.io.imageprep import IngestSettings
from cryoiso.io.ingest import check_stacks, ingest
from cryoiso.io.mrc import write_stack
from cryoiso.io.shards import ShardSource
from cryoiso.io.star.read import read_particles

FEW, MANY, PER_STACK = 2_048, 10_240, 512
"""Rows are text 2,048 at a time (``text_column.SLAB``)."""
LONG = "/".join(["a_folder_with_a_long_name"] * 6)
"""156 characters: at 4 bytes each, 624 B per particle."""
HEAD = (
    "data_optics\nloop_\n_rlnOpticsGroup\n_rlnVoltage\n_rlnSphericalAberration\n_rlnAmplitudeContrast\n_rlnImagePixelSize\n"
    "1 300 2.7 0.1 6\n\ndata_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n_rlnDefocusU\n_rlnDefocusV\n"
    "_rlnDefocusAngle\n"
)


def star_of(folder: Path, n: int) -> Path:
    (folder / LONG).mkdir(parents=True, exist_ok=True)
    for number in range(n // PER_STACK):
        with write_stack(folder / LONG / f"{number:02d}.mrcs", 8, 6.0) as stack:
            stack.append(np.random.default_rng(number).normal(size=(PER_STACK, 8, 8)).astype(np.float32))
    rows = [f"{i % PER_STACK + 1}@{folder}/{LONG}/{i // PER_STACK:02d}.mrcs 1 10000 10000 0\n" for i in range(n)]
    path = folder / f"{n}.star"
    path.write_text(HEAD + "".join(rows))
    return path


def added_bytes(make: Callable[[int], Any]) -> tuple[float, float]:
    """Bytes per particle that stay and that are there at most, between few and many particles."""
    make(FEW)  # what is loaded and cached once
    held, peak = [], []
    for n in (FEW, MANY):
        tracemalloc.start()
        result = make(n)
        now, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        held.append(now)
        peak.append(most)
        del result
    return (held[1] - held[0]) / (MANY - FEW), (peak[1] - peak[0]) / (MANY - FEW)


@pytest.fixture(scope="module")
def stars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("p")
    return {n: star_of(folder, n) for n in (FEW, MANY)}


def test_names_of_stacks_cost_their_text_once_each(stars):
    def columns(n: int) -> Any:
        return replace(read_particles(stars[n]), table=None)

    held, peak = added_bytes(columns)
    assert held < 130, held
    particles = columns(MANY)
    assert particles.stack.nbytes == 8 * MANY
    assert len({id(name) for name in particles.stack.tolist()}) == MANY // PER_STACK
    assert len(pickle.dumps(particles.stack)) < 10 * MANY, "what goes to every rank"
    assert added_bytes(lambda n: check_stacks(read_particles(stars[n])))[1] < peak + 150


def test_shards_give_names_that_rows_share(stars, tmp_path):
    for n, star in stars.items():
        ingest(star, tmp_path / str(n), IngestSettings(invert="no"))
    held, peak = added_bytes(lambda n: ShardSource(tmp_path / str(n)))
    assert held < 130 and peak < 300, (held, peak)


def test_distinct_names_are_those_of_numpy():
    names = np.array(["b", "a/é", "b", "Z", "a/é", ""], dtype=object)
    for given in (names, names.astype(str), np.array([3, 1, 3, 2])):
        different, place = distinct(given)
        expected, inverse = np.unique(given.astype(str) if given.dtype == object else given, return_inverse=True)
        assert different.dtype == expected.dtype and different.tolist() == expected.tolist()
        np.testing.assert_array_equal(place, inverse)
