# SPDX-License-Identifier: Apache-2.0
"""Measures the accuracy of a prediction table of labelled synapses.

The numbers are computed for synapses, neurons, hemilineages, cell types and brain
regions. `evaluate` writes them as metrics.json; docs/evaluation.md lists every key.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.evaluation import (
    accuracy,
    calibration,
    group_calls,
    intervals,
    mixtures,
    vote_tallies,
)
from synister_jax.evaluation.accuracy import Accuracies, Summary
from synister_jax.evaluation.intervals import Interval
from synister_jax.tables import predictions, synapses

# The accuracy is also measured over neurons with at least this many predicted synapses
# and at least this share of votes for the call. The limits correspond to `n_min` and
# `cutoff` in evaluate.py of the original.
N_MIN = (1, 10, 30, 100)
CUTOFFS = (0.0, 0.5, 0.7, 0.9)
RULE = "majority"


class SynapseNumbers(Summary):
    """The numbers of the synapses."""

    interval: Interval


class GroupNumbers(Summary):
    """The numbers of groups, such as hemilineages, that are called by `rule`."""

    rule: str


class NeuronNumbers(GroupNumbers):
    """The numbers of the neurons."""

    interval: Interval
    # A tenth of the counted neurons has fewer predicted synapses than this number.
    tenth_of_synapses: int | None


class Variant(Accuracies):
    """The numbers of the neurons within both limits, and of the neurons' synapses."""

    n_min: int
    cutoff: float
    synapses: Accuracies


class Measured(TypedDict):
    """The numbers that `measure` returns; docs/evaluation.md explains every key."""

    loss: float | None
    synapses: SynapseNumbers
    neurons: NeuronNumbers
    hemilineages: GroupNumbers | None
    cell_types: GroupNumbers | None
    brain_regions: dict[str, Accuracies]
    expected_probability: list[list[float] | None]
    neuron_variants: list[Variant]
    accuracy_by_synapses: list[dict[str, Any]]
    correlation: dict[str, float | None]
    calibration: dict[str, Any]


def measure(
    table: pa.Table,
    n_mins: Sequence[int] = N_MIN,
    cutoffs: Sequence[float] = CUTOFFS,
) -> Measured:
    """Returns the numbers of a prediction table; undefined numbers are None.

    A synapse counts if its known transmitter is one of the classes and it has a
    prediction. A group counts if its synapses name exactly one known transmitter, which
    is one of the classes, and at least one of its synapses has a prediction.

    Args:
      table: the predictions.
      n_mins: the smallest numbers of predicted synapses in `neuron_variants`.
      cutoffs: the smallest shares of votes in `neuron_variants`, which has an entry for
        every pair of `n_mins` and `cutoffs`.
    """
    classes = predictions.classes(table)
    k = len(classes)
    truth, called = synapses.labels(table, classes), predictions.called(table)
    probabilities = predictions.probabilities(table)
    neurons = _Groups.of(table, "neuron")
    hemilineages = _Groups.of(table, "hemilineage")
    cell_types = _Groups.of(table, "cell_type")
    neuron_of = neurons.rows_of(table)
    return {
        "loss": calibration.loss(probabilities, truth),
        "synapses": {
            **accuracy.summary(accuracy.confusion(truth, called, k), classes),
            "interval": intervals.by_group(neuron_of, truth, called, k),
        },
        "neurons": {
            **neurons.summary(),
            "interval": neurons.intervals(),
            "tenth_of_synapses": neurons.tenth(),
        },
        "hemilineages": hemilineages.summary() if len(hemilineages) else None,
        "cell_types": cell_types.summary() if len(cell_types) else None,
        "brain_regions": _regions(table, truth, called, k),
        "expected_probability": _expected(probabilities, truth, k),
        "neuron_variants": [
            _variant(neurons, neuron_of, truth, called, n_min, cutoff)
            for n_min in n_mins
            for cutoff in cutoffs
        ],
        "accuracy_by_synapses": _by_synapses(neurons),
        "correlation": {
            "synapses_within_neurons": mixtures.correlation(
                neurons.tally.counts, neurons.truth
            ),
            "neurons_within_hemilineages": mixtures.correlation(
                *_neurons_within(hemilineages, neurons)
            ),
        },
        "calibration": calibration.reliability(probabilities, truth),
    }


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The groups of one kind, with their true classes and their calls."""

    tally: vote_tallies.Tally
    truth: np.ndarray  # int32 [n]; -1 where there is not exactly one known class
    called: np.ndarray  # int32 [n]; -1 where no synapse has a prediction
    share: np.ndarray  # float64 [n], share of votes for the call; NaN without a call

    @classmethod
    def of(cls, table: pa.Table, by: str) -> "_Groups":
        tally = vote_tallies.count([table], predictions.classes(table), by)
        table = group_calls.call(tally, RULE)
        called = synapses.index_in(table["predicted_neurotransmitter"], tally.classes)
        truth = synapses.labels(tally.groups, tally.classes)
        return cls(tally, truth, called, table["score"].to_numpy())

    def __len__(self) -> int:
        return len(self.truth)

    def rows_of(self, table: pa.Table) -> np.ndarray:
        """Returns the index of each row's group, [rows] int32; -1 without a group."""
        name = synapses.GROUP_COLUMNS[self.tally.by]
        names = self.tally.groups[name].combine_chunks()
        found = pc.index_in(table[name], value_set=names)
        return pc.fill_null(found, -1).to_numpy().astype(np.int32)

    def summary(self) -> GroupNumbers:
        k = len(self.tally.classes)
        confusion = accuracy.confusion(self.truth, self.called, k)
        return {"rule": RULE, **accuracy.summary(confusion, self.tally.classes)}

    def intervals(self) -> Interval:
        """Returns the intervals of the numbers of `summary`.

        The accuracy has the Wilson interval. The means over classes have intervals from
        drawing groups.
        """
        k, counted = len(self.tally.classes), (self.truth >= 0) & (self.called >= 0)
        found = intervals.by_group(np.arange(len(self)), self.truth, self.called, k)
        right = (self.truth == self.called)[counted]
        wilson = intervals.wilson(int(right.sum()), len(right))
        return {**found, "accuracy": wilson}

    def tenth(self) -> int | None:
        """Returns the tenth percentile of the predicted synapses of counted groups."""
        sizes = self.tally.predicted[(self.truth >= 0) & (self.called >= 0)]
        return int(np.ceil(np.quantile(sizes, 0.1))) if len(sizes) else None


