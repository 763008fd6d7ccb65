"""How far two half-sets agree, and what that says about the power of their signal.

The FSC of unregularised maps is drowned by the noise of directions that few images saw. That of Wiener-filtered maps
counts every coefficient by how well it was measured, w / (w + 1/tau^2); where all directions were measured alike the
two are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from cryoiso.core.protocols import Communicator
from cryoiso.core.types import HALVES
from cryoiso.parallel.partition import root_of_half
from cryoiso.physics.fourier_sums import FourierSums

if TYPE_CHECKING:
    from jaxtyping import Float

HalfMapFsc = Callable[[dict[int, np.ndarray]], np.ndarray]
"""(D//2+1,) FSC of half -> map, inside the mask that an FSC is taken in."""


@dataclass(frozen=True)
class Agreement:
    """FSC of the half-maps, and the Wiener terms that follow from it."""

    plain: Float[np.ndarray, " shells"]
    """(D//2+1,) of the unregularised maps."""
    weighted: Float[np.ndarray, " shells"]
    """(D//2+1,) of the Wiener-filtered maps; ``plain`` where none was asked for."""
    wiener: dict[int, Float[Tensor, " shells"]]
    """Half -> (radius+1,) term of each shell; of the halves that this rank is root of."""


def agreement(
    sums: dict[int, FourierSums],
    plain: dict[int, np.ndarray],
    fsc: HalfMapFsc,
    comm: Communicator,
    *,
    uneven: bool = True,
    weighted: bool = True,
    fsc_filtered: HalfMapFsc | None = None,
) -> Agreement:
    """Compares the half-sets (collective).

    The signal power is found twice: from the unregularised maps, then, with far less scatter, from maps filtered with
    the first estimate (``FourierSums.wiener_term`` derives it for either).

    Args:
        sums: of the halves that this rank is root of.
        plain: half -> unregularised map, on every rank.
        uneven: whether the noise is that of unevenly measured directions; False: that of the mean weight.
        weighted: whether to compare filtered maps too.
        fsc_filtered: FSC of the filtered maps (default: ``fsc``).
    """
    curve = fsc(plain)
    wiener = {half: s.wiener_term(curve, uneven=uneven) for half, s in sums.items()}
    if not weighted:
        return Agreement(curve, curve, wiener)
    better = (fsc_filtered or fsc)(on_every_rank({h: as_map(s.reconstruct(wiener[h])) for h, s in sums.items()}, comm))
    if uneven:
        wiener = {half: s.wiener_term(better, wiener[half]) for half, s in sums.items()}
    return Agreement(curve, better, wiener)


def as_map(volume: Float[Tensor, "box box box"]) -> Float[np.ndarray, "box box box"]:
    """(D, D, D) float32 in host memory."""
    return volume.cpu().numpy().astype(np.float32, copy=False)


def on_every_rank(own: dict[int, np.ndarray], comm: Communicator) -> dict[int, np.ndarray]:
    """Half -> array, sent from the root of that half (collective)."""
    return {half: comm.bcast(own.get(half), root_of_half(half, comm.size)) for half in HALVES}
