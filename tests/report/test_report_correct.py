"""Sections of the report about the anisotropy correction of maps, and about the correction between iterations."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from correct_helper import BOX, PIXEL, task_of
from pipeline_helper import cryoiso_here, simulate, write_job
from realign_helper import use_quick_networks

from cryoiso.io.mrc import read_map, write_map
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import lowpass
from cryoiso.physics.phantom import phantom_map
from cryoiso.pipeline.run import run_job
from cryoiso.pipeline.stages.correct import correct_files
from cryoiso.report import build
from cryoiso.report.run_reader import read_json
from cryoiso.report.sections import correct, correct_figures, realign

SECTIONS = ["measured", "correct", "correct-fourier", "correct-curves", "correct-training"]
NOT_A_RESOLUTION = "agreement of network outputs - not a resolution"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What `cryoiso correct` leaves, in paired and in independent mode, beside the half-maps that went in."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(3)
    truth = np.asarray(phantom_map(BOX, PIXEL).data, np.float32)
    halves = {half: folder / f"in{half}.mrc" for half in (1, 2)}
    for path in halves.values():
        write_map(path, truth + truth.std() * rng.normal(size=truth.shape).astype(np.float32), PIXEL)
    for mode in ("paired", "independent"):
        correct_files(task_of(halves, folder / mode, mode=mode, epochs=2), Context())
    return folder


@pytest.fixture
def corrected(made, tmp_path) -> Path:
    """A copy of the paired one, to be changed."""
    return Path(shutil.copytree(made / "paired", tmp_path / "paired"))


def change(path: Path, **keys: object) -> None:
    path.write_text(json.dumps({**read_json(path), **keys}))


def ids(text: str) -> list[str]:
    return re.findall(r'<h2 id="([^"]+)"', text)


def section(text: str, key: str) -> str:
    """What a reader reads under a heading: without pictures, cells apart by |."""
    part = re.search(rf'<h2 id="{key}".*?(?=<h2|</main>)', text, re.S)[0]
    return unescape(re.sub(r"<[^>]*>", "|", part))


def pictures(text: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/[^;]*;base64,([^"]*)"', text)]


@pytest.mark.parametrize("mode", ["paired", "independent"])
def test_the_folder_of_the_command_gets_a_report(made, mode):
    folder = made / mode
    done = cryoiso_here("report", folder)
    assert done.returncode == 0, done.stderr
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert ids(text) == SECTIONS and len(pictures(text)) == 5 and all(len(p) > 3000 for p in pictures(text))
    facts, data = read_json(folder / "correct.json"), read_json(folder / "report.json")
    assert data["correct"] == {**facts, "maps": {half: Path(name).name for half, name in facts["maps"].items()}}
    said = section(text, "correct")
    assert f"{100 * facts['filter_mean']:.1f} % of Fourier space up to {facts['resolution_A']:.1f} Å" in said
    assert "Deposit the half-maps that went in" in said and "which no network has touched" in said
    assert f"|corrected up to||{facts['resolution_A']:.2f} Å|" in said and "|went in||in1.mrc, in2.mrc|" in said
    assert "|2 epochs, 4 sub-maps each, of 16 px, 2 per step|" in said and "3D U-Net with 16, 32, 64 channels" in said
    assert all(f"|note||{note}|" in said for note in facts["notes"])
    assert ("the corrected half-maps are not independent of each other" in said) == (mode == "paired")
    assert ("a network for each half-map" in said) == (mode == "independent")
    assert "this curve is not a resolution" in section(text, "correct-curves")
    assert "No resolution is read from that map." in data["summary"][0] and "not been measured yet" not in text
    assert build(folder).read_text(encoding="utf-8") == text  # the same bytes


def test_slices_are_those_of_the_maps(made):
    facts = correct.collect_correct(made / "paired")
    slices = correct.collect_slices(made / "paired", {"correct": facts})
    halves = [read_map(made / f"in{half}.mrc").data for half in (1, 2)]
    mean = lowpass(np.mean(halves, axis=0, dtype=np.float32), PIXEL, facts["resolution_A"])
    after = read_map(made / "paired/corrected_map.mrc").data
    for i, axis in enumerate("zyx"):
        np.testing.assert_allclose(slices["before"][i], mean.take(BOX // 2, i), atol=1e-6 * np.abs(mean).max())
        np.testing.assert_array_equal(slices["after"][i], after.take(BOX // 2, i), axis)
    assert set(slices) == {"before", *correct.VOLUMES}


def test_before_and_after_have_one_grey_scale_and_shares_the_whole_one(made, monkeypatch):
    facts = correct.collect_correct(made / "paired")
    slices = correct.collect_slices(made / "paired", {"correct": facts})
    monkeypatch.setattr(correct_figures, "address", lambda figure, *_: figure)
    panels = [ax for ax in correct_figures.maps(slices, facts).axes if ax.images]
    assert [ax.get_title() for ax in panels[:3]] == ["XY", "XZ", "YZ"]
    assert len({image.get_clim() for ax in panels[:6] for image in ax.images}) == 1
    assert all(ax.images[0].get_clim() == (0, 1) for ax in panels[6:9])
    outside = slices["mask"][0] <= 0.5
    assert outside.any() and panels[6].images[0].get_array().mask.any()  # where a share says nothing
    for ax in correct_figures.fourier(slices, facts).axes[:6]:
        assert ax.images[0].get_clim() == (0, 1)


def test_nobody_takes_the_agreement_of_networks_for_a_resolution(made, monkeypatch):
    facts = correct.collect_correct(made / "paired")
    monkeypatch.setattr(correct_figures, "address", lambda figure, *_: figure)
    left, right = correct_figures.curves(facts, correct.AGREEMENT).axes[:2]
    curve = next(line for line in right.lines if len(line.get_ydata()) == BOX // 2 + 1)
    np.testing.assert_allclose(curve.get_ydata(), facts[correct.AGREEMENT])
    assert curve.get_linestyle() == "--" and curve.get_marker() == "None"
    assert " ".join(curve.get_label().split()) == NOT_A_RESOLUTION
    assert right.get_legend() is not None and right.get_title(loc="left") == "not a resolution"
    others = [line for line in right.lines if line is not curve]
    assert all(set(np.ravel(line.get_ydata())) == {0} for line in others) and not right.texts  # no threshold, no mark
    assert not right.child_axes  # no scale in Å to read one from
    assert not any(np.array_equal(line.get_ydata(), curve.get_ydata()) for line in left.lines)


def test_every_numeric_column_of_a_training_has_a_panel(made, monkeypatch):
    facts = correct.collect_correct(made / "paired")
    assert correct_figures.courses(facts) == ["loss", "without_network", "gradient_norm"]
    runs = {h: {"step": [5, 10], "word": ["a", "b"], "other": [1, None], "loss": [3, 2], "none": [0, 0]} for h in "12"}
    assert correct_figures.courses({"training": runs}) == ["loss", "other"]
    monkeypatch.setattr(correct_figures, "address", lambda figure, *_: figure)
    first = correct_figures.training({"training": runs}).axes[0]
    assert [line.get_label() for line in first.lines] == ["half 1", "half 2"]
    assert first.lines[0].get_color() != first.lines[1].get_color() and list(first.lines[0].get_xdata()) == [5, 10]


@pytest.mark.parametrize("name", [*correct.VOLUMES.values()])
def test_every_volume_may_be_absent(corrected, name):
    (corrected / name).unlink()
    text = build(corrected).read_text(encoding="utf-8")
    assert ids(text) == (SECTIONS[1:] if name == "measured.mrc" else SECTIONS)
    assert len(pictures(text)) == {"corrected_map.mrc": 3, "measured.mrc": 4}.get(name, 5)


@pytest.mark.parametrize(
    "facts",
    [
        {"mode": "paired"},
        {"mode": "single", "maps": {"1": "gone.mrc"}, "filter_mean": 0.5, "notes": ["one <map> & no more"]},
        {"training": [1], "networks": {"both": None}, "settings": [], "maps": ["a"], "notes": "text", "box_px": None},
        {"training": {"both": {"step": [1], "loss": [None]}, "1": 3}, "frequency_invA": [0, 0.1], "resolution_A": 0},
        {"frequency_invA": [0, 0.1], "fsc_half_maps": [1, None], "measured_share_mean": 0.99999},
        {"frequency_invA": [0, 0.1, 0.2], correct.AGREEMENT: [1, 0.5, 0.1], "new_key": {"a": 1}},
    ],
)
def test_keys_may_be_absent_or_new_or_odd(tmp_path, corrected, facts):
    (tmp_path / "correct.json").write_text(json.dumps(facts))  # without any volume
    text = build(tmp_path).read_text(encoding="utf-8")
    assert ids(text)[0] == "correct" and read_json(tmp_path / "report.json")["correct"] == facts
    assert "100.0 %" not in text and "<map>" not in text
    assert ("no network has touched" in section(text, "correct")) and ("None" not in section(text, "correct"))
    (corrected / "correct.json").write_text(json.dumps(facts))  # with all of them
    assert ids(build(corrected).read_text(encoding="utf-8"))[:3] == ["measured", "correct", "correct-fourier"]


def test_a_moved_run_shows_its_own_half_maps(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "paired", run / "05_correct")
    change(run / "05_correct/correct.json", maps={"1": "/gone/half1.mrc", "2": "/gone/half2.mrc"})
    data = {"correct": correct.collect_correct(run)}
    assert "before" not in correct.collect_slices(run, data)
    assert "Before:" not in section(build(run).read_text(encoding="utf-8"), "correct")
    (run / "04_reconstruct").mkdir()
    for half in (1, 2):
        shutil.copy(made / f"in{half}.mrc", run / f"04_reconstruct/half{half}.mrc")
    assert "before" in correct.collect_slices(run, data)
    assert "Before: the mean of the half-maps" in section(build(run).read_text(encoding="utf-8"), "correct")


APPLIED = {
    "applied": True, "mean_transfer": 0.7431, "networks": ["network-002-1.npz"], "warm": False, "seconds": 1.5,
    "loss": {"1": [0.51, 0.32], "2": [0.52, 0.33]}, "scale": {"1": [0.91, 1.13], "2": [0.87, 1.2]},
}  # fmt: skip


def refined(**keys: object) -> dict[str, object]:
    """A refine.json by hand."""
    rows = [
        {"iteration": 1, "resolution_A": 21.0, "step_deg": 15.0,
         "correction": {"applied": False, "why_not": "the angular sampling of 15° is coarser than 7.5° & <so on>"}},
        {"iteration": 2, "resolution_A": 12.5, "step_deg": 7.5, "correction": APPLIED},
        {"iteration": 3, "resolution_A": 12.0, "step_deg": 7.5},
    ]  # fmt: skip
    correction = {"mode": "independent", "correct": True, "halves_share_a_network": False}
    return {"engine": "relion", "correction": correction, "iterations": rows, **keys}


def put(path: Path, facts: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))
    return path


@pytest.mark.parametrize("place", ["refine.json", "03_refine/refine.json", "03_refine/engine/refine.json"])
def test_iterations_say_whether_they_were_corrected(tmp_path, place):
    put(tmp_path / place, refined())
    (tmp_path / "journal.jsonl").write_text('{"event": "start"}\n')
    text = build(tmp_path).read_text(encoding="utf-8")
    said = section(text, "realign")
    assert "|1||21.0 Å||no: the angular sampling of 15° is coarser than 7.5° & <so on>|" in said
    half = "half 1: 0.51 to 0.32; half 2: 0.52 to 0.33||half 1: 0.91 to 1.13; half 2: 0.87 to 1.20"
    assert f"|2||12.5 Å||yes||74.3 %||{half}|" in said and "|3||12.0 Å||not written down|" in said
    assert "After 1 of 3 iterations (refinement, engine 'relion')" in said
    assert "a reference to search with and never a result" in said and realign.APART in said
    data = read_json(tmp_path / "report.json")
    assert data["realign"][0]["iterations"][1] == {
        "iteration": 2, "resolution_A": 12.5, "step_deg": 7.5, **APPLIED
    }  # fmt: skip
    assert data["summary"][0].startswith("In the refinement the references were corrected after 1 of 3 iterations")
    assert len(pictures(text)) == (2 if "engine" not in place else 1)


def test_halves_that_share_a_network_are_told(tmp_path):
    path = put(tmp_path / "refine.json", refined())
    for shared, words in ((True, realign.SHARED), (None, "not written down whether the halves shared")):
        change(path, correction={"mode": "paired", "halves_share_a_network": shared})
        said = section(build(tmp_path).read_text(encoding="utf-8"), "realign")
        assert words in said and realign.APART not in said
    change(path, correction={"correct": False, "halves_share_a_network": False})
    said = section(build(tmp_path).read_text(encoding="utf-8"), "realign")
    assert "No network took part" in said and "what the network made" not in said


@pytest.mark.parametrize("rows", [[], None, [{}], [{"correction": {"applied": True, "loss": 3, "scale": {"1": 2}}}]])
def test_records_may_be_odd(tmp_path, rows):
    put(tmp_path / "refine.json", refined(iterations=rows))
    assert "realign" in ids(build(tmp_path).read_text(encoding="utf-8"))


def test_a_refinement_without_correction_has_no_section(tmp_path):
    put(tmp_path / "refine.json", {"iterations": [{"iteration": 1, "resolution_A": 9.0}]})
    assert ids(build(tmp_path).read_text(encoding="utf-8")) == ["iterations"]
    assert not {"correct", "realign"} & set(read_json(tmp_path / "report.json"))


def test_co_refinements_have_sections_of_their_own(tmp_path):
    put(tmp_path / "03_refine/refine.json", {"iterations": [{"iteration": 1, "resolution_A": 9.0}]})
    for n in (1, 2):
        put(tmp_path / f"0{5 + n}_corefine-{n}/engine/refine.json", refined(engine="native"))
        put(tmp_path / f"0{5 + n}_corefine-{n}/corefine.json", {"raw": 60})
    text = build(tmp_path).read_text(encoding="utf-8")
    assert [key for key in ids(text) if key.startswith("realign")] == ["realign", "realign-2"]
    assert "Correction between the iterations: co-refinement of round 2" in section(text, "realign-2")


def test_a_run_with_both(tmp_path, monkeypatch):
    """Real files of a run: the loop's networks are stand-ins, the correction of its maps is real and tiny."""
    calls = use_quick_networks(monkeypatch)
    simulate(tmp_path, n=60)
    tiny = {"correct_sub_maps": 4, "correct_cube_px": 16, "correct_epochs": 1, "refine_max_iterations": 3}
    tiny |= {"realign_mode": "paired", "correct_mode": "independent"}  # stages in processes of their own are real
    job = write_job(tmp_path, run_workflow="realign", **tiny)
    run = run_job(job, tmp_path / "run", Context(), report=build).path
    text, data = (run / "report.html").read_text(encoding="utf-8"), read_json(run / "report.json")
    assert [key for key in ids(text) if key.startswith(("correct", "realign"))] == [*SECTIONS[1:], "realign"]
    said = section(text, "realign")
    assert realign.SHARED in said and "no: no further iteration needs references" in said
    assert len(calls) == sum(row["applied"] for row in data["realign"][0]["iterations"]) > 0
    assert data["correct"] == read_json(next(run.glob("*_correct")) / "correct.json")
    assert "Before: the mean of the half-maps" in section(text, "correct")
