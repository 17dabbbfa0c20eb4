# SPDX-License-Identifier: Apache-2.0
"""How far probabilities can be trusted, and the temperature that mends them.

Temperature scaling, expected calibration error and its 15 bins are those of Guo et
al. 2017 (ICML, arXiv:1706.04599): softmax(logits / T), which softmax(log p / T) equals.

In all functions `probabilities` are [n, k] and `truth` is [n], the index of the right
class. Rows with a NaN, and rows whose truth is below 0, do not count. The confidence of
a row is its highest probability, its call the first class that has it.
"""

import dataclasses
from typing import Any

import numpy as np

BINS = 15
# Rows that are all right would be surer for ever: the lower bound ends that. At the
# upper one a top probability of 0.999 of 6 classes has become 0.22.
BOUNDS = (0.05, 20.0)
# Probabilities are saved as float32, in which softmax can be 0: its smallest normal
# number bounds the logarithm.
_SMALLEST = 1e-38


def known(
    probabilities: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that count, of both."""
    counts = (truth >= 0) & ~np.isnan(probabilities).any(axis=1)
    return probabilities[counts], truth[counts]


def fit(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The temperature of the least mean cross-entropy, within `BOUNDS`.

    1 where no other is better. One row, at least, must count.
    """
    from scipy import optimize  # half a second to import

    probabilities, truth = known(probabilities, truth)
    logs = _logs(probabilities)

    def at(temperature: float) -> float:
        return _cross_entropy(logs / temperature, truth)

    # Convex in 1 / T, so that there is one minimum.
    found = optimize.minimize_scalar(
        lambda log_temperature: at(np.exp(log_temperature)),
        bounds=np.log(BOUNDS),
        method="bounded",
        options={"xatol": 1e-6},
    )
    # It never tries the bounds themselves; of equal ones the first.
    return min((1.0, *BOUNDS, float(np.exp(found.x))), key=at)


def apply(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / temperature), [n, k] float32; rows with a NaN are all NaN."""
    values = np.exp(_log_softmax(_logs(probabilities) / temperature))
    return values.astype(np.float32)


def loss(probabilities: np.ndarray, truth: np.ndarray) -> float | None:
    """Mean cross-entropy in nats; None where no row counts."""
    probabilities, truth = known(probabilities, truth)
    return _cross_entropy(_logs(probabilities), truth) if len(truth) else None


def reliability(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """{ece, bins}: expected calibration error, and what it is the mean over.

    `bins` are {low, high, count, confidence, accuracy} of the rows whose confidence is
    above `low` and not above `high`; the two means are None in an empty one. `ece` is
    the mean of |accuracy - confidence| weighted by count, None where no row counts.
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
    """What is kept as the threshold on the confidence falls; none where no row counts.

    Rows of equal confidence are kept together: one entry for each confidence.
    """

    threshold: np.ndarray  # [m] descending: kept are the rows at or above it
    kept: np.ndarray  # [m] int64, rows
    right: np.ndarray  # [m] int64, of them

    @classmethod
    def of(cls, probabilities: np.ndarray, truth: np.ndarray) -> "Curve":
        confidence, right = _calls(*known(probabilities, truth))
        values, place, counts = np.unique(
            -confidence, return_inverse=True, return_counts=True
        )
        of_right = np.bincount(place, right, len(values)).astype(np.int64)
        return cls(-values, counts.cumsum(), of_right.cumsum())

    @property
    def coverage(self) -> np.ndarray:
        """[m] share of the rows that is kept."""
        return self.kept / self.kept[-1:]

    @property
    def precision(self) -> np.ndarray:
        """[m] share of the kept rows that is right."""
        return self.right / self.kept

    def lowest(self, precision: float) -> float | None:
        """The lowest threshold whose kept rows are that precise; None if none is."""
        enough = np.flatnonzero(self.precision >= precision)
        return float(self.threshold[enough[-1]]) if len(enough) else None

    def at(self, threshold: float) -> tuple[float, float | None]:
        """(coverage, precision) at a threshold, which need not be an entry.

        The precision is None where nothing is kept.
        """
        entries = int((self.threshold >= threshold).sum())
        if not entries:
            return 0.0, None
        return float(self.coverage[entries - 1]), float(self.precision[entries - 1])

    def points(self, most: int = 200) -> list[dict[str, float]]:
        """At most so many entries, the first and the last among them."""
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
    """For each class: calls at or above the threshold, and the share that is right."""
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
    """Confidence [n] float64 and whether the call is right [n]."""
    right = probabilities.argmax(axis=1) == truth
    return probabilities.max(axis=1, initial=0).astype(np.float64), right


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, _SMALLEST), dtype=np.float64)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _cross_entropy(logits: np.ndarray, truth: np.ndarray) -> float:
    return float(-_log_softmax(logits)[np.arange(len(truth)), truth].mean())
