"""Plans for GPUs by what a run on GPUs left, without one: records are made from rates that the plan does not know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here, simulate

from cryoiso.core.config import Job
from cryoiso.core.errors import EXIT_USAGE, UsageError
from cryoiso.parallel.context import Context
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.job_inputs import Inputs
from cryoiso.pipeline.jobfile import read_job
from cryoiso.pipeline.planning import rates, timing, workload
from cryoiso.pipeline.planning.job_size import Problem, problem_of
from cryoiso.pipeline.planning.plan import Layout, as_dict, as_lines, make_plan
from cryoiso.pipeline.planning.rates import BUILT_IN, Rates, built_in, guessed
from cryoiso.pipeline.planning.timing import note_timing, predicted_stages, save_timing
from cryoiso.pipeline.planning.workload import KERNELS, Assumed
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.workflow import folder_stages, kind_of

GPU = Layout(1, 1, 1)
APART = {"gemm": 0.5, "local": 2.0, "insert": 3.0, "transform": 0.4, "read": 2.5}


@pytest.fixture(scope="module")
def job_file(tmp_path_factory) -> Path:
    return simulate(tmp_path_factory.mktemp("data"))


def problem(n: int, box: int, workflow: str = "refine") -> Problem:
    job = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, "run": {"workflow": workflow}}
    return Problem(Job.model_validate(job), n, box, 3.0, 150.0, device="cuda")


def machine(**apart: float) -> Rates:
    """A GPU that is not as guessed."""
    return Rates({k: rate * apart.get(k, 1.0) for k, rate in guessed("cuda").kernels.items()}, "true", 1.0)


def record(folder: Path, p: Problem, true: Rates, device: str = "cuda:0") -> Path:
    """timing.json of a run on such a GPU, with the kernels that this version writes there."""
    stages = {
        name: {"kind": kind_of(name), "seconds": true.seconds(kind_of(name), work), "cpu_seconds": 0.1,
               "resumed": False, "work": work}
        for name, work in workload.stages(p, 1, Assumed(), device).items()
    }  # fmt: skip
    facts = {
        "schema": 1, "date": "2026-11-26", "hardware": "a GPU", "device": device, "ranks": 1, "hosts": 1, "threads": 8,
        "problem": {"particles": p.particles, "box_px": p.box_px}, "iterations": None, "nyquist_share": None,
        "kernels": built_in(device).kernels, "stages": stages,
    }  # fmt: skip
    (folder / "timing.json").write_text(json.dumps(facts))
    return folder


def seconds_of(p: Problem, by: Rates) -> dict[str, float | None]:
    return {row.stage: row.seconds for row in make_plan(p, GPU, by).rows}


@pytest.mark.parametrize("workflow", ["refine", "auxiliary", "realign", "both"])
def test_a_run_on_gpus_tells_the_times_of_the_same_and_of_a_larger_one(workflow, tmp_path):
    """Proportions as guessed: whatever the size, the plan is the truth."""
    true = machine(**dict.fromkeys(rates.TIMES_FASTER, 3.0))
    found = rates.of_run(record(tmp_path, problem(1000, 64, workflow), true))
    for p in (problem(1000, 64, workflow), problem(50_000, 64, workflow), problem(1000, 192, workflow)):
        for stage, seconds in seconds_of(p, found).items():
            work = workload.stages(p, 1, found.assumed, "cuda")[stage]
            assert seconds == pytest.approx(true.seconds(kind_of(stage), work), rel=0.25), (stage, p.particles)
    made = make_plan(problem(50_000, 64, workflow), GPU, found)
    assert made.seconds and made.wall_s() and "no total" not in "\n".join(as_lines(made))


@pytest.mark.parametrize("n, box", [(20_000, 64), (1000, 128), (20_000, 128)])
def test_other_proportions_are_learnt_within_the_uncertainty_that_is_told(n, box, tmp_path):
    true = machine(**APART)
    found = rates.of_run(record(tmp_path, problem(1000, 64), true))
    large = problem(n, box)
    for stage, seconds in seconds_of(large, found).items():
        expected = true.seconds(kind_of(stage), workload.stages(large, 1, found.assumed, "cuda")[stage])
        assert 1 / found.spread < seconds / expected < found.spread, stage


def test_what_a_run_did_not_do_is_a_part_that_is_not_known(tmp_path):
    found = rates.of_run(record(tmp_path, problem(1000, 64), machine()))
    made = make_plan(problem(1000, 64, "auxiliary"), GPU, found)
    assert set(made.unknown) == {"train-1", "generate-1", "train-2", "generate-2"}
    told = as_dict(made)
    assert told["seconds"] is None and told["wall_time_s"] is None and told["unknown_stages"] == made.unknown
    assert told["seconds_of_known_stages"] > sum(r.seconds for r in made.rows if r.stage in ("refine", "local"))
    text = "\n".join(as_lines(made))
    assert "a part of the whole" in text and "train-1, generate-1" in text and " + ?" in text


def test_without_rates_only_what_cpus_do_is_known():
    made = make_plan(problem(1000, 64), Layout(2, 4, 4), built_in("cuda"))
    assert made.unknown == ["refine", "reconstruct"] and made.known_s > 0 and made.seconds is None
    told = as_dict(made)
    assert told["wall_time_s"] is None and told["gpu_bytes_per_rank"] > 0 and told["layout"]["ranks"] == 8


def test_rates_of_the_other_kind_of_device_are_refused(tmp_path):
    of_gpu = rates.of_run(record(tmp_path, problem(1000, 64), machine()))
    with raises_code("options-conflict", UsageError, match="rates are those of GPUs"):
        make_plan(problem(1000, 64), Layout(1, 0, 1), of_gpu)
    with raises_code("options-conflict", UsageError, match="rates are those of CPUs"):
        make_plan(problem(1000, 64), GPU, built_in("cpu"))
    with raises_code("options-conflict", UsageError, match="CPU seconds"):
        rates.of_run(tmp_path, cpu=True)


def test_every_kernel_is_timed_where_nothing_is_built_in(monkeypatch):
    """--measure leaves nothing unknown, on whatever device."""
    monkeypatch.setitem(BUILT_IN, "cpu", {})
    job = {"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, "run": {"workflow": "both"},
           "correct": {"cube_px": 16}, "micelle": {"enable": True}}  # fmt: skip
    p = Problem(Job.model_validate(job), 100, 24, 3.0, 60.0)
    found = rates.measure(p, "cpu", limit_s=0.0)
    work = workload.stages(p, 1, Assumed(), "cpu")
    assert {k for units in work.values() for k, n in units.items() if n} <= set(found.kernels)
    assert make_plan(p, Layout(1, 0, 1), found).seconds


# --- forecasts


class OnGpu(Context):
    """Ranks that say they have GPUs."""

    def device(self, preference: str | None = None) -> str:
        return "cuda:0"


def test_a_run_on_gpus_foresees_what_its_stages_have_told(job_file, tmp_path):
    _, job = read_job(job_file)
    run = RunContext(job, RunFolder(tmp_path / "run", folder_stages(job)), OnGpu())
    inputs = Inputs(job, run.folder, run.comm)
    first = predicted_stages(run, inputs)
    assert {name for name, seconds in first.items() if seconds is None} == {"refine", "reconstruct"}
    assert set(guessed("cuda:0").kernels) == set(KERNELS)
    done = workload.stages(problem(100, 32), 1, Assumed(), "cuda:0")["refine"]
    took = 1000 * guessed("cuda").seconds("refine", done)
    same = {"device": "cuda:0", "ranks": 1}
    refine = {"kind": "refine", "work": done, "seconds": took, "resumed": False}
    foreseen = predicted_stages(replace(run, timing={**same, "stages": {"refine": refine}}), inputs)
    still = workload.stages(problem_of(inputs), 1, Assumed(), "cuda:0")["reconstruct"]
    assert foreseen["reconstruct"] == pytest.approx(1000 * guessed("cuda").seconds("reconstruct", still), rel=0.01)
    assert foreseen["report"] == first["report"] > 0


def test_the_command_goes_by_a_run_on_gpus(job_file, tmp_path):
    record(tmp_path, problem(100, 32), machine())
    done = cryoiso_here("plan", job_file, "--gpus", 1, "--rates", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seconds"] > 0
    assert cryoiso_here("plan", job_file, "--rates", tmp_path).returncode == EXIT_USAGE


def test_a_round_that_was_left_out_is_no_measurement(tmp_path):
    """Poses had settled: the stage took no time, and did no work."""
    p = problem(1000, 64, "auxiliary")
    plain = rates.of_run(record(tmp_path, p, machine()))
    facts = json.loads((tmp_path / "timing.json").read_text())
    for name in ("train-2", "generate-2", "corefine-2"):
        facts["stages"][name] |= {"seconds": 0.05, "work": {}}
    (tmp_path / "timing.json").write_text(json.dumps(facts))
    assert rates.of_run(tmp_path).factors == pytest.approx(plain.factors, rel=1e-6)


def test_times_of_another_device_are_not_gone_on_with(job_file, tmp_path, monkeypatch):
    """The first job of a chain reads images on CPUs; its rates are not those of the GPUs of the second."""
    monkeypatch.setattr(timing, "computes_on", lambda device: f"a {device}")
    _, job = read_job(job_file)
    folder = RunFolder(tmp_path / "run", folder_stages(job))
    folder.path.mkdir()
    inputs = Inputs(job, folder, Context())
    first = RunContext(job, folder, Context())
    note_timing(first, inputs, "ingest", 12.0, 11.0, resumed=False)
    save_timing(first)
    second = RunContext(job, folder, OnGpu())
    note_timing(second, inputs, "refine", 30.0, 29.0, resumed=False)
    assert second.timing["device"] == "cuda:0" and list(second.timing["stages"]) == ["refine"]
    again = RunContext(job, folder, Context())
    note_timing(again, inputs, "reference", 1.0, 1.0, resumed=False)
    assert list(again.timing["stages"]) == ["ingest", "reference"]


def test_white_noise_needs_no_network():
    p = problem(1000, 64, "auxiliary")
    p.job.auxiliary.generators = "white-noise"
    work = workload.stages(p, 1, Assumed(), "cuda")
    assert not any(kernel.startswith(("train_", "generate_")) for units in work.values() for kernel in units)
