"""What a refinement that estimates intensities keeps to find the images' own shares in its references again."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from cryoiso.core.protocols import Communicator, RefineRequest
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.physics.symmetry import point_group
from cryoiso.refine.agreement import on_every_rank
from cryoiso.refine.junk import JUNK_COLUMN
from cryoiso.refine.leverage import Leverage, cropped, noise_change, own_response, total_weight
from cryoiso.refine.model import Model
from cryoiso.refine.noise import weight_scale
from cryoiso.refine.own_shares import OwnShares

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class ReferenceShares:
    """Of one refinement."""

    request: RefineRequest
    diameter_A: float
    limit_px: int
    """Largest radius that is back-projected."""
    support: Float[np.ndarray, "box box box"]
    """(D, D, D) sphere, or the given mask, inside which references are."""
    device: str
    filled: dict[int, float] = field(default_factory=dict)
    """Half -> volume of the mask of its last reference over that of ``support``; of the halves that this rank is root
    of."""

    @property
    def wanted(self) -> bool:
        """Whether references are linear in the images, and intensities estimated."""
        return self.request.settings.scale != "none" and self.request.correction is None

    @cached_property
    def kappa(self) -> float:
        """See ``leverage.own_response``. It is linear in the mask, so that smaller ones have a smaller value."""
        padding, seed = self.request.settings.padding, self.request.seed
        return own_response(len(self.support), self.limit_px, padding, self.support, seed)

    def note(self, half: int, mask: Float[np.ndarray, "box box box"] | None) -> None:
        """The mask (D, D, D) of the next reference of a half; None: ``support`` alone."""
        support_sum = self.support.sum(dtype=np.float64)
        self.filled[half] = 1.0 if mask is None else float((mask * self.support).sum(dtype=np.float64) / support_sum)

    def of(self, model: Model, half: int) -> OwnShares | None:
        """Shares of the images in the references of a model; None where these were not made of them."""
        if half not in model.total_weight:
            return None
        particles, pixel_A = self.request.source.particles, self.request.reference.pixel_size_A
        share = 1 - model.columns.get(JUNK_COLUMN, np.zeros(len(particles)))
        box, padding = len(self.support), self.request.settings.padding
        leverage = Leverage.of(model.total_weight[half], share, box, padding, self.device)
        shift_px = -model.shift_A / particles.group_values("pixel_size_A")[:, None]
        return OwnShares(
            leverage, model.rotation, shift_px, model.columns["cryoisoPoseSpread"], point_group(self.request.symmetry),
            self.diameter_A / 2 / pixel_A,
        )  # fmt: skip

    def total_weight(
        self, model: Model, sigma2: np.ndarray, sums: dict[int, FourierSums], wiener: dict[int, Tensor],
        shared_px: int, radius_px: int, comm: Communicator,
    ) -> dict[int, np.ndarray]:  # fmt: skip
        """``Model.total_weight`` of the next references (collective).

        Args:
            model: of the iteration that made the sums; ``sigma2`` (G, S): noise spectra of the next one.
            sums: of the halves that this rank is root of; ``wiener``: their terms.
            shared_px: up to this shell both halves have common sums.
            radius_px: of the next search.
        """
        if not self.wanted:
            return {}
        scale = self.kappa * weight_scale(model.sigma2 / model.intensity.largest_weight())
        padding, change, own = self.request.settings.padding, noise_change(model.sigma2, sigma2), {}
        for half, half_sums in sums.items():
            total = total_weight(half_sums, wiener[half], shared_px, scale * self.filled[half], change)
            own[half] = cropped(total, padding, radius_px)
        return on_every_rank(own, comm)
