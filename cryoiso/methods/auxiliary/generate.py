"""Making the images of auxiliary particles: shard by shard, in batches that do not depend on who makes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from cryoiso.core.types import Particles
from cryoiso.io.shardset import ShardSet, plan_shards
from cryoiso.methods.auxiliary.generator import BATCH, Generator


class Maker:
    """The images of a set of auxiliary particles by the generators of its half-sets."""

    def __init__(
        self, particles: Particles, generators: dict[int, Generator], temperature: float, seed: int, device: str = "cpu"
    ) -> None:
        """
        Args:
            particles: both halves, those of a half side by side.
            generators: half -> generator, its network on ``device``.
            temperature: factor on the spread of latents and pixel noise.
        """
        self.particles, self.generators = particles, generators
        self.temperature, self.seed, self.device = temperature, seed, device
        self.conditions = {half: g.condition(device) for half, g in generators.items()}

    def images(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images and the noise-free projections in them, (n, D, D) float32 each, of rows of one half."""
        half = int(self.particles.half[rows[0]])  # type: ignore[index]
        generated, clean = self.generators[half].images(
            self.conditions[half], self.particles, rows, self.temperature, self.seed
        )
        return generated.cpu().numpy(), clean.cpu().numpy()

    def at_temperature(self, temperature: float) -> Maker:
        """The same with another temperature."""
        return Maker(self.particles, self.generators, temperature, self.seed, self.device)

    def blocks(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Images of rows start..stop in order."""
        for rows in batches(self.particles.half, start, stop):  # type: ignore[arg-type]
            yield self.images(rows)[0]

    def plan(self, parameters_digest: str) -> ShardSet:
        """How the set is cut into shards.

        Args:
            parameters_digest: names the generators' parameters.
        """
        box = next(iter(self.generators.values())).reference.box_px
        identity = json.dumps([parameters_digest, self.temperature, self.seed])
        return plan_shards(self.particles, box, identity, "auxiliary particles, made by a trained generator")


def batches(half: np.ndarray, start: int, stop: int) -> Iterator[np.ndarray]:
    """Rows start..stop in batches of at most BATCH, none across two halves or a multiple of BATCH."""
    edges = set(range(start, stop, BATCH)) | {start}
    edges |= {start + int(i) + 1 for i in np.flatnonzero(np.diff(half[start:stop]))}
    ordered = [*sorted(edges), stop]
    for a, b in pairwise(ordered):
        yield np.arange(a, b)
