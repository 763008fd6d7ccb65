"""The workflows ``realign`` and ``both`` and the command ``cryoiso realign``, end to end at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pipeline_helper import cryoiso, cryoiso_here, hash_files, simulate, write_job
from realign_helper import use_quick_networks

from cryoiso.core.config import Job, parse_job
from cryoiso.core.errors import UsageError
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map, write_map
from cryoiso.io.star.write import write_particles
from cryoiso.parallel.context import Context
from cryoiso.pipeline import workflow
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.inputs.half_sets import assign_halves
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.run import run_job
from cryoiso.pipeline.stages import table
from cryoiso.report import build

SMALL = {"refine_max_iterations": 3, "auxiliary_steps": 6, "auxiliary_rounds": 1, "auxiliary_settle_deg": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    simulate(folder, n=60)
    return folder


def put_a_corrected_map(run: RunContext, inputs: Inputs, *, resume: bool) -> None:
    """A stage ``correct`` that has nothing to learn."""
    if run.comm.rank == 0:
        mean = read_map(run.folder.stage("reconstruct") / "map.mrc")
        for name in ("corrected_map.mrc", "measured.mrc"):
            write_map(run.folder.stage("correct") / name, mean.data, mean.pixel_size_A)


@pytest.fixture
def quick(monkeypatch):
    """Neither the loop nor the last stage trains a network; the list of the loop's corrections."""
    monkeypatch.setattr(table, "_correct", put_a_corrected_map)
    return use_quick_networks(monkeypatch)


def job_of(name: str) -> Job:
    data = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, "run": {"workflow": name}}
    return parse_job({**data, "auxiliary": {"rounds": 1}})


def facts(run: Path, stage: str, name: str) -> dict:
    return json.loads((next(run.glob(f"[0-9][0-9]_{stage}")) / name).read_text())


def test_stages_of_the_workflows():
    end = ("reconstruct", "correct", "diagnose")
    assert workflow.folder_stages(job_of("realign")) == ("ingest", "reference", "refine", *end)
    rounds = ("train-1", "generate-1", "corefine-1")
    assert workflow.folder_stages(job_of("both")) == ("ingest", "reference", "refine", *rounds, *end)
    for name in ("refine", "auxiliary"):
        assert "correct" not in workflow.folder_stages(job_of(name))


def test_realign(data, tmp_path):
    """With real networks, tiny."""
    tiny = {"correct_sub_maps": 4, "correct_cube_px": 16, "correct_epochs": 1, "realign_epochs": 1}
    job = write_job(data, "realign.toml", **SMALL, **tiny, run_workflow="realign", realign_mode="paired")
    run = run_job(job, tmp_path / "run", Context(), report=build).path
    assert [p.name[3:] for p in sorted(run.glob("[0-9][0-9]_*"))] == list(workflow.folder_stages(job_of("realign")))
    refined = facts(run, "refine", "refine.json")
    assert refined["correction"]["halves_share_a_network"]
    applied = [record["correction"]["applied"] for record in refined["iterations"]]
    assert any(applied)
    notes = facts(run, "diagnose", "diagnose.json")["notes"]
    assert any("no gold standard" in note for note in notes)
    names = {p.name for p in (run / "result").iterdir()}
    assert {"half1.mrc", "half2.mrc", "additional_corrected_map.mrc", "additional_measured.mrc"} <= names
    assert not {"corrected_half1.mrc", "corrected_half2.mrc"} & names and (run / "report.html").exists()
    # what is deposited has been touched by no network
    for half in (1, 2):
        made = next(run.glob("*_reconstruct")) / f"half{half}.mrc"
        assert (run / f"result/half{half}.mrc").read_bytes() == made.read_bytes()


def test_independent_networks_need_no_note(data, tmp_path, quick):
    job = write_job(data, "independent.toml", **SMALL, run_workflow="realign")
    run = run_job(job, tmp_path / "run", Context()).path
    assert not facts(run, "refine", "refine.json")["correction"]["halves_share_a_network"]
    assert not any("gold" in note for note in facts(run, "diagnose", "diagnose.json")["notes"])


