"""Controls of workflows beyond a refinement, end to end at toy size: what is repeated, and how after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pipeline_helper import StopsAt, forget_signals, hash_files, quick_report, simulate, write_job
from realign_helper import use_quick_networks

from cryoiso.core.errors import Interrupted
from cryoiso.io.mrc import read_map, write_map
from cryoiso.parallel.context import Context
from cryoiso.pipeline.audit.command import audit_run
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.run import run_job
from cryoiso.pipeline.stages import table

SMALL = {
    "refine_max_iterations": 2, "auxiliary_rounds": 1, "auxiliary_generators": "coloured-noise",
    "auxiliary_settle_deg": 0.0, "correct_mode": "independent",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    simulate(folder, n=60)
    return folder


def put_corrected_maps(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """A stage ``correct`` that has nothing to learn."""
    if run.comm.rank == 0:
        made, corrected = run.folder.stage("reconstruct"), run.folder.stage("correct")
        sources = {"corrected_map.mrc": "map.mrc", "measured.mrc": "map.mrc"}
        sources |= {f"corrected_half{h}.mrc": f"half{h}.mrc" for h in (1, 2)}
        for target, source in sources.items():
            density = read_map(made / source)
            write_map(corrected / target, density.data, density.pixel_size_A)


@pytest.mark.parametrize(
    ("workflow", "control", "last"),
    [("auxiliary", "null", "corefine-1"), ("realign", "leak", "correct"), ("both", "leak", "correct")],
)
def test_the_whole_workflow_is_repeated_and_a_stopped_audit_ends_with_the_same_bits(
    data, tmp_path, monkeypatch, workflow, control, last
):
    monkeypatch.setattr(table, "_correct", put_corrected_maps)
    use_quick_networks(monkeypatch)
    job = write_job(data, f"{workflow}.toml", **SMALL, run_workflow=workflow)
    run = run_job(job, tmp_path / "run", Context(), quick_report).path
    forget_signals()
    settings = {"controls": [control], "particles": 50}
    whole = audit_run(run, Context(), settings, {})
    (verdict,) = (c["verdict"] for c in whole["controls"] if c["name"] == control)
    assert whole["workflow"] == workflow and verdict in ("pass", "fail", "inconclusive")
    repetition = run / "audit" / control / ("workflow" if control == "null" else "noise")
    lines = [json.loads(line) for line in (repetition / "journal.jsonl").read_text().splitlines()]
    assert last in [line.get("stage") for line in lines if line["event"] == "end"]
    made = hash_files(run / "audit")
    shutil.rmtree(run / "audit")
    with pytest.raises(Interrupted):
        audit_run(run, StopsAt(7), settings, {})
    forget_signals()
    assert repetition.parent.exists() or (run / "audit" / "arms").exists()
    assert not (run / "audit" / "audit.json").exists()
    assert audit_run(run, Context(), settings, {}) == whole
    forget_signals()
    assert hash_files(run / "audit") == made
