# SPDX-License-Identifier: Apache-2.0
"""Simulates how reliable the test is whether a group releases one transmitter.

    python -m benchmarks.simulate_one_transmitter > one_transmitter.jsonl

The program simulates groups of synapses from the confusion of a published network. In
practice the test has only an estimate of the confusion. So each repeat simulates a test
part and estimates the confusion from this part. The program prints a line of JSON for
each setting, in four parts (`--parts`):

- level: how often groups of one class have p ≤ 0.05. The line has the average of the
  classes, and the worst class, which is the largest of six noisy numbers.
- fdr: 500 groups are tested by Benjamini and Hochberg at 0.05. A tenth of the groups
are
  mixed of two classes, half and half. The line has the share of false discoveries, and
  the power.
- power: how often groups of two classes have p ≤ 0.05 and p ≤ 0.01.
- correlation: the estimate of the correlation for groups of known correlation.

Errors are standard errors over the repeats, each with a test part of its own. Groups
that are tested with the same estimated confusion are not independent.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from scipy import stats

from synister_jax.base import command
from synister_jax.evaluation import mixtures

_REPEATS = flags.DEFINE_integer(
    "repeats", 60, "Simulate this many test parts for each setting.", lower_bound=2
)
_GROUPS = flags.DEFINE_integer(
    "groups",
    100,
    "Simulate this many groups of each class and size for each test part.",
    lower_bound=1,
)

_DRAWS = 999  # simulated groups for a p-value
_SIZES = (3, 5, 10, 30, 100, 1_000, 10_000)
_LEVEL = 0.05
# P(true | called) of the hemibrain network (train 8, iteration 375,000, validation), as
# published with the R package hemibrainr. The rows are the true classes: gaba,
# acetylcholine, glutamate, serotonin, octopamine, dopamine. It is not published how
# often each class is called. If each is called equally often, dividing each row by its
# sum gives P(called | true).
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
_PURE = np.eye(_K)  # the shares of the classes in groups of one class
_PAIRS = list(itertools.permutations(range(_K), 2))

# The ways to make the model of the test from a test part.
_COMMAND = "as the command"
_EXACT = "confusion exact"
_KNOWN = "correlation known"
_INDEPENDENT = "test part's units independent"
_AS_EXACT = "estimate taken as exact"
_WRONG = "correlation wrongly 0"


@dataclasses.dataclass(frozen=True)
class Setting:
    """The correlation within a group, and the size of the labelled test part.

    Attributes:
      correlation: how similar the calls of the units (synapses) of one group are.
      groups: the number of labelled groups of each class.
      units: the number of units of each labelled group.
    """

    correlation: float
    groups: int
    units: int

    @property
    def truth(self) -> mixtures.CallModel:
        """The confusion from which the calls are simulated."""
        rows = _COLUMNS / _COLUMNS.sum(axis=1, keepdims=True)
        return mixtures.from_fractions(rows, self.correlation)

    def test_part(self, rng: np.random.Generator) -> np.ndarray:
        """Returns simulated calls [class, group, k] of labelled groups."""
        shape = (self.units, self.groups)
        return np.stack([mixtures.draw(rng, self.truth, row, *shape) for row in _PURE])

    def estimate(self, calls: np.ndarray) -> float:
        """Returns the estimated correlation of the calls of a test part."""
        labels = np.repeat(np.arange(_K), self.groups)
        return mixtures.correlation(calls.reshape(-1, _K), labels) or 0.0

    def model(self, way: str, rng: np.random.Generator) -> mixtures.CallModel:
        """Simulates a test part, and returns the model that the test makes from it."""
        calls = self.test_part(rng)
        counts, known = calls.sum(axis=1), self.correlation
        if way == _EXACT:
            return self.truth
        if way == _INDEPENDENT:
            return mixtures.from_counts(counts, known)
        if way == _WRONG:
            known = 0.0
        elif way == _COMMAND and known:  # a correlation of 0 is not estimated
            known = self.estimate(calls)
        model = mixtures.from_counts(counts, known, np.full(_K, self.groups))
        if way == _AS_EXACT:
            model = dataclasses.replace(model, concentration=np.full(_K, np.inf))
        return model

    def p_values(
        self,
        rng: np.random.Generator,
        model: mixtures.CallModel,
        shares: np.ndarray,
        size: int,
    ) -> np.ndarray:
        """Returns the p-values [mixtures, groups] of simulated groups.

        Args:
          rng: the source of random numbers.
          model: the model of the test.
          shares: the shares [mixtures, k] of the classes in the groups of each mixture.
          size: the number of units of each group.
        """
        counts = (size, _GROUPS.value)
        calls = [mixtures.draw(rng, self.truth, row, *counts) for row in shares]
        seed = int(rng.integers(1 << 31))
        p = mixtures.p_values(np.concatenate(calls), model, _DRAWS, seed)
        return p.reshape(len(shares), -1)

    def line(self, part: str, **found: Any) -> dict[str, Any]:
        """Returns the content of one line of the output."""
        labelled = {"groups": self.groups, "units": self.units}
        about = {"correlation": self.correlation, "labelled": labelled}
        return {"part": part} | about | found


def _mean(values: Any) -> list[float]:
    """Returns the mean and its standard error, rounded to four digits."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5)
    return [round(float(np.mean(values)), 4), round(error, 4)]


