"""Reference fitting on the command line and in a job."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pipeline_helper import cryoiso, cryoiso_here, use_quick_parts, write_job

from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE
from cryoiso.io.mrc import read_map, write_map
from cryoiso.metrics.mapmodel import correlation
from cryoiso.physics.fit import inverted
from cryoiso.physics.phantom import phantom_map
from cryoiso.physics.resample import place_map
from cryoiso.physics.so3 import rotvec_to_matrix
from cryoiso.pipeline.inputs.reference import prepare_reference

BOX, PIXEL = 28, 6.0


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """The phantom, the same spun about its axis and slid along it, its mirror image, and one that lies anywhere."""
    folder = tmp_path_factory.mktemp("maps")
    whole = phantom_map(BOX, PIXEL, 15.0).data
    spun = place_map(whole, PIXEL, rotvec_to_matrix([0, 0, 1.0])[0], np.array([0, 0, 8.0]))
    tumbled = place_map(whole, PIXEL, rotvec_to_matrix([0.9, -1.1, 0.6])[0], np.array([3.0, -5.0, 4.0]), 34, 5.0)
    for name, data, pixel in (
        ("whole", whole, PIXEL), ("spun", spun, PIXEL), ("mirrored", inverted(whole), PIXEL), ("tumbled", tumbled, 5.0),
    ):  # fmt: skip
        write_map(folder / f"{name}.mrc", data, pixel)
    return folder


def test_a_map_is_laid_into_the_frame_of_another(maps, tmp_path):
    words = ["--box", BOX, "--pixel-size", PIXEL, "--symmetry", "C3", "--lowpass", 0]
    done = cryoiso("reference", maps / "tumbled.mrc", tmp_path / "out.mrc", *words, "--fit", maps / "spun.mrc")
    assert done.returncode == 0, done.stderr
    found, wanted = read_map(tmp_path / "out.mrc"), read_map(maps / "spun.mrc")
    assert found.box_px == BOX and correlation(found.data, wanted.data) > 0.99
    assert "fitted into spun.mrc" in done.stdout and "Both have the same hand, clearly" in done.stdout


def test_a_map_of_the_other_hand_brings_a_warning_and_is_not_flipped(maps, tmp_path, caplog):
    made = prepare_reference(maps / "whole.mrc", BOX, PIXEL, 0, symmetry="C3", fit=maps / "mirrored.mrc")
    assert made.fit is not None and made.fit.hand == "mirrored" and not made.fit.best.mirrored
    assert any("was not mirrored" in record.message for record in caplog.records if record.levelname == "WARNING")
    assert correlation(made.map.data, read_map(maps / "mirrored.mrc").data) < 0.97
    caplog.clear()
    made = prepare_reference(maps / "whole.mrc", BOX, PIXEL, 0, symmetry="C3", fit=maps / "spun.mrc", mirror=False)
    assert made.fit is not None and made.fit.hand == "not tried"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_what_cannot_be_fitted_is_refused(maps, tmp_path):
    words = ["--box", BOX, "--pixel-size", PIXEL, "--fit"]
    out = tmp_path / "out.mrc"
    gone = cryoiso_here("reference", maps / "whole.mrc", out, *words, tmp_path / "gone.mrc")
    assert gone.returncode == EXIT_INPUT and "no such map to fit into" in gone.stderr
    coarse = cryoiso_here("reference", maps / "whole.mrc", out, *words, maps / "spun.mrc", "--fit-resolution", 5)
    assert coarse.returncode == EXIT_INPUT and "[grid-too-coarse]" in coarse.stderr
    assert "lower resolution" in coarse.stderr
    phantom = cryoiso_here("reference", "phantom", out, *words, maps / "spun.mrc")
    assert phantom.returncode == EXIT_USAGE and not out.exists()


def test_a_model_is_placed_without_interpolation(shared, tmp_path):
    from cryoiso.io.models import model_to_map

    file = shared / "data/models/ha/6wxb.pdb.gz"
    turn, shift = rotvec_to_matrix([0, 0, 0.7])[0], np.array([0, 0, 9.0])
    target = model_to_map(file, 40, 6.0, 18.0, align_symmetry_axis="C3", placement=(turn, shift))
    write_map(tmp_path / "target.mrc", target.data, 6.0)
    made = prepare_reference(file, 40, 6.0, 40.0, symmetry="C3", fit=tmp_path / "target.mrc")
    exact = model_to_map(file, 40, 6.0, 20.0, align_symmetry_axis="C3", placement=(turn, shift))
    assert np.linalg.norm(made.map.data - exact.data) < 0.005 * np.linalg.norm(exact.data)
    assert made.fit is not None and made.fit.on_axes and "fitted into target.mrc" in made.source


def test_a_job_fits_its_reference(tmp_path, monkeypatch):
    """The map to fit into is an input like any other: its path is relative to the job, its hash is kept."""
    done = cryoiso("simulate", "phantom", tmp_path, "--n", 12, "--box", BOX, "--pixel-size", PIXEL, "--snr-db", 0)
    assert done.returncode == 0, done.stderr
    truth = read_map(tmp_path / "truth_map.mrc")
    turned = place_map(truth.data, PIXEL, rotvec_to_matrix([0, 0, 0.8])[0], np.array([0, 0, 6.0]))
    write_map(tmp_path / "turned.mrc", turned, PIXEL)
    job = write_job(
        tmp_path, reference_file="turned.mrc", reference_fit="truth_map.mrc", reference_fit_resolution_A=15.0
    )
    use_quick_parts(monkeypatch)
    done = cryoiso_here("run", job, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run/02_reference/reference.json").read_text())
    assert facts["fit"]["hand"] == "same" and facts["fit"]["score"] > 0.9 and facts["fit"]["on_axes"]
    assert correlation(read_map(tmp_path / "run/02_reference/reference.mrc").data, truth.data) > 0.99
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert str(tmp_path / "truth_map.mrc") in manifest["inputs"]
