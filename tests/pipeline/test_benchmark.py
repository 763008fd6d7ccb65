"""``cryoiso benchmark``: a device that computes wrong is refused, rates reach the plan."""

from __future__ import annotations

import json

import pytest
from errors_helper import raises_code
from pipeline_helper import cryoiso_here

from cryoiso.core.errors import MissingError
from cryoiso.pipeline.planning import benchmark as bench
from cryoiso.pipeline.planning import rates
from cryoiso.pipeline.planning.ceilings import BYTES, FLOPS, Ceilings, flops_of
from cryoiso.pipeline.planning.same_results import KernelComparison, comparisons

BEST = Ceilings(memory=10.0, products=50.0, low_products=100.0)


def test_compiled_kernels_agree_with_plain_torch():
    found = comparisons("cpu")
    assert {c.kernel for c in found} == {"slices", "local", "insert"}
    assert all(c.agrees for c in found)
    bench.require_same(found, "cpu")


@pytest.mark.gpu
def test_kernels_of_a_gpu_agree_with_those_of_the_cpu():
    found = comparisons("cuda")
    assert {c.kernel for c in found} == {"slices", "local", "gemm", "insert"}
    bench.require_same(found, "cuda")


@pytest.mark.parametrize("difference", [0.1, float("nan")])
def test_a_device_that_computes_wrong_is_refused(difference):
    with raises_code("device-computes-wrong", MissingError, match="local"):
        bench.require_same([KernelComparison("slices", 0.0, 1e-5), KernelComparison("local", difference, 1e-4)], "cpu")


def test_operations_are_counted():
    import torch

    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert flops_of(lambda: a @ b) == 2 * 3 * 5 * 7


def test_rates_are_units_per_second_and_a_share_of_the_ceiling(monkeypatch):
    p = bench.problem(32, 4.0, "refine", "cpu")
    monkeypatch.setattr(bench, "best_time", lambda call, device, limit_s: 2.0)
    units = {name: n for name, (n, _) in bench.timings(p, "cpu").items()}
    found = {k.name: k for k in bench.kernel_times(p, "cpu", BEST, 0.01)}
    assert found["local"].seconds_a_unit == 2.0 / units["local"]
    assert found["local"].unit == BYTES and found["gemm"].unit == FLOPS
    assert found["gemm"].rate == pytest.approx(units["gemm"] / 2.0 / 1e9)
    assert found["gemm"].share == pytest.approx(found["gemm"].rate / BEST.products)
    assert found["local"].share == pytest.approx(found["local"].rate / BEST.memory)
    assert found["write"].rate is None


def test_the_plan_reads_the_record(tmp_path):
    p = bench.problem(32, 4.0, "auxiliary", "cpu")
    kernels = [bench.KernelTime("local", 7e-8, 1.0, BYTES, 0.1), bench.KernelTime("train_small", 5e-6, 1.0, FLOPS, 0.1)]
    found = bench.record(p, "cpu", BEST, kernels, comparisons("cpu"), None)
    (tmp_path / "node.json").write_text(json.dumps(found))
    known = rates.of_run(tmp_path / "node.json")
    assert known.kernels["local"] == 7e-8 and known.kernels["train_small"] == 5e-6
    assert "benchmark at 32 px" in known.source and not known.factors
    assert any("local" in line for line in bench.as_lines(found))
    with raises_code("options-conflict"):
        rates.of_run(tmp_path / "node.json", cpu=True)


def test_a_miniature_runs_every_stage(tmp_path):
    out = tmp_path / "node.json"
    done = cryoiso_here(
        "benchmark", "--box", "24", "--pixel-size", "6", "--seconds", "0.01", "--miniature", "30", "--out", out
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["miniature"]["stages"]) == {"ingest", "reference", "refine", "reconstruct", "diagnose", "report"}
    assert found["miniature"]["particles"] == 30
    assert "refine" in done.stdout and "results agree" in done.stdout
