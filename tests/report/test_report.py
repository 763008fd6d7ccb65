"""A made-up run folder goes through diagnose and the report; the page, its pictures and its numbers are looked at."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from errors_helper import raises_code
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from cryoiso.core.errors import InputError
from cryoiso.core.types import OpticsGroup, Particles
from cryoiso.io.mrc import write_map
from cryoiso.methods.assess.measure import diagnose
from cryoiso.metrics.pose_error import pose_errors
from cryoiso.physics.symmetry import point_group
from cryoiso.report import build

BOX, PIXEL_A, N = 32, 3.0, 400


def make_particles(rotation, shift_A, **results):
    n = len(rotation)
    group = OpticsGroup(1, "one", PIXEL_A, BOX, 300.0, 2.7, 0.1)
    zeros = np.zeros(n)
    return Particles(
        np.arange(n, dtype=np.uint64),
        np.zeros(n, np.int32),
        (group,),
        np.full(n, "a.mrcs"),
        np.arange(n),
        *(zeros,) * 6,
        rotation=rotation,
        shift_A=shift_A,
        half=(np.arange(n) % 2 + 1).astype(np.int8),
        results=results,
    )


@pytest.fixture(scope="module")
def measured():
    """Maps and poses of a run that went wrong: top views put to the side, maps that agree beyond the truth."""
    rng = np.random.default_rng(0)
    z, y, x = np.mgrid[:BOX, :BOX, :BOX] - BOX // 2
    truth = np.zeros((BOX,) * 3)
    for angle in (0, 120, 240):
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        for r, h in ((4, -6), (5, 2), (3, 7)):
            truth += np.exp(-((x - r * c) ** 2 + (y - r * s) ** 2 + (z - h) ** 2) / 3)
    bad = gaussian_filter(truth, (4, 0.7, 0.7))

    def halves(volume, noise):
        return [(volume + noise * rng.standard_normal(volume.shape)).astype(np.float32) for _ in range(2)]

    tilt = np.where(rng.random(N) < 0.8, np.degrees(np.arccos(rng.uniform(np.cos(np.radians(30)), 1, N))), 90.0)
    angles = np.column_stack([rng.uniform(0, 360, N), tilt, rng.uniform(0, 360, N)])
    true = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().transpose(0, 2, 1)
    estimated = Rotation.from_rotvec(np.radians(3) * rng.standard_normal((N, 3))).as_matrix() @ true
    moved = np.flatnonzero(tilt < 36)[::5]
    estimated[moved] = Rotation.from_euler("y", 80, degrees=True).as_matrix() @ true[moved]
    shift = rng.normal(0, 3, (N, 2))
    results = {"rlnMaxValueProbDistribution": rng.uniform(0, 1, N), "cryoisoPoseEntropy": rng.exponential(1, N)}
    ideal = halves(truth, 0.1)
    return {
        "halves": halves(bad, 0.05),
        "mask": gaussian_filter((x**2 + y**2 < 100).astype(np.float32), 1.0),
        "truth": truth.astype(np.float32),
        "ideal": (ideal[0] + ideal[1]) / 2,
        "estimated": make_particles(estimated, shift + rng.normal(0, 1, (N, 2)), **results),
        "true": make_particles(true, shift),
    }


@pytest.fixture(scope="module")
def numbers(measured):
    m = measured
    return diagnose(
        *m["halves"],
        m["mask"],
        PIXEL_A,
        m["estimated"],
        "C3",
        truth_particles=m["true"].take(np.arange(N)[::-1]),
        truth_map=m["truth"],
        truth_pose_map=m["ideal"],
        seed=3,
    )


@pytest.fixture
def run_folder(tmp_path, measured, numbers):
    for name in ("03_refine", "04_reconstruct/truth_poses", "05_diagnose"):
        (tmp_path / name).mkdir(parents=True)
    h1, h2 = measured["halves"]
    write_map(tmp_path / "04_reconstruct/map.mrc", (h1 + h2) / 2, PIXEL_A)
    write_map(tmp_path / "04_reconstruct/truth_poses/map.mrc", measured["ideal"], PIXEL_A)
    write_map(tmp_path / "truth.mrc", measured["truth"], PIXEL_A)
    rows = [
        {"iteration": i, "resolution_A": r, "step_deg": s, "changes_deg": c, "seconds": 2.0}
        for i, r, s, c in ((1, 30.0, 15.0, 40.0), (2, 14.0, 15.0, 9.0), (3, 9.0, 7.5, 3.0), (4, 8.0, 3.8, 1.0))
    ]
    (tmp_path / "03_refine/refine.json").write_text(json.dumps({"iterations": rows}))
    (tmp_path / "05_diagnose/diagnose.json").write_text(json.dumps(numbers))
    (tmp_path / "resolved.toml").write_text(
        f'[truth]\nmap = "{tmp_path / "truth.mrc"}"\n[run]\nseed = 3\ntitle = "A <made-up> run & more"\n'
    )
    start = {
        "time": "2025-01-01T00:00:00+00:00",
        "command": ["cryoiso", "run", "my job.toml"],
        "ranks": 2,
        "mpi": "MPICH",
    }
    manifest = {"cryoiso": "0.1.0", "inputs": {"a.star": {"sha256": "0123456789abcdef" * 4}}, "starts": [start]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    lines = [{"event": "end", "stage": s, "seconds": t} for s, t in (("ingest", 3.1), ("refine", 125.0))]
    (tmp_path / "journal.jsonl").write_text("\n".join(json.dumps(x) for x in lines) + '\n{"torn')
    return tmp_path


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_diagnose_sees_the_disease(measured, numbers):
    json.dumps(numbers, allow_nan=False)
    errors = numbers["pose_errors"]
    direct = pose_errors(measured["estimated"].rotation, measured["true"].rotation, point_group("C3"), align="axis")
    assert errors["median_deg"] == pytest.approx(direct.median_deg, abs=1e-6)
    assert errors["top_to_side"] == pytest.approx(0.2, abs=0.01) and errors["side_to_top"] == 0
    assert sum(errors["histogram"]["all"]) == N
    mine, ideal = numbers["map_to_truth"], numbers["true_poses"]
    assert mine["axial_A"] > 1.5 * ideal["axial_A"] and mine["resolution_05_A"] > ideal["resolution_05_A"]
    assert numbers["resolution_0143_A"] < mine["resolution_05_A"]
    assert len(numbers["frequency_invA"]) == len(numbers["fsc_corrected"]) == len(mine["fsc"]) == BOX // 2 + 1
    assert numbers["frequency_invA"][-1] == pytest.approx(1 / (2 * PIXEL_A))
    assert sum(numbers["views"]["estimated"]["counts"]) == pytest.approx(N)
    assert len(numbers["views"]["true"]["counts"]) == sum(numbers["views"]["cells_per_ring"])
    assert numbers["half_counts"] == [N // 2, N // 2]
    assert sum(numbers["posterior"]["entropy_nats"]["counts"]) == N


def test_diagnose_undoes_a_slide_along_the_axis(measured):
    slid = [np.roll(h, 2, axis=0) for h in measured["halves"]]
    still, moved = (
        diagnose(*halves, None, PIXEL_A, None, "C3", truth_map=measured["truth"])["map_to_truth"]
        for halves in (measured["halves"], slid)
    )
    np.testing.assert_allclose(moved["frame_shift_A"], [0, 0, 2 * PIXEL_A], atol=1e-6)
    assert moved["correlation"] == pytest.approx(still["correlation"], abs=2e-3)
    aside = [np.roll(h, 2, axis=2) for h in measured["halves"]]  # no frame of a C3 map: a real error
    worse = diagnose(*aside, None, PIXEL_A, None, "C3", truth_map=measured["truth"])["map_to_truth"]
    assert worse["correlation"] < still["correlation"] - 0.1


def test_diagnose_without_truth_or_poses(measured):
    bare = diagnose(*measured["halves"], None, PIXEL_A, measured["true"].take(slice(0, 50)), "C1")
    assert "pose_errors" not in bare and "map_to_truth" not in bare and bare["posterior"] == {}
    stranger = make_particles(measured["true"].rotation, measured["true"].shift_A)
    stranger = Particles(**{**stranger.__dict__, "uid": stranger.uid + np.uint64(10**6)})
    lost = diagnose(*measured["halves"], None, PIXEL_A, measured["true"], "C3", truth_particles=stranger)
    assert "pose_errors" not in lost and "no particle" in lost["notes"][0]


def test_report_is_one_page_with_every_figure(run_folder):
    path = build(run_folder)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and path.name == "report.html"
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "h2" and "id" in attrs]
    by_direction = ["directions", "sphere", "fsc3d"]
    assert ids == [
        "maps",
        "measured",
        "numbers",
        "fsc",
        "truth",
        *by_direction,
        "views",
        "errors",
        "iterations",
        "posterior",
    ]
    assert len(page.images) == 11
    for image in page.images:
        kind, data = re.fullmatch(r"data:image/(svg\+xml|png);base64,(.*)", image).groups()
        raw = base64.b64decode(data)
        assert len(raw) > 3000 and (raw.startswith(b"\x89PNG") if kind == "png" else b"<svg" in raw)
    shell = re.sub(r'src="data:[^"]*"|<script type="application/json".*?</script>', "", text, flags=re.S)
    assert "http" not in shell and " src=" not in shell and "fetch(" not in shell  # nothing is fetched
    assert "A &lt;made-up&gt; run &amp; more" in shell
    assert "cryoiso run &#x27;my job.toml&#x27;" in shell and "refine 2 min 05 s" in shell
    assert not list(run_folder.glob("*.part"))


def test_report_json_has_the_same_numbers(run_folder, numbers):
    text = build(run_folder).read_text(encoding="utf-8")
    data = json.loads((run_folder / "report.json").read_text())
    assert data["diagnose"] == numbers
    rows = {(r["group"], r["label"]): r for r in data["numbers"]}
    truth = rows["Map against truth", "resolution, FSC 0.5, all directions"]
    assert truth["value"] == numbers["map_to_truth"]["resolution_05_A"]
    assert truth["true_poses"] == numbers["true_poses"]["resolution_05_A"]
    assert rows["Pose errors", "top views put to the side"]["value"] == 100 * numbers["pose_errors"]["top_to_side"]
    for sentence in data["summary"]:
        assert sentence in text.replace("<strong>", "").replace("</strong>", "")
    assert f"<strong>Verdict: {numbers['verdict']['verdict']}.</strong>" in text
    joined = " ".join(data["summary"])
    assert f"{numbers['resolution_0143_A']:.1f} Å (FSC 0.143" in joined
    assert f"{numbers['true_poses']['resolution_05_A']:.1f} Å" in joined
    assert f"{100 * numbers['pose_errors']['top_to_side']:.1f} % of the top views were put to the side" in joined


def test_same_run_gives_the_same_bytes(run_folder):
    first = build(run_folder).read_bytes()
    assert build(run_folder).read_bytes() == first


def test_parts_may_be_absent(run_folder):
    (run_folder / "05_diagnose/diagnose.json").write_text(json.dumps({"fsc_unmasked": None, "pose_errors": {}}))
    for name in (
        "03_refine/refine.json",
        "04_reconstruct/map.mrc",
        "04_reconstruct/truth_poses/map.mrc",
        "manifest.json",
    ):
        (run_folder / name).unlink()
    (run_folder / "truth.mrc").unlink()
    text = build(run_folder).read_text()
    assert "<img" not in text and "not been measured yet" in text


def test_what_is_no_run_folder_says_so(tmp_path):
    with raises_code("run-missing", InputError):
        build(tmp_path)
    (tmp_path / "manifest.json").write_text("{broken")
    with pytest.raises(InputError, match=r"manifest\.json: not a JSON file"):
        build(tmp_path)
