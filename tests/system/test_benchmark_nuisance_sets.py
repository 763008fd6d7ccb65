"""Sets with nuisances of the benchmarks: their options are those of the command, and junk does not count as poses."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pandas as pd
import pytest

from benchmarks import nuisance_sets, particle_sets
from benchmarks.score import without_junk
from cryoiso.cli.simulate_cmd import simulate
from cryoiso.core.errors import InputError
from cryoiso.physics.simulation import make_particles
from cryoiso.report.contact_sheet import write_contact_sheet


def test_options_are_those_of_the_command():
    known = set(inspect.signature(simulate).parameters)
    for name, one in nuisance_sets.SETS.items():
        assert {key.replace("-", "_") for key in one.nuisances} <= known, name
    assert {name.split("_", 1)[1] for name in nuisance_sets.SETS} == {
        "plain", "touching", "ice_by_view", "scale", "bfactor", "junk_20", "real_noise", "all", "wide_plain",
        "wide_neighbours", "fine_plain", "fine_defocus_error", "fine_beam_tilt", "noisy_plain", "noisy_junk_20",
    }  # fmt: skip
    junk = nuisance_sets.NUISANCES["junk_20"]["junk"]
    assert sum(float(entry.split("=")[1]) for entry in junk) == pytest.approx(0.2)


def test_words_of_a_command_line(tmp_path):
    options = {"ice": (1.0, 2.0), "known": True, "junk": ["a=1", "b=2"], "seed": 3, "noise-from": "x.mrcs"}
    words = particle_sets.option_words(options, tmp_path)
    assert words == [
        "--ice", 1.0, 2.0, "--known", "--junk", "a=1", "--junk", "b=2", "--seed", 3,
        "--noise-from", tmp_path / "x.mrcs",
    ]  # fmt: skip


@pytest.mark.parametrize("changed", [{}, {"neighbour_distance": 1.1}, {"noise_from": "/elsewhere/other.mrcs"}])
def test_a_prepared_set_has_the_same_nuisances(tmp_path, changed):
    one = nuisance_sets.SETS["HA_all"]
    settings = {
        "model": f"/data/models/{one.target}", "n": one.particles, "box": one.box, "pixel_size": one.pixel_A,
        "symmetry": "C3", "noise": one.noise, "snr_db": one.snr_db, "seed": 3, **one.views,
        **{key.replace("-", "_"): value for key, value in one.nuisances.items()},
        "noise_from": f"/data/{nuisance_sets.REAL_NOISE}", **changed,
    }  # fmt: skip
    for name in ("particles.star", "truth.star", "signal_map.mrc", "homologue.mrc"):
        (tmp_path / name).write_text("")
    (tmp_path / "simulation.json").write_text(json.dumps({"settings": settings}))
    assert particle_sets.prepared(one, 3, tmp_path) == (not changed)


def test_junk_does_not_count():
    particles = make_particles(6, 16, 4.0)
    assert without_junk(particles) is particles
    kinds = ["particle", "broken", "particle", "empty", "pair", "other"]
    particles = particles.__class__(**{**vars(particles), "table": pd.DataFrame({"cryoisoKind": kinds})})
    np.testing.assert_array_equal(without_junk(particles).uid, particles.uid[[0, 2]])


def test_contact_sheet(tmp_path):
    images = np.random.default_rng(0).standard_normal((5, 16, 16))
    write_contact_sheet(tmp_path / "sheet.png", {"one": images, "two": images[:3]})
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match="no images"):
        write_contact_sheet(tmp_path / "none.png", {})
