# SPDX-License-Identifier: Apache-2.0
"""Collects what the report shows about a prediction table of any size."""

import collections
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.base.progress import Progress
from synister_jax.evaluation import group_calls, voting_rules
from synister_jax.evaluation.confusions import Confusion
from synister_jax.pages import neurons_table
from synister_jax.tables import predictions

_BINS = 20  # bins of the highest probability, from 0 to 1
_MOST_HEMILINEAGES = 60
_SAID_OF = 1_000_000  # progress is shown for tables with at least this many rows


class Counter:
    """The counts over the rows of a table, collected batch by batch in one pass."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        k = len(classes)
        self.status: collections.Counter[str] = collections.Counter()
        self.top = np.zeros((k, _BINS), np.int64)  # [called class, bin]
        self.sure = np.zeros(k, np.int64)  # calls with a probability of at least 0.9
        self.hemilineages: dict[str, np.ndarray] = {}  # [k] synapses by class
        self.neurons = 0  # rows that name a neuron

    @classmethod
    def of(cls, source: predictions.Predictions) -> "Counter":
        """Returns how often each status, class and hemilineage is in the table."""
        counter = cls(source.classes)
        columns = ["status", "hemilineage", "neuron_id"]
        columns += map(predictions.probability_column, source.classes)
        silent = source.rows < _SAID_OF
        progress = Progress("count", source.rows, "synapses", silent=silent)
        for table in source.tables(columns):
            counter.add(table)
            progress.add(len(table))
        return counter

    def add(self, table: pa.Table) -> None:
        """Counts one batch of the table."""
        for entry in table["status"].combine_chunks().value_counts().to_pylist():
            self.status[entry["values"]] += entry["counts"]
        called = predictions.called(table)
        top = predictions.probabilities(table)[called >= 0].max(axis=1, initial=0)
        is_called = called[called >= 0]
        place = np.minimum((top * _BINS).astype(int), _BINS - 1)
        np.add.at(self.top, (is_called, place), 1)
        self.sure += np.bincount(is_called[top >= 0.9], minlength=len(self.sure))
        self.neurons += len(table) - table["neuron_id"].null_count
        names = table["hemilineage"].combine_chunks().dictionary_encode()
        index = names.indices.fill_null(-1).to_numpy()
        counts = np.zeros((len(names.dictionary), len(self.sure)), np.int64)
        both = (index >= 0) & (called >= 0)
        np.add.at(counts, (index[both], called[both]), 1)
        for name, of_name in zip(names.dictionary.to_pylist(), counts, strict=True):
            self.hemilineages[name] = self.hemilineages.get(name, 0) + of_name


def content(
    source: predictions.Predictions,
    rule: str,
    confusion: Confusion | None = None,
    folder: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Returns what the template predictions.html.j2 needs.

    The function reads the table twice: once for the counts, once for the neurons.

    Args:
      source: the predictions.
      rule: the rule that calls the neurons, a key of `voting_rules.RULES`.
      confusion: the confusion matrix of the network, for the rules that need one.
      folder: a folder on a disk with room for what does not fit into memory.

    Raises:
      UserError: The rule cannot be used on these predictions.
    """
    counter = Counter.of(source)
    found: dict[str, Any] = {
        "path": source.path.name,
        "about": source.about,
        "classes": neurons_table.legend(source.classes),
        "rows": source.rows,
        "status": counter.status.most_common(),
        "histograms": _histograms(counter),
        "neurons": None,
        "hemilineages": None,
    }
    neurons = None
    if counter.neurons:
        neurons = group_calls.of(source, "neuron", rule, confusion, folder)
        found["neurons"] = neurons_table.prepare(neurons, source.classes, rule)
    if counter.hemilineages:
        found["hemilineages"] = hemilineages(counter.hemilineages, neurons, source)
    return found


def _histograms(counter: Counter) -> list[dict[str, Any]]:
    """Returns each class's synapses, their share at 0.9 or more, and bar heights."""
    return [
        {
            "count": int(bins.sum()),
            "sure": float(sure / max(bins.sum(), 1)),
            "heights": [float(h) for h in bins / max(bins.max(), 1)],
        }
        for bins, sure in zip(counter.top, counter.sure, strict=True)
    ]


def hemilineages(
    of_synapses: dict[str, np.ndarray],
    neurons: pa.Table | None,
    source: predictions.Predictions,
) -> dict[str, Any]:
    """Returns the largest hemilineages, with the calls of their neurons and synapses.

    Args:
      of_synapses: hemilineage → int64 [k], how many synapses are called as each class.
      neurons: the called neurons, or None if no row names a neuron.
      source: the predictions.
    """
    order = sorted(of_synapses, key=lambda name: (-of_synapses[name].sum(), name))
    called: collections.Counter[tuple[str | None, str | None]] = collections.Counter()
    if neurons is not None:
        columns = ["hemilineage", "predicted_neurotransmitter"]
        counted = neurons.group_by(columns).aggregate([([], "count_all")])
        for entry in counted.to_pylist():
            called[*map(entry.get, columns)] = entry["count_all"]
    rows = []
    for name in order[:_MOST_HEMILINEAGES]:
        of_neurons = [called[name, c] for c in source.classes]
        rows.append(
            {
                "name": name,
                "synapses": of_synapses[name].tolist(),
                "neurons": of_neurons,
                "others": called[name, voting_rules.UNCLEAR],
            }
        )
    return {
        "rows": rows,
        "total": len(order),
        "unclear": any(row["others"] for row in rows),
    }
