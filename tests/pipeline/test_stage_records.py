"""One record per kind of stage: every workflow's stages have one, and everything that is known by kind is complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cryoiso.core.config import Job, parse_job
from cryoiso.pipeline import workflow
from cryoiso.pipeline.planning import job_size, memory, workload
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.stages.table import stages_of
from cryoiso.pipeline.workflow import RECORDS, StageRecord, folder_stages, kind_of, record_of, working_stages

WORKFLOWS = ("refine", "auxiliary", "realign", "both")


def job_of(name: str) -> Job:
    data = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, "run": {"workflow": name},
            "auxiliary": {"rounds": 2, "balance": True}, "micelle": {"enable": True},
            "classify": {"enable": True}}  # fmt: skip
    return parse_job(data)


def test_every_kind_has_its_costs_and_no_other():
    folders = set(RECORDS) - {"report"}  # what the report leaves is counted with the result
    assert set(workload.WORKS) == set(RECORDS) == set(memory.MEMORY) and set(job_size.DISK) == folders
    assert set(memory.GPU) == {kind for kind, record in RECORDS.items() if record.on_gpu}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_stages_have_records_and_resume_as_these_say(name):
    job = job_of(name)
    stages = stages_of(job, RunFolder(Path("run"), folder_stages(job)))
    assert [s.name for s in stages] == [*folder_stages(job), "report"]
    assert [s.continues for s in stages] == [record_of(s.name).resumes for s in stages]
    assert {kind_of(s.name) for s in stages} <= set(RECORDS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_controls_come_before_the_report(name):
    job = job_of(name)
    job.audit.enable = True
    stages = [s.name for s in stages_of(job, RunFolder(Path("run"), folder_stages(job)))]
    assert stages == [*working_stages(job), "report"] and stages[-2:] == ["audit", "report"]


def test_all_kinds_are_of_some_workflow():
    used = {kind_of(stage) for name in WORKFLOWS for stage in folder_stages(job_of(name))}
    assert used | {"audit", "report"} == set(RECORDS)
    assert all(record.like in RECORDS for record in RECORDS.values() if record.like)


def test_a_stage_without_a_record_is_an_error(monkeypatch):
    """Before, an unknown stage got the micelle's disk and work."""
    with pytest.raises(KeyError, match="polish"):
        record_of("polish-1")
    problem = job_size.Problem(job_of("refine"), 100, 64, 4.0, 150.0)
    whole = workload.stages(problem, 1, workload.Assumed(), "cpu")
    monkeypatch.setitem(RECORDS, "polish", StageRecord("polish"))
    for module in (workload, memory, job_size):
        monkeypatch.setattr(module, "working_stages", lambda job: (*workflow.working_stages(job), "polish"))
    calls = (
        lambda: workload.stages(problem, 1, workload.Assumed(), "cpu"),
        lambda: memory.memory_of_stages(problem, 1),
        lambda: memory.gpu_memory(replace(problem, device="cuda"), 1),
        lambda: job_size.disk(problem),
    )
    for call in calls:
        with pytest.raises(KeyError, match="polish"):
            call()
    assert "polish" not in whole
