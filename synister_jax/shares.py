# SPDX-License-Identifier: Apache-2.0
"""What the counts of a class in the parts should be, and how near they can come."""

import numpy as np

_ROUNDING = 1e-9
_WINDOW = 300  # counts on either side of a target that the lower bound looks at
_LARGEST_SUBSET_SUM = 10**10  # bits to shift


def targets(count: int, fractions: np.ndarray) -> np.ndarray:
    """[parts] int: truncated; the first part that is made takes the rest."""
    wanted = np.floor(fractions * count + _ROUNDING).astype(np.int64)
    wanted[np.flatnonzero(fractions)[0]] += count - wanted.sum()
    return wanted


def least_objective(sizes_of_groups: np.ndarray, fractions: np.ndarray) -> float:
    """Lower bound of sum over parts of |count - target| / target, for one class.

    Which counts can parts have at all? Sums of group sizes; the nearest such sums to
    the targets that leave such a sum to the first part are a relaxation that a solver's
    LP does not see.

    Args:
      sizes_of_groups: [groups] int, positive.
      fractions: [parts], adding up to 1.
    """
    total = int(sizes_of_groups.sum())
    sizes, many = np.unique(sizes_of_groups, return_counts=True)
    made = np.flatnonzero(fractions)
    if len(sizes) * total > _LARGEST_SUBSET_SUM:
        return 0.0
    is_sum = _subset_sums(sizes.tolist(), many.tolist(), total)
    wanted = targets(total, fractions)[made]
    weights = 1 / np.maximum(wanted, 1)
    near = [np.array([0])] * 2
    for i, target in enumerate(wanted[1:]):
        first = max(target - _WINDOW, 0)
        near[i] = first + np.flatnonzero(is_sum[first : target + _WINDOW + 1])
    others = near[0][:, None] + near[1]
    possible = (others <= total) & is_sum[np.minimum(others, total)]
    cost = weights[0] * np.abs(others - wanted[1:].sum())
    cost += weights[1] * np.abs(near[0] - wanted[1])[:, None]
    if len(made) == 3:
        cost += weights[2] * np.abs(near[1] - wanted[2])
    outside = (_WINDOW + 1) * weights[1:].min()
    return float(min(cost[possible].min(initial=np.inf), outside))


def _subset_sums(sizes: list[int], many: list[int], total: int) -> np.ndarray:
    """[total + 1] bool: whether some of the groups add up to the index."""
    sums = 1
    for size, left in zip(sizes, many, strict=True):
        take = 1
        while left:
            take = min(take, left)
            sums |= sums << (size * take)
            left -= take
            take *= 2
    octets = np.frombuffer(sums.to_bytes(total // 8 + 1, "little"), np.uint8)
    return np.unpackbits(octets, bitorder="little")[: total + 1].astype(bool)
