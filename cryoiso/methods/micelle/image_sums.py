"""One pass over the images: all that least squares needs to know of them, for both half-sets apart.

For poses A_i, CTFs c_i and centred coefficients y_i of the images: sum c_i y_i and sum c_i^2, inserted into a Fourier
grid. The copies that the point group makes of every view are inserted as views of their own, which is exact, and
divided by their number at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cryoiso.core.log import ProgressLine
from cryoiso.core.protocols import Communicator
from cryoiso.core.types import HALVES
from cryoiso.parallel.partition import owned_chunks, root_of_half
from cryoiso.physics.backproject import SliceAccumulator
from cryoiso.physics.fourier_sums import FourierSums
from cryoiso.refine.batches import BatchReader
from cryoiso.refine.likelihood import with_magnification
from cryoiso.refine.offsets import check_poses
from cryoiso.refine.reconstruct import weigh

LEAST_CTF = 0.1
"""Of premultiplied images, coefficients with a smaller |c| count less in the power: the image over c is not known."""


@dataclass
class MicelleSums:
    """What has been read of one half-set so far, reduced over ranks; on the half's root, elsewhere ``grid`` is None."""

    grid: np.ndarray | None = None
    """(2h+1, 2h+1, h+1, 3) int64, see ``SliceAccumulator``."""
    bound: float = 0.0
    done: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(b,) batches that are in the sums."""
    power: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(b,) sum of |y|^2 over a batch's coefficients (see LEAST_CTF)."""
    count: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(b,) how many coefficients that are (see LEAST_CTF)."""

    @property
    def mean_power(self) -> float:
        """Mean |y|^2 of a coefficient, added in the order of batches."""
        return float(self.power.sum() / max(self.count.sum(), 1.0))

    def arrays(self, half: int) -> dict[str, np.ndarray]:
        """For a checkpoint; needs the grid."""
        named = {"grid": self.grid, "done": self.done, "power": self.power, "count": self.count}
        return {f"{k}{half}": np.asarray(v) for k, v in named.items()} | {f"bound{half}": np.array(self.bound)}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray], half: int) -> MicelleSums:
        """From :meth:`arrays`."""
        values: dict[str, Any] = {k: arrays[f"{k}{half}"] for k in ("grid", "done", "power", "count")}
        return cls(bound=float(arrays[f"bound{half}"]), **values)


class SumPass:
    """Reads the images once, both halves at the same pace, so that both have a map whenever it is interrupted."""

    def __init__(
        self, reader: BatchReader, operations: np.ndarray, radius_px: int, padding: int, comm: Communicator
    ) -> None:
        """
        Args:
            reader: with the zero frequency.
            operations: (g, 3, 3) of the point group.
            radius_px: frequencies up to here, in pixels of the transform of the box.
        """
        self.reader, self.operations, self.comm = reader, operations, comm
        self.radius, self.padding = radius_px, padding
        self.plans = {half: reader.plan((half,)) for half in HALVES}
        self.rotation, self.shift_A = reader.particles.require_poses()
        check_poses(reader.particles, reader.source.box_px)
        self.pixel = reader.particles.group_values("pixel_size_A")

    def run(self, before: dict[int, MicelleSums]) -> tuple[dict[int, MicelleSums], bool]:
        """Adds what is not yet in ``before`` (collective).

        Returns:
            the sums of both halves, and whether all images are in them (False: stopped by a signal).
        """
        todo = sorted(
            (i / len(plan), half, i)
            for half, plan in self.plans.items()
            for i in set(range(len(plan))) - set(before[half].done.tolist())
        )
        chunks = owned_chunks(len(todo), self.comm.rank, self.comm.size)
        most = max(len(owned_chunks(len(todo), r, self.comm.size)) for r in range(self.comm.size))
        empty = SliceAccumulator.empty(self.reader.source.box_px, self.radius, self.padding, self.reader.device)
        accumulators = {1: empty, 2: replace(empty, grid=torch.zeros_like(empty.grid))}
        results: list[tuple[int, int, float, float]] = []
        line = ProgressLine("reading images", most, active=self.comm.rank == 0)
        stopped = False
        for i in range(most):
            stopped = self.comm.stop_requested()
            if stopped:
                break
            if i < len(chunks):
                _, half, number = todo[chunks[i]]
                power, count = self._insert(self.plans[half][number], accumulators[half])
                results.append((half, number, power, count))
            line.update(i + 1)
        line.close("" if stopped else f"{sum(len(rows) for plan in self.plans.values() for rows in plan):,} images")
        return self._reduce(accumulators, results, before), not stopped

    def _insert(self, rows: np.ndarray, accumulator: SliceAccumulator) -> tuple[float, float]:
        """Back-projects a batch; its power and its number of coefficients."""
        batch = self.reader.read(rows, self.radius)
        content_px = torch.as_tensor(-self.shift_A[rows] / self.pixel[rows, None], device=batch.ctf.device)
        data, weight = torch.empty_like(batch.coefficients), torch.empty_like(batch.ctf)
        weigh(batch, content_px, data, weight)
        for operation in self.operations:
            pose = torch.as_tensor(self.rotation[rows] @ operation, dtype=torch.float32, device=batch.ctf.device)
            accumulator.insert(data, weight, with_magnification(pose, batch.magnification), batch.disc)
        y = batch.coefficients.cpu().numpy()
        power = y.real.astype(np.float64) ** 2 + y.imag.astype(np.float64) ** 2
        counted = batch.power_weight(full_from=LEAST_CTF)
        if counted is None:
            return float(np.sum(power)), y.size
        each = counted.cpu().numpy().astype(np.float64)
        return float(np.sum(each * power)), float(np.sum(each))

    def _reduce(
        self,
        accumulators: dict[int, SliceAccumulator],
        results: list[tuple[int, int, float, float]],
        before: dict[int, MicelleSums],
    ) -> dict[int, MicelleSums]:
        """Sums over ranks, added to what was there before; every half on its root."""
        everything = sorted(item for part in self.comm.allgather(results) for item in part)
        result = {}
        for half, accumulator in accumulators.items():
            root = root_of_half(half, self.comm.size)
            bound = before[half].bound + sum(self.comm.allgather(accumulator.bound))
            grid = self.comm.sum_to(accumulator.grid.cpu().numpy(), root)
            old = before[half]
            if grid is not None and old.grid is not None:
                grid = grid + old.grid
            new = np.array([item[1:] for item in everything if item[0] == half]).reshape(-1, 3)
            columns = np.concatenate([np.stack([old.done, old.power, old.count], 1), new])
            columns = columns[np.argsort(columns[:, 0], kind="stable")]
            result[half] = MicelleSums(grid, bound, columns[:, 0].astype(np.int64), columns[:, 1], columns[:, 2])
        return result

    def finished(self, sums: MicelleSums, device: str) -> FourierSums:
        """The sums as numbers, on the half's root, a copy of the point group counted once."""
        assert sums.grid is not None
        empty = SliceAccumulator(
            torch.as_tensor(sums.grid).to(device), self.reader.source.box_px, self.padding, self.radius, sums.bound
        )
        full_sums, share = empty.finish(), 1.0 / len(self.operations)
        return replace(full_sums, numerator=full_sums.numerator * share, weight=full_sums.weight * share)
