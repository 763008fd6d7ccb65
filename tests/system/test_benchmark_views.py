"""What the benchmark of uneven views counts and how it pools seeds (`benchmarks/views.py`)."""

from __future__ import annotations

import json
import tomllib

import numpy as np
import pytest

from benchmarks import nuisance_rows, particle_sets, views, views_tables
from benchmarks.pooling import differences, mean_error, pooled, student95, wilson
from benchmarks.score import Preferred, slid, truth_scores, view_counts
from benchmarks.views_rows import BEFORE, ROWS, job_text
from cryoiso.core.config import parse_job
from cryoiso.physics.so3 import euler_to_matrix


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_the_published_values(hits, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)
    assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_nothing_counted_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert pooled([], "rare_over_20", "rare") is None
    assert pooled([{"rare": 0, "rare_over_20": 0}], "rare_over_20", "rare") is None
    assert pooled([{"rare": 3, "rare_over_20": 1}, {"n": 4}], "rare_over_20", "rare") is None


def test_counts_are_pooled_not_shares():
    counts = [{"rare": 10, "rare_over_20": 9}, {"rare": 90, "rare_over_20": 1}]
    assert pooled(counts, "rare_over_20", "rare") == (10, 100)
    assert views_tables.share((10, 100)) == "10.0 % (5.5-17.4)"


def test_pairs_use_common_seeds_only():
    assert differences({3: 1.0, 4: 2.0, 5: 9.0}, {4: 4.0, 3: 2.0, 6: 0.0}) == [1.0, 2.0]
    assert differences({3: 1.0}, {4: 1.0}) == []
    assert mean_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / np.sqrt(3)))


