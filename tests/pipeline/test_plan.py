"""The planner: its files and bytes against a real run, its work against the code's own numbers, its jobs and words."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here, quick_report, use_quick_parts

from cryoiso.core.config import Job
from cryoiso.core.errors import EXIT_INPUT, EXIT_USAGE, InputError
from cryoiso.parallel.context import Context
from cryoiso.pipeline.planning import job_size, rates, workload
from cryoiso.pipeline.planning.job_size import Problem, shard_layout
from cryoiso.pipeline.planning.plan import Layout, as_dict, as_lines, make_plan
from cryoiso.pipeline.planning.rates import Rates
from cryoiso.pipeline.planning.workload import KERNELS, Assumed
from cryoiso.pipeline.run import run_job

ONE = Layout(1, 0, 1)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run with the real engine and report."""
    from cryoiso.report import publish

    return run_job(data / "job.toml", tmp_path_factory.mktemp("runs") / "run", Context(), publish).path


def problem(n: int = 1000, box: int = 64, **sections) -> Problem:
    job = Job.model_validate({"particles": {"file": "p.star"}, "reference": {"file": "r.mrc"}, **sections})
    return Problem(job, n, box, 3.0, 150.0)


def planned(job: Path, *options: object) -> dict:
    done = cryoiso_here("plan", job, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- disk


def test_files_and_bytes_are_those_of_a_run(data, finished):
    made = planned(data / "job.toml")
    files = [p for p in finished.rglob("*") if p.is_file()]
    assert made["files"] == len(files), sorted(str(p.relative_to(finished)) for p in files)
    stages = {row["stage"]: row for row in made["stages"]}
    for folder in sorted(finished.glob("0*_*")):
        name = folder.name.split("_", 1)[1]
        inside = [p for p in folder.rglob("*") if p.is_file()]
        assert stages[name]["files"] == len(inside), name
        if name != "diagnose":
            assert stages[name]["disk_bytes"] == pytest.approx(sum(p.stat().st_size for p in inside), rel=0.2), name


@pytest.mark.parametrize("n, box, mib", [(1, 24, 1), (1000, 48, 256), (9000, 128, 64), (40, 24, 256)])
def test_shards_are_cut_as_ingest_does(n, box, mib):
    from cryoiso.io.imageprep import IngestSettings
    from cryoiso.io.ingest import _images_per_shard

    per_shard = _images_per_shard(box, IngestSettings(shard_mib=mib))
    layout = shard_layout(n, box, "float16", mib)
    assert sum(layout) == n and len(layout) == math.ceil(n / per_shard) and max(layout) == min(n, per_shard)


def test_generated_shards_are_cut_as_generation_does():
    from cryoiso.core.types import OpticsGroup, Particles
    from cryoiso.io.shardset import plan_shards
    from cryoiso.pipeline.planning.microbenchmarks import _particles

    p = problem(64, 48, run={"workflow": "auxiliary"})
    some = _particles(p, OpticsGroup, Particles)
    many = some.take(np.arange(2300) % 64)
    p = problem(2300, 48, run={"workflow": "auxiliary"})
    assert job_size._made_shards("generate-1", p).files == len(plan_shards(many, 48, "x", "y").shards)


# --- work


def test_work_of_an_iteration_is_that_of_the_search_plan():
    """The global search multiplies images x shifts with coefficients x views: the count of the code's own matrices."""
    from cryoiso.physics.fourier import fourier_disc
    from cryoiso.refine.schedule import ScheduleState, global_grid, search_plan

    p = problem(128, 64)
    first = next(workload.iterations(p, 128, 1, Assumed()))
    grid = global_grid(2, "C1")
    plan = search_plan(ScheduleState(0, round(64 * 3 / 30), 2.0), p.job.refine, grid, 64, 3.0, 150.0)
    k = fourier_disc(64, plan.coarse_radius_px).size
    flops = 128 * len(grid) * k * (4 * len(plan.shifts_px) + 2)
    assert first["gemm"] == pytest.approx(flops, rel=0.15)


def test_work_is_shared_out_and_symmetry_saves_views():
    one, four = (workload.refinement(problem(), 1000, ranks, Assumed(), {}) for ranks in (1, 4))
    assert four["gemm"] == pytest.approx(one["gemm"] / 4) and four["transform"] < one["transform"]
    c3 = workload.refinement(problem(sample={"symmetry": "C3"}), 1000, 1, Assumed(), {})
    assert c3["gemm"] < 0.5 * one["gemm"] and c3["transform"] > one["transform"]


@pytest.mark.parametrize("workflow", ["refine", "auxiliary", "realign", "both"])
def test_every_workflow_has_a_plan_in_known_units(workflow):
    p = problem(run={"workflow": workflow}, micelle={"enable": workflow == "both"})
    for device in ("cpu", "cuda"):
        work = workload.stages(p, 2, Assumed(), device)
        assert {kernel for units in work.values() for kernel in units} <= set(KERNELS)
    made = make_plan(p, ONE, rates.built_in("cpu"))
    assert made.seconds and {row.stage for row in made.rows} == set(workload.stages(p, 1, Assumed(), "cpu"))
    assert sum(row.disk_bytes for row in made.rows) == sum(s.bytes for s in job_size.disk(p))


# --- rates


def test_a_run_leaves_rates_that_foretell_itself(data, finished):
    """Planned from its own rates, a run takes what it took."""
    left = json.loads((finished / "timing.json").read_text())
    assert set(left["stages"]) == {"ingest", "reference", "refine", "reconstruct", "diagnose", "report"}
    assert left["iterations"] == 2 and 0 < left["nyquist_share"] <= 1
    made = planned(data / "job.toml", "--rates", finished)
    stages = {row["stage"]: row["seconds"] for row in made["stages"]}
    for name, facts in left["stages"].items():
        assert stages[name] == pytest.approx(facts["seconds"], rel=0.01, abs=0.01), name
    by_cpu = planned(data / "job.toml", "--rates", finished, "--cpu")
    assert by_cpu["stages"][2]["seconds"] == pytest.approx(left["stages"]["refine"]["cpu_seconds"], rel=0.01)


def test_interrupted_stages_do_not_count(data, finished, tmp_path):
    left = json.loads((finished / "timing.json").read_text())
    left["stages"]["refine"]["resumed"] = True
    (tmp_path / "timing.json").write_text(json.dumps(left))
    assert "refine" not in rates.of_run(tmp_path).factors and "reconstruct" in rates.of_run(tmp_path).factors


def test_no_rates_is_one_sentence(tmp_path):
    with raises_code("rates-missing", InputError):
        rates.of_run(tmp_path)


def test_timing_of_a_stand_in_does_not_end_the_run(data, tmp_path, monkeypatch):
    """refine.json without what the plan looks for."""
    use_quick_parts(monkeypatch)
    run_job(data / "job.toml", tmp_path / "run", Context(), quick_report)
    assert json.loads((tmp_path / "run/timing.json").read_text())["iterations"] is None


def test_kernels_are_timed_on_this_machine():
    p = problem(100, 24, run={"workflow": "both"}, correct={"cube_px": 16})
    found = rates.measure(p, "cpu", limit_s=0.0)
    timed = {"gemm", "local", "insert", "transform", "read", "train_small", "generate_small", "unet_small"}
    assert timed <= set(found.kernels) and all(0 < found.kernels[name] < 1e-2 for name in timed)
    assert "measured on this machine" in found.source


# --- jobs and words


def test_number_of_jobs():
    fast = Rates(dict.fromkeys(KERNELS, 0.0) | {"gemm": 1e-9, "transform": 1e-6}, "test", 2.0)
    p = problem(1000, 64)
    made = make_plan(p, ONE, fast, time_s=1e9)
    assert made.jobs() == (1, 1) and not made.never_ends() and "0 time(s) requeued" in "\n".join(as_lines(made))
    few, many = replace(made, time_s=made.seconds / 2).jobs()
    assert few >= 3 and (many > few or many == -1)
    stuck = replace(made, time_s=made.repeated_s)
    assert stuck.never_ends() and "more ranks are needed" in "\n".join(as_lines(stuck))
    short = replace(made, time_s=60.0, repeated_s=0.0)
    assert short.jobs()[0] == -1 and as_dict(short)["jobs"] == {"expected": None, "at_the_most": None}
    assert any("no number of them ends the run" in line for line in as_lines(short))
    assert not any("-1 job" in line for line in as_lines(short))
    assert made.wall_s() >= made.seconds * 2 and made.wall_s() % 900 == 0
    # a search is not done twice, however long it takes; RELION's iterations are
    slower = replace(fast, kernels=fast.kernels | {"gemm": 1e-6})
    assert make_plan(p, ONE, slower).repeated_s == made.repeated_s
    theirs = problem(1000, 64, refine={"engine": "relion"})
    assert make_plan(theirs, ONE, slower).repeated_s > 100 * made.repeated_s


def test_lengths_of_jobs_are_read_as_launch_reads_them(data):
    """Two numbers are hours and minutes; one alone is refused by both."""
    text = cryoiso_here("plan", data / "job.toml", "--time", "90:00").stdout
    assert "job(s) of 3 d 18 h" in text or "job(s) of 90 h" in text, text
    for wrong in ("24", "soon", "1:2:3:4", "00:00"):
        done = cryoiso_here("plan", data / "job.toml", "--time", wrong)
        assert done.returncode == EXIT_USAGE and "--time" in done.stderr


def test_the_command_prints_a_table_and_refuses_nonsense(data, tmp_path):
    text = cryoiso_here("plan", data / "job.toml", "--nodes", 2, "--ranks-per-node", 8, "--time", "0:30").stdout
    assert re.search(r"^refine +\S+", text, re.M) and "rates: built in" in text
    assert "on 2 node(s) with 8 rank(s) each" in text
    assert cryoiso_here("plan", data / "job.toml", "--rates", tmp_path).returncode == EXIT_INPUT
    assert cryoiso_here("plan", data / "job.toml", "--rates", tmp_path, "--measure").returncode == EXIT_USAGE
    assert list(tmp_path.iterdir()) == []
