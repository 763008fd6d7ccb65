"""The report of a run with auxiliary particles, of a made-up run folder: figures, sentences, numbers, gaps."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from test_report import Page, make_particles

from cryoiso.core.errors import InputError
from cryoiso.io.mrc import write_map
from cryoiso.methods.assess.measure import ERROR_EDGES_DEG, diagnose, plain
from cryoiso.metrics.imagestats import compare_images
from cryoiso.metrics.orientation import view_distribution
from cryoiso.physics.noise import colour_noise, noise_spectrum
from cryoiso.report import build, figures
from cryoiso.report.run_reader import stage_folder
from cryoiso.report.sections import anisotropy_figures, auxiliary_figures, measured
from cryoiso.report.sections.auxiliary import collect_rounds

BOX, PIXEL_A, N, STEPS, LAYERS = 32, 3.0, 400, 60, 7
FIGURES = [
    *("maps", "measured", "numbers", "fsc", "truth", "directions", "sphere", "fsc3d", "views", "errors-before"),
    *("samples", "spectra", "transfer", "training", "moved", "iterations", "posterior"),
]


def poses(rng, wrong: float) -> tuple[np.ndarray, np.ndarray]:
    """True poses, half of them top views, and estimated ones of which a share of the side views is put on top."""
    tilt = np.where(np.arange(N) % 2, 10.0, 90.0)
    angles = np.column_stack([rng.uniform(0, 360, N), tilt, rng.uniform(0, 360, N)])
    true = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().transpose(0, 2, 1)
    estimated = Rotation.from_rotvec(np.radians(2) * rng.standard_normal((N, 3))).as_matrix() @ true
    moved = np.flatnonzero((tilt > 36) & (rng.random(N) < wrong))
    estimated[moved] = Rotation.from_euler("y", 80, degrees=True).as_matrix() @ true[moved]
    return true, estimated


@pytest.fixture(scope="module")
def world():
    """Truth, maps and measured numbers before and after."""
    rng = np.random.default_rng(0)
    z, y, x = np.mgrid[:BOX, :BOX, :BOX] - BOX // 2
    truth = np.zeros((BOX,) * 3)
    for angle in (0, 120, 240):
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        for r, h in ((4, -6), (5, 2), (3, 7)):
            truth += np.exp(-((x - r * c) ** 2 + (y - r * s) ** 2 + (z - h) ** 2) / 3)

    def halves(volume, noise):
        return [(volume + noise * rng.standard_normal(volume.shape)).astype(np.float32) for _ in range(2)]

    maps = {"before": halves(gaussian_filter(truth, (4, 0.7, 0.7)), 0.02), "after": halves(truth, 0.15)}
    maps["ideal"] = halves(truth, 0.05)
    numbers = {}
    for name, wrong in (("before", 0.8), ("after", 0.05)):
        true, estimated = poses(rng, wrong)
        certain = {"rlnMaxValueProbDistribution": rng.uniform(0, 1, N)}
        numbers[name] = diagnose(
            *maps[name],
            None,
            PIXEL_A,
            make_particles(estimated, np.zeros((N, 2)), **certain),
            "C3",
            truth_particles=make_particles(true, np.zeros((N, 2))),
            truth_map=truth.astype(np.float32),
            truth_pose_map=np.mean(maps["ideal"], axis=0),
        )
    kept = ("pose_errors", "map_to_truth", "views")
    measured = {**numbers["after"], "before": {key: numbers["before"][key] for key in kept}}
    return {"truth": truth.astype(np.float32), "maps": maps, "diagnose": measured}


def training(rng, number: int) -> dict:
    steps = np.arange(0, 10 * STEPS, 10)
    halves = {}
    for half in (1, 2):
        kl = 1.2 * np.exp(-np.arange(LAYERS))[None] * (1 - np.exp(-(steps[:, None] + 1) / 80)) * rng.uniform(0.5, 1)
        kl[:, 4] *= 1e-3 if half == 2 else 1
        loss = 0.5 + 50 * np.exp(-steps / 15) + 0.5 * np.exp(-steps / 200) + 0.02 * rng.standard_normal(STEPS)
        halves[str(half)] = {
            "steps": steps,
            "loss": loss,
            "reconstruction": 0.01 + 0.9 * np.exp(-steps / 60) * rng.uniform(0.9, 1.1, STEPS),
            "kl_weight": np.minimum(1, steps / 300),
            "kl_per_layer": kl,
            "attempts": half,
            "seconds": None,
        }
    return {"round": number, "halves": halves, "settings": {"preset": "small"}}


def images(rng) -> dict[str, np.ndarray]:
    import torch

    y, x = np.mgrid[:BOX, :BOX] - BOX // 2
    blobs = np.stack([np.exp(-((x - 3 * c) ** 2 + y**2) / (12 + 8 * c)) for c in rng.uniform(-1, 1, 64)])
    white = torch.from_numpy(rng.standard_normal((128, BOX, BOX)).astype(np.float32))
    noise = colour_noise(white, noise_spectrum(BOX, "coloured")).numpy()
    return {"raw": noise[:64] + 1.5 * blobs, "auxiliary": 0.97 * noise[64:] + 1.5 * blobs, "projections": 1.5 * blobs}


def motion(rng, typical_deg: float) -> dict:
    angles = np.minimum(rng.lognormal(math.log(typical_deg), 1.2, N), 180)
    counts, edges = np.histogram(angles, ERROR_EDGES_DEG)
    over = {f"over_{d}": float(np.mean(angles > d)) for d in (10, 20, 30)}
    return {"median_deg": float(np.median(angles)), **over, "histogram": {"edges_deg": edges, "counts": counts}}


def views(rng, wrong: float) -> dict:
    spread = view_distribution(poses(rng, wrong)[1], "C3")
    return {**spread.summary(), "counts": spread.counts, "cells": spread.grid.cells}


def put(path, data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(data)))


def passing(number: int) -> dict:
    """A transfer that falls with the frequency, and is not known beyond 10 Å; half 2's is 0.1 lower."""
    frequency = np.arange(1, BOX // 2 + 1) / (BOX * PIXEL_A)
    value, sd = 1 - 4 * frequency / number, np.where(frequency > 0.1001, 0.4, 0.01)
    sd = np.where(frequency > 0.13, np.nan, sd)
    halves = {h: {"images": 200, "value": np.where(sd > 0, value - 0.1 * (h == "2"), np.nan), "sd": sd} for h in "12"}
    return {"frequency_invA": frequency, "halves": halves}


def write_round(folder, rng, number: int, first_stage: int, world) -> None:
    put(folder / f"{first_stage:02}_train-{number}/train.json", training(rng, number))
    put(folder / f"{first_stage:02}_train-{number}/timing.json", {"1": {"images_per_s": 212.4}, "2": {}})
    some = images(rng)
    statistics = compare_images(some["raw"], some["auxiliary"], PIXEL_A, 10.0)
    made = folder / f"{first_stage + 1:02}_generate-{number}"
    counts = {"1": 200, "2": 200}
    facts = {
        "round": number,
        "counts": counts,
        "temperature": 1.0,
        "statistics": statistics,
        "transfer": passing(number),
    }
    put(made / "generate.json", facts)
    np.savez(made / "samples.npz", **{k: v[:8].astype(np.float32) for k, v in some.items()})
    before, after = views(rng, 0.8 if number == 1 else 0.3), views(rng, 0.3 / number)
    numbers = {
        "round": number,
        "raw": N,
        "auxiliary": 400,
        "moved": motion(rng, 30 / number**3),
        "resolution_A": 9.0 - number,
        "auxiliary_error_deg": 2.5,
        "auxiliary_weight_share": 0.8,
        "homologue": {"confirmed": number == 2, "deviation": 2.0 + number, "first_A": 24.0, "rho": [0.0, 0.7, 0.6]},
        "views": {"cells_per_ring": before.pop("cells"), "before": before, "after": after},
        "settled": number == 2,
    }
    after.pop("cells")
    refined = folder / f"{first_stage + 2:02}_corefine-{number}"
    put(refined / "corefine.json", numbers)
    write_map(refined / "raw_map.mrc", gaussian_filter(world["maps"]["after"][0], 1.0), PIXEL_A)


@pytest.fixture
def run_folder(tmp_path, world):
    rng = np.random.default_rng(1)
    rows = [{"iteration": i, "resolution_A": 30 / i, "step_deg": 15 / i, "changes_deg": 9.0 / i} for i in range(1, 5)]
    put(tmp_path / "03_refine/refine.json", {"iterations": rows})
    for half, volume in enumerate(world["maps"]["before"], 1):
        write_map(tmp_path / f"03_refine/half{half}.mrc", volume, PIXEL_A)
    for number in (1, 2):
        write_round(tmp_path, rng, number, 1 + 3 * number, world)
    local = {"kept": 300, "dropped": 100, "cap": 9, "cells": 60, "dropped_fraction_top": 0.9, "moved": motion(rng, 1.0)}
    put(tmp_path / "10_local/local.json", local)
    (tmp_path / "11_reconstruct/truth_poses").mkdir(parents=True)
    write_map(tmp_path / "11_reconstruct/map.mrc", np.mean(world["maps"]["after"], axis=0), PIXEL_A)
    write_map(tmp_path / "11_reconstruct/truth_poses/map.mrc", np.mean(world["maps"]["ideal"], axis=0), PIXEL_A)
    write_map(tmp_path / "truth.mrc", world["truth"], PIXEL_A)
    put(tmp_path / "13_diagnose/diagnose.json", world["diagnose"])
    text = f'[truth]\nmap = "{tmp_path / "truth.mrc"}"\n[run]\nseed = 1\ntitle = "Auxiliary particles"\n'
    (tmp_path / "resolved.toml").write_text(text)
    return tmp_path


@pytest.fixture
def unrendered(monkeypatch):
    """Pictures are composed but not rendered, which takes most of the time."""
    for module in (figures, anisotropy_figures, auxiliary_figures):
        monkeypatch.setattr(module, "address", lambda figure, *_: "data:,")
    monkeypatch.setattr(measured, "still", lambda surface: "data:,")


def headings(text: str) -> list[str]:
    page = Page(text)
    assert page.open == []
    return [attrs["id"] for tag, attrs in page.tags if tag == "h2" and "id" in attrs]


def built(folder) -> tuple[str, dict]:
    text = build(folder).read_text(encoding="utf-8")
    json.dumps(json.loads((folder / "report.json").read_text()), allow_nan=False)
    return text, json.loads((folder / "report.json").read_text())


def change(path, edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_every_figure_is_there(run_folder):
    text, data = built(run_folder)
    assert headings(text) == FIGURES
    assert len(Page(text).images) == len(FIGURES) - 1
    shell = re.sub(r'src="data:[^"]*"|<script.*?</script>', "", text, flags=re.S)
    assert "http" not in shell and "nan" not in shell.lower()
    assert "round 1, half 1: 212 images/s" in shell and "round 2, half 2: attempt 2" in shell
    assert [part["round"] for part in data["auxiliary"]["rounds"]] == [1, 2]


def test_sentences_say_before_and_after(run_folder, world, unrendered):
    text, data = built(run_folder)
    joined = " ".join(data["summary"])
    d, old = world["diagnose"], world["diagnose"]["before"]
    for sentence in data["summary"]:
        assert sentence in text.replace("<strong>", "").replace("</strong>", "")
    assert f"Poses are wrong by {d['pose_errors']['median_deg']:.1f}°" in joined
    assert f"Before the auxiliary particles the map reached {old['map_to_truth']['resolution_05_A']:.1f} Å" in joined
    share = 100 * old["pose_errors"]["side_over_20"]
    assert f"and {share:.1f} % of the {old['pose_errors']['side_n']:,} side views." in joined
    rounds = data["auxiliary"]["rounds"]
    shares = [100 * part["corefine"]["moved"]["over_20"] for part in rounds]
    assert f"moved by more than 20°: {shares[0]:.1f} % in round 1, {shares[1]:.1f} % in round 2." in joined
    statistics = rounds[1]["generate"]["statistics"]
    assert f"differ by {statistics['kl_nats']:.3f} nats" in joined
    off = 100 * (math.exp(statistics["finer"]["largest"]) - 1)
    assert f"off by {off:+.1f} % at most in any shell beyond 20 Å" in joined
    assert "that they were made from: 0.88 at 30 Å, 0.85 at 20 Å, 0.82 at 15 Å (1: all" in joined
    assert "In round 1 the raw particles did not confirm the homologue (beyond 24 Å, 3.0 standard deviations" in joined
    assert "In round 2 the raw particles alone confirmed the homologue" in joined and "at least 0.70)" in joined
    assert "keeps 300 of 400 particles (at most 9 of a half-set from each of 60 directions)" in joined


def test_the_table_has_a_column_before(run_folder, world, unrendered):
    text, data = built(run_folder)
    d, old = world["diagnose"], world["diagnose"]["before"]
    rows = {(row["group"], row["label"]): row for row in data["numbers"]}
    row = rows["Map against truth", "resolution, FSC 0.5, all directions"]
    expected = (old["map_to_truth"], d["map_to_truth"], d["true_poses"])
    assert [row[k] for k in ("before", "value", "true_poses")] == [part["resolution_05_A"] for part in expected]
    side = rows["Pose errors", "side views above 20°"]
    assert side["before"] > 60 > 20 > side["value"]
    assert rows["Views", "entropy of the view distribution (1 = even)"]["before"] is not None
    assert rows["Auxiliary particles, round 2", "raw particles refined with them"]["value"] == N
    assert rows["Auxiliary particles, round 1", "resolution"]["value"] == 8.0
    assert rows["Auxiliary particles, round 1", "weight of the auxiliaries in the references"]["value"] == 80
    assert rows["Auxiliary particles, round 2", "homologue in the raw particles, above noise"]["value"] == 4.0
    assert rows["Balanced subset", "particles dropped"]["value"] == 100
    row = rows["Auxiliary particles, round 2", "transfer of the generator at 20 Å"]
    assert row["value"] == pytest.approx(0.85, abs=0.002)
    assert '<th class="n">before</th><th class="n">this run</th><th class="n">true poses</th>' in text


def test_without_truth_views_and_motion_remain(run_folder, unrendered):
    (run_folder / "resolved.toml").write_text("[run]\nseed = 1\n")

    def forget(d):
        for key in ("before", "pose_errors", "map_to_truth", "true_poses"):
            d.pop(key)
        d["views"].pop("true")

    change(run_folder / "13_diagnose/diagnose.json", forget)
    text, data = built(run_folder)
    assert headings(text) == [key for key in FIGURES if key not in ("truth", "errors-before")]
    first = data["auxiliary"]["rounds"][0]["corefine"]["views"]["before"]
    joined = " ".join(data["summary"])
    assert f"{100 * first['top_fraction']:.1f} % of the views lay within 36° of z before" in joined
    assert joined.count("within 36° of z") == 1 and "wrong by" not in joined
    views = [row for row in data["numbers"] if row["group"] == "Views"]
    assert views[0]["before"] == pytest.approx(100 * first["top_fraction"])


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("*_train-*/train.json", ["training"]),
        ("*_generate-*/generate.json", ["spectra", "transfer"]),
        ("*_generate-*/samples.npz", ["samples"]),
        ("*_corefine-*/*", []),
        ("*_local/local.json", []),
        ("03_refine/half1.mrc", []),
        ("11_reconstruct/map.mrc", ["measured"]),
        (
            "13_diagnose/diagnose.json",
            ["fsc", "truth", "directions", "sphere", "fsc3d", "errors-before", "posterior"],
        ),
    ],
)
def test_any_file_may_be_absent(run_folder, name, gone, unrendered):
    paths = list(run_folder.glob(name))
    assert paths
    for path in paths:
        path.unlink()
    text, _ = built(run_folder)
    assert headings(text) == [key for key in FIGURES if key not in gone]


