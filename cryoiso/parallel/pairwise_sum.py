"""Sums in pairs: halves of halves, so that it does not matter to the last bit among how many ranks a sum is divided."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def sum_in_pairs(part: Callable[[int], list[Tensor]], first: int, last: int) -> list[Tensor]:
    """part(first) + ... + part(last - 1), tensor by tensor: the first half plus the second, each of them likewise.

    Two ranks get the halves from ``partition.owned_chunks``, four ranks their halves if each rank gets as many, and so
    on: the sum over ranks of the sums on each rank is then the same tree, and the same bits, as the sum on one rank.

    Args:
        part: called once for each index, upwards; its tensors are overwritten. Of n parts, log2(n) + 1 are in memory
            at most (rounded up).

    >>> from torch import tensor
    >>> sum_in_pairs(lambda i: [tensor(float(i)), tensor([i, 1])], 0, 5)
    [tensor(10.), tensor([10,  5])]
    """
    if last <= first:
        raise ValueError("nothing to add up")
    if last - first == 1:
        return part(first)
    middle = (first + last + 1) // 2
    total = sum_in_pairs(part, first, middle)
    for left, right in zip(total, sum_in_pairs(part, middle, last), strict=True):
        left.add_(right)
    return total
