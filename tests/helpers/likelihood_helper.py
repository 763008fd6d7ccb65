"""Batches and posteriors of a small simulated set."""

from __future__ import annotations

import numpy as np
import torch

from cryoiso.refine.batches import BatchReader
from cryoiso.refine.schedule import global_grid
from cryoiso.refine.search import Posterior

BOX, PIXEL_A = 32, 6.0


GRID = global_grid(2, "C3")


def tensor(a) -> torch.Tensor:
    return torch.as_tensor(np.asarray(a, np.float32))


def the_batch(source, n: int = 12, radius: int = 15, pixel_A: float = PIXEL_A):
    return BatchReader(source, source.particles, pixel_A)._prepare(np.arange(n), radius)


def true_posterior(source, rows: np.ndarray, pixel_A: float = PIXEL_A) -> Posterior:
    n = len(rows)
    rotation, shift = tensor(source.particles.rotation[rows]), tensor(-source.particles.shift_A[rows] / pixel_A)
    one = torch.ones(n)
    return Posterior(
        torch.arange(n), rotation, shift, one, rotation, shift, one, one, one, torch.zeros(n), one - torch.inf
    )
