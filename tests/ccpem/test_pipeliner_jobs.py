"""The jobs of the CCP-EM Pipeliner, with the published package: found, checked, run in a small project, displayed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipeline_helper import simulate
from relion_project_helper import PARTICLES, make_program, make_project

from cryoiso.io.mrc import write_map

if importlib.util.find_spec("pipeliner") is None:
    pytest.skip("the CCP-EM Pipeliner is not installed (pip install ccpem-pipeliner)", allow_module_level=True)

from pipeliner.api.manage_project import PipelinerProject
from pipeliner.job_factory import get_job_types, new_job_of_type

DIAGNOSE, CORRECT = "cryoiso.map_analysis.anisotropy", "cryoiso.postprocess.anisotropy_correction"
REBALANCE, RUN = "cryoiso.select.particles", "cryoiso.refine3d.preferred_orientation"
HALVES = {f"half{half}": f"Refine3D/job010/run_half{half}_class001_unfil.mrc" for half in (1, 2)}
FILLED = {
    DIAGNOSE: {**HALVES, "particles": PARTICLES, "symmetry": "D2"},
    CORRECT: {**HALVES, "resolution": 8.0, "epochs": 3},
    REBALANCE: {"particles": PARTICLES, "keep": 0.6},
    RUN: {"job_file": "job.toml"},
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    programs = make_program(tmp_path)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PIPELINER_QUEUE_USE", "false")
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    return tmp_path


def filled(name: str, **options: object):
    job = new_job_of_type(name)
    for option, value in {**FILLED[name], **options}.items():
        job.joboptions[option].value = value
    return job


def errors(job) -> list[str]:
    return [result.message for result in job.validate_joboptions() if result.type == "error"]


def run(name: str, **options: object):
    """The finished job, read again from the project as the GUI does."""
    here = PipelinerProject(make_new_project=True)
    job = here.run_job(filled(name, **options), run_in_foreground=True)
    assert Path(job.output_dir, "PIPELINER_JOB_EXIT_SUCCESS").exists(), Path(job.output_dir, "run.err").read_text()
    return here.get_job(job.output_dir)


def displayed(job) -> dict[str, str]:
    """Kinds of the display objects by their titles; a kind "pending" is one that could not be made."""
    shown = job.create_results_display()
    assert [one.reason for one in shown if one.dobj_type == "pending"] == []
    return {one.title: one.dobj_type for one in shown}


def nodes(job) -> dict[str, str]:
    return {str(Path(node.name).relative_to(job.output_dir)): node.type for node in job.output_nodes}


def test_the_factory_finds_four_jobs_that_can_run(project):
    jobs = {job.PROCESS_NAME: job for job in get_job_types("cryoiso")}
    assert sorted(jobs) == sorted(FILLED)
    for job in jobs.values():
        assert job.jobinfo.is_available, job.jobinfo.unavailable_message
        assert job.jobinfo.short_desc and job.jobinfo.programs[0].get_version(timeout=60)


@pytest.mark.parametrize("name", FILLED)
def test_options_are_checked_and_become_a_command_line_that_the_program_takes(project, name):
    from typer.main import get_command

    from cryoiso.cli.main import build_app

    Path("job.toml").touch()
    assert errors(new_job_of_type(name)), "an empty form is refused"
    job = filled(name)
    assert errors(job) == []
    job.output_dir = "Cryoiso/job001/"
    (command,) = job.get_commands()
    program, step, *words = map(str, command.cmd)
    assert program == "cryoiso"
    get_command(build_app()).commands[step].make_context(step, words)  # type: ignore[attr-defined]
    job.create_output_nodes()
    assert job.output_nodes


def test_cap_and_fraction_exclude_each_other(project):
    assert errors(filled(REBALANCE, cap=5)) and errors(filled(REBALANCE, keep=None))
    assert errors(filled(REBALANCE, keep=None, cap=5)) == [] and errors(filled(REBALANCE, symmetry="X3"))


def test_ranks_are_started_by_the_pipeliners_launcher(project):
    job = filled(CORRECT, nr_mpi=3, mpi_command="mpirun -n XXXmpinodesXXX")
    job.output_dir = "AnisotropyCorrection/job001/"
    assert list(job.get_commands()[0].cmd)[:4] == ["mpirun", "-n", "3", "cryoiso"]


def test_a_job_runs_in_a_project_and_shows_its_results(project):
    job = run(REBALANCE)
    assert nodes(job) == {
        "particles_kept.star": "ParticleGroupMetadata.star.relion.cryoiso.balanced",
        "particles_discarded.star": "ParticleGroupMetadata.star.relion.cryoiso.discarded",
    }
    assert displayed(job) == {"Balance": "table", "Viewing directions": "image"}


def test_half_maps_are_measured_and_shown(project):
    rng = np.random.default_rng(3)
    z, y, x = np.mgrid[:24, :24, :24] - 12
    blob = np.exp(-(x**2 / 18 + y**2 / 10 + z**2 / 14))
    for file in HALVES.values():
        write_map(Path(file), (blob + rng.normal(0, 0.02, blob.shape)).astype(np.float32), 3.0)
    job = run(DIAGNOSE, particles="", symmetry="C1")
    assert list(nodes(job)) == ["diagnose.json"]
    shown = displayed(job)
    assert shown["Resolution and anisotropy"] == "table" and shown["FSC of the half-maps"] == "graph"
    assert shown["Verdict"] == "text"


@pytest.mark.slow
def test_the_workflow_runs_and_its_half_maps_can_be_corrected(project):
    simulate(project / "data")
    job = run(RUN, job_file="data/job.toml")
    assert {"run/result/particles.star", "run/result/half1.mrc", "run/result/map.mrc"} <= set(nodes(job))
    shown = displayed(job)
    assert shown["Report"] == "html" and shown["3D viewer: Map"] == "mapmodel" and shown["Verdict"] == "text"
    halves = {f"half{half}": f"{job.output_dir}run/result/half{half}.mrc" for half in (1, 2)}
    corrected = run(CORRECT, **halves, epochs=1)
    assert "corrected_map.mrc" in nodes(corrected)
    assert displayed(corrected) == {"Correction": "table", "3D viewer: Corrected map": "mapmodel"}


def test_cryoiso_does_not_import_the_pipeliner():
    code = "import sys, cryoiso.cli.main, cryoiso.pipeline.run; sys.exit('pipeliner' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
