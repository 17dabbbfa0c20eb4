# SPDX-License-Identifier: Apache-2.0
"""The counts that a split aims at, and how close to them it can come."""

import numpy as np

_ROUNDING = 1e-9
_WINDOW = 300  # the lower bound looks at this many counts on either side of a target
_LARGEST_SUBSET_SUM = 10**10  # the lower bound shifts at most about this many bits


def targets(count: int, fractions: np.ndarray) -> np.ndarray:
    """Returns the target count of each part, [parts] int.

    The targets are truncated. The first part with a fraction above 0 takes the rest.
    """
    wanted = np.floor(fractions * count + _ROUNDING).astype(np.int64)
    wanted[np.flatnonzero(fractions)[0]] += count - wanted.sum()
    return wanted


def least_objective(sizes_of_groups: np.ndarray, fractions: np.ndarray) -> float:
    """Returns a lower bound of the objective of one class.

    The objective is the sum over the parts of |count - target| / target. The count of
    every part is a sum of group sizes. The bound uses the sums nearest to the targets,
    if the rest for the first part is such a sum too. The linear relaxation of the
    solver does not find this bound. The bound is 0 where its computation is too large.

    Args:
      sizes_of_groups: [groups] int, positive.
      fractions: [parts] float, which add up to 1.
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
    """Returns whether some of the groups add up to each index, [total + 1] bool."""
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
