"""Directional parts of the report: they say what the numbers say, and leave gaps where there are none."""

from __future__ import annotations

import base64
import copy
import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryoiso.methods.assess.directional import directional, sampling
from cryoiso.methods.assess.measure import plain
from cryoiso.pipeline.commands.diagnose import write_volume
from cryoiso.report import collect, figure_list
from cryoiso.report.sections import anisotropy, anisotropy_figures

BOX, PIXEL_A = 32, 3.0


@pytest.fixture(scope="module")
def numbers():
    """What `diagnose` would write of two noisy maps, without the rest."""
    rng = np.random.default_rng(0)
    z, y, x = np.mgrid[:BOX, :BOX, :BOX] - BOX // 2
    signal = 5 * np.exp(-(z**2 / 60 + y**2 / 8 + x**2 / 8))
    halves = [(signal + 0.2 * rng.standard_normal(signal.shape)).astype(np.float32) for _ in range(2)]
    poses = Rotation.random(300, random_state=0).as_matrix()
    part, volume = directional(*halves, None, PIXEL_A, poses, "C1")
    result = {
        "frequency_invA": np.arange(BOX // 2 + 1) / (BOX * PIXEL_A),
        "directional": part,
        "sampling": {"estimated": sampling(poses, "C1"), "true": sampling(poses[:100], "C1")},
        "verdict": {"verdict": "fine", "sentence": "All is well.", "advice": "Go on.", "evidence": []},
    }
    assert volume.shape == (BOX,) * 3
    return json.loads(json.dumps(plain(result), allow_nan=False))


def decoded(address: str) -> bytes:
    return base64.b64decode(address.partition(",")[2])


def test_numbers_fit_together(numbers):
    part = numbers["directional"]
    shells = BOX // 2 + 1
    assert all(len(part[k]) == shells for k in ("cfsc_mean", "cfsc_sd", "cfsc_min", "cfsc_max", "fso", "bingham_p"))
    assert len(part["axes"]) == len(part["resolution_A"]) == 256
    assert part["resolution_min_A"] <= part["resolution_mean_A"] <= part["resolution_max_A"]
    assert part["resolution_A"][int(np.argmax(part["resolution_A"]))] == pytest.approx(
        part["resolution_max_A"], abs=1e-3
    )
    assert set(part["expected"]) == {"even", "views"} and 0 <= part["expected"]["views"]["short_fraction"] <= 1
    slices = part["fsc3d_slices"]
    assert all(np.shape(slices[axis]) == (31, 31) for axis in "xyz") and slices["x"][15][15] == 1
    assert slices["last_invA"] == pytest.approx(15 / (BOX * PIXEL_A))
    for kind, n in (("estimated", 300), ("true", 100)):
        found = numbers["sampling"][kind]
        assert found["n"] == n and len(found["map"]) == found["points"]
        assert np.mean(found["map"]) == pytest.approx(1, abs=0.01)


def test_slices_of_a_large_box_are_thinned():
    from cryoiso.methods.assess.directional import _slices

    box = 201
    k = np.arange(box) - box // 2
    volume = (np.abs(k[:, None, None]) + 2 * np.abs(k[None, :, None]) + 4 * np.abs(k)).astype(np.float32)
    slices = _slices(volume, 1.0)
    assert len(slices["z"]) <= 96 and len(slices["z"]) % 2 == 1
    centre = len(slices["z"]) // 2
    assert slices["z"][centre, centre] == 0
    edge = slices["last_invA"] * box
    assert slices["z"][centre, -1] == pytest.approx(4 * edge) and slices["x"][0, centre] == pytest.approx(edge)


def test_figures_and_words(numbers):
    entries = anisotropy.entries(numbers)
    assert [e[0] for e in entries] == ["directions", "sphere", "fsc3d"]
    for _, title, present, caption, draw in entries:
        picture = decoded(draw())
        assert present and title and len(caption) > 100 and len(picture) > 3000
        assert draw() == draw()  # the same bytes
    rows = {label: (value, unit, true) for _, label, value, unit, true in anisotropy.number_rows(numbers)}
    part = numbers["directional"]
    assert rows["cFAR, open definition (below 0.5: anisotropic)"][0] == part["cfar"]
    assert rows["resolution, coarsest direction"] == (part["resolution_max_A"], "Å", None)
    star = rows["SCF* (1 = even, 0.81 = side views)"]
    assert star == (numbers["sampling"]["estimated"]["scf_star"], "", numbers["sampling"]["true"]["scf_star"])
    empty = rows["directions that no view measures"]
    assert empty[0] == pytest.approx(100 * numbers["sampling"]["estimated"]["empty_fraction"])
    assert anisotropy.sentences(numbers) == ["Verdict: fine. All is well. Go on."]
    assert "Verdict: fine. All is well. Go on." in collect.summary({"diagnose": numbers})


def test_gaps_are_left(numbers):
    assert [e[2] for e in anisotropy.entries({})] == [None] * 3
    assert len(anisotropy.number_rows({})) == len(
        anisotropy.number_rows(numbers)
    )  # before and after stand side by side
    assert all(row[2] is None for row in anisotropy.number_rows({})) and anisotropy.sentences({"verdict": {}}) == []
    holes = copy.deepcopy(numbers)
    part = holes["directional"]
    part["cfsc_mean"][3] = part["fso"][4] = part["resolution_A"][7] = part["fsc3d_slices"]["x"][2][2] = None
    part.update(cfsc_sd=None, resolution_min_A=None)
    holes["sampling"] = {"estimated": {**numbers["sampling"]["estimated"], "map": None}}
    for draw in (anisotropy_figures.by_direction, anisotropy_figures.spheres):
        assert len(decoded(draw(holes))) > 3000
    assert len(decoded(anisotropy_figures.fsc3d_slices(part["fsc3d_slices"]))) > 3000


def test_pages_have_them_between_truth_and_views(numbers, monkeypatch):
    monkeypatch.setattr(anisotropy_figures, "address", lambda figure, *_: "data:,")
    data = {"diagnose": numbers, "iterations": [], "job": {}}
    assert [f.key for f in figure_list.figures(data, [])] == ["directions", "sphere", "fsc3d"]


def test_volume_files(tmp_path):
    from cryoiso.io.mrc import read_map, write_map
    from cryoiso.metrics.anisotropy import phase_cosine
    from cryoiso.metrics.directional_fsc import fsc3d

    rng = np.random.default_rng(1)
    halves = [rng.standard_normal((16,) * 3).astype(np.float32) for _ in range(2)]
    mask = np.ones((16,) * 3, np.float32)
    paths = [tmp_path / f"{name}.mrc" for name in ("half1", "half2", "mask")]
    for path, data in zip(paths, (*halves, mask), strict=True):
        write_map(path, data, PIXEL_A)
    for kind, measure in (("fsc3d", fsc3d), ("phase-cosine", phase_cosine)):
        write_volume(kind, *paths, tmp_path / "out.mrc")
        written = read_map(tmp_path / "out.mrc")
        np.testing.assert_array_equal(written.data, measure(*halves, mask))
        assert written.pixel_size_A == PIXEL_A
