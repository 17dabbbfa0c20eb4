# SPDX-License-Identifier: Apache-2.0
"""How sure an accuracy is: intervals from drawing whole neurons again and again.

Synapses of one neuron are right or wrong together; drawing synapses would make
intervals far too narrow (Efron & Tibshirani 1993, chapter 8: draw the units that are
independent).
"""

from typing import TypedDict

import numpy as np

DRAWS = 1_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 50


class Interval(TypedDict):
    """95 % intervals [low, high]; None where there is none to tell."""

    accuracy: list[float] | None
    mean_class_accuracy: list[float] | None
    macro_f1: list[float] | None


def by_group(
    groups: np.ndarray, truth: np.ndarray, called: np.ndarray, classes: int
) -> Interval:
    """Percentile intervals of `accuracy.summary`'s accuracies, by whole groups.

    Args:
      groups: [n] number of each entry's group, what is drawn with replacement; below 0
        for an entry that is a group of its own.
      truth, called: [n] classes; entries below 0 are not counted.

    Returns:
      Intervals, None of fewer than two groups, and where all draws are equal, which
      tells nothing. The same for the same input: the draws begin from a fixed seed.
    """
    known = (truth >= 0) & (called >= 0)
    cells = classes**2
    cell = truth[known].astype(np.int64) * classes + called[known]
    group, alone = groups[known], groups[known] < 0
    names, place = np.unique(group[~alone], return_inverse=True)
    counts = np.bincount(place * cells + cell[~alone], minlength=len(names) * cells)
    # Of entries that are groups of their own those in a cell are one like the other:
    # how many of them are drawn is all that counts.
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
    """Interval of a share, for entries that are independent; None of none.

    Wilson 1927; unlike draws it says something where all are right.
    """
    if not count:
        return None
    from scipy import stats  # SciPy's statistics take a second to import

    interval = stats.binomtest(right, count).proportion_ci(LEVEL, "wilson")
    return [float(interval.low), float(interval.high)]


def _percentiles(values: np.ndarray) -> list[float] | None:
    outside = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [outside, 100 - outside]).tolist()
    return [low, high] if low < high else None


def _numbers(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Those of many confusions [m, k, k] at once; means over classes that occur."""
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
