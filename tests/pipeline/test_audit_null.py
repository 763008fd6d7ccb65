"""The control of noise: which of its two comparisons decides, and what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cryoiso.core.config import parse_job
from cryoiso.parallel.context import Context
from cryoiso.physics.filters import lowpass
from cryoiso.pipeline.audit.bench import Bench
from cryoiso.pipeline.audit.controls import null
from cryoiso.pipeline.context import RunContext
from cryoiso.pipeline.records.run_folder import RunFolder
from cryoiso.pipeline.workflow import folder_stages

BOX, PIXEL_A = 24, 6.0


def smooth_noise(seed: int) -> np.ndarray:
    white = np.random.default_rng(seed).standard_normal((BOX, BOX, BOX))
    return np.asarray(lowpass(white, PIXEL_A, 14.0), np.float64)


def recorded(of_workflow: float, of_plain: float, workflow: str = "auxiliary", **auxiliary: object):
    """The record where noise has these shares of the reference, with the workflow and with a plain refinement."""
    data = {
        "particles": {"file": "p"},
        "reference": {"file": "r"},
        "run": {"workflow": workflow},
        "auxiliary": auxiliary,
    }
    job = parse_job(data)
    run = RunContext(job, RunFolder(Path("run"), folder_stages(job)), Context())
    reference, inside = smooth_noise(0), np.ones((BOX, BOX, BOX), bool)
    bench = Bench(run, Path("audit"), 60, np.arange(60), PIXEL_A, 100.0, 14.0, 1.0, None, None, reference, inside)

    def outcome(share: float) -> SimpleNamespace:
        maps = {name: share * reference + smooth_noise(k) for k, name in enumerate(("half1.mrc", "half2.mrc"), 2)}
        whole = share * reference + smooth_noise(1)
        return SimpleNamespace(refused="", map=lambda name="": maps.get(name, whole))

    return null.record(bench, outcome(5.0), {"workflow": outcome(of_workflow), "plain": outcome(of_plain)})


def test_of_a_workflow_that_adds_bias_the_number_is_that_of_the_bias_and_the_remedy_is_said():
    control = recorded(0.8, 0.2, weight=1)
    low, high = control.interval
    assert control.verdict == "fail" and control.details["verdict_data"] == "pass"
    assert "plain refinement" in control.measure and 0 < control.threshold < low < control.number < high
    assert [control.number, low, high] == control.details["workflow_less_plain"]
    assert "adds bias" in control.sentence and 'auxiliary.weight = "measured"' in control.sentence
    assert "noise and reference, plain refinement" in [line.label for line in control.figure.lines]
    # there is no such remedy where the weight is measured, or without auxiliary particles
    assert "auxiliary.weight" not in recorded(0.8, 0.2).sentence
    assert "auxiliary.weight" not in recorded(0.8, 0.2, "realign").sentence


@pytest.mark.parametrize("workflow", ["realign", "auxiliary"])
def test_without_bias_the_number_is_what_particles_have_beyond_noise(workflow):
    control = recorded(0.2, 0.2, workflow)
    assert control.verdict == "pass" and control.threshold == 0 < control.number
    assert "less that of noise" in control.measure
    assert "bias above" in control.power and "no more of the reference" in control.sentence