def test_the_interval_of_a_mean_holds_it_in_95_percent_of_few_values():
    """Ends of Student's table (t = 4.303 of three values), and how often the interval of three or five normal values
    holds their mean."""
    assert student95([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / np.sqrt(3), 2 + 4.3027 / np.sqrt(3)), abs=1e-3)
    assert student95([1.0]) is None
    rng = np.random.default_rng(5)
    for n in (3, 5):
        ends = np.array([student95(values) for values in rng.normal(2.0, 1.5, (2000, n))])
        share = ((ends[:, 0] < 2) & (ends[:, 1] > 2)).mean()
        assert abs(share - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


TOP = particle_sets.TOP
SIDE = particle_sets.SIDE


def counts(estimated, true, symmetry, preferred):
    """Of the first particle; a hundred that are right keep the frame."""
    right = euler_to_matrix(np.linspace(0, 350, 100), np.linspace(3, 177, 100), np.linspace(0, 340, 100))
    made = view_counts(
        np.concatenate([euler_to_matrix(*estimated), right]), np.concatenate([euler_to_matrix(*true), right]),
        symmetry, preferred,
    )["counts"]  # fmt: skip
    rest = view_counts(right, right, symmetry, preferred)["counts"]
    assert rest["n_over_20"] == rest["rare_to_frequent"] == rest["frequent_to_rare"] == 0
    return {key: made[key] - rest[key] for key in made if made[key] != rest[key]}


@pytest.mark.parametrize(
    ("estimated", "true", "symmetry", "preferred", "expected"),
    [
        # a top view upside down stays frequent: both ends of the axis are
        ((0, 176, 0), (0, 4, 0), "C3", TOP, {"frequent": 1, "n_over_20": 1, "frequent_over_20": 1,
                                             "frequent_upside_down": 1}),
        ((0, 80, 0), (0, 10, 0), "C3", TOP, {"frequent": 1, "n_over_20": 1, "frequent_over_20": 1,
                                             "frequent_to_rare": 1}),
        ((0, 10, 0), (0, 80, 0), "C3", TOP, {"rare": 1, "n_over_20": 1, "rare_over_20": 1, "rare_to_frequent": 1}),
        ((0, 80, 60), (0, 80, 0), "C3", TOP, {"rare": 1, "n_over_20": 1, "rare_over_20": 1}),
        # the two-fold axis across makes both ends one view
        ((0, 180, 0), (0, 0, 0), "D2", TOP, {"frequent": 1}),
        ((120, 80, 0), (0, 80, 0), "C3", TOP, {"rare": 1}),
        ((120, 80, 0), (0, 80, 0), "C1", TOP, {"rare": 1, "n_over_20": 1, "rare_over_20": 1}),
        # side views along x: their mates at 120 and 240 degrees are frequent, the opposite one is not
        ((240, 90, 0), (0, 90, 0), "C3", SIDE, {"frequent": 1}),
        ((180, 90, 0), (0, 90, 0), "C3", SIDE, {"frequent": 1, "n_over_20": 1, "frequent_over_20": 1,
                                                "frequent_to_rare": 1}),
        ((110, 90, 0), (60, 90, 0), "C3", SIDE, {"rare": 1, "n_over_20": 1, "rare_over_20": 1,
                                                 "rare_to_frequent": 1}),
    ],
)  # fmt: skip
def test_classes_of_views_by_symmetry(estimated, true, symmetry, preferred, expected):
    assert counts(estimated, true, symmetry, preferred) == {"n": 1, **expected}


def test_the_frame_of_the_estimate_is_turned_before_side_views_are_classed():
    true = euler_to_matrix(np.linspace(-30, 30, 50), 90.0, np.linspace(0, 300, 50))
    turned = true @ euler_to_matrix(40.0, 0.0, 0.0)[0].T
    assert view_counts(turned, true, "C3", SIDE)["counts"]["frequent_to_rare"] == 0
    assert view_counts(turned, true, "C1", SIDE)["counts"]["frequent_to_rare"] > 20


def test_no_view_is_rare_in_an_even_set():
    true = euler_to_matrix([0, 10], [20, 70], [0, 0])
    assert view_counts(true, true, "C3", None) == {"counts": {"n": 2, "n_over_20": 0}}


def blob(box=24):
    z, y, x = np.indices((box, box, box)) - box // 2
    lobes = [((2, 3, 1), 1.5), ((-4, -1, 2), 1.2), ((3, -3, -3), 1.0)]
    parts = [np.exp(-((z - c[0]) ** 2 + (y - c[1]) ** 2 + (x - c[2]) ** 2) / 4) * h for c, h in lobes]
    return sum(parts).astype(np.float32)


@pytest.mark.parametrize(("symmetry", "shift"), [("C3", (2.3, 0, 0)), ("C1", (-3.4, 1.25, 0.6)), ("D2", (0, 0, 0))])
def test_maps_slide_where_the_symmetry_leaves_their_place_open(symmetry, shift):
    truth = blob()
    k = np.fft.fftfreq(24)
    phase = np.exp(-2j * np.pi * sum(s * np.meshgrid(k, k, k, indexing="ij")[i] for i, s in enumerate(shift)))
    moved = np.fft.ifftn(np.fft.fftn(truth) * phase).real
    back, by = slid(moved, truth, symmetry)
    assert by == pytest.approx([-s for s in shift], abs=0.051)
    assert np.abs(back - truth).max() < 0.02
    assert truth_scores(moved, truth, 3.0, symmetry)["truth_area"] > 0.98


def test_the_area_of_a_part_shows_where_information_is_missing():
    """Only noise within 30 degrees of z: nothing along the axis, everything across it."""
    truth = blob()
    k = np.fft.fftfreq(24)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    lost = np.abs(z) > np.cos(np.radians(30)) * np.sqrt(x**2 + y**2 + z**2)
    lost[0, 0, 0] = False
    noise = np.random.default_rng(1).standard_normal(truth.shape) * 1e-5
    made = np.fft.ifftn(np.where(lost, 0, np.fft.fftn(truth))).real + noise
    found = truth_scores(made, truth, 3.0, "D2", np.ones_like(truth))
    assert abs(found["truth_axial_area"]) < 0.25 and found["truth_equatorial_area"] > 0.99
    assert 0.8 < found["truth_area"] < 0.99


def test_records_are_replaced_by_set_seed_and_row(tmp_path):
    path = tmp_path / "views.json"
    for seed, value in ((4, 1), (3, 2), (4, 3)):
        views.add_record(path, {"set": "uniform_-15", "seed": seed, "row": "refine", "truth_A": value})
    assert [(r["seed"], r["truth_A"]) for r in views.read_records(path)] == [(3, 2), (4, 3)]


def test_tasks_go_seed_by_seed_and_leave_out_what_does_not_apply():
    made = list(views.tasks(["one_pole_-13", "noise_white"], ["true poses", "refine", "oracle"], [4, 3]))
    assert [t.key for t in made[:4]] == [
        ("one_pole_-13", 3, "true poses"), ("one_pole_-13", 3, "refine"), ("one_pole_-13", 3, "oracle"),
        ("noise_white", 3, "refine"),
    ]  # fmt: skip
    assert len(made) == 8
    whole = views.tasks(["one_pole_-13", "omitted", "noise_white"], ["refine whole"], [3])
    assert [t.key for t in whole] == [("omitted", 3, "refine whole")]


def test_a_folder_holds_a_set_only_if_its_settings_are_the_same(tmp_path):
    one = particle_sets.SETS["side_views_-15"]
    for name in ("particles.star", "truth.star", "signal_map.mrc", "homologue.mrc"):
        (tmp_path / name).touch()
    settings = {
        "model": "/models/ha/6wxb.pdb.gz", "n": 1500, "box": 48, "pixel_size": 4.5, "symmetry": "C3", "seed": 3,
        "noise": "coloured", "snr_db": -15.0, "mode": "preferred", "fraction": 0.98, "pole_tilt": 90.0,
    }  # fmt: skip
    for changed, same in (({}, True), ({"pole_tilt": 0.0}, False), ({"snr_db": -13.0}, False), ({"seed": 4}, False)):
        (tmp_path / "simulation.json").write_text(json.dumps({"settings": {**settings, **changed}}))
        assert particle_sets.prepared(one, 3, tmp_path) == same


NOT_JOBS = ("true poses", "relion")
JOBS = [
    pytest.param(row, id=name) for name, row in [*ROWS.items(), *nuisance_rows.ROWS.items()] if name not in NOT_JOBS
]


@pytest.mark.parametrize("row", JOBS)
def test_every_row_is_a_job(row, tmp_path):
    """A renamed key would be an error here, not a row that measures something else."""
    job = parse_job(tomllib.loads(job_text(row, particle_sets.SETS["D2"], tmp_path)))
    assert job.sample.symmetry == "D2" and job.particles.file == str(tmp_path / row.particles)
    assert job.refine.model_dump().items() >= dict(row.engine).items()
    assert job.run.workflow == row.command


def test_the_engine_before_differs_from_the_default():
    default = parse_job({"particles": {"file": "a"}, "reference": {"file": "b"}}).refine
    assert BEFORE["regularisation"] == "mean-weight" and not BEFORE["weighted_fsc"] and not BEFORE["view_density"]
    assert any(getattr(default, key) != value for key, value in BEFORE.items())


def test_every_table_has_its_cells():
    record = {"set": "one_pole_-13", "seed": 3, "row": "refine", "cpu_s": 20.0, "truth_A": 15.0, "median_deg": 3.0}
    record["counts"] = {"n": 100, "n_over_20": 5, "rare": 10, "rare_over_20": 4}
    other = {**record, "row": "before", "truth_A": 18.5, "counts": {**record["counts"], "n_over_20": 8}}
    sets, pairs = views_tables.tables([record, other], ["one_pole_-13"], list(ROWS), [("before", "refine")], set())
    assert "| one_pole_-13 | refine | 1 | 100 | 10 | 5.0 % (2.2-11.2) | 40.0 % (16.8-68.7) | - |" in sets
    assert "| one_pole_-13 | refine - before | 1 | -3.0 | +0.0 |" in pairs and "| -3.5 |" in pairs
    more = [{**r, "seed": 4, "truth_A": r["truth_A"] + by} for r, by in ((record, 1.0), (other, 0.0))]
    noise = [{"set": "noise_white", "seed": 3, "row": row, "correlation": c, "cpu_s": 9.0}
             for row, c in (("before", 0.4), ("refine", 0.3))]  # fmt: skip
    pairs = views_tables.tables(
        [record, other, *more, *noise], ["one_pole_-13", "noise_white"], [], [("before", "refine")], {"noise_white"}
    )[0]
    assert "| -3.0 (-9.4 to +3.4) |" in pairs, "-3.5 and -2.5 with t = 12.7"
    assert "| noise_white | refine - before | 1 |" in pairs and "| -0.100 |" in pairs


def test_preferred_axis_or_pole():
    views_of = np.array([[0, 0, 1.0], [0, 0, -1.0], [1.0, 0, 0]])
    one = np.eye(3)[None]
    assert Preferred(np.array([[0, 0, 1.0]])).frequent(views_of, one).tolist() == [True, True, False]
    assert Preferred(np.array([[0, 0, 1.0]]), both_ends=False).frequent(views_of, one).tolist() == [True, False, False]
