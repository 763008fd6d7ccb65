"""A run beside another one: both in plain words, what differs; and the density of views that a refinement learned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code

from cryoiso.core.errors import InputError
from cryoiso.metrics.orientation import ViewGrid
from cryoiso.report import build
from cryoiso.report.sections import intensity
from cryoiso.report.sections.view_density import sentences

STEP_DEG = 12.0


def measured(errors: tuple[float, float, float], truth: tuple[float, float, float], claim_A: float) -> dict:
    """What `diagnose` would have found.

    Args:
        errors: shares of all wrong by 20°, of side views, of the opposite end.
        truth: resolution, mean FSC along z, mean FSC.
    """
    shells = np.arange(17) / (32 * 3.0)
    curve = list(np.linspace(1, 0, 17))
    compare = {"fsc": curve, "axial": curve, "equatorial": curve, "axial_A": 20.0, "equatorial_A": 9.0}
    return {
        "box_px": 32, "pixel_size_A": 3.0, "symmetry": "C3", "particles": 1000, "frequency_invA": list(shells),
        "resolution_0143_A": claim_A,
        "map_to_truth": {**compare, "resolution_05_A": truth[0], "axial_area": truth[1], "fsc_area": truth[2]},
        "true_poses": {**compare, "resolution_05_A": 11.0, "axial_area": 0.5, "fsc_area": 0.6},
        "pose_errors": {
            "n": 1000, "median_deg": 3.0, "fraction_over_20": errors[0], "side_n": 25, "side_over_20": errors[1],
            "fraction_opposite": errors[2], "top_to_side": 0.01, "side_to_top": 0.2,
        },
    }  # fmt: skip


OLD = measured((0.15, 0.76, 0.12), (18.6, 0.12, 0.40), 13.0)
NEW = measured((0.04, 0.32, 0.01), (12.0, 0.45, 0.55), 12.5)


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """The other run and this one."""
    jobs = {
        "old": '[refine]\nregularisation = "mean-weight"\nweighted_fsc = false\nhealpix_order = 2\n'
        '[run]\nseed = 1\ntitle = "the loop before"\nworkflow = "refine"\n',
        "new": '[refine]\nregularisation = "uneven"\nweighted_fsc = true\nhealpix_order = 2\n'
        '[auxiliary]\nratio = 2.0\n[run]\nseed = 1\ntitle = "now"\nworkflow = "refine"\n',
    }
    for (name, job), numbers in zip(jobs.items(), (OLD, NEW), strict=True):
        (tmp_path / name / "05_diagnose").mkdir(parents=True)
        (tmp_path / name / "05_diagnose/diagnose.json").write_text(json.dumps(numbers))
        (tmp_path / name / "resolved.toml").write_text(job)
    return tmp_path / "old", tmp_path / "new"


def test_plain_sentences_have_both_runs_numbers(runs):
    old, new = runs
    build(new, old)
    data = json.loads((new / "report.json").read_text())
    said = data["comparison"]["sentences"]
    assert said == [
        "Of 1,000 particles 97.5 % show the molecule along its axis, 25 from the side; only the side views tell how it "
        "is built along the axis.",
        "Before, 15.0 % of all particles and 19 of the 25 side views got a wrong view (by more than 20°), 12.0 % of "
        "all particles the view from the opposite end; the map is right to 18.6 Å, and its detail along the axis "
        "agrees with the truth to 12 %.",
        "In this run, 4.0 % of all particles and 8 of the 25 side views got a wrong view (by more than 20°), 1.0 % of "
        "all particles the view from the opposite end; the map is right to 12.0 Å, and its detail along the axis "
        "agrees with the truth to 45 %.",
        "With their true views the same images give a map that is right to 11.0 Å (50 % along the axis); in all "
        "directions the agreement is 40.0 % before, 55.0 % in this run and 60.0 % with true views: this run regains "
        "75 % of what wrong views cost.",
        "The two half-maps agree to 13.0 Å before and to 12.5 Å in this run: before, their agreement hid how wrong the "
        "map was.",
    ]
    assert data["summary"][:5] == said
    assert data["summary"][5] == (
        "Before: the loop before; its settings differ in refine.regularisation = mean-weight (here uneven), "
        "refine.weighted_fsc = false (here true)."
    )
    rows = {(r["group"], r["label"]): r for r in data["numbers"]}
    row = rows["Map against truth", "mean FSC up to the pixel size, all directions"]
    assert (row["before"], row["value"], row["true_poses"]) == (0.40, 0.55, 0.6)
    assert rows["Pose errors", "seen from the opposite end (view wrong by more than 150°)"]["before"] == 12.0
    page = (new / "report.html").read_text(encoding="utf-8")
    assert "Before: the loop before." in page and "without auxiliary particles" not in page
    build(new)
    assert "comparison" not in json.loads((new / "report.json").read_text())


@pytest.mark.parametrize(
    ("area", "along", "said"),
    [
        (0.39, 0.4, "this run regains nothing of what wrong views cost."),
        (0.65, 0.4, "more than true views give, which is a sign of bias towards the reference."),
        (0.50, 0.6, "regains 50 % of what wrong views cost, though what it has along the axis beyond"),
    ],
)
def test_a_run_that_gains_nothing_or_too_much_says_so(runs, area, along, said):
    old, new = runs
    numbers = measured((0.04, 0.32, 0.01), (12.0, along, area), 12.5)
    (new / "05_diagnose/diagnose.json").write_text(json.dumps(numbers))
    build(new, old)
    assert said in json.loads((new / "report.json").read_text())["comparison"]["sentences"][3]


def test_a_run_of_other_particles_is_refused(runs):
    old, new = runs
    (old / "05_diagnose/diagnose.json").write_text(json.dumps({**OLD, "particles": 999}))
    with pytest.raises(InputError, match=r"not of the same particles \(particles\)"):
        build(new, old)
    (old / "05_diagnose/diagnose.json").unlink()
    with raises_code("runs-not-comparable", InputError):
        build(new, old)


def density(grid: ViewGrid, peak: float) -> list[float]:
    """Of top views from one end."""
    values = np.where(grid.centres()[:, 2] > np.cos(np.radians(20)), peak, 0.2)
    return list(values)


def test_the_learned_density_of_views_is_said_and_drawn(runs):
    _, new = runs
    grid = ViewGrid.with_step(STEP_DEG)
    part = {"step_deg": STEP_DEG, "kernel_deg": 10, "used": True, "axis_odds": 4.0, "polarity_floor": 0.1,
            "half1": density(grid, 12.0), "half2": density(grid, 8.0)}  # fmt: skip
    rows = [{"iteration": i, "resolution_A": r} for i, r in ((1, 30.0), (2, 20.0))]
    (new / "03_refine").mkdir()
    file = new / "03_refine/refine.json"
    file.write_text(json.dumps({"iterations": rows, "view_density": part}))
    plain = build(new).read_text(encoding="utf-8")
    assert 'id="view-density"' in plain and "cFAR: least over" not in plain and "weighted: by the FSC" not in plain
    data = json.loads((new / "report.json").read_text())
    assert data["refine"]["view_density"] == part
    (said,) = [s for s in data["summary"] if "learned the density" in s]
    top = np.abs(grid.centres()[:, 2]) > np.cos(np.radians(36))
    mean = np.array(density(grid, 10.0))
    assert "10.0 times as often as if views were even, its opposite 0.20 times" in said
    assert f"{100 * mean[top].sum() / mean.sum():.0f} % within 36°" in said
    assert "correlate by 1.00" in said
    assert said.endswith(
        "The search made use of how often an axis is seen (favoured 4 times at most) and from which end it is seen "
        "(10 % even views mixed in)."
    )
    rows = [{**row, "resolution_weighted_A": row["resolution_A"] - 3, "cfar": 0.2} for row in rows]
    file.write_text(json.dumps({"iterations": rows, "view_density": part}))
    assert "cFAR: least over" in build(new).read_text(encoding="utf-8")


CONES = [
    {"axis": [0.0, 0.0, 1.0], "particles": 90, "scale": 1.1, "scale_error": 0.01, "noise": 0.98},
    {"axis": [1.0, 0.0, 0.0], "particles": 10, "scale": 0.6, "scale_error": 0.05, "noise": 1.04},
    {"axis": [0.0, 0.0, -1.0], "particles": 2, "scale": 3.0, "scale_error": 0.5, "noise": 1.0},
]  # fmt: skip
INTENSITY = {"scale": "particle", "scale_sd": 0.3, "noise_sd": 0.05, "micrographs": 30, "by_view": CONES}


def test_intensities_are_said_and_drawn(runs):
    _, new = runs
    (new / "03_refine").mkdir()
    (new / "03_refine/refine.json").write_text(json.dumps({"iterations": [], "intensity": INTENSITY}))
    assert 'id="intensity"' in build(new).read_text(encoding="utf-8")
    (said,) = [s for s in json.loads((new / "report.json").read_text())["summary"] if s.startswith("Scale and noise")]
    assert "each image, near that of its one of" not in said and "its micrograph (30 of them)" in said
    assert "0.30 and 0.05 about 1" in said and said.endswith("between 0.60 and 1.10.")
    by_group = {**INTENSITY, "scale": "group", "micrographs": None}
    assert "for each optics group:" in intensity.sentences({"refine": {"intensity": by_group}})[0]


@pytest.mark.parametrize("change", [
    {"by_view": []}, {"by_view": [{**CONES[0], "axis": [1.0]}]}, {"by_view": [{**CONES[0], "scale": "x"}]},
    {"by_view": [3]}, {"scale_sd": None},
])  # fmt: skip
def test_intensities_that_are_none_are_left_out(change):
    assert intensity.estimated({"refine": {"intensity": INTENSITY}})
    assert intensity.entries({"refine": {"intensity": {**INTENSITY, **change}}}) == []


@pytest.mark.parametrize("change", [{"half1": [1.0]}, {"step_deg": 0}, {"step_deg": "x"}, {"half2": None}])
def test_a_density_that_is_none_is_left_out(change):
    grid = ViewGrid.with_step(STEP_DEG)
    part = {
        "step_deg": STEP_DEG,
        "axis_odds": 1.0,
        "polarity_floor": 0.1,
        "half1": [1.0] * len(grid),
        "half2": [1.0] * len(grid),
    }
    assert sentences({"refine": {"view_density": part}})
    assert "how often an axis" not in sentences({"refine": {"view_density": part}})[0]
    off = sentences({"refine": {"view_density": {**part, "used": False}}})
    assert off[0].endswith("The search made no use of it.")
    assert sentences({"refine": {"view_density": {**part, **change}}}) == []


def test_centres_lie_in_their_cells():
    grid = ViewGrid.with_step(7.0)
    assert np.array_equal(grid.index(grid.centres()), np.arange(len(grid)))
    assert np.linalg.norm(grid.centres(), axis=1) == pytest.approx(1.0)
