# SPDX-License-Identifier: Apache-2.0
"""Measures how well probabilities are calibrated, and fits a temperature to them.

Temperature scaling, the expected calibration error and its 15 bins follow Guo et al.
2017 (ICML, arXiv:1706.04599). The paper computes softmax(logits / T). This module
computes softmax(log p / T), which has the same values.

In all functions, `probabilities` has the shape [n, k], and `truth` [n] has the index of
the right class of each row. Rows with a NaN and rows whose truth is below 0 do not
count. The confidence of a row is its highest probability. The call of a row is the
first class that has this probability.
"""

import dataclasses
from typing import Any

import numpy as np

BINS = 15
# If all rows are right, the best temperature is 0: the lower bound stops the search. At
# the upper bound, a highest probability of 0.999 among 6 classes becomes 0.22.
BOUNDS = (0.05, 20.0)
# Probabilities are saved as float32, where a softmax value can become 0. This number,
# near the smallest normal float32, keeps the logarithm finite.
_SMALLEST = 1e-38


def known(
    probabilities: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of both arrays that count: known truth and no NaN."""
    counts = (truth >= 0) & ~np.isnan(probabilities).any(axis=1)
    return probabilities[counts], truth[counts]


def fit(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Returns the temperature, within `BOUNDS`, with the least mean cross-entropy.

    The temperature is 1 where no other temperature is better. At least one row must
    count.
    """
    from scipy import optimize  # takes half a second to import

    probabilities, truth = known(probabilities, truth)
    logs = _logs(probabilities)

    def at(temperature: float) -> float:
        return _cross_entropy(logs / temperature, truth)

    # The cross-entropy is convex in 1 / T, so there is only one minimum.
    found = optimize.minimize_scalar(
        lambda log_temperature: at(np.exp(log_temperature)),
        bounds=np.log(BOUNDS),
        method="bounded",
        options={"xatol": 1e-6},
    )
    # The bounded method never tries the bounds themselves. Among equally good
    # temperatures, the first is used.
    return min((1.0, *BOUNDS, float(np.exp(found.x))), key=at)


def apply(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Returns softmax(log p / temperature), [n, k] float32.

    A row with a NaN becomes NaN in all classes.
    """
    values = np.exp(_log_softmax(_logs(probabilities) / temperature))
    return values.astype(np.float32)


def loss(probabilities: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the mean cross-entropy in nats, or None where no row counts."""
    probabilities, truth = known(probabilities, truth)
    return _cross_entropy(_logs(probabilities), truth) if len(truth) else None


def reliability(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Returns the expected calibration error and the bins that it is computed from.

    Returns:
      {ece, bins}. Each bin is {low, high, count, confidence, accuracy}, over the rows
      whose confidence is above `low` and at most `high`. `confidence` and `accuracy`
      are means, and None in an empty bin. `ece` is the mean of |accuracy - confidence|
      over the bins, weighted by count; it is None where no row counts.
    """
    probabilities, truth = known(probabilities, truth)
    confidence, right = _calls(probabilities, truth)
    edges = np.linspace(0, 1, BINS + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    counts, confidences, rights = (
        np.bincount(place, weights, BINS) for weights in (None, confidence, right)
    )
    bins = [
        {
            "low": float(low),
            "high": float(high),
            "count": int(count),
            "confidence": float(of_confidence / count) if count else None,
            "accuracy": float(of_right / count) if count else None,
        }
        for low, high, count, of_confidence, of_right in zip(
            edges[:-1], edges[1:], counts, confidences, rights, strict=True
        )
    ]
    error = np.abs(rights - confidences).sum() / len(truth) if len(truth) else None
    return {"ece": None if error is None else float(error), "bins": bins}


@dataclasses.dataclass(frozen=True)
class Curve:
    """The rows that are kept as the threshold on the confidence falls.

    There is one entry for each confidence that occurs, because rows of equal confidence
    are kept together. The curve is empty where no row counts.
    """

    threshold: np.ndarray  # [m] descending; rows at or above the threshold are kept
    kept: np.ndarray  # [m] int64, number of kept rows
    right: np.ndarray  # [m] int64, number of kept rows that are right

    @classmethod
    def of(cls, probabilities: np.ndarray, truth: np.ndarray) -> "Curve":
        """Returns the curve of these rows."""
        confidence, right = _calls(*known(probabilities, truth))
        values, place, counts = np.unique(
            -confidence, return_inverse=True, return_counts=True
        )
        of_right = np.bincount(place, right, len(values)).astype(np.int64)
        return cls(-values, counts.cumsum(), of_right.cumsum())

    @property
    def coverage(self) -> np.ndarray:
        """The share of the rows that is kept, [m]."""
        return self.kept / self.kept[-1:]

    @property
    def precision(self) -> np.ndarray:
        """The share of the kept rows that is right, [m]."""
        return self.right / self.kept

    def lowest(self, precision: float) -> float | None:
        """Returns the lowest threshold with at least this precision, or None."""
        enough = np.flatnonzero(self.precision >= precision)
        return float(self.threshold[enough[-1]]) if len(enough) else None

    def at(self, threshold: float) -> tuple[float, float | None]:
        """Returns (coverage, precision) at any threshold, also between the entries.

        The precision is None where no row is kept.
        """
        entries = int((self.threshold >= threshold).sum())
        if not entries:
            return 0.0, None
        return float(self.coverage[entries - 1]), float(self.precision[entries - 1])

    def points(self, most: int = 200) -> list[dict[str, float]]:
        """Returns at most `most` entries, with the first and the last among them."""
        n = len(self.threshold)
        chosen = np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))
        columns = (self.threshold, self.coverage, self.precision)
        return [
            {"threshold": float(t), "coverage": float(c), "precision": float(p)}
            for t, c, p in zip(*(column[chosen] for column in columns), strict=True)
        ]


def by_class(
    probabilities: np.ndarray, truth: np.ndarray, threshold: float
) -> list[tuple[int, float | None]]:
    """Returns (count, precision) of each class, at or above the threshold.

    The count is the number of rows that are called the class with at least this
    confidence. The precision is the share of these rows that is right. It is None where
    the count is 0.
    """
    probabilities, truth = known(probabilities, truth)
    confidence, right = _calls(probabilities, truth)
    kept, k = confidence >= threshold, probabilities.shape[1]
    called = probabilities[kept].argmax(axis=1)
    counts = np.bincount(called, minlength=k)
    rights = np.bincount(called, right[kept], k)
    return [
        (int(count), float(of_right / count) if count else None)
        for count, of_right in zip(counts, rights, strict=True)
    ]


def _calls(
    probabilities: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the confidence [n] float64 and whether the call is right [n] bool."""
    right = probabilities.argmax(axis=1) == truth
    return probabilities.max(axis=1, initial=0).astype(np.float64), right


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, _SMALLEST), dtype=np.float64)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _cross_entropy(logits: np.ndarray, truth: np.ndarray) -> float:
    return float(-_log_softmax(logits)[np.arange(len(truth)), truth].mean())
