"""One optimisation step: clipping, Adam, the compiler, and a state that comes back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_helper import ALONE, digest

from cryoiso.train import state
from cryoiso.train.step import Stepper, try_compiled


def stepper_of(module: nn.Module, **options) -> Stepper:
    return Stepper(module, ALONE, **{"learning_rate": 0.1, "clip_norm": 0.0, "amp": False, **options})


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_long_gradients_are_shortened_not_turned(clip):
    module = nn.Linear(3, 1, bias=False)
    stepper = stepper_of(module, clip_norm=clip)
    x = torch.tensor([[1.0, 2.0, -2.0]])
    numbers = stepper(lambda m: (m(x).sum() * 10, {}), 1.0, list)
    assert numbers.tolist()[1:] == [pytest.approx(30.0), 0.0], "the norm before clipping; not skipped"
    expected = torch.tensor([[10.0, 20.0, -20.0]]) * (clip / 30 if 0 < clip < 30 else 1)
    assert torch.allclose(module.weight.grad, expected, rtol=1e-5)


def test_adam_is_adam():
    """Against the textbook, three steps (Kingma and Ba 2015, algorithm 1)."""
    module = nn.Linear(2, 1, bias=False)
    w = module.weight.detach().clone().double()
    stepper = stepper_of(module, learning_rate=0.05)
    m = v = torch.zeros_like(w)
    for t in range(1, 4):
        stepper(lambda net: (net.weight.square().sum(), {}), 1.0, list)
        g = 2 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert torch.allclose(module.weight.double(), w, atol=1e-6)


def test_trying_the_compiler_leaves_no_trace():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    stepper, before = stepper_of(module), digest(module)
    assert try_compiled(stepper, lambda m: (nn.Sequential.forward(m, torch.ones(2, 1, 4, 4)).sum(), {}))
    assert digest(module) == before and all(p.grad is None for p in module.parameters())


def test_state_of_channels_last_parameters_comes_back_in_their_layout(tmp_path):
    def build():
        torch.manual_seed(1)
        module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return module, stepper_of(module)

    module, stepper = build()
    x = torch.randn(2, 3, 8, 8)
    for _ in range(3):
        stepper(lambda m: (m(x).square().mean(), {}), 1.0, list)
    state.save(tmp_path / "s.npz", module, stepper.optimiser, state.TrainingProgress(step=3), {})
    other, restored = build()
    arrays, progress = state.load(tmp_path / "s.npz", {})
    state.restore(arrays, other, restored.optimiser)
    assert progress.step == 3
    for a, b in zip(module.parameters(), other.parameters()):
        mine, theirs = stepper.optimiser.state[a], restored.optimiser.state[b]
        assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in mine:
            assert torch.equal(mine[key], theirs[key]) and mine[key].stride() == theirs[key].stride()
    for s, m in ((stepper, module), (restored, other)):
        s(lambda _, m=m: (m(x).square().mean(), {}), 1.0, list)
    assert digest(module) == digest(other)