def test_a_run_in_its_first_training_has_a_report(run_folder, unrendered):
    keep = {"03_refine", "04_train-1", "resolved.toml", "truth.mrc"}
    for path in run_folder.iterdir():
        if path.name not in keep:
            path.rename(run_folder / f"gone-{path.name}")
    assert headings(built(run_folder)[0]) == ["maps", "numbers", "training", "iterations"]


@pytest.mark.parametrize("annealed", [True, False])
def test_the_caption_of_a_training_speaks_of_annealing_only_where_there_was_some(run_folder, unrendered, annealed):
    """Without it no dashed line is drawn."""

    def at_full_weight(d):
        for run in d["halves"].values():
            run["kl_weight"] = [1.0] * STEPS

    if not annealed:
        for file in run_folder.glob("*_train-*/train.json"):
            change(file, at_full_weight)
    assert ("weight of the KL term, which grows until the dashed line" in built(run_folder)[0]) == annealed


def test_nulls_and_nan_leave_gaps(run_folder):
    def spoil_training(d):
        run = d["halves"]["1"]
        run["loss"][3:6] = [None, float("nan"), float("inf")]
        run["reconstruction"] = [None] * STEPS
        run["kl_per_layer"][2] = [None] * LAYERS
        d["halves"]["2"].update(kl_per_layer=None, kl_weight=None, steps=d["halves"]["2"]["steps"][:5])

    def spoil_statistics(d):
        s = d["statistics"]
        s["log_ratio"][4], s["kl_nats"], s["finer"] = float("nan"), None, {"largest": None}
        s["power_generated"][3], s["histogram"], d["counts"] = None, None, None

    def spoil_motion(d):
        d.update(moved={"median_deg": None, "over_20": None, "histogram": None}, views=None, resolution_A=None)

    for name, edit in (
        ("07_train-2/train.json", spoil_training),
        ("08_generate-2/generate.json", spoil_statistics),
        ("09_corefine-2/corefine.json", spoil_motion),
        ("10_local/local.json", lambda d: d.update(moved=None, cap=None)),
        ("13_diagnose/diagnose.json", lambda d: d["before"].update(pose_errors=None, map_to_truth=None)),
    ):
        change(run_folder / name, edit)
    text, data = built(run_folder)
    assert headings(text) == [key if key != "errors-before" else "errors" for key in FIGURES]
    assert "nan" not in re.sub(r'src="data:[^"]*"', "", text).lower()
    assert data["auxiliary"]["rounds"][1]["train"]["halves"]["1"]["loss"][3:6] == [None] * 3
    assert "keeps 300 of 400 particles." in " ".join(data["summary"])