def _regions(
    table: pa.Table, truth: np.ndarray, called: np.ndarray, k: int
) -> dict[str, Accuracies]:
    """Returns the accuracies of the synapses in each brain region.

    A region itself is not called, because its neurons have several transmitters.
    """
    regions = sorted(pc.unique(table["brain_region"].drop_null()).to_pylist())
    place = synapses.index_in(table["brain_region"], regions)
    return {
        name: accuracy.accuracies(
            accuracy.confusion(truth[place == i], called[place == i], k)
        )
        for i, name in enumerate(regions)
    }


def _expected(
    probabilities: np.ndarray, truth: np.ndarray, k: int
) -> list[list[float] | None]:
    """Returns the mean probabilities [k] of the synapses of each true class.

    The entry of a class without synapses is None. The original calls the result
    `expected_probability_matrix`.
    """
    probabilities, truth = calibration.known(probabilities, truth)
    return [
        probabilities[truth == i].mean(axis=0, dtype=np.float64).tolist()
        if (truth == i).any()
        else None
        for i in range(k)
    ]


def _variant(
    neurons: _Groups,
    neuron_of: np.ndarray,
    truth: np.ndarray,
    called: np.ndarray,
    n_min: int,
    cutoff: float,
) -> Variant:
    """Returns the numbers of the neurons within the limits, and of their synapses."""
    k = len(neurons.tally.classes)
    kept = (neurons.tally.predicted >= n_min) & (neurons.share >= cutoff)
    rows = (neuron_of >= 0) & np.append(kept, False)[neuron_of]
    return {
        "n_min": n_min,
        "cutoff": cutoff,
        **accuracy.accuracies(
            accuracy.confusion(neurons.truth[kept], neurons.called[kept], k)
        ),
        "synapses": accuracy.accuracies(
            accuracy.confusion(truth[rows], called[rows], k)
        ),
    }


def _by_synapses(neurons: _Groups) -> list[dict[str, Any]]:
    """Returns the accuracy of neurons with 1, 2 to 3, 4 to 7, … predicted synapses."""
    known = (neurons.truth >= 0) & (neurons.called >= 0)
    right = neurons.truth == neurons.called
    sizes = neurons.tally.predicted
    found = []
    for exponent in range(int(sizes.max(initial=0)).bit_length()):
        low, high = 2**exponent, 2 ** (exponent + 1) - 1
        there = known & (sizes >= low) & (sizes <= high)
        if there.any():
            numbers = {
                "neurons": int(there.sum()),
                "accuracy": float(right[there].mean()),
            }
            found.append({"synapses": [low, high], **numbers})
    return found


def _neurons_within(
    hemilineages: _Groups, neurons: _Groups
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the calls of the neurons in each hemilineage, and its true class.

    The calls are numbers of neurons that are called each class, [n, k]. The true class
    has the shape [n], with -1 where there is not exactly one known class.
    """
    names, counts = vote_tallies.calls_of_neurons(neurons.tally, "hemilineage")
    every = hemilineages.tally.groups["hemilineage"].combine_chunks()
    return counts, hemilineages.truth[pc.index_in(names, value_set=every).to_numpy()]


def scalars(part: str, measured: Measured) -> dict[str, float]:
    """Returns the numbers of `measure` that a run logs, without undefined numbers.

    Args:
      part: the part of the split, which is the first half of each name.
    """
    of_synapses, neurons = measured["synapses"], measured["neurons"]
    values = {
        f"{part}/loss": measured["loss"],
        f"{part}/synapse_accuracy": of_synapses["accuracy"],
        f"{part}/synapse_mean_class_accuracy": of_synapses["mean_class_accuracy"],
        f"{part}/synapse_macro_f1": of_synapses["macro_f1"],
        f"{part}/neuron_accuracy": neurons["accuracy"],
    }
    return {name: value for name, value in values.items() if value is not None}
