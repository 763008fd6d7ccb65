"""Agreement of the two half-sets, and the signal power that follows from it.

The FSC of unregularised maps is dominated by the noise of directions that few images saw. The FSC of Wiener-filtered
maps weights every coefficient by how well it was measured, w / (w + 1/tau^2); for evenly measured directions both are
the same.
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
"""(D//2+1,) FSC of half -> map, inside the mask used for FSCs."""


@dataclass(frozen=True)
class Agreement:
    """FSC of the half-maps, and the Wiener terms that follow from it."""

    plain: Float[np.ndarray, " shells"]
    """(D//2+1,) of the unregularised maps."""
    weighted: Float[np.ndarray, " shells"]
    """(D//2+1,) of the Wiener-filtered maps; ``plain`` if they are not compared."""
    wiener: dict[int, Float[Tensor, " shells"]]
    """Half -> (radius+1,) term of each shell; for the halves of which this rank is root."""


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
    """Compare the half-sets (collective).

    The signal power is estimated twice: from the unregularised maps, then, with far less scatter, from maps filtered
    with the first estimate (``FourierSums.wiener_term`` has the derivation for both).

    Args:
        sums: of the halves of which this rank is root.
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
    """Half -> array, broadcast from the root of that half (collective)."""
    return {half: comm.bcast(own.get(half), root_of_half(half, comm.size)) for half in HALVES}
