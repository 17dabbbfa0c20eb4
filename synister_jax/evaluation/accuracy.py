# SPDX-License-Identifier: Apache-2.0
"""From the counts of a confusion matrix to accuracy, precision, recall and F1."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from synister_jax.evaluation import confusions


class Accuracies(TypedDict):
    """Numbers of a confusion matrix (rows true); None where undefined.

    `accuracy` is the fraction of all that is right, `mean_class_accuracy` the mean
    recall over the classes that occur; both as the original's `get_accuracy`.
    """

    count: int
    accuracy: float | None
    mean_class_accuracy: float | None
    confusion: list[list[int]]


class ClassNumbers(TypedDict):
    """Numbers of one class; one that occurs and is never called has precision None."""

    support: int  # how many are of it
    called: int  # how many are called so
    precision: float | None
    recall: float | None
    f1: float | None


class Summary(Accuracies):
    """All numbers of a confusion matrix (rows true); None where undefined.

    `macro_f1` is the mean F1 over the classes that occur.
    """

    macro_f1: float | None
    per_class: dict[str, ClassNumbers]
    confusion_by_row: list[list[float | None]]
    confusion_by_column: list[list[float | None]]


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts [classes, classes], rows true; entries below 0 are not counted."""
    known = (truth >= 0) & (predicted >= 0)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (truth[known], predicted[known]), 1)
    return counts


def accuracies(counts: np.ndarray) -> Accuracies:
    """The accuracies of a confusion matrix, int [k, k], rows true."""
    support, right = counts.sum(axis=1), np.diag(counts)
    recall = right[support > 0] / support[support > 0]
    return {
        "count": int(counts.sum()),
        "accuracy": float(right.sum() / counts.sum()) if counts.sum() else None,
        "mean_class_accuracy": float(recall.mean()) if len(recall) else None,
        "confusion": counts.tolist(),
    }


def summary(counts: np.ndarray, classes: Sequence[str]) -> Summary:
    """All numbers of a confusion matrix, int [k, k], rows true."""
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
    """`confusions.normalised` for JSON: None where it is undefined."""
    found = confusions.normalised(counts, axis)
    return [[None if np.isnan(x) else float(x) for x in row] for row in found]
