"""The correction's training and prediction on a GPU: the numbers of the CPU, also in bfloat16 and compiled."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryoiso.core.config import CorrectSection
from cryoiso.methods.anisotropy.filter import missing_cone, radii
from cryoiso.methods.anisotropy.predict import predict
from cryoiso.methods.anisotropy.settings import resolve
from cryoiso.methods.anisotropy.task import CorrectionTask
from cryoiso.nets.unet import Unet3d, UnetConfig
from cryoiso.parallel.ddp import TrainingGroup
from cryoiso.physics.phantom import phantom_map
from cryoiso.train.loop import LoopSettings, train
from cryoiso.train.step import seed_torch

pytestmark = pytest.mark.gpu
GPU = "cuda:0"
BOX = 32
NETWORK = UnetConfig((8, 16, 16), 2)
SECTION = CorrectSection(preset="small", mode="paired", cube_px=16, batch=4)


def exact() -> AbstractContextManager[None]:
    """Convolutions in float32 as it is: TF32 keeps 10 bits of a factor only."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def task(device: str) -> CorrectionTask:
    """Two noisy halves without a cone; the same on each device."""
    rng = np.random.default_rng(5)
    clean = np.asarray(phantom_map(BOX, 6.0, 15.0).data, np.float32)
    clean /= clean.std()
    maps = [clean + 0.5 * rng.standard_normal(clean.shape).astype(np.float32) for _ in (1, 2)]
    inside = radii(BOX) < BOX / 3
    settings = replace(resolve(SECTION, "cpu"), network=NETWORK)
    return CorrectionTask(maps, missing_cone(BOX, 35.0), inside, settings, 7, device=device)


def trained(network: torch.nn.Module) -> torch.nn.Module:
    """A network that changes its input: a new one is the identity, and most of its gradients are 0."""
    torch.manual_seed(2)
    torch.nn.init.normal_(network.last.weight, std=0.03)
    return network


def one_step(device: str) -> tuple[float, dict[str, float], torch.Tensor]:
    """Loss, its terms and the gradient (on the CPU) of the same step."""
    made = task(device)
    seed_torch("parameters")
    made.start(0)
    module = trained(made.module).to(device)
    batch = {name: value.to(device) for name, value in made.prepare(3).items()}
    seed_torch("step")
    loss, terms = made.loss(module, batch, 3, 0)
    loss.backward()
    gradient = torch.cat([p.grad.detach().cpu().reshape(-1) for p in module.parameters()])
    return loss.item(), {name: value.item() for name, value in terms.items()}, gradient


def test_loss_and_gradient_are_those_of_the_cpu():
    """Loss and terms to 1e-5, the gradient to 1e-3 of its length: rounding turns a few signs of |x|."""
    with exact():
        (loss, terms, gradient), (expected, parts, true) = one_step(GPU), one_step("cpu")
    assert loss == pytest.approx(expected, rel=1e-5) and terms == pytest.approx(parts, rel=1e-5, abs=1e-6)
    assert float(true.norm()) > 0.01
    assert float((gradient - true).norm()) < 1e-3 * float(true.norm())


def curve(device: str, folder: Path) -> np.ndarray:
    """The loss of each step; on the GPU as the command trains there, in bfloat16 and compiled."""
    on_gpu = device != "cpu"
    settings = LoopSettings(
        steps=60, learning_rate=1e-3, seed=5, log_every=1, clip_norm=1.0, amp=on_gpu, compile=on_gpu,
        channels_last=True, flat_window=61,
    )  # fmt: skip
    history = train(task(device), TrainingGroup((0,), 0, device), settings, folder).history
    assert not any(record["skipped"] for record in history)
    return np.array([record["loss"] for record in history])


def test_bfloat16_and_compilation_learn_what_float32_on_the_cpu_learns(tmp_path):
    here, there = curve("cpu", tmp_path / "cpu"), curve(GPU, tmp_path / "gpu")
    assert there[0] == pytest.approx(here[0], rel=0.01)
    start, mine, other = here[:10].mean(), here[-10:].mean(), there[-10:].mean()
    assert mine < 0.9 * start, "it learns on the CPU"
    assert start - other == pytest.approx(start - mine, rel=0.2), "and as much on the GPU"


@pytest.mark.parametrize("box", [24, 32])
def test_tiles_are_predicted_as_on_the_cpu(box):
    """What the network adds, to 1e-4 of its largest value; in bfloat16 to 3 per cent of its length."""
    seed_torch("parameters")
    network = trained(Unet3d(NETWORK)).eval()
    data = np.random.default_rng(3).normal(size=(box,) * 3).astype(np.float32)
    true = predict(network, data, 24, TrainingGroup((0,), 0, "cpu"), False) - data
    there, group = network.to(GPU), TrainingGroup((0,), 0, GPU)
    assert np.abs(true).max() > 0.1
    with exact():
        np.testing.assert_allclose(
            predict(there, data, 24, group, False) - data, true, rtol=0, atol=1e-4 * np.abs(true).max()
        )
    rough = predict(there, data, 24, group, True) - data
    assert 0 < np.linalg.norm(rough - true) < 0.03 * np.linalg.norm(true)
