"""What the trainings of the correction have in common, whatever their loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cryoiso.core.identity import MARK
from cryoiso.methods.anisotropy.settings import Correction
from cryoiso.methods.anisotropy.submaps import digest_of
from cryoiso.nets.unet import Unet3d
from cryoiso.train.decision import TrainingDecision


class NetworkTask:
    """The part of ``train.loop.Task`` that depends on the network alone; subclasses set the attributes."""

    module: nn.Module
    watched = "loss"
    settings: Correction
    label: str
    warm: dict[str, np.ndarray] | None
    """Parameters to begin with; None: new ones."""
    _given: str
    """A hash of what is trained on."""

    def start(self, attempt: int) -> None:
        """A new network, or the given one."""
        network = Unet3d(self.settings.network)
        if self.warm is not None and attempt == 0:
            network.load_state_dict({k: torch.from_numpy(v) for k, v in self.warm.items()})
        self.module = network

    def annealed_at(self, attempt: int) -> int:
        return 0

    def judge(self, history: Sequence[dict[str, Any]]) -> TrainingDecision:
        return TrainingDecision()

    def configuration(self) -> dict[str, Any]:
        """What decides the result beside the loop's settings."""
        warm = MARK + digest_of(*self.warm.values()) if self.warm else "none"
        facts = self.settings.facts()
        del facts["bfloat16"]  # what a training begins with is kept with its progress
        return {**facts, "label": self.label, "maps": MARK + self._given, "warm": warm}