def test_nothing_but_nulls_still_gives_a_page(run_folder):
    def emptied(value):
        if isinstance(value, dict):
            return {k: emptied(v) for k, v in value.items()}
        return [] if isinstance(value, list) else None

    for path in run_folder.glob("[0-9][0-9]_*-[12]/*.json"):
        path.write_text(json.dumps(emptied(json.loads(path.read_text()))))
    text, _ = built(run_folder)
    assert "samples" in headings(text) and "spectra" not in headings(text)


def test_damaged_files_are_named(run_folder):
    (run_folder / "08_generate-2/samples.npz").write_bytes(b"PK torn")
    with pytest.raises(InputError, match=r"samples\.npz"):
        build(run_folder)


def test_stage_folders_are_found_by_name(tmp_path):
    for name in ("03_refine", "12_refine", "04_refine_old", "5_refine", "07_train-1", "08_train-x", "09_other-3"):
        (tmp_path / name).mkdir()
    assert stage_folder(tmp_path, "refine").name == "12_refine"
    assert not stage_folder(tmp_path, "local").exists()
    assert collect_rounds(tmp_path) == {}
    (tmp_path / "07_train-1/train.json").write_text('{"round": 1}')
    assert collect_rounds(tmp_path)["rounds"][0]["train"] == {"round": 1}
