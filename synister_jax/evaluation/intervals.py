# SPDX-License-Identifier: Apache-2.0
"""Computes confidence intervals of accuracies by drawing whole neurons (bootstrap).

The synapses of one neuron are not independent: they tend to be all right or all wrong.
Drawing single synapses would make the intervals far too narrow. The units that are
drawn must be independent (Efron & Tibshirani 1993, chapter 8).
"""

from typing import TypedDict

import numpy as np

DRAWS = 1_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 50


class Interval(TypedDict):
    """The 95 % intervals [low, high]; None where no interval can be computed."""

    accuracy: list[float] | None
    mean_class_accuracy: list[float] | None
    macro_f1: list[float] | None


def by_group(
    groups: np.ndarray, truth: np.ndarray, called: np.ndarray, classes: int
) -> Interval:
    """Returns percentile intervals of the accuracies that `accuracy.summary` computes.

    Whole groups are drawn with replacement. The draws begin from a fixed seed, so equal
    input gives equal intervals.

    Args:
      groups: [n] number of the group of each entry; a number below 0 means that the
        entry is a group of its own.
      truth: [n] index of the true class; entries below 0 do not count.
      called: [n] index of the called class; entries below 0 do not count.
      classes: the number of classes.

    Returns:
      The intervals. An interval is None if there are fewer than two groups. It is also
      None if all draws are equal, because they carry no information.
    """
    known = (truth >= 0) & (called >= 0)
    cells = classes**2
    cell = truth[known].astype(np.int64) * classes + called[known]
    group, alone = groups[known], groups[known] < 0
    names, place = np.unique(group[~alone], return_inverse=True)
    counts = np.bincount(place * cells + cell[~alone], minlength=len(names) * cells)
    # Entries that are groups of their own are interchangeable within a cell of the
    # confusion. Only the number of drawn entries of each cell matters.
    counts = np.concatenate([counts.reshape(-1, cells), np.eye(cells)])
    sizes = np.bincount(cell[alone], minlength=cells)
    weights = np.concatenate([np.ones(len(names)), sizes])
    total = int(weights.sum())
    if total < 2:
        return {"accuracy": None, "mean_class_accuracy": None, "macro_f1": None}
    rng = np.random.default_rng(0)
    found = []
    for _ in range(0, DRAWS, _DRAWS_AT_ONCE):
        drawn = rng.multinomial(total, weights / total, _DRAWS_AT_ONCE)
        found.append(_numbers((drawn @ counts).reshape(-1, classes, classes)))

    def of(name: str) -> list[float] | None:
        return _percentiles(np.concatenate([each[name] for each in found]))

    return {
        "accuracy": of("accuracy"),
        "mean_class_accuracy": of("mean_class_accuracy"),
        "macro_f1": of("macro_f1"),
    }


def wilson(right: int, count: int) -> list[float] | None:
    """Returns the 95 % Wilson interval of the share right / count.

    The entries must be independent. Unlike drawing, the method of Wilson (1927) also
    gives an interval where all entries are right. The function returns None where
    `count` is 0.
    """
    if not count:
        return None
    from scipy import stats  # takes a second to import

    interval = stats.binomtest(right, count).proportion_ci(LEVEL, "wilson")
    return [float(interval.low), float(interval.high)]


def _percentiles(values: np.ndarray) -> list[float] | None:
    outside = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [outside, 100 - outside]).tolist()
    return [low, high] if low < high else None


def _numbers(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the accuracies [m] of many confusions [m, k, k] at once.

    Means over the classes count only the classes that occur.
    """
    support, called = confusion.sum(axis=2), confusion.sum(axis=1)
    right = np.diagonal(confusion, axis1=1, axis2=2)
    occurs = support > 0
    with np.errstate(invalid="ignore"):
        recall = np.where(occurs, right / support, 0)
        f1 = np.where(occurs, 2 * right / (support + called), 0)
    return {
        "accuracy": right.sum(axis=1) / support.sum(axis=1),
        "mean_class_accuracy": recall.sum(axis=1) / occurs.sum(axis=1),
        "macro_f1": f1.sum(axis=1) / occurs.sum(axis=1),
    }
