# SPDX-License-Identifier: Apache-2.0
"""How sure an accuracy is: intervals from drawing whole neurons again and again.

Synapses of one neuron are right or wrong together; drawing synapses would make
intervals far too narrow (Efron & Tibshirani 1993, chapter 8: draw the units that are
independent).
"""

import numpy as np

DRAWS = 1_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 50


def intervals(
    groups: np.ndarray, truth: np.ndarray, called: np.ndarray, classes: int
) -> dict[str, list[float] | None]:
    """Percentile intervals of `metrics.summary`'s accuracies, by whole groups.

    Args:
      groups: [n] number of each entry's group, what is drawn with replacement; below 0
        for an entry that is a group of its own.
      truth, called: [n] classes; entries below 0 are not counted.

    Returns:
      {accuracy, mean_class_accuracy, macro_f1: [low, high]}; None of fewer than two
      groups. The same for the same input: the draws begin from a fixed seed.
    """
    known = (truth >= 0) & (called >= 0)
    alone = groups < 0
    names = np.where(alone, -1 - np.arange(len(groups)), groups)[known]
    _, group = np.unique(names, return_inverse=True)
    count = int(group.max()) + 1 if len(group) else 0
    if count < 2:
        return dict.fromkeys(("accuracy", "mean_class_accuracy", "macro_f1"))
    cell = truth[known].astype(np.int64) * classes + called[known]
    counts = np.bincount(group * classes**2 + cell, minlength=count * classes**2)
    counts = counts.reshape(count, classes**2).astype(np.float64)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(0, DRAWS, _DRAWS_AT_ONCE):
        drawn = rng.multinomial(count, np.full(count, 1 / count), _DRAWS_AT_ONCE)
        found.append(_numbers((drawn @ counts).reshape(-1, classes, classes)))
    outside = 50 * (1 - LEVEL)
    return {
        name: np.percentile(
            np.concatenate([each[name] for each in found]), [outside, 100 - outside]
        ).tolist()
        for name in found[0]
    }


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
