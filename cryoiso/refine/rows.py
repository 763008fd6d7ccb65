"""Numbers per particle, from the ranks that found them to all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryoiso.core.protocols import Communicator

if TYPE_CHECKING:
    from jaxtyping import Float


def gathered_rows(
    parts: list[tuple[np.ndarray, np.ndarray]], n: int, width: int, comm: Communicator
) -> Float[np.ndarray, "{n} {width}"]:
    """(n, width) float64: the numbers of all ranks by row, zero where no rank has any, on all ranks (collective).

    Args:
        parts: rows and their numbers (rows, width), of this rank's batches.
    """
    rows = np.concatenate([rows for rows, _ in parts] or [np.empty(0, np.int64)])
    facts = np.concatenate([facts for _, facts in parts] or [np.empty((0, width))])
    table = np.zeros((n, width))
    table[comm.concat_all(rows)] = comm.concat_all(facts)
    return table
