"""Training with the published losses, those of spIsoNet, on sub-maps of one or two maps.

With x0 a sub-map, x1 the same of the other half-map, A the filter, T a random rotation and f the network:

    Lc     = |A f(x0) - x0|      Le     = |f(A T f(x0)) - T f(x0)|
    Lc_n2n = |A f(x0) - x1|      Le_n2n = |f(A T f(x0)) - T f(x1)|      L = Lc + a Le + b (Lc_n2n + a Le_n2n)

Means of absolute differences: over the inner part of the cube for Lc, over the ball in which a turned cube is known for
Le.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cryoiso.methods.anisotropy.filter import half_layout, on_grid
from cryoiso.methods.anisotropy.networktask import NetworkTask
from cryoiso.methods.anisotropy.settings import Correction
from cryoiso.methods.anisotropy.submaps import SubMaps, ball, core, digest_of, turned, weighted_mean
from cryoiso.parallel.partition import owned_rows


class CorrectionTask(NetworkTask):
    """The task that ``train.loop.train`` works on (its ``TrainingTask``)."""

    def __init__(
        self,
        maps: list[np.ndarray],
        fsc_filter: np.ndarray,
        particle_mask: np.ndarray,
        settings: Correction,
        seed: int,
        *,
        device: str = "cpu",
        index: int = 0,
        size: int = 1,
        label: str = "",
        warm: dict[str, np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            maps: one or (paired) two (D, D, D) maps, normalised.
            fsc_filter: (D, D, D) A.
            particle_mask: (D, D, D) bool, centres of sub-maps.
            device, index, size: of this rank and its place in its group.
            label: names the network.
            warm: parameters to begin with; None: new ones.
        """
        self.maps, self.settings, self.seed, self.label, self.warm = maps, settings, seed, label, warm
        self.batch = settings.batch
        self.rows = owned_rows(self.batch, 1, index, size)
        self.sub_maps = SubMaps(particle_mask, settings.cube_px, seed, label, settings.rotations)
        self.filter = half_layout(on_grid(fsc_filter, settings.cube_px)).to(device)
        cube = settings.cube_px
        self.ball = ball(cube, 1.0).to(device)
        self.core = core(cube).to(device)
        self._given = digest_of(fsc_filter, np.asarray(particle_mask), *maps)

    def prepare(self, step: int) -> dict[str, Tensor]:
        """This rank's sub-maps and rotations of a step."""
        cubes: list[list[np.ndarray]] = [[] for _ in self.maps]
        rotations = []
        for row in self.rows:
            corner, rotation, swap = self.sub_maps.draw(step * self.batch + row)
            order = self.maps[::-1] if swap else self.maps
            for kept, data in zip(cubes, order, strict=True):
                kept.append(self.sub_maps.cut(data, corner))
            rotations.append(rotation)
        names = ("first", "second")
        batch = {name: torch.from_numpy(np.stack(kept))[:, None] for name, kept in zip(names, cubes)}
        return {**batch, "rotation": torch.from_numpy(np.stack(rotations).astype(np.float32))}

    def loss(self, module: nn.Module, batch: Any, step: int, attempt: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the module's docstring and its terms."""
        settings, x0, turn = self.settings, batch["first"], batch["rotation"]
        paired = len(self.maps) == 2 and settings.beta > 0
        y0 = module(x0)
        seen = self._filtered(y0)
        y0_turned = turned(y0, turn)
        again = module(self._filtered(y0_turned))
        terms = {
            "consistency": weighted_mean(seen - x0, self.core),
            "equivariance": weighted_mean(again - y0_turned, self.ball),
        }
        loss = terms["consistency"] + settings.alpha * terms["equivariance"]
        if paired:
            x1 = batch["second"]
            terms["consistency_n2n"] = weighted_mean(seen - x1, self.core)
            terms["equivariance_n2n"] = weighted_mean(again - turned(module(x1), turn), self.ball)
            twins = terms["consistency_n2n"] + settings.alpha * terms["equivariance_n2n"]
            loss = loss + settings.beta * twins
        return loss, terms

    def _filtered(self, cubes: Tensor) -> Tensor:
        axes = (-3, -2, -1)
        coefficients = torch.fft.rfftn(cubes, dim=axes) * self.filter
        filtered: Tensor = torch.fft.irfftn(coefficients, s=cubes.shape[-3:], dim=axes)
        return filtered
