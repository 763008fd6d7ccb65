"""Batch systems: every record is complete, and a process knows which job it is."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from cryoiso.core import batch_system
from cryoiso.core.batch_system import BY_KEY, JOB_START, SYSTEMS, job_facts, this_start
from cryoiso.core.config import LaunchSection
from cryoiso.engines.process import clean_environment
from cryoiso.pipeline.batch.fill_template import OWN
from cryoiso.pipeline.batch.submit import submit_command
from cryoiso.pipeline.batch.walltime import QUERIES

LAUNCHED = [name for name in get_args(LaunchSection.model_fields["scheduler"].annotation) if name != "mpirun"]


def test_every_system_that_jobs_are_launched_on_is_complete():
    assert [s.key for s in SYSTEMS if s.submission is not None] == LAUNCHED
    assert set(QUERIES) == set(LAUNCHED), "each is asked for the end of a job"
    assert all((OWN / f"{name}.sh").is_file() for name in LAUNCHED)


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_script_that_waits_names_the_job_before(name, tmp_path):
    how = BY_KEY[name].submission
    words = submit_command(name, tmp_path / "job.sh", "71")
    assert words[: len(how.command)] == list(how.command) and any("71" in word for word in words)
    assert (str(tmp_path / "job.sh") in words) is not how.script_on_stdin
    said = {"slurm": "71;cluster", "pbs": "71.server", "lsf": "Job <71> is submitted to queue <normal>."}[name]
    assert re.search(how.job_id, said, re.MULTILINE)[1] == {"pbs": "71.server"}.get(name, "71")


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.key)
def test_a_job_is_known_by_its_variables(system):
    env = {variable: f"value of {fact}" for fact, variable in system.variables.items()}
    assert batch_system.current(env) is system
    assert job_facts(env) == {fact: f"value of {fact}" for fact in system.variables}
    assert batch_system.current({}) is None and job_facts({}) == {}


def test_a_requeued_job_is_another_start():
    assert this_start({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == {"job": "7", "restart": "2"}
    assert this_start({"PBS_JOBID": "8.s", JOB_START: "1790000000"}) == {"job": "8.s", "restart": "1790000000"}
    assert this_start({"LSB_JOBID": "9"}) == {"job": "9", "restart": "0"}
    assert this_start({"JOB_ID": "10"}) == {"job": "", "restart": "0"}, "its starts are not counted"


def test_an_inner_program_sees_no_step_and_on_request_the_allocation(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "PBS_JOBID"):
        monkeypatch.setenv(name, "1")
    inside, allocation = clean_environment(), clean_environment(keep_allocation=True)
    assert not [name for name in inside if name.startswith("SLURM_")] and "PBS_JOBID" in inside
    assert "SLURM_JOB_ID" in allocation and not {"SLURM_STEP_ID", "SLURM_PROCID"} & set(allocation)