def test_both(data, tmp_path, quick):
    """The correction works in the co-refinement, not in the first refinement, which is "before"."""
    job = write_job(data, "both.toml", **SMALL, run_workflow="both", auxiliary_balance=False)
    run = run_job(job, tmp_path / "run", Context()).path
    assert "correction" not in facts(run, "refine", "refine.json")
    engine = facts(run, "corefine-1", "engine/refine.json")
    assert engine["particles"] == 120 and engine["correction"]["mode"] == "independent"
    assert sum(record["correction"]["applied"] for record in engine["iterations"]) == len(quick) > 0
    assert {p.name for p in (run / "result").iterdir()} >= {"additional_corrected_map.mrc", "half1.mrc"}
    assert "before" in facts(run, "diagnose", "diagnose.json")


def test_what_cannot_be_kept_is_refused(data, tmp_path):
    job = write_job(data, "kept.toml", **SMALL, run_workflow="realign", realign_keep_lowres_A=12.0)
    with pytest.raises(UsageError, match=r"keep_lowres_A = 12.*30 Å"):
        run_job(job, tmp_path / "run", Context())
    assert not (tmp_path / "run").exists()


COMMAND = (
    "--symmetry", "C3", "--max-iterations", 2, "--healpix-order", 1, "--sub-maps", 4, "--cube", 16, "--epochs", 1,
)  # fmt: skip


def test_the_command_and_its_resumption(data, tmp_path):
    """With the real networks, tiny."""
    given = ("realign", data / "particles.star", "--ref", data / "truth_map.mrc", *COMMAND)
    done = cryoiso(*given, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert "references corrected (measured directions" in done.stderr and "loss" in done.stderr
    assert "references not corrected: no further iteration" in done.stderr
    summary = json.loads((tmp_path / "whole/refine.json").read_text())
    assert summary["iterations"][0]["correction"]["loss"].keys() == {"1", "2"}
    found = read_particle_file(tmp_path / "whole/particles.star", "", ("pose",))
    assert np.array_equal(found.uid, read_particle_file(data / "particles.star").uid)
    before = hash_files(tmp_path / "whole")
    again = cryoiso(*given, "--out", tmp_path / "whole", "--resume")
    assert again.returncode == 0 and hash_files(tmp_path / "whole") == before


def test_the_command_with_auxiliary_particles(data, tmp_path, quick):
    """Only the particles themselves come back, and only they are in the half-maps."""
    from cryoiso.pipeline.commands.ingest import ingest_files

    truth = read_particle_file(data / "truth.star")
    job = parse_job({"particles": {"file": str(data / "particles.star")}, "reference": {"file": "r.mrc"}})
    simulate(tmp_path / "other", n=40, seed=2)
    no_halves = tmp_path / "other/particles.star"
    ingest_files(job.particles.model_copy(update={"file": str(no_halves)}), tmp_path / "refused", Context())
    found = cryoiso_here(
        "realign", data / "particles.star", "--ref", data / "truth_map.mrc", *COMMAND, "--auxiliary",
        tmp_path / "refused", "--out", tmp_path / "out",
    )  # fmt: skip
    assert found.returncode == 65 and "half-sets" in found.stderr
    halves = tmp_path / "other/halves.star"
    write_particles(halves, assign_halves(read_particle_file(no_halves), 1))
    ingest_files(job.particles.model_copy(update={"file": str(halves)}), tmp_path / "made", Context())
    done = cryoiso_here(
        "realign", data / "particles.star", "--ref", data / "truth_map.mrc", *COMMAND, "--auxiliary",
        tmp_path / "made", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_particle_file(tmp_path / "out/particles.star", "", ("pose",))
    assert np.array_equal(found.uid, truth.uid)
    summary = json.loads((tmp_path / "out/refine.json").read_text())
    assert (summary["particles"], summary["auxiliary"]) == (60, 40) and summary["half_counts"] == [30, 30]
    assert json.loads((tmp_path / "out/engine/refine.json").read_text())["particles"] == 100 and quick
    assert {"half1.mrc", "half2.mrc", "map.mrc"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_auxiliary_particles_of_another_grid_are_refused(data, tmp_path):
    simulate(tmp_path / "other", n=20, box=26)
    done = cryoiso_here("ingest", tmp_path / "other/particles.star", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    found = cryoiso_here(
        "realign", data / "particles.star", "--ref", data / "truth_map.mrc", *COMMAND, "--auxiliary",
        tmp_path / "made", "--out", tmp_path / "out",
    )  # fmt: skip
    assert found.returncode == 65 and "26 px" in found.stderr and "24 px" in found.stderr
