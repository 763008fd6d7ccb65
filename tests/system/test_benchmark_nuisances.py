"""What the benchmark of nuisances measures, counts and compares (`benchmarks/nuisances.py`)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import harness, nuisance_rows, nuisance_scores, nuisance_sets, nuisance_tables, nuisances, views
from cryoiso.io import read_particle_file
from cryoiso.io.star.write import write_particles
from cryoiso.physics.simulation import Views, make_particles
from cryoiso.refine.junk import JUNK_COLUMN

ONE = nuisance_sets.SETS["HA_junk_20"]


def test_the_plan_names_every_set_and_only_rows_that_exist():
    assert set(nuisances.PLAN) == set(nuisance_sets.SETS)
    assert {row for rows in nuisances.PLAN.values() for row in rows} <= set(nuisance_rows.ROWS)
    assert nuisances.NUISANCES.plan["HA_junk_20"] == ("plain", "junk", "known")


def test_a_record_does_not_name_the_file_that_every_row_refines():
    """Records from before there was a choice stay valid."""
    settings = views.Task("HA_plain", 3, "plain", nuisance_rows.ROWS["plain"]).settings()
    assert "particles" not in settings["row"]
    assert (
        views.Task("HA_plain", 3, "known", nuisance_rows.ROWS["known"]).settings()["row"]["particles"] == "known.star"
    )


def simulated(folder, kinds, table=None):
    """truth.star of particles of these kinds, all of C3 with top and side views."""
    n = len(kinds)
    particles = make_particles(n, 48, 4.5, views=Views("preferred", fraction=0.5), seed=1, stack="particles.mrcs")
    columns = {"cryoisoKind": np.array(kinds), **(table or {})}
    write_particles(folder / "truth.star", particles.with_results(**columns))
    return particles


def test_known_particles_have_the_true_ctf_and_intensity_and_no_pose(tmp_path):
    kinds = ["particle", "empty", "particle", "pair", "particle"]
    noise = {"cryoisoSignalScale": np.full(5, 0.8), "cryoisoNoiseScale": np.array([1.0, 1.0, 2.0, 1.0, 0.5])}
    true = simulated(tmp_path, kinds, noise)
    nuisance_rows.write_known(tmp_path)
    known = read_particle_file(tmp_path / "known.star", require=("ctf",))
    np.testing.assert_array_equal(known.uid, true.uid[[0, 2, 4]])
    assert known.rotation is None and known.shift_A is None and known.half is None
    np.testing.assert_allclose(known.ctf_scale, [1.0, 0.5, 2.0])
    np.testing.assert_allclose(known.defocus_u_A, true.defocus_u_A[[0, 2, 4]], atol=1e-3)
    assert [str(known.stack[0]), known.index.tolist()] == [str(tmp_path / "particles.mrcs"), [0, 2, 4]]


def test_junk_is_counted_by_kind_and_by_view(tmp_path):
    kinds = ["particle"] * 90 + ["empty"] * 6 + ["broken"] * 4
    true = simulated(tmp_path, kinds)
    out = tmp_path / "out"
    out.mkdir()
    junk = np.zeros(100)
    junk[[0, *range(90, 96)]] = 0.9
    write_particles(out / "particles.star", true.with_results(**{JUNK_COLUMN: junk}))
    counts = nuisance_scores.junk_scores(tmp_path, out, ONE)["junk_counts"]
    assert counts["called"] == 7 and (counts["empty_called"], counts["broken_called"]) == (6, 0)
    assert counts["rare_particles"] + counts["frequent_particles"] == 90
    assert counts["rare_particles_called"] + counts["frequent_particles_called"] == 1
    assert counts["rare_particles_weight"] + counts["frequent_particles_weight"] == pytest.approx(89.1)
    words = nuisance_tables.junk_words(nuisance_tables.summed([counts, counts]))
    assert "precision 0.86" in words and "broken 0/8, empty 12/12" in words


def test_views_that_are_drawn_to_the_axis_show_it(tmp_path):
    from cryoiso.physics.so3 import euler_to_matrix

    tilt = np.linspace(50, 80, 40)
    turned = [euler_to_matrix(np.linspace(0, 300, 40), tilt - by, np.zeros(40)) for by in (0.0, 3.0)]
    true = simulated(tmp_path, ["particle"] * 40).with_poses(turned[0], np.zeros((40, 2)))
    write_particles(tmp_path / "truth.star", true.with_results(cryoisoKind=np.array(["particle"] * 40)))
    out = tmp_path / "out"
    out.mkdir()
    write_particles(out / "particles.star", true.with_poses(turned[1], np.zeros((40, 2))))
    record = nuisance_scores.bias_scores(tmp_path, out, ONE)
    mean, error = nuisance_tables.drift([record, record], "rare")
    assert mean == pytest.approx(-3.0, abs=1e-3) and error < 0.01
    assert nuisance_tables.drift([record], "frequent") == (None, None)


def record(name, row, seed, severe, area):
    counts = {"n": 100, "n_over_20": severe, "rare": 10, "rare_over_20": severe // 2}
    drift = {"drift_rare": [10.0, 40.0, 10], "drift_frequent": [0.0, 90.0, 90]}
    return {"set": name, "row": row, "seed": seed, "counts": counts, "median_deg": 3.0, "truth_area": area,
            "final_area": area, "cpu_s": 5.0, **drift}  # fmt: skip


def test_criteria_compare_seed_by_seed():
    records = [record("HA_wide_plain", "plain", s, 10, 0.5) for s in (3, 4)]
    records += [record("HA_wide_neighbours", "plain", s, 10 + s, 0.45) for s in (3, 4, 5)]
    table = nuisance_tables.criteria(records, ("HA", "betagal"))
    assert "| HA_wide_neighbours, plain | HA_wide_plain, plain | 2 | +3.5 [-2.9, +9.9] |" in table
    assert "| -10.0 [-10.0, -10.0] | -10.0 [-10.0, -10.0] |" in table
    line = nuisance_tables.nuisance_table(records, ["HA_wide_neighbours"], ["plain"]).splitlines()[-1]
    assert line.startswith("| HA_wide_neighbours | plain | 3 | 42 of 300 | 20 of 30 | 3.0 ± 0.0 | +1.0 ± 0.3 |")


def test_locks_leave_no_file(tmp_path):
    with harness.locked(tmp_path):
        pass
    views.add_record(tmp_path / "r.json", {"set": "HA_plain", "seed": 3, "row": "plain"})
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert len(json.loads((tmp_path / "r.json").read_text())["records"]) == 1
