# SPDX-License-Identifier: Apache-2.0
"""How often does the test of one transmitter err, and how often does it find two?

    python benchmarks/simulate_one_transmitter.py > one_transmitter.jsonl

Groups are simulated from the confusion of a published network; the test is given what
it would have: a confusion estimated from a simulated test part, an own one each time.
Prints a line of JSON for each setting, in four parts (`--parts`):

level: groups of one class; how often p ≤ 0.05 (on average over the classes, and of the
  worst class, which is the largest of six noisy numbers), by units a group.
fdr: 500 groups, a tenth of them mixed half and half; share of false ones among those
  found by Benjamini and Hochberg at 0.05, averaged over repeats, and power.
power: groups of two classes; how often p ≤ 0.05 and ≤ 0.01, by the second's share.
correlation: what the estimator answers on groups of known correlation.

Errors are standard errors over the repeats, each with a test part of its own: groups
that are tested with the same estimated confusion are not independent.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags
from scipy import stats

from synister_jax.base import command
from synister_jax.evaluation import mixtures

_PARTS = flags.DEFINE_multi_enum(
    "parts",
    ["level", "fdr", "power", "correlation"],
    ["level", "fdr", "power", "correlation"],
    "Which; once for each.",
)
_REPEATS = flags.DEFINE_integer("repeats", 60, "Test parts a setting.", lower_bound=2)
_GROUPS = flags.DEFINE_integer("groups", 100, "Of a class and size.", lower_bound=1)
_DRAWS = flags.DEFINE_integer("draws", 999, "Simulated groups for a p-value.")

_SIZES = (3, 5, 10, 30, 100, 1_000, 10_000)
_LEVEL = 0.05
# Of the hemibrain network (train 8, iteration 375,000, validation) P(true | called),
# rows true, as published with the R package hemibrainr: gaba, acetylcholine,
# glutamate, serotonin, octopamine, dopamine. How often each class is called is not
# published; equally often is assumed, which turns columns into rows P(called | true).
_COLUMNS = np.array(
    [
        [0.80, 0.00, 0.08, 0.02, 0.01, 0.02],
        [0.09, 0.94, 0.17, 0.16, 0.03, 0.15],
        [0.09, 0.05, 0.72, 0.11, 0.01, 0.02],
        [0.00, 0.00, 0.00, 0.45, 0.02, 0.02],
        [0.00, 0.00, 0.00, 0.21, 0.88, 0.00],
        [0.02, 0.00, 0.03, 0.05, 0.04, 0.78],
    ]
)
_K = len(_COLUMNS)


@dataclasses.dataclass(frozen=True)
class TestPart:
    """What the confusion is estimated from: `groups` of `units` for each class."""

    groups: int
    units: int

    def draw(self, rng: np.random.Generator, correlation: float) -> np.ndarray:
        """Calls [class, group, k]."""
        return np.stack(
            [
                mixtures.draw(rng, truth(correlation), row, self.units, self.groups)
                for row in np.eye(_K)
            ]
        )


def truth(correlation: float) -> mixtures.Model:
    """The confusion that simulated calls come from."""
    return mixtures.from_fractions(
        _COLUMNS / _COLUMNS.sum(axis=1, keepdims=True), correlation
    )


def estimated(calls: np.ndarray, correlation: float) -> mixtures.Model:
    """The model of a test part, as the command makes it."""
    clusters = np.full(_K, calls.shape[1])
    return mixtures.from_counts(calls.sum(axis=1), correlation, clusters)


def _own_correlation(calls: np.ndarray, correlation: float) -> mixtures.Model:
    groups = np.repeat(np.arange(_K), calls.shape[1])
    found = mixtures.correlation(calls.reshape(-1, _K), groups)
    return estimated(calls, found or 0.0)


def _independent(calls: np.ndarray, correlation: float) -> mixtures.Model:
    return mixtures.from_counts(calls.sum(axis=1), correlation)


def _taken_as_exact(calls: np.ndarray, correlation: float) -> mixtures.Model:
    model = estimated(calls, correlation)
    return dataclasses.replace(model, concentration=np.full(_K, np.inf))


def _no_correlation(calls: np.ndarray, correlation: float) -> mixtures.Model:
    return estimated(calls, 0.0)


def _exact(calls: np.ndarray, correlation: float) -> mixtures.Model:
    return truth(correlation)


def _mean(values: list[float]) -> list[float]:
    """Mean and its standard error."""
    return [
        round(float(np.mean(values)), 4),
        round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4),
    ]


def level() -> Iterator[dict[str, Any]]:
    ways: list[tuple[float, TestPart, Callable[..., mixtures.Model], str]] = [
        (0.0, TestPart(1, 333), _exact, "confusion exact"),
        (0.0, TestPart(33, 1), estimated, "as the command"),
        (0.0, TestPart(333, 1), estimated, "as the command"),
        (0.0, TestPart(33, 1), _taken_as_exact, "estimate taken as exact"),
        (0.0, TestPart(333, 1), _taken_as_exact, "estimate taken as exact"),
        (0.05, TestPart(1, 333), _exact, "confusion exact"),
        (0.05, TestPart(5, 100), estimated, "correlation known"),
        (0.05, TestPart(5, 100), _own_correlation, "as the command"),
        (0.05, TestPart(5, 100), _independent, "test part's units independent"),
        (0.05, TestPart(5, 100), _taken_as_exact, "estimate taken as exact"),
        (0.05, TestPart(30, 100), _own_correlation, "as the command"),
        (0.05, TestPart(30, 100), _no_correlation, "correlation wrongly 0"),
        (0.3, TestPart(30, 100), _own_correlation, "as the command"),
    ]
    for index, (correlation, part, way, name) in enumerate(ways):
        rates = np.zeros((_REPEATS.value, len(_SIZES), _K))
        for repeat in range(_REPEATS.value):
            rng = np.random.default_rng([1, index, repeat])
            model = way(part.draw(rng, correlation), correlation)
            for place, size in enumerate(_SIZES):
                p = _p_values(rng, model, correlation, np.eye(_K), size)
                rates[repeat, place] = (p <= _LEVEL).mean(axis=1)
        by_size = {
            str(size): {
                "all": _mean(list(rates[:, place].mean(axis=1))),
                "worst_class": _mean(
                    list(rates[:, place, rates[:, place].mean(axis=0).argmax()])
                ),
            }
            for place, size in enumerate(_SIZES)
        }
        yield {
            "part": "level",
            "correlation": correlation,
            "labelled": dataclasses.asdict(part),
            "way": name,
            "p<=0.05": by_size,
        }


def _p_values(
    rng: np.random.Generator,
    model: mixtures.Model,
    correlation: float,
    shares: np.ndarray,
    size: int,
) -> np.ndarray:
    """p-values [mixtures, groups] of groups with each of the `shares` [mixtures, k]."""
    calls = [
        mixtures.draw(rng, truth(correlation), row, size, _GROUPS.value)
        for row in shares
    ]
    seed = int(rng.integers(1 << 31))
    p = mixtures.p_values(np.concatenate(calls), model, _DRAWS.value, seed)
    return p.reshape(len(shares), -1)


def fdr() -> Iterator[dict[str, Any]]:
    half = np.array([(a + b) / 2 for a in np.eye(_K) for b in np.eye(_K)])
    half = half[(half < 1).all(axis=1)]
    for correlation, part in (
        (0.0, TestPart(33, 1)),
        (0.0, TestPart(333, 1)),
        (0.05, TestPart(5, 100)),
        (0.05, TestPart(30, 100)),
    ):
        false, power, found = [], [], []
        for repeat in range(_REPEATS.value):
            rng = np.random.default_rng([2, part.groups, repeat])
            way = _own_correlation if correlation else estimated
            model = way(part.draw(rng, correlation), correlation)
            mixed = np.arange(500) < 50
            calls = np.concatenate(
                [
                    mixtures.draw(
                        rng,
                        truth(correlation),
                        rng.choice(half) if several else rng.choice(np.eye(_K)),
                        int(rng.choice([10, 30, 100, 300])),
                        1,
                    )
                    for several in mixed
                ]
            )
            p = mixtures.p_values(calls, model, 9_999, repeat)
            rejected = stats.false_discovery_control(p) <= _LEVEL
            false.append((rejected & ~mixed).sum() / max(rejected.sum(), 1))
            power.append(rejected[mixed].mean())
            found.append(rejected.sum())
        yield {
            "part": "fdr",
            "correlation": correlation,
            "labelled": dataclasses.asdict(part),
            "units": [10, 30, 100, 300],
            "false_discoveries": _mean(false),
            "power": _mean(power),
            "found_of_500": _mean(found),
        }


def power() -> Iterator[dict[str, Any]]:
    pairs = [(a, b) for a in range(_K) for b in range(_K) if a != b]
    for correlation, part in (
        (0.0, TestPart(333, 1)),
        (0.05, TestPart(30, 100)),
        (0.2, TestPart(30, 100)),
    ):
        for share in (0.1, 0.2, 0.3, 0.4, 0.5):
            shares = np.array(
                [(1 - share) * np.eye(_K)[a] + share * np.eye(_K)[b] for a, b in pairs]
            )
            rates: dict[str, dict[str, float]] = {}
            for place, size in enumerate(_SIZES):
                found = []
                for repeat in range(4):
                    rng = np.random.default_rng([3, place, repeat, int(10 * share)])
                    model = estimated(part.draw(rng, correlation), correlation)
                    found.append(_p_values(rng, model, correlation, shares, size))
                p = np.concatenate(found, axis=1)
                rates[str(size)] = {
                    "p<=0.05": round(float((p <= 0.05).mean()), 3),
                    "p<=0.01": round(float((p <= 0.01).mean()), 3),
                }
            yield {
                "part": "power",
                "correlation": correlation,
                "labelled": dataclasses.asdict(part),
                "share": share,
                "by_units": rates,
            }


def correlation() -> Iterator[dict[str, Any]]:
    for true in (0.0, 0.01, 0.05, 0.2, 0.5):
        for part in (TestPart(5, 100), TestPart(30, 100), TestPart(30, 5)):
            found = []
            for repeat in range(10 * _REPEATS.value):
                rng = np.random.default_rng([4, repeat])
                calls = part.draw(rng, true).reshape(-1, _K)
                label = np.repeat(np.arange(_K), part.groups)
                found.append(mixtures.correlation(calls, label) or 0.0)
            yield {
                "part": "correlation",
                "correlation": true,
                "labelled": dataclasses.asdict(part),
                "estimate": _mean(found),
                "deviation_of_one": round(float(np.std(found)), 4),
            }


_RUN = {"level": level, "fdr": fdr, "power": power, "correlation": correlation}


def main() -> None:
    for part in _PARTS.value:
        for line in _RUN[part]():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    command.run(main)
