"""``cryoiso diagnose`` with an atomic model and the local resolution, on files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pipeline_helper import cryoiso_here
from whole_run_helper import BOX, PIXEL_A, helix_pdb

from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE
from cryoiso.io.models import model_to_map
from cryoiso.io.mrc import read_map, write_map


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A helix, its density where the model lies, the same turned by 90° about x, and half-maps."""
    here = tmp_path_factory.mktemp("model")
    (here / "helix.pdb").write_text(helix_pdb())
    moved = model_to_map(here / "helix.pdb", BOX, PIXEL_A, 5.0, centre=True).data
    write_map(here / "map.mrc", moved, PIXEL_A)
    write_map(here / "turned.mrc", np.rot90(moved, axes=(0, 1)).copy(), PIXEL_A)
    noise = 0.05 * moved.max() * np.random.default_rng(0).standard_normal((2, BOX, BOX, BOX))
    for half in (1, 2):
        write_map(here / f"half{half}.mrc", (moved + noise[half - 1]).astype(np.float32), PIXEL_A)
    return here


def test_a_model_in_a_map_without_half_maps(folder, tmp_path):
    out = tmp_path / "numbers.json"
    done = cryoiso_here("diagnose", "--map", folder / "map.mrc", "--model", folder / "helix.pdb", "--out", out)
    assert done.returncode == 0, done.stderr
    model = json.loads(out.read_text())["model"]
    assert model["placed"] == "as given" and model["correlation"] > 0.9 and model["sigma_A"] == 0.6
    assert model["atoms"] == 200 and model["outside"] == 0 and 0 < model["q"] <= 1
    assert f"Q-score (sigma 0.6 Å) {model['q']:36.2f}".split()[-1] in done.stdout
    rows = (tmp_path / "q_scores.tsv").read_text().splitlines()
    assert len(rows) == 41 and rows[1].split("\t")[:4] == ["A", "1", "ALA", "5"]
    assert np.mean([float(row.split("\t")[4]) for row in rows[1:]]) == pytest.approx(model["q"], abs=1e-3)


def test_a_model_that_lies_elsewhere_is_fitted_or_refused(folder, tmp_path):
    words = ("diagnose", "--map", folder / "turned.mrc", "--model", folder / "helix.pdb", "--out", tmp_path / "n.json")
    done = cryoiso_here(*words)
    model = json.loads((tmp_path / "n.json").read_text())["model"]
    assert done.returncode == 0 and model["placed"] == "fitted" and model["correlation"] > 0.9
    here = cryoiso_here(*words, "--fit-model", "no")
    kept = json.loads((tmp_path / "n.json").read_text())["model"]
    assert here.returncode == 0 and kept["placed"] == "as given" and kept["q"] < model["q"] - 0.1
    shifted = tmp_path / "away.pdb"
    shifted.write_text("\n".join(
        f"{line[:30]}{float(line[30:38]) + 900:8.3f}{line[38:]}" if line.startswith("ATOM") else line
        for line in helix_pdb().splitlines()
    ))  # fmt: skip
    away = cryoiso_here("diagnose", "--map", folder / "map.mrc", "--model", shifted, "--fit-model", "no", "--out",
                        tmp_path / "none.json")  # fmt: skip
    assert away.returncode == EXIT_INPUT and "model-outside-map" in away.stderr
    assert not (tmp_path / "none.json").exists()


def test_half_maps_with_everything(folder, tmp_path):
    halves, local = (folder / "half1.mrc", folder / "half2.mrc"), tmp_path / "local.mrc"
    done = cryoiso_here(
        "diagnose", *halves, "--model", folder / "helix.pdb", "--compare-model", folder / "helix.pdb",
        "--local-resolution", local, "--local-window", 30, "--out", tmp_path / "numbers.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["model"]["comparison"]["tm_score"] == pytest.approx(1)
    assert numbers["local_resolution"]["window_A"] == 30 and read_map(local).box_px == BOX
    assert {flag["name"] for flag in numbers["emdb_flags"]} == {"FSC minimum", "FSC end", "FSC peaks", "FSC slope"}
    assert "local resolution in the mask, median" in done.stdout


def test_what_does_not_go_together_is_refused(folder, tmp_path):
    halves, out = (folder / "half1.mrc", folder / "half2.mrc"), tmp_path / "none.json"
    alone = cryoiso_here("diagnose", *halves, "--compare-model", folder / "helix.pdb", "--out", out)
    wide = cryoiso_here("diagnose", *halves, "--local-window", 80, "--out", out)
    none = cryoiso_here("diagnose", "--map", folder / "map.mrc", "--out", out)
    assert [done.returncode for done in (alone, wide, none)] == [EXIT_USAGE] * 3
    assert "options-conflict" in alone.stderr and "option-out-of-range" in wide.stderr and not out.exists()
