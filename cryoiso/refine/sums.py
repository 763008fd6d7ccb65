"""The Fourier sums of half-sets after reduction, separate for raw and auxiliary particles.

Auxiliary particles are made from a reference, initially the same for both half-sets, so their resolution and signal are
those of that reference. All decisions of a refinement are based on the raw particles; the auxiliary ones join them only
in the next references.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryoiso.core.protocols import Communicator
from cryoiso.core.types import HALVES
from cryoiso.parallel.partition import root_of_half
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.refine.model import BEST
from cryoiso.refine.rows import gathered_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped


def reduced(
    accumulator: SliceAccumulator, half: int, operations: Float[np.ndarray, "g 3 3"], comm: Communicator
) -> FourierSums | None:
    """Symmetrised sums of all ranks on the half's root, None elsewhere (collective). Consumes the accumulator."""
    if comm.size == 1:  # the sums stay where they are
        finished = [accumulator.finish()]
        accumulator.grid = torch.empty(0)
        return finished.pop().symmetrised(operations)
    bound = sum(comm.allgather(accumulator.bound))
    summed = comm.sum_to(accumulator.grid.cpu().numpy(), root_of_half(half, comm.size))
    if summed is None:
        accumulator.discard()
        return None
    device, total = accumulator.grid.device, [summed]
    del summed
    whole_sums = replace(accumulator, grid=torch.as_tensor(total.pop()).to(device), bound=bound)
    accumulator.discard()  # before there are further arrays of its size
    finished = [whole_sums.finish(release=True)]
    whole_sums.discard()
    return finished.pop().symmetrised(operations)


@dataclass
class HalfSums:
    """Sums by half-set, for the halves of which this rank is root."""

    auxiliary_weight: float = 1.0
    """Factor on the sums of the auxiliary particles when they join the raw ones, where ``factors`` has none."""
    raw: dict[int, FourierSums] = field(default_factory=dict)
    auxiliary: dict[int, FourierSums] = field(default_factory=dict)
    """Empty without auxiliary particles."""
    factors: dict[int, Float[torch.Tensor, " shells"]] = field(default_factory=dict)
    """Half -> (radius+1,) factor by shell, in place of the weight."""

    def put(self, half: int, auxiliary: bool, sums: FourierSums | None) -> None:
        if sums is not None:
            (self.auxiliary if auxiliary else self.raw)[half] = sums

    def limit_weight(self, largest: dict[int, Float[torch.Tensor, " shells"]]) -> None:
        """Limit the mean weight of the auxiliary particles in each shell.

        Args:
            largest: half -> (radius+1,) that weight, for the halves of which this rank is root.
        """
        for half, auxiliary_sums in self.auxiliary.items():
            own = auxiliary_sums.shell_mean_weight()[: auxiliary_sums.radius_px + 1].double().clamp(min=1e-30)
            self.factors[half] = (largest[half].to(own) / own).clamp(max=1.0).float()

    def factor(self, half: int) -> Float[torch.Tensor, " shells"]:
        """(radius+1,) factor on the sums of a half's auxiliary particles."""
        by_shell = self.factors.get(half)
        return torch.full((self.raw[half].radius_px + 1,), self.auxiliary_weight) if by_shell is None else by_shell

    def joined(self) -> dict[int, FourierSums]:
        """Half -> raw sums plus weight times those of the auxiliary particles, which are overwritten to save memory.
        Without auxiliary particles the raw sums themselves."""
        for half, auxiliary_sums in self.auxiliary.items():
            factor: float | torch.Tensor = self.auxiliary_weight
            if half in self.factors:
                factor = self.factors[half][auxiliary_sums.shells().clamp(max=auxiliary_sums.radius_px)]
            for target, own in (
                (auxiliary_sums.numerator, self.raw[half].numerator),
                (auxiliary_sums.weight, self.raw[half].weight),
            ):
                target.mul_(factor).add_(own)
        return self.auxiliary or self.raw

    def auxiliary_share(self, radius_px: int, comm: Communicator) -> float:
        """Share of the auxiliary particles in the references' weight within a radius (collective), before
        ``joined``."""
        shell = np.arange(radius_px + 1, dtype=np.float64)
        totals = np.zeros(2)
        for half in HALVES:
            own_shares = [0.0, 0.0]
            if half in self.raw and self.auxiliary:
                own, auxiliary_sums = (
                    sums[half].shell_mean_weight()[1 : radius_px + 1].cpu().numpy()
                    for sums in (self.raw, self.auxiliary)
                )
                # a shell has voxels in proportion to its area
                own_shares = [float(shell[1:] ** 2 @ own)]
                if half in self.factors:
                    own_shares.append(
                        float(shell[1:] ** 2 @ (auxiliary_sums * self.factors[half][1 : radius_px + 1].cpu().numpy()))
                    )
                else:
                    own_shares.append(self.auxiliary_weight * float(shell[1:] ** 2 @ auxiliary_sums))
            totals += np.array(comm.bcast(own_shares, root_of_half(half, comm.size)))
        return float(totals[1] / totals.sum()) if totals[1] > 0 else 0.0


def mean_of_halves(own: dict[int, Float[torch.Tensor, " shells"]], comm: Communicator) -> list[float]:
    """Mean of both half-sets' numbers (collective).

    Args:
        own: of the halves of which this rank is root.
    """
    known = {half: values.cpu().numpy().astype(np.float64) for half, values in own.items()}
    half_values = [comm.bcast(known.get(half), root_of_half(half, comm.size)) for half in HALVES]
    mean: list[float] = ((half_values[0] + half_values[1]) / 2).tolist()
    return mean


def gathered(
    parts: list[tuple[np.ndarray, np.ndarray]], n: int, comm: Communicator
) -> tuple[Float[np.ndarray, "{n} 3 3"], Float[np.ndarray, "{n} 2"], dict[str, Shaped[np.ndarray, " {n}"]]]:
    """Rotations (n, 3, 3), shifts (n, 2) and per-particle numbers of all ranks, on all ranks, in row order
    (collective).

    Args:
        parts: rows and the output of ``model.best_of`` for this rank's batches.
    """
    table = gathered_rows(parts, n, len(BEST), comm)
    columns = {name: table[:, i].copy() for i, name in enumerate(BEST) if name}
    return table[:, :9].reshape(n, 3, 3).copy(), table[:, 9:11].copy(), columns
