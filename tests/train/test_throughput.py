"""What a training writes of its arithmetic: counted operations, and rates that follow from them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from cryoiso.train.state import TrainingProgress
from cryoiso.train.throughput import product_tflops, training_flop
from cryoiso.train.timer import ThroughputTimer


def test_operations_of_a_step_are_those_of_three_products():
    layer, x = nn.Linear(30, 20), torch.randn(8, 30)
    assert training_flop(lambda: layer(x)) == 3 * 2 * 8 * 30 * 20
    conv = nn.Conv2d(3, 5, 3, padding=1)
    assert training_flop(lambda: conv(torch.randn(2, 3, 10, 10))) == 3 * 2 * 2 * 100 * 27 * 5
    assert layer.weight.grad is None


@pytest.mark.parametrize("low", [False, True])
def test_matrix_products_have_a_rate(low):
    assert 1e-3 < product_tflops("cpu", low) < 1e3


def test_the_rate_of_a_device_is_measured_once(monkeypatch):
    """A realigned refinement trains in every iteration."""
    product_tflops.cache_clear()
    rate = product_tflops("cpu", False)
    monkeypatch.setattr("torch.mm", None)
    assert product_tflops("cpu", False) == rate


def test_rates_follow_from_time_and_operations(tmp_path, monkeypatch):
    now = iter([0.0, 2.0, 6.0])
    monkeypatch.setattr("cryoiso.train.timer.time.monotonic", lambda: next(now))
    timer = ThroughputTimer(tmp_path / "timing.json", batch=8, ranks=2)
    timer.device(flop_per_image=5e9, product_tflops=0.1)
    assert timer.note(TrainingProgress(step=1)) == "0 images/s"
    assert timer.note(TrainingProgress(step=11)) == "40 images/s, 0.2 TFLOP/s (100% of matrix products)"
    timer.note(TrainingProgress(step=16))
    timer.write()
    found = json.loads((tmp_path / "timing.json").read_text())
    assert found["seconds"] == 6 and found["images_per_s"] == pytest.approx(20)
    assert found["gflop_per_image"] == 5 and found["tflops"] == pytest.approx(0.1)
    assert found["share_of_products"] == pytest.approx(0.5)
    assert [note["tflops"] for note in found["notes"]] == pytest.approx([0.2, 0.05])
