"""`sample.symmetry = "auto"` from the job file to the report: refined in C1, the group is proposed and not imposed."""

from __future__ import annotations

import json
import tomllib

from pipeline_helper import cryoiso, write_job

from cryoiso.io.mrc import read_map
from cryoiso.physics.map_symmetry import symmetry_score


def test_a_run_refines_in_c1_and_proposes_the_group(tmp_path):
    options = ("--n", 200, "--box", 32, "--pixel-size", 6, "--snr-db", 0, "--symmetry", "C3", "--seed", 2)
    done = cryoiso("simulate", "phantom", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    write_job(tmp_path, sample_symmetry="auto", run_workflow="refine")
    done = cryoiso("run", "job.toml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    resolved = tomllib.loads((run / "resolved.toml").read_text())
    assert resolved["sample"]["symmetry"] == "C1" and resolved["run"]["propose_symmetry"] is True
    facts = json.loads(next(run.glob("*_diagnose/diagnose.json")).read_text())
    proposed = facts["symmetry_proposal"]
    assert proposed["proposed"] == "C3", proposed["words"]
    sentence = f"Symmetry proposed from the half-maps, not imposed: {proposed['words']}"
    assert sentence in facts["notes"]
    assert "proposed from the half-maps, not imposed" in (run / "report.html").read_text()
    half1 = read_map(run / "result" / "half1.mrc")
    assert symmetry_score(half1, "C3", 20.0) < 0.999, "the map has the symmetry of its images alone"
