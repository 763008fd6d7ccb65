"""Small things to train, in tests and in the scripts that tests start under mpirun."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cryoiso.core.rng import stable_hash
from cryoiso.io.sources import ArraySource
from cryoiso.nets.hvae import ConditionalHvae
from cryoiso.nets.hvae_parts import HvaeConfig
from cryoiso.nets.losses import negative_elbo
from cryoiso.parallel.ddp import TrainingGroup
from cryoiso.physics.simulation import make_particles
from cryoiso.train.batches import Batches
from cryoiso.train.decision import TrainingDecision
from cryoiso.train.loop import LoopSettings

torch.set_num_threads(1)  # the convolutions are tiny: more threads only wait for each other
SETTINGS = LoopSettings(steps=24, learning_rate=3e-3, seed=5, log_every=4)
ALONE = TrainingGroup((0,), 0, "cpu")


def source_of(n: int = 40, box: int = 16, seed: int = 0) -> ArraySource:
    """Smooth blobs of random size with white noise on them."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((box, box)) - box // 2
    width = rng.uniform(2, 5, n)[:, None, None]
    images = 3 * np.exp(-(y**2 + x**2) / (2 * width**2)) + rng.standard_normal((n, box, box))
    return ArraySource(images.astype(np.float32), make_particles(n, box, 2.0, shift_sd_A=0.0, seed=seed))


class ToyTask:
    """A denoiser with dropout: draws from torch's generator and keyed noise of its own."""

    batch = 5
    watched = "loss"

    def __init__(
        self,
        group: TrainingGroup = ALONE,
        *,
        factor: Callable[[int, int], float] = lambda attempt, step: 1.0,
        seed: int = 5,
        verdict: Callable[[list[dict[str, Any]]], TrainingDecision] = lambda history: TrainingDecision(),
    ) -> None:
        """
        Args:
            factor: (attempt, step) -> what the loss is multiplied by.
            verdict: the judge.
        """
        self.group, self.factor, self.verdict, self.seed = group, factor, verdict, seed
        self.batches = Batches(source_of(), np.arange(40), self.batch, seed, index=group.index, size=group.size)
        self.started: list[int] = []
        self.prepared: list[int] = []

    def make(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.LeakyReLU(), nn.Dropout(0.1), nn.Conv2d(6, 1, 3, padding=1)
        )

    def start(self, attempt: int) -> None:
        self.started.append(attempt)
        self.module = self.make()

    def prepare(self, step: int) -> dict[str, Tensor]:
        self.prepared.append(step)
        images = torch.from_numpy(self.batches.images(step))[:, None]
        uids = self.batches.source.particles.uid[self.batches.rows_of(step)]
        return {"images": images, "noise": torch.stack([self.draw(step, int(uid)) for uid in uids])}

    def draw(self, step: int, uid: int) -> Tensor:
        g = torch.Generator().manual_seed(stable_hash(f"{self.seed}/posterior/{step}/{uid}"))
        return torch.randn((1, 16, 16), generator=g)

    def loss(self, module: nn.Module, batch: Any, step: int, attempt: int) -> tuple[Tensor, dict[str, Tensor]]:
        error = (module(batch["images"] + batch["noise"]) - batch["images"]).square()
        loss = error.mean() * self.factor(attempt, step)
        return loss, {"error": error.mean(), "rows": error.mean((0, 1, 3))}

    def annealed_at(self, attempt: int) -> int:
        return 0

    def judge(self, history: list[dict[str, Any]]) -> TrainingDecision:
        return self.verdict(history)

    def configuration(self) -> dict[str, Any]:
        return {"task": "toy", "shape": (1, 6)}


class PlainTask(ToyTask):
    """Without dropout, so that the number of ranks does not matter."""

    def make(self) -> nn.Module:
        return nn.Conv2d(1, 1, 3, padding=1)


class HvaeTask(ToyTask):
    """The real network, as small as it gets."""

    batch = 6
    watched = "bound"
    config = HvaeConfig(16, (1, 1), width=8, growth=4, convolutions=2, latent_channels=4, pose_features=8)

    def make(self) -> nn.Module:
        return ConditionalHvae(self.config)

    def draw(self, step: int, uid: int) -> Tensor:
        g = torch.Generator().manual_seed(stable_hash(f"{self.seed}/posterior/{step}/{uid}"))
        return torch.randn(self.config.latent_size, generator=g)

    def loss(self, module: nn.Module, batch: Any, step: int, attempt: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"]
        pose = images.new_tensor([1.0, 0, 0, 0, 0, 0]).expand(len(images), 6)
        output = module(images, torch.zeros_like(images), pose, batch["noise"])
        elbo = negative_elbo(output, images, 0.3, min(1.0, (step + 1) / 25))
        bound = elbo.reconstruction + elbo.kl_per_layer.sum()
        return elbo.loss, {"reconstruction": elbo.reconstruction, "kl": elbo.kl_per_layer, "bound": bound}


def digest(module: nn.Module) -> str:
    """Of all parameters, to the bit."""
    h = hashlib.sha256()
    for name, value in module.state_dict().items():
        h.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def checkpoint_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint but its description."""
    with np.load(folder / "checkpoint" / "state.npz") as file:
        return {name: file[name] for name in file.files}


class StopAt:
    """Says stop when asked for the n-th time (once a step)."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


HEAD = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
from train_helper import SETTINGS, HvaeTask, PlainTask, StopAt, ToyTask, digest
from cryoiso.core.errors import CryoisoError, InputError, Interrupted
from cryoiso.parallel.abort import guard
from cryoiso.parallel.group_stop import side_by_side
from cryoiso.parallel.context import get_context
from cryoiso.parallel.ddp import ranks_of_half, training_group
from cryoiso.train.loop import train
ctx = get_context()
ctx.install_signal_handlers()
folder = Path(sys.argv[1])
"""


def script(tmp_path: Path, body: str, *arguments: object) -> list[str | Path]:
    """Arguments for the interpreter: this text, run below HEAD inside ``guard``."""
    file = tmp_path / f"script{len(list(tmp_path.glob('script*')))}.py"
    inside = "\n".join("    " + line for line in body.strip().splitlines())
    file.write_text(HEAD + "with guard(ctx):\n" + inside + "\n")
    return [file, tmp_path, *map(str, arguments)]
