"""What a generator sees of the reference: its CTF-multiplied projection at a particle's pose, on the images' scale."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cryoiso.core.errors import InputError
from cryoiso.core.protocols import Communicator, ImageSource
from cryoiso.core.rng import shuffle_keys
from cryoiso.core.types import DensityMap, Particles
from cryoiso.nets.hvae import pose_vector
from cryoiso.parallel.partition import owned_rows
from cryoiso.physics.simulation import Projector

SCALE_PARTICLES = 2048
SCALE_BLOCK = 64
FEW = 64
"""An optics group with fewer particles than this takes the scale of all."""


class Condition:
    """Projections and pose vectors of any particles with poses, for one reference.

    x = C(psi) P(phi) V + n (paper, eq. 1): this is C P V, with V on the images' grey scale by optics group.
    """

    def __init__(self, reference: DensityMap, scale: np.ndarray, device: str = "cpu") -> None:
        """
        Args:
            reference: on the images' grid.
            scale: (G,) factor of each optics group.
        """
        self.reference, self.scale, self.device = reference, np.asarray(scale, np.float64), device
        self._projector = Projector(reference, device=device)

    def images(self, particles: Particles, rows: np.ndarray) -> Tensor:
        """(n, 1, D, D) float32."""
        scale = torch.as_tensor(self.scale[particles.optics[rows]], dtype=torch.float32, device=self.device)
        return (self._projector.images(particles, rows) * scale[:, None, None])[:, None]

    def poses(self, particles: Particles, rows: np.ndarray) -> Tensor:
        """(n, 6): quaternion and shift over box."""
        rotation, shift_A = particles.require_poses()
        shift_px = shift_A[rows] / self.reference.pixel_size_A
        return pose_vector(
            torch.as_tensor(np.asarray(rotation[rows], np.float32), device=self.device),
            torch.as_tensor(np.asarray(shift_px, np.float32), device=self.device),
            self.reference.box_px,
        )


def fit_scale(
    source: ImageSource, particles: Particles, rows: np.ndarray, reference: DensityMap, comm: Communicator, seed: int
) -> np.ndarray:
    """Least-squares grey scale of a reference by optics group, sum <x, p> / sum <p, p> (collective).

    Images and projections lose their means first, so that the density of the solvent does not matter.

    Args:
        source: images, row for row those of ``particles``.
        particles: with poses.
        rows: which to fit on (one half-set, say); at most 2,048 of them are read.
        reference: on the images' grid.

    Returns:
        (G,) one factor a group; groups without enough particles get the common one. The same bits on any number of
        ranks.

    Raises:
        InputError: the images do not correlate with the reference at these poses.
    """
    keys = shuffle_keys(seed, "scale of the reference", particles.uid[rows])
    chosen = np.sort(rows[np.argsort(keys, kind="stable")[:SCALE_PARTICLES]])
    projector = Projector(reference)
    own_rows = owned_rows(len(chosen), SCALE_BLOCK, comm.rank, comm.size)
    terms = []
    for start in range(own_rows.start, own_rows.stop, SCALE_BLOCK):
        part = chosen[start : min(start + SCALE_BLOCK, own_rows.stop)]
        terms.append(_terms(source.read(part), projector.images(particles, part).numpy()))
    gathered = [t for share in comm.allgather(terms) for t in share]
    all_terms = np.concatenate(gathered)
    return _factors(all_terms, particles.optics[chosen], len(particles.groups))


def _terms(images: np.ndarray, projections: np.ndarray) -> np.ndarray:
    """(n, 2): <x, p> and <p, p> of each image, means removed."""
    x = images.astype(np.float64) - images.mean((1, 2), dtype=np.float64)[:, None, None]
    p = projections.astype(np.float64) - projections.mean((1, 2), dtype=np.float64)[:, None, None]
    return np.stack([(x * p).sum((1, 2)), (p * p).sum((1, 2))], 1)


def _factors(terms: np.ndarray, optics: np.ndarray, n_groups: int) -> np.ndarray:
    cross, square = terms.sum(0)
    common = cross / square if square > 0 else 0.0
    if not np.isfinite(common) or common <= 0:
        raise InputError(
            "the reference does not match the images at their poses: no positive grey scale fits",
            expected="images that correlate with the reference's projections",
            found=f"factor {common:.3g}",
            hint="Check the reference, the poses and the sign of the images.",
            code="reference-does-not-match-images",
        )
    scale = np.full(n_groups, common)
    for group in range(n_groups):
        group_sums = terms[optics == group].sum(0)
        if (optics == group).sum() >= FEW and group_sums[0] > 0 and group_sums[1] > 0:
            scale[group] = group_sums[0] / group_sums[1]
    return scale
