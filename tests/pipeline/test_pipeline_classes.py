"""Classes as a stage of a run: what is selected, and that all stages after it see only that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from mpi_helper import run_mpi
from pipeline_helper import hash_files, simulate, write_job

from cryoiso.core.config import parse_job
from cryoiso.core.errors import InputError, Interrupted, UsageError
from cryoiso.io import read_particle_file
from cryoiso.io.mrc import read_map
from cryoiso.parallel.context import Context
from cryoiso.pipeline.planning import job_size, memory, workload
from cryoiso.pipeline.run import resume_run, run_job
from cryoiso.pipeline.stages.classify import largest_class
from cryoiso.refine.reconstruct import reconstruct_halves
from cryoiso.report import build

CLASSES = {"classify_enable": True, "classify_max_iterations": 2, "refine_max_iterations": 1}
AUXILIARY = {"run_workflow": "auxiliary", "auxiliary_generators": "white-noise", "auxiliary_rounds": 1,
             "auxiliary_balance": False, "reference_lowpass_A": 40.0}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    simulate(folder, n=60)
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    job = write_job(data, "classes.toml", **CLASSES, classify_junk=True)
    return run_job(job, tmp_path_factory.mktemp("runs") / "run", Context(), report=build).path


def facts(run: Path, stage: str) -> dict:
    (folder,) = run.glob(f"[0-9][0-9]_{stage}")
    return json.loads((folder / f"{stage.split('-')[0]}.json").read_text())


def numbers(run: Path) -> np.ndarray:
    table = read_particle_file(next(run.glob("*_classify")) / "particles.star").table
    return table["rlnClassNumber"].astype(int).to_numpy()


def test_a_run_goes_on_with_its_largest_class(finished):
    found = facts(finished, "classify")
    number = numbers(finished)
    assert len(number) == 60 and set(number) <= {1, 2, 3}
    counts = np.bincount(number, minlength=4)[1:3]
    assert found["selected"] == {"classes": [1 + int(counts.argmax())], "particles": int(counts.max()), "of": 60}
    before = read_particle_file(next(finished.glob("*_refine")) / "particles.star")
    after = read_particle_file(finished / "result" / "particles.star")
    keep = number == 1 + counts.argmax()
    np.testing.assert_array_equal(after.uid, before.uid[keep])
    np.testing.assert_array_equal(after.rotation, before.rotation[keep])
    assert sum(facts(finished, "reconstruct")["half_counts"]) == counts.max()
    assert facts(finished, "diagnose")["pose_errors"]["n"] == counts.max()


def test_the_maps_are_those_of_the_selected_particles(finished, data):
    from cryoiso.io.sources import StackSource

    after = read_particle_file(finished / "result" / "particles.star", data)
    expected = reconstruct_halves(StackSource(after), after, Context(), symmetry="C3")
    made = read_map(finished / "result" / "half1.mrc").data
    assert np.corrcoef(made.ravel(), expected[1].data.ravel())[0, 1] > 0.999


def test_the_report_says_it(finished):
    numbers_ = json.loads((finished / "report.json").read_text())
    kept = facts(finished, "classify")["selected"]["particles"]
    assert any("2 classes" in line and f"{kept} of 60 particles" in line for line in numbers_["summary"])
    assert 'id="classes"' in (finished / "report.html").read_text()


def test_selected_classes_can_be_several(data, tmp_path):
    """All classes: the run is the one without a classification, bit by bit."""
    job = write_job(data, "all.toml", **CLASSES, classify_select="1, 2")
    whole = run_job(job, tmp_path / "all", Context()).path
    plain = run_job(write_job(data, "none.toml", refine_max_iterations=1), tmp_path / "none", Context()).path
    for name in ("half1.mrc", "half2.mrc", "map_weighted.mrc"):
        assert (whole / "result" / name).read_bytes() == (plain / "result" / name).read_bytes()


RANKS_SCRIPT = """
import sys
from pathlib import Path
from cryoiso.parallel.context import get_context
from cryoiso.pipeline.run import run_job
run_job(Path(sys.argv[1]), Path(sys.argv[2]), get_context())
"""


@pytest.mark.mpi
def test_ranks_and_interruptions_give_the_same_bits(finished, data, tmp_path):
    job = data / "classes.toml"
    run_mpi(2, ["-c", RANKS_SCRIPT, job, tmp_path / "two"])
    same = ("classify/particles.star", "classify/class001.mrc", "classify/selected.star", "reconstruct/half1.mrc")

    def results(run: Path) -> dict[str, bytes]:
        return {name: next(run.glob(f"*_{name}")).read_bytes() for name in same}

    assert results(tmp_path / "two") == results(finished)

    class Stopping(Context):
        def stop_requested(self) -> bool:
            state = list((tmp_path / "stopped").glob("*_classify/checkpoint/state.npz"))
            return bool(state) or super().stop_requested()

    with pytest.raises(Interrupted):
        run_job(job, tmp_path / "stopped", Stopping())
    assert not list((tmp_path / "stopped").glob("*_classify/selected.star"))
    resume_run(tmp_path / "stopped", Context())
    assert results(tmp_path / "stopped") == results(finished)
    before = hash_files(tmp_path / "stopped" / "result")
    next((tmp_path / "stopped").glob("*_classify/selected.star")).unlink()
    resume_run(tmp_path / "stopped", Context())
    assert hash_files(tmp_path / "stopped" / "result") == before


def test_a_co_refinement_has_the_selected_particles_alone(data, tmp_path):
    job = write_job(data, "auxiliary.toml", **CLASSES, **AUXILIARY)
    run = run_job(job, tmp_path / "run", Context(), report=build).path
    kept = facts(run, "classify")["selected"]["particles"]
    assert 0 < kept < 60 and facts(run, "corefine-1")["raw"] == kept == facts(run, "corefine-1")["auxiliary"]
    assert len(read_particle_file(run / "result" / "particles.star")) == kept
    assert facts(run, "diagnose")["before"]["pose_errors"]["n"] == kept


# --- settings


def job_with(**section: object):
    return parse_job({"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, "classify": section})


@pytest.mark.parametrize("select", ["", "0", "4", "1;2", "smallest", "1,,2", "-1"])
def test_bad_selections_are_refused(select):
    with raises_code("job-bad-value", UsageError):
        job_with(classes=3, select=select)


def test_selections():
    assert job_with(classes=3, select="3,1, 3").classify.selected == (1, 3)
    assert job_with().classify.selected == ()
    assert largest_class([{"number": 1, "particles": 5}, {"number": 2, "particles": 7}]) == 2
    assert largest_class([{"number": 1, "particles": 7}, {"number": 2, "particles": 7}]) == 1


def test_an_empty_selection_is_an_error(data, tmp_path):
    """Nine classes of few particles: one that ended empty cannot be gone on with."""
    job = write_job(data, "empty.toml", **CLASSES, classify_classes=9, classify_select="9")
    with raises_code("particles-too-few", InputError):
        run_job(job, tmp_path / "run", Context())
    assert not (tmp_path / "run" / "result").exists()


def test_costs_grow_with_the_classes():
    def of(classes: int) -> tuple[float, int, int]:
        p = job_size.Problem(job_with(enable=True, classes=classes), 1000, 64, 4.0, 150.0)
        stage = next(one for one in job_size.disk(p) if one.name == "classify")
        work = workload.stages(p, 1, workload.Assumed(), "cpu")["classify"]
        return work["insert"], memory.memory_of_stages(p, 1)["classify"], stage.bytes

    two, four = of(2), of(4)
    assert four[0] == pytest.approx(2 * two[0]) and four[1] > two[1] and four[2] > two[2]
