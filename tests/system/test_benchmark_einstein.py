"""The benchmark of noise against a reference (`benchmarks/einstein.py`) on the smallest set."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import einstein
from cryoiso.core.types import DensityMap
from cryoiso.io.mrc import write_map
from cryoiso.methods.auxiliary.generator import Generator
from cryoiso.physics.phantom import phantom_map

TINY = ("--particles", "40", "--box", "24", "--pixel-A", "7", "--snr-db", "0", "--steps", "3", "--lowpass", "20")


def run(kinds, tmp_path):
    out = tmp_path / "einstein.json"
    einstein.main([*TINY, "--kinds", kinds, "--out", str(out), "--work", str(tmp_path / "work")])
    return json.loads(out.read_text())["rows"]


def test_white_noise_looks_like_its_reference_and_never_confirms_it(tmp_path, capsys):
    (row,) = run("white", tmp_path)
    assert row["kind"] == "white" and row["lowpass_A"] == 20 and row["size"]["particles"] == 40
    assert row["correlation"] > 0.3 and row["reference_verdict"] != "pass"
    assert "| white | 20 Å |" in capsys.readouterr().out


@pytest.mark.slow
def test_images_of_a_generator_without_reference_are_noise_too(tmp_path):
    (row,) = run("vae", tmp_path)
    assert row["kind"] == "vae" and row["reference_verdict"] != "pass"


def test_a_generator_whose_reference_is_taken_away_keeps_all_else(tmp_path):
    made = Generator(None, DensityMap(np.ones((8, 8, 8), np.float32), 3.0), np.array([2.0]), 0.5, {"half": 1})
    made.save(tmp_path / "generator1.npz")
    einstein.take_reference_away(tmp_path / "generator1.npz", tmp_path / "blind.npz")
    blind = Generator.load(tmp_path / "blind.npz")
    assert not blind.reference.data.any() and blind.reference.pixel_size_A == 3.0
    assert blind.likelihood_sd == 0.5 and blind.facts["half"] == 1 and blind.scale.tolist() == [2.0]


def test_half_maps_of_the_reference_itself_have_all_of_it(tmp_path):
    box, pixel_A = 32, 5.0
    model = phantom_map(box, pixel_A, 12.0).data
    write_map(tmp_path / "reference.mrc", model, pixel_A)
    rng = np.random.default_rng(0)
    for half in (1, 2):
        noise = 0.01 * model.std() * rng.standard_normal(model.shape)
        write_map(tmp_path / f"half{half}.mrc", (3 * model + noise).astype(np.float32), pixel_A)
    found = einstein.scores(tmp_path, tmp_path / "reference.mrc", 40.0)
    assert found["correlation"] == pytest.approx(1, abs=1e-3) and found["density"] == pytest.approx(3, rel=1e-3)
    assert found["reference"][0] == pytest.approx(1, abs=0.02)
