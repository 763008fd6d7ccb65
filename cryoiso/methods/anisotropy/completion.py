"""Training by completion: the network learns to undo what the measurement did to turned copies of the map itself.

With y the present estimate of the map (in the first round what the solvent constraint makes of A x), T a random
rotation of the whole of it, n noise like that of the half-map, and S a few steps of the solvent constraint:

    L = |f(S[A (T y + n)]) - T y'|     y' = y, or, in mode paired, the estimate of the other half-map (and n = 0)

on sub-maps of T y. Turned, directions that A cuts out lie mostly where y was measured, so that the target is known
there. The correction applies the same steps to the data: f(S[A x]).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cryoiso.core.rng import generator, stable_hash
from cryoiso.methods.anisotropy.networktask import NetworkTask
from cryoiso.methods.anisotropy.settings import Correction
from cryoiso.methods.anisotropy.solvent import AXES, Solvent, on_device
from cryoiso.methods.anisotropy.submaps import EDGE, axis_rotations, digest_of, turned
from cryoiso.nets.unet import inner
from cryoiso.parallel.partition import owned_rows
from cryoiso.physics.so3 import random_rotations

VOLUME_COST = 32
"""A turned volume costs about as much as training on a sub-map, divided by this, for each sub-map that fits into it."""


class CompletionTask(NetworkTask):
    """The task that ``train.loop.train`` works on (its ``TrainingTask``)."""

    def __init__(
        self,
        estimates: list[np.ndarray],
        solvent: Solvent,
        particle_mask: np.ndarray,
        settings: Correction,
        seed: int,
        *,
        noise: list[Tensor] | None = None,
        device: str = "cpu",
        index: int = 0,
        size: int = 1,
        label: str = "",
        warm: dict[str, np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            estimates: y of one or (paired) two half-maps, (D, D, D), normalised, solvent at 0.
            solvent: the filter and the band, on ``device``.
            particle_mask: (D, D, D) bool; centres of sub-maps are drawn from it, turned with the map.
            noise: per estimate, from ``solvent.noise_amplitude``; None: no noise is added.
            device, index, size: of this rank and its place in its group.
            label: names the network and the round.
            warm: parameters to begin with; None: new ones.
        """
        self.solvent, self.settings, self.seed, self.label, self.warm = solvent, settings, seed, label, warm
        self.device, self.batch = device, settings.batch
        self.rows = owned_rows(self.batch, 1, index, size)
        self.box, self.cube = estimates[0].shape[0], settings.cube_px
        self.estimates = on_device(np.stack(estimates), device)
        self.noise = None if noise is None else torch.stack(noise).to(device)
        self.offsets = (np.argwhere(particle_mask) - self.box // 2)[:, ::-1]
        self.margin = self.cube // EDGE
        self.steps_a_turn = max(1, round((self.box / self.cube) ** 3 / VOLUME_COST))
        self._turned: tuple[int, Tensor, Tensor] | None = None
        self._given = digest_of(
            *estimates, solvent.fsc_filter.cpu().numpy(), np.asarray(particle_mask), *_arrays(noise)
        )

    def rotation(self, turn: int) -> np.ndarray:
        """(3, 3) of a turn, the same on every rank."""
        rng = generator(self.seed, f"rotation of network {self.label}", turn)
        choices = random_rotations(rng, 1) if self.settings.rotations == "so3" else axis_rotations()[[rng.integers(24)]]
        rotation: np.ndarray = choices[0]
        return rotation

    def prepare(self, step: int) -> dict[str, Any]:
        """This rank's places of sub-maps, (b, 3) first voxels (z, y, x)."""
        rotation = self.rotation(step // self.steps_a_turn)
        corners = []
        for row in self.rows:
            rng = generator(self.seed, f"sub-map of network {self.label}", step * self.batch + row)
            offset = rotation @ self.offsets[rng.integers(len(self.offsets))]
            corner = np.rint(offset[::-1]).astype(int) + max(self.box, self.cube) // 2 - self.cube // 2
            corners.append(np.clip(corner, 0, max(0, self.box - self.cube)))
        return {"corner": np.array(corners)}

    def loss(self, module: nn.Module, batch: Any, step: int, attempt: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the module's docstring, and what it would be without a network."""
        inputs, target = (self._cut(volume, batch["corner"]) for volume in self._volumes(step // self.steps_a_turn))
        target = inner(target, self.margin)
        loss = (module(inputs, self.margin) - target).abs().mean()
        return loss, {"without_network": (inner(inputs, self.margin) - target).abs().mean()}

    @torch.no_grad()
    def _volumes(self, turn: int) -> tuple[Tensor, Tensor]:
        """(D, D, D) what the network sees and what it is to make of it, for one rotation."""
        if self._turned is None or self._turned[0] != turn:
            rng = generator(self.seed, f"half of network {self.label}", turn)
            index = int(rng.integers(len(self.estimates)))
            other = len(self.estimates) - 1 - index
            rotation = torch.from_numpy(self.rotation(turn).astype(np.float32)).to(self.device)
            volumes = turned(self.estimates[[index, other] if other != index else [index]][None], rotation[None])[0]
            measured = self.solvent.measured(volumes[0])
            if self.noise is not None:
                measured = measured + self._noise(index, turn) * self.solvent.fsc_filter
            filled = self.solvent.filled(measured, self.box, self.settings.solvent_steps)
            self._turned = turn, self._padded(filled), self._padded(volumes[-1])
        return self._turned[1:]

    def _noise(self, half: int, turn: int) -> Tensor:
        """Coefficients of noise with the half-map's spectrum; its directions are those of A and do not turn."""
        assert self.noise is not None
        random = torch.Generator(self.device).manual_seed(stable_hash(f"{self.seed}/{self.label}/{turn}") % 2**63)
        white = torch.randn((self.box,) * 3, generator=random, device=self.device)
        coloured: Tensor = torch.fft.rfftn(white, dim=AXES) * self.noise[half]
        return coloured

    def _padded(self, volume: Tensor) -> Tensor:
        """A box smaller than a sub-map in the middle of one."""
        if self.box >= self.cube:
            return volume
        before = self.cube // 2 - self.box // 2
        return functional.pad(volume, (before, self.cube - self.box - before) * 3)

    def _cut(self, volume: Tensor, corners: np.ndarray) -> Tensor:
        """(b, 1, C, C, C)."""
        cubes = [volume[tuple(slice(c, c + self.cube) for c in corner)] for corner in corners.tolist()]
        return torch.stack(cubes)[:, None].contiguous(memory_format=torch.channels_last_3d)


def _arrays(tensors: list[Tensor] | None) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in tensors or []]
