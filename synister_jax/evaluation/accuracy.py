# SPDX-License-Identifier: Apache-2.0
"""From the counts of a confusion matrix to accuracy, precision, recall and F1."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from synister_jax.evaluation import confusions


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts [classes, classes], rows true; entries below 0 are not counted."""
    known = (truth >= 0) & (predicted >= 0)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (truth[known], predicted[known]), 1)
    return counts


def accuracies(counts: np.ndarray) -> dict[str, Any]:
    """Of a confusion matrix (rows true); None where undefined.

    `accuracy`: fraction of all right. `mean_class_accuracy`: mean recall over the
    classes that occur; both as the original's `get_accuracy`.
    """
    support, right = counts.sum(axis=1), np.diag(counts)
    recall = right[support > 0] / support[support > 0]
    return {
        "count": int(counts.sum()),
        "accuracy": float(right.sum() / counts.sum()) if counts.sum() else None,
        "mean_class_accuracy": float(recall.mean()) if len(recall) else None,
        "confusion": counts.tolist(),
    }


def summary(counts: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All numbers of a confusion matrix (rows true); None where undefined.

    Those of `accuracies`; `macro_f1`, the mean F1 over the classes that occur;
    `per_class`; the matrix as fractions of its rows and of its columns. A class that
    occurs and is never called has precision None and F1 0.
    """
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
    f1 = [numbers["f1"] for numbers in per_class.values() if numbers["support"]]
    return accuracies(counts) | {
        "macro_f1": float(np.mean(f1)) if f1 else None,
        "per_class": per_class,
        "confusion_by_row": fractions(counts, axis=1),
        "confusion_by_column": fractions(counts, axis=0),
    }


def _of_class(right: int, support: int, called: int) -> dict[str, Any]:
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
    return np.where(np.isnan(found), None, found).tolist()
