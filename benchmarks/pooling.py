"""Shares and means of several seeds: pooled counts with Wilson's interval, means with standard errors, and paired
differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    Args:
        hits: of n. z: quantile of the normal distribution; 1.96 gives 95 %.

    Returns:
        Lower and upper end, 0 to 1; (0, 1) of nothing.
    """
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, z * z / n
    centre = (share + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * float(np.sqrt(share * (1 - share) / n + z2 / (4 * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def pooled(counts: Sequence[dict[str, int]], hits: str, of: str) -> tuple[int, int] | None:
    """Sums of two counts over seeds; None where a seed lacks them or none was counted."""
    if not counts or any(hits not in c or of not in c for c in counts):
        return None
    n = sum(c[of] for c in counts)
    return (sum(c[hits] for c in counts), n) if n else None


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None of a single value."""
    x = np.asarray(values, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None


def paired(one: dict[int, float], other: dict[int, float]) -> tuple[float, float | None, int] | None:
    """Mean of other - one over the seeds that both have, its standard error, and how many; None of no common seed."""
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    return (*mean_error([other[s] - one[s] for s in seeds]), len(seeds))
