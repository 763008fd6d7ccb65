"""The share that an image has in the reference of a refinement, where its intensity is estimated.

A reference contains every image that it was made of. With h the image's share at a coefficient (``leverage``), the
reference without it is M' = (M - h x) / (1 - h), and x - M' has the variance sigma^2 / (1 - h). So the sums that a
scale follows from become

    sum Re conj(M') x (1 - h) / sigma^2 = sum (Re conj(M) x - h |x|^2) / sigma^2
    sum |M'|^2 (1 - h) / sigma^2        = sum (|M|^2 - 2 h Re conj(M) x + h^2 |x|^2) / (1 - h) sigma^2

and the noise level is the mean of |x - M|^2 / (1 - h) sigma^2. Where few images saw a direction h is large, and without
this their own noise would pass for signal.

The image was inserted at the poses of the iteration before. Its share is found again as far as the present pose is that
one: noise inside the particle's sphere of radius r is correlated over about 1/r in Fourier space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryoiso.physics.fourier import Disc
from cryoiso.refine.leverage import Leverage
from cryoiso.refine.likelihood import Whitened
from cryoiso.refine.search import Posterior

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class OwnShares:
    """The shares of a half-set's images in its reference."""

    leverage: Leverage
    rotation: Float[np.ndarray, "n 3 3"]
    """(N, 3, 3) poses at which the images were inserted, the mean of each."""
    shift_px: Float[np.ndarray, "n 2"]
    """(N, 2) likewise, of the content."""
    spread_deg: Float[np.ndarray, " n"]
    """(N,) angular spread of the views about that mean."""
    operations: Float[np.ndarray, "g 3 3"]
    """(g, 3, 3) of the point group."""
    radius_px: float
    """Of the particle."""

    def __call__(
        self, rows: Int[np.ndarray, " b"], white: Whitened, posterior: Posterior, disc: Disc
    ) -> Float[Tensor, "r k"]:
        """(R, K) share h of every sample of a batch's posterior.

        Args:
            rows: (B,) of the particle table.
            white: the batch; ``disc``: its first K coefficients.
        """
        each, k = posterior.particle, disc.size
        own = Whitened(white.data, white.weight[each, :k], disc, white.magnification)
        return self.leverage(own, rows[each.cpu().numpy()], posterior.rotation) * self._found_again(
            rows, posterior, disc
        )

    def _found_again(self, rows: np.ndarray, posterior: Posterior, disc: Disc) -> Tensor:
        """(R, K) correlation of an image inserted then with one read out now.

        A sphere's transform falls off as exp(-q^2 r^2 / 10) at a distance q; a rotation by t about a random axis moves
        a coefficient k by sqrt(2/3) |k| t.
        """
        each = posterior.particle.cpu().numpy()
        before = torch.as_tensor(self.rotation[rows], dtype=torch.float32, device=posterior.rotation.device)[
            posterior.particle
        ]
        mates = torch.as_tensor(np.asarray(self.operations), dtype=torch.float32, device=before.device)
        traces = torch.einsum("rij,rik,gkj->rg", posterior.rotation, before, mates)
        angle = torch.arccos(((traces.max(1).values - 1) / 2).clamp(-1, 1))
        spread = torch.as_tensor(np.radians(self.spread_deg[rows])[each], dtype=torch.float32, device=before.device)
        shift = torch.as_tensor(self.shift_px[rows], dtype=torch.float32, device=before.device)[posterior.particle]
        moved = self.radius_px**2 * (angle.square() + spread.square()) / 15
        moved = moved + (posterior.shift_px - shift).square().sum(1) / 4
        radius = np.hypot(disc.kx, disc.ky) * (2 * np.pi / disc.box_px)
        square = torch.as_tensor(np.square(radius), dtype=torch.float32, device=before.device)
        return torch.exp(-moved[:, None] * square)


def without_own(
    cross: Float[Tensor, "r k"], norm: Float[Tensor, "r k"], square: Float[Tensor, "r k"], own: Float[Tensor, "r k"]
) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r k"]]:
    """Re conj(M') x (1 - h) and |M'|^2 (1 - h) from Re conj(M) x, |M|^2, |x|^2 and h."""
    return cross - own * square, (norm - 2 * own * cross + own.square() * square) / (1 - own)
