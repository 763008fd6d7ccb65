"""Training of a generator: what one step is, and when a posterior has collapsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cryoiso.core.identity import of_images, of_map, of_particles
from cryoiso.core.protocols import ImageSource
from cryoiso.core.types import Particles
from cryoiso.io.sources import SubsetSource
from cryoiso.methods.auxiliary.condition import Condition
from cryoiso.methods.auxiliary.generator import normal_numbers
from cryoiso.methods.auxiliary.settings import Training
from cryoiso.nets.hvae import NETWORK_FORMAT, ConditionalHvae
from cryoiso.nets.hvae_parts import HvaeConfig
from cryoiso.nets.losses import negative_elbo
from cryoiso.train.batches import Batches
from cryoiso.train.decision import TrainingDecision

COLLAPSE_NATS = 0.1
"""A layer whose latents tell less than this about an image has collapsed."""
COLLAPSED_SHARE = 0.5
"""More collapsed layers than this share make a collapsed posterior."""
SLOWER = (1.0, 1.4, 1.8)
"""Factor on the length of the annealing in each attempt."""
ANNEALED_AFTER_ALL = (0.0, 0.3, 0.6)
"""Share of the training that is annealed in each attempt where the first one is not."""
FIRST_WEIGHT = 1e-3
LOST_NATS = 0.2
"""A training without annealing that ends so much above its start, in nats per pixel, has failed."""


class GeneratorTask:
    """The task that ``train.loop.train`` works on (its ``TrainingTask``).

    Loss: negative evidence lower bound a pixel with a KL weight that grows linearly (paper, eqs. 9 and 10).
    """

    module: nn.Module
    watched = "bound"
    """The bound with the whole KL term is one function from the first step to the last; the annealed loss is not."""

    def __init__(
        self,
        source: ImageSource,
        particles: Particles,
        rows: np.ndarray,
        condition: Condition,
        config: HvaeConfig,
        settings: Training,
        seed: int,
        *,
        index: int = 0,
        size: int = 1,
        label: str = "",
    ) -> None:
        """
        Args:
            source: images, row for row those of ``particles``.
            particles: with poses.
            rows: what to train on.
            condition: projections of the reference, on the device of this rank.
            index, size: this rank's place in its group.
            label: names the generator in what decides the result (half, round).
        """
        self.source, self.rows = source, rows
        self.particles, self.condition, self.config, self.settings = particles, condition, config, settings
        self.batch, self.seed, self.label = settings.batch, seed, label
        self.batches = Batches(source, rows, settings.batch, seed, index=index, size=size)
        self._first = self.batches.share.start

    def start(self, attempt: int) -> None:
        """A new network."""
        self.module = ConditionalHvae(self.config)

    def prepare(self, step: int) -> dict[str, Any]:
        """Images of this rank's share and, on CPUs, what they are conditioned on."""
        rows = self.batches.rows_of(step)
        batch: dict[str, Any] = {"images": torch.from_numpy(self.batches.images(step))[:, None], "rows": _Rows(rows)}
        if self.condition.device == "cpu":
            batch |= self._seen(rows)
        return batch

    def _seen(self, rows: np.ndarray) -> dict[str, Tensor]:
        return {
            "condition": self.condition.images(self.particles, rows),
            "pose": self.condition.poses(self.particles, rows),
        }

    def loss(self, module: nn.Module, batch: Any, step: int, attempt: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Nats a pixel, and the terms that are recorded."""
        images, rows = batch["images"], batch["rows"].rows
        seen = batch if "condition" in batch else self._seen(rows)
        # a draw of its own for each image of the global batch: the same on any number of ranks
        keys = [f"{self.seed}/{self.label}/posterior/{attempt}/{step}/{self._first + i}" for i in range(len(rows))]
        noise = normal_numbers(keys, self.config.latent_size, str(images.device))
        weight = self.kl_weight(step, attempt)
        out = module(images, seen["condition"], seen["pose"], noise)
        terms = negative_elbo(out, images, self.settings.likelihood_sd, weight)
        recorded = {
            "reconstruction": terms.reconstruction,
            "mean_square_error": terms.mean_square_error,
            "bound": terms.reconstruction + terms.kl_per_layer.sum(),
            "kl_weight": torch.tensor(weight),  # on the CPU: sending it costs less than waiting for the GPU
            "kl_per_layer": terms.kl_per_layer,
        }
        return terms.loss, recorded

    def kl_weight(self, step: int, attempt: int) -> float:
        """Grows linearly to 1 over the annealing."""
        end = self.annealed_at(attempt)
        return min(1.0, FIRST_WEIGHT + step / end) if end else 1.0

    def annealed_at(self, attempt: int) -> int:
        """The step at which the KL term has its whole weight: always inside the training."""
        fraction, turn = self.settings.kl_anneal_fraction, min(attempt, len(SLOWER) - 1)
        share = min(fraction * SLOWER[turn], 0.95) if fraction else ANNEALED_AFTER_ALL[turn]
        return int(share * self.settings.steps)

    def judge(self, history: Sequence[dict[str, Any]]) -> TrainingDecision:
        """Restart if the posterior has collapsed once the KL term has its whole weight, or if the training is lost."""
        if reason := self._lost(history):
            return TrainingDecision("restart", reason)
        if not history or history[-1]["step"] <= self._settled_at(history[-1]["attempt"]):
            return TrainingDecision()
        kl = history[-1].get("kl_per_layer")
        if kl is None:
            return TrainingDecision()
        collapsed = collapsed_layers(np.asarray(kl), self.config.box_px)
        if collapsed.mean() <= COLLAPSED_SHARE:
            return TrainingDecision()
        return TrainingDecision(
            "restart",
            f"the posterior has collapsed in {collapsed.sum()} of {len(collapsed)} layers (less than "
            f"{COLLAPSE_NATS:g} nats an image)",
        )

    def _settled_at(self, attempt: int) -> int:
        """The step from which on a collapse is one: after the annealing, or in the second half where there is none."""
        return self.annealed_at(attempt) or self.settings.steps // 2

    def _lost(self, history: Sequence[dict[str, Any]]) -> str:
        """Why a training without annealing has failed: its bound ends above the start, which codes white noise exactly.

        An even bound is no failure then, as it is after annealing: images of white noise leave nothing to be gained.
        """
        bounds = [r["bound"] for r in history if r.get("bound") is not None]
        if self.settings.kl_anneal_fraction or len(bounds) < 2 or history[-1]["step"] < self.settings.steps:
            return ""
        first, last = bounds[0], float(np.mean(bounds[-max(1, len(bounds) // 10) :]))
        return f"the bound rose from {first:.4g} to {last:.4g}" if last > first + LOST_NATS else ""

    def configuration(self) -> dict[str, Any]:
        """What decides the result beside the loop's settings."""
        c = self.config
        return {
            **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(c).items()},
            **self.settings.facts(),
            "network_format": NETWORK_FORMAT,
            "label": self.label,
            "reference": of_map(self.condition.reference),
            "scale": [float(s) for s in self.condition.scale],
            "particles": of_particles(self.particles.take(self.rows), poses=True, ordered=True),
            "images": of_images(SubsetSource(self.source, self.rows)),
        }


class _Rows:
    """Row numbers on their way through the loop, which moves tensors and arrays to the device but not these."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows


def collapsed_layers(kl_per_layer: np.ndarray, box_px: int) -> np.ndarray:
    """(L,) bool: which layers say less than COLLAPSE_NATS about an image.

    Args:
        kl_per_layer: (L,) nats per pixel of the image, not weighted.
        box_px: D.
    """
    return np.asarray(kl_per_layer) * box_px**2 < COLLAPSE_NATS
