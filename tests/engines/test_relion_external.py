"""Steps as External jobs of RELION's GUI: command lines, marks and output nodes, by the rules of RELION's sources and
with RELION's own pipeliner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here, python, write_job
from relion_project_helper import make_program, make_project

from cryoiso.core.errors import EXIT_REQUEUE, EXIT_USAGE, Interrupted
from cryoiso.engines.relion import external_job
from cryoiso.engines.relion.external_job import ABORT_NOW, ABORTED, FAILURE, SUCCESS, OutputNode
from cryoiso.io.star.text import read_blocks
from cryoiso.pipeline.commands import relion_external
from cryoiso.pipeline.commands.relion_external import STEPS, ExternalJob, half_maps_of, run_external_job

MARKS = (SUCCESS, FAILURE, ABORTED, ABORT_NOW)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A RELION project with the particles of a refinement, as the working folder."""
    python()  # its server starts in the tests' own working folder
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path)
    return tmp_path


def columns(file: str | Path, block: str) -> dict[str, list[str]]:
    return next(one.columns for one in read_blocks(Path(file)) if one.name == block)


def marks(folder: str | Path) -> list[str]:
    return [name for name in MARKS if (Path(folder) / name).exists()]


def test_output_nodes_hold_what_each_version_of_relion_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("External/job012/")  # RELION passes it with the slash
    folder.mkdir(parents=True)
    (folder / "half1.mrc").touch()
    nodes = [OutputNode("half1.mrc", external_job.HALF_MAP), OutputNode("not_made.mrc", external_job.MASK)]
    external_job.write_output_nodes(folder, nodes)
    assert columns(folder / external_job.OUTPUT_NODES, "output_nodes") == {
        "rlnPipeLineNodeName": ["External/job012/half1.mrc"],
        "rlnPipeLineNodeType": ["10"],
        "rlnPipeLineNodeTypeLabel": ["DensityMap.mrc.halfmap"],
    }


@pytest.mark.parametrize(
    "given",
    [
        {"reference": "Refine3D/job010/run_half1_class001_unfil.mrc"},
        {"reference": "Refine3D/job010/run_half2_class001_unfil.mrc"},
        {"reference": "Refine3D/job010/run_class001.mrc"},
        {"particles": "Refine3D/job010/run_data.star"},
        {"reference": "mask/somewhere.mrc", "particles": "Refine3D/job010/run_data.star"},
    ],
)
def test_half_maps_follow_from_what_the_input_tab_offers(project, given):
    job = ExternalJob(Path("External/job012"), **{name: Path(file) for name, file in given.items()})
    assert [file.name for file in half_maps_of(job)] == [f"run_half{half}_class001_unfil.mrc" for half in (1, 2)]


def test_half_maps_of_our_own_jobs_and_none(project):
    mine = Path("External/job011")
    mine.mkdir(parents=True)
    for name in ("half1.mrc", "half2.mrc", "particles.star"):
        (mine / name).touch()
    assert half_maps_of(ExternalJob(Path("x"), particles=mine / "particles.star")) == (
        mine / "half1.mrc",
        mine / "half2.mrc",
    )
    with raises_code("file-not-found"):
        half_maps_of(ExternalJob(Path("x"), reference=Path("Import/job001/map.mrc")))
    with raises_code("option-missing"):
        half_maps_of(ExternalJob(Path("x")))


def test_every_step_is_a_command_line_that_the_program_takes(project):
    from typer.main import get_command

    from cryoiso.cli.main import build_app

    job_file = write_job(project)
    refined = Path("Refine3D/job010")
    job = ExternalJob(
        Path("External/job012"), refined / "run_data.star", refined / "run_class001.mrc", refined / "run_class001.mrc"
    )
    whole = ExternalJob(Path("External/job012"), job_file=job_file)
    commands = get_command(build_app()).commands  # type: ignore[attr-defined]
    for step in STEPS:
        words = relion_external._command(step, whole if step == "run" else job)[3:]
        assert words[0] == step
        commands[step].make_context(step, words[1:])  # raises at an option that it does not have


