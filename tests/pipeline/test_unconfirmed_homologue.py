"""Nothing is trained or generated for a round whose raw particles confirm nothing of the homologue."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mpi_helper import run_mpi
from pipeline_helper import simulate, write_job

from cryoiso.core.errors import Interrupted
from cryoiso.io import read_particle_file
from cryoiso.methods.auxiliary import corefine as co_refinement
from cryoiso.methods.auxiliary import reference_check
from cryoiso.parallel.context import Context
from cryoiso.pipeline.run import resume_run, run_job
from cryoiso.pipeline.stages import corefine, train
from cryoiso.refine import homologue
from cryoiso.report import build

SMALL = {"run_workflow": "auxiliary", "auxiliary_steps": 6, "refine_max_iterations": 2, "auxiliary_balance": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    simulate(folder, n=60)
    return folder


@pytest.fixture
def nothing_is_confirmed(monkeypatch):
    """No agreement is taken for more than chance."""
    monkeypatch.setattr(homologue, "CHANCE", -1.0)


def facts(run: Path, stage: str) -> dict:
    (folder,) = run.glob(f"[0-9][0-9]_{stage}")
    return json.loads((folder / f"{stage.split('-')[0]}.json").read_text())


def results(run: Path) -> dict[str, bytes]:
    names = ("half1.mrc", "half2.mrc", "map.mrc", "particles.star")
    return {name: (run / "result" / name).read_bytes() for name in names}


@pytest.fixture
def skipped(data, tmp_path, nothing_is_confirmed, monkeypatch):
    """A run of two rounds in which no training may begin."""
    monkeypatch.setattr(train, "train_generators", None)
    job = write_job(data, "skipped.toml", **SMALL, auxiliary_settle_deg=0.0)
    return run_job(job, tmp_path / "skipped", Context(), report=build).path


def test_it_is_a_refinement_of_the_raw_particles_and_says_so(skipped):
    for r in (1, 2):
        for stage in (f"train-{r}", f"generate-{r}"):
            assert facts(skipped, stage)["skipped"] and "confirm nothing" in facts(skipped, stage)["reason"]
            (folder,) = skipped.glob(f"*_{stage}")
            assert [p.name for p in folder.iterdir()] == [f"{stage[:-2]}.json"]
        assert not facts(skipped, f"train-{r}")["homologue"]["confirmed"]
        assert (
            facts(skipped, f"corefine-{r}")["auxiliary"]
            == 0
            == facts(skipped, f"corefine-{r}")["auxiliary_weight_share"]
        )
        assert facts(skipped, f"corefine-{r}")["homologue"] == facts(skipped, f"train-{r}")["homologue"]
    alone, first = (next(skipped.glob(f"*_{name}")) / "particles.star" for name in ("refine", "corefine-1"))
    poses = [read_particle_file(file, "", ("pose",)) for file in (alone, first)]
    np.testing.assert_array_equal(poses[0].rotation, poses[1].rotation)
    page = (skipped / "report.html").read_text()
    assert "no auxiliary particles were made" in page and "were left out of the references" not in page
    assert "skipped, because the raw particles confirm nothing" in (skipped / "logs/rank-0000.log").read_text()
    timing = json.loads((skipped / "timing.json").read_text())["stages"]
    assert not any(timing[name]["work"] for name in ("train-1", "generate-1", "corefine-1"))


def test_the_result_has_the_bits_of_a_run_that_made_them(skipped, data, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(homologue, "CHANCE", -1.0)
    monkeypatch.setattr(train, "homologue_found", lambda *given: None)
    job = write_job(data, "trained.toml", **SMALL, auxiliary_settle_deg=0.0)
    trained = run_job(job, tmp_path / "trained", Context(), report=build).path
    assert facts(trained, "corefine-2")["auxiliary"] == 60
    assert results(skipped) == results(trained)


def test_an_interrupted_run_goes_on_without_training(skipped, data, tmp_path, monkeypatch):
    def interrupted(*given, **options):
        raise Interrupted("here")

    job = write_job(data, "interrupted.toml", **SMALL, auxiliary_settle_deg=0.0)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(corefine, "round_request", interrupted)
        run_job(job, tmp_path / "run", Context(), report=build)
    resumed = resume_run(tmp_path / "run", Context(), report=build).path
    assert results(resumed) == results(skipped)


def test_given_poses_are_asked_by_an_iteration(data, tmp_path, nothing_is_confirmed, monkeypatch):
    monkeypatch.setattr(train, "train_generators", None)
    given = {"auxiliary_poses": "given", "particles_file": "truth.star", "auxiliary_rounds": 1}
    run = run_job(write_job(data, "given.toml", **SMALL, **given), tmp_path / "run", Context()).path
    assert facts(run, "train-1")["skipped"] and not facts(run, "corefine-1")["homologue"]["confirmed"]


def test_what_is_confirmed_before_the_training_is_not_asked_again(data, tmp_path, monkeypatch):
    """By an engine that cannot weigh: the co-refinement takes the answer of the stage before."""
    asked = []

    def confirmed(request, comm):
        asked.append(request.folder.name)
        return {"homologue": {"confirmed": True}, "homologue_precision": [0.0, 1.0]}

    monkeypatch.setattr(reference_check, "homologue_evidence", confirmed)
    monkeypatch.setattr(co_refinement, "homologue_evidence", confirmed)
    monkeypatch.setattr(co_refinement, "WEIGHING", ())
    given = {"auxiliary_poses": "given", "particles_file": "truth.star", "auxiliary_rounds": 1}
    job = write_job(data, "given.toml", **SMALL, **given, auxiliary_generators="white-noise")
    run = run_job(job, tmp_path / "run", Context()).path
    assert len(asked) == 1 and asked[0].endswith("_train-1")
    assert facts(run, "train-1")["homologue"] == facts(run, "corefine-1")["homologue"] == {"confirmed": True}
    assert facts(run, "corefine-1")["auxiliary"] == 60


def test_a_fixed_weight_or_common_noise_asks_nothing(data, tmp_path, nothing_is_confirmed):
    for name, choice in {"fixed": {"auxiliary_weight": 0.5}, "pooled": {"auxiliary_noise_group": "raw"}}.items():
        job = write_job(data, f"{name}.toml", **SMALL, **choice, auxiliary_rounds=1)
        run = run_job(job, tmp_path / name, Context()).path
        assert facts(run, "generate-1")["counts"] == {"1": 30, "2": 30} and facts(run, "corefine-1")["auxiliary"] == 60


RANKS = """
from pathlib import Path
from cryoiso.parallel.context import get_context
from cryoiso.pipeline.run import run_job
from cryoiso.pipeline.stages import train
from cryoiso.refine import homologue
homologue.CHANCE, train.train_generators = -1.0, None
run_job(Path({job!r}), Path({out!r}), get_context(), until="corefine-1")
"""


@pytest.mark.mpi
def test_two_ranks_decide_alike(skipped, data, tmp_path):
    job = write_job(data, "ranks.toml", **SMALL, auxiliary_settle_deg=0.0)
    run_mpi(2, RANKS.format(job=str(job), out=str(tmp_path / "two")))
    one, two = (next(run.glob("*_corefine-1")) / "particles.star" for run in (skipped, tmp_path / "two"))
    assert one.read_bytes() == two.read_bytes()
