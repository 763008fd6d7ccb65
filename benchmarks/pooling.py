"""Shares and means of several seeds: pooled counts with Wilson's interval, means with standard errors, and differences
of the same seeds with Student's interval."""

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


def student95(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of normal values (Student); None of a single value."""
    from scipy.stats import t

    mean, error = mean_error(values)
    if error is None:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def differences(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """other - one of the seeds that both have, in their order."""
    return [other[seed] - one[seed] for seed in sorted(set(one) & set(other))]