def _level() -> Iterator[dict[str, Any]]:
    settings = [
        *((0.0, 1, 333, _EXACT), (0.0, 33, 1, _COMMAND), (0.0, 333, 1, _COMMAND)),
        *((0.0, 33, 1, _AS_EXACT), (0.0, 333, 1, _AS_EXACT), (0.05, 1, 333, _EXACT)),
        *((0.05, 5, 100, _KNOWN), (0.05, 5, 100, _COMMAND)),
        *((0.05, 5, 100, _INDEPENDENT), (0.05, 5, 100, _AS_EXACT)),
        *((0.05, 30, 100, _COMMAND), (0.05, 30, 100, _WRONG), (0.3, 30, 100, _COMMAND)),
    ]
    for index, (*values, way) in enumerate(settings):
        setting = Setting(*values)
        rates = np.zeros((len(_SIZES), _REPEATS.value, _K))
        for repeat in range(_REPEATS.value):
            rng = np.random.default_rng([1, index, repeat])
            model = setting.model(way, rng)
            for place, size in enumerate(_SIZES):
                p = setting.p_values(rng, model, _PURE, size)
                rates[place, repeat] = (p <= _LEVEL).mean(axis=1)
        by_size = {
            str(size): {
                "all": _mean(of_size.mean(axis=1)),
                "worst_class": _mean(of_size[:, of_size.mean(axis=0).argmax()]),
            }
            for size, of_size in zip(_SIZES, rates, strict=True)
        }
        yield setting.line("level", way=way) | {"p<=0.05": by_size}


def _fdr() -> Iterator[dict[str, Any]]:
    half = np.array([(_PURE[a] + _PURE[b]) / 2 for a, b in _PAIRS])
    mixed = np.arange(500) < 50
    units = [10, 30, 100, 300]
    for values in ((0.0, 33, 1), (0.0, 333, 1), (0.05, 5, 100), (0.05, 30, 100)):
        setting = Setting(*values)
        false, power, found = [], [], []
        for repeat in range(_REPEATS.value):
            rng = np.random.default_rng([2, setting.groups, repeat])
            model = setting.model(_COMMAND, rng)
            calls = []
            for several in mixed:
                row = rng.choice(half if several else _PURE)
                size = int(rng.choice(units))
                calls.append(mixtures.draw(rng, setting.truth, row, size, 1))
            p = mixtures.p_values(np.concatenate(calls), model, 9_999, repeat)
            rejected = stats.false_discovery_control(p) <= _LEVEL
            false.append((rejected & ~mixed).sum() / max(rejected.sum(), 1))
            power.append(rejected[mixed].mean())
            found.append(rejected.sum())
        yield setting.line(
            "fdr",
            units=units,
            false_discoveries=_mean(false),
            power=_mean(power),
            found_of_500=_mean(found),
        )


def _power() -> Iterator[dict[str, Any]]:
    for values, share in itertools.product(
        ((0.0, 333, 1), (0.05, 30, 100), (0.2, 30, 100)), (0.1, 0.2, 0.3, 0.4, 0.5)
    ):
        setting = Setting(*values)
        shares = np.array(
            [(1 - share) * _PURE[a] + share * _PURE[b] for a, b in _PAIRS]
        )
        rates: dict[str, dict[str, float]] = {}
        for place, size in enumerate(_SIZES):
            found = []
            for repeat in range(4):
                rng = np.random.default_rng([3, place, repeat, int(10 * share)])
                model = setting.model(_KNOWN, rng)
                found.append(setting.p_values(rng, model, shares, size))
            rates[str(size)] = {
                f"p<={limit}": round(float((np.array(found) <= limit).mean()), 3)
                for limit in (0.05, 0.01)
            }
        yield setting.line("power", share=share, by_units=rates)


def _correlation() -> Iterator[dict[str, Any]]:
    for true, labelled in itertools.product(
        (0.0, 0.01, 0.05, 0.2, 0.5), ((5, 100), (30, 100), (30, 5))
    ):
        setting = Setting(true, *labelled)
        found = []
        for repeat in range(10 * _REPEATS.value):
            rng = np.random.default_rng([4, repeat])
            found.append(setting.estimate(setting.test_part(rng)))
        spread = round(float(np.std(found)), 4)
        yield setting.line(
            "correlation", estimate=_mean(found), deviation_of_one=spread
        )


_RUN = {"level": _level, "fdr": _fdr, "power": _power, "correlation": _correlation}
_PARTS = flags.DEFINE_multi_enum(
    "parts", list(_RUN), list(_RUN), "Simulate this part. Repeat the flag for several."
)


def main() -> None:
    for part in _PARTS.value:
        for line in _RUN[part]():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    command.run(main)
