# SPDX-License-Identifier: Apache-2.0
"""Computes accuracy, precision, recall and F1 from the counts of a confusion matrix."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from synister_jax.evaluation import confusions


class Accuracies(TypedDict):
    """The accuracies of a confusion matrix whose rows are the true classes.

    `accuracy` is the share of all entries that are right. `mean_class_accuracy` is the
    mean recall over the classes that occur. Both follow `get_accuracy` of the original.
    Numbers are None where they are undefined.
    """

    count: int
    accuracy: float | None
    mean_class_accuracy: float | None
    confusion: list[list[int]]


class ClassNumbers(TypedDict):
    """The numbers of one class.

    `precision` is None where the class is never called. `recall` and `f1` are None
    where the class does not occur.
    """

    support: int  # the number of entries whose true class is this class
    called: int  # the number of entries that are called this class
    precision: float | None
    recall: float | None
    f1: float | None


class Summary(Accuracies):
    """All numbers of a confusion matrix whose rows are the true classes.

    `macro_f1` is the mean F1 over the classes that occur. Numbers are None where they
    are undefined.
    """

    macro_f1: float | None
    per_class: dict[str, ClassNumbers]
    confusion_by_row: list[list[float | None]]
    confusion_by_column: list[list[float | None]]


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts the pairs of true class (row) and predicted class (column).

    Args:
      truth: [n] indices of the true classes; entries below 0 do not count.
      predicted: [n] indices of the predicted classes; entries below 0 do not count.
      classes: the number of classes.

    Returns:
      The counts, int64 [classes, classes].
    """
    known = (truth >= 0) & (predicted >= 0)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (truth[known], predicted[known]), 1)
    return counts


def accuracies(counts: np.ndarray) -> Accuracies:
    """Returns the accuracies of a confusion matrix, int [k, k], with true rows."""
    support, right = counts.sum(axis=1), np.diag(counts)
    recall = right[support > 0] / support[support > 0]
    return {
        "count": int(counts.sum()),
        "accuracy": float(right.sum() / counts.sum()) if counts.sum() else None,
        "mean_class_accuracy": float(recall.mean()) if len(recall) else None,
        "confusion": counts.tolist(),
    }


def summary(counts: np.ndarray, classes: Sequence[str]) -> Summary:
    """Returns all numbers of a confusion matrix, int [k, k], with true rows."""
    per_class = {
        name: _of_class(int(right), int(support), int(called))
        for name, right, support, called in zip(
            classes,
            np.diag(counts),
            counts.sum(axis=1),
            counts.sum(axis=0),
            strict=True,
        )
    }
    f1 = [n["f1"] for n in per_class.values() if n["f1"] is not None]
    return {
        **accuracies(counts),
        "macro_f1": float(np.mean(f1)) if f1 else None,
        "per_class": per_class,
        "confusion_by_row": fractions(counts, axis=1),
        "confusion_by_column": fractions(counts, axis=0),
    }


def _of_class(right: int, support: int, called: int) -> ClassNumbers:
    return {
        "support": support,
        "called": called,
        "precision": right / called if called else None,
        "recall": right / support if support else None,
        "f1": 2 * right / (support + called) if support else None,
    }


def fractions(counts: np.ndarray, axis: int) -> list[list[float | None]]:
    """Returns `confusions.normalised` as lists for JSON, with None instead of NaN."""
    found = confusions.normalised(counts, axis)
    return [[None if np.isnan(x) else float(x) for x in row] for row in found]