def test_a_step_that_fails_says_so_to_relion_and_on_stderr(project):
    folder = Path("External/job001")
    folder.mkdir(parents=True)
    (folder / SUCCESS).touch()  # of an earlier start
    done = cryoiso_here("relion-external", "rebalance", "--o", "External/job001/", "--j", 1)
    assert done.returncode == EXIT_USAGE and marks(folder) == [FAILURE]
    assert "[option-missing]" in done.stderr and "Traceback" not in done.stderr

    done = cryoiso_here("relion-external", "sharpen", "--o", "External/job002/", "--j", 1)
    assert done.returncode == EXIT_USAGE and marks("External/job002") == [FAILURE]

    tab = ("--in_parts", "Refine3D/job010/run_data.star", "--in_mics", "CtfFind/job003/micrographs.star")
    done = cryoiso_here("relion-external", "rebalance", "--o", "External/job003/", *tab, "--keep", 0.5, "--j", 1)
    assert done.returncode == EXIT_USAGE and marks("External/job003") == [FAILURE]


def test_an_error_of_the_step_keeps_its_exit_status(project, monkeypatch):
    monkeypatch.setattr(sys, "executable", python())
    tab = ("--in_parts", "Refine3D/job010/run_data.star", "--j", 1)
    done = cryoiso_here("relion-external", "rebalance", "--o", "External/job001/", *tab)  # neither --cap nor --keep
    assert done.returncode == EXIT_USAGE and "[external-step-failed]" in done.stderr
    assert "[option-missing]" in Path("External/job001/run.out").read_text()
    assert marks("External/job001") == [FAILURE] and not Path("External/job001", external_job.OUTPUT_NODES).exists()


def test_inputs_of_the_gui_must_be_those_of_the_job_file(project):
    job_file = write_job(project)
    job = ExternalJob(Path("External/job001"), Path("Refine3D/job010/run_data.star"), job_file=job_file)
    with raises_code("options-conflict"):
        run_external_job("run", job)
    assert marks("External/job001") == [FAILURE]


@pytest.mark.parametrize("how", ["button", "batch system"])
def test_aborting_ends_the_step_and_can_be_seen_by_relion(project, monkeypatch, how):
    lives, folder = project / "lives", Path("External/job001").absolute()
    code = f"import os, time; open({str(lives)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(relion_external, "_command", lambda *_: [sys.executable, "-S", "-c", code])

    def stop() -> None:
        while not (lives.exists() and lives.read_text()):
            time.sleep(0.02)
        (folder / ABORT_NOW).touch() if how == "button" else os.kill(os.getpid(), signal.SIGTERM)

    user = threading.Thread(target=stop)
    user.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        run_external_job("refine", ExternalJob(folder), poll_s=0.05)
    user.join()
    assert caught.value.exit_code == EXIT_REQUEUE and marks(folder) == [ABORTED]
    assert not Path(f"/proc/{lives.read_text()}").exists() and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.relion
def test_relions_own_pipeliner_runs_the_job_and_takes_its_outputs(project):
    programs = make_program(project)
    Path("default_pipeline.star").write_text("data_pipeline_general\n\n_rlnPipeLineJobCounter 1\n\n")
    options = {
        "fn_exe": '"cryoiso relion-external rebalance"', "in_part": "Refine3D/job010/run_data.star",
        "param1_label": "keep", "param1_value": "0.6", "do_queue": "No", "nr_threads": "1",
    }  # fmt: skip
    head = "data_job\n\n_rlnJobType 99\n_rlnJobIsContinue 0\n\ndata_joboptions_values\n\nloop_\n"
    labels = "_rlnJobOptionVariable #1\n_rlnJobOptionValue #2\n"
    rows = "".join(f"{name} {value}\n" for name, value in options.items())
    Path("external.star").write_text(head + labels + rows)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    for words in (
        ["--addJobFromStar", "external.star"],
        ["--RunJobs", "External/job001/", "--schedule", "s", "--sec_wait_after", "0"],
    ):
        done = subprocess.run(
            ["relion_pipeliner", *words], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    table = "default_pipeline.star"
    assert columns(table, "pipeline_processes")["rlnPipeLineProcessStatus"] == ["2"], "finished"
    nodes = columns(table, "pipeline_nodes")
    types = dict(zip(nodes["rlnPipeLineNodeName"], nodes["rlnPipeLineNodeType"], strict=True))
    edges = columns(table, "pipeline_output_edges")["rlnPipeLineEdgeToNode"]
    for name in ("External/job001/particles_kept.star", "External/job001/particles_discarded.star"):
        assert types[name] == "3" and name in edges
    assert "particles" in Path("External/job001/run.out").read_text()
