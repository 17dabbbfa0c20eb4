# SPDX-License-Identifier: Apache-2.0
"""Prepares the table of called neurons for a page, and the colours of the classes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.tables import synapses

MOST = 20_000  # neurons in one table of a page, which take about two megabytes
FIRST = 25  # rows that are shown without JavaScript
# With fewer predicted synapses than this, the majority may be due to chance. The number
# is from the report of the original synister (synistereq).
FEW = 100
# The text columns: name in the page, name in the table, heading.
_WORDS = (
    ("known", "neurotransmitter", "known"),
    ("called", "predicted_neurotransmitter", "called"),
    ("hemilineage", "hemilineage", "hemilineage"),
    ("cell_type", "cell_type", "cell type"),
)
_NUMBERS = ("score", "margin", "entropy")
_SHORT = {
    "gaba": "GABA",
    "acetylcholine": "ACh",
    "glutamate": "Glu",
    "serotonin": "5HT",
    "octopamine": "OA",
    "dopamine": "DA",
    "histamine": "HA",
    "tyramine": "TA",
    "neither": "nei",
    "unknown": "unk",
}


@dataclasses.dataclass(frozen=True)
class LegendEntry:
    """A class as all pages show it: with its name, short name and colour."""

    name: str
    short: str
    colour: int  # index into the palette of style.css, 0 to 9


def legend(classes: Sequence[str]) -> list[LegendEntry]:
    """Returns the classes with their short names and colours.

    The classes of known networks always have the same colour. Classes with other names
    take the free colours in turn.
    """
    free = [n for n in range(10) if n not in map(_colour, classes)] or [0]
    return [
        LegendEntry(
            name,
            _SHORT.get(name, name[:4]),
            free[place % len(free)] if (known := _colour(name)) is None else known,
        )
        for place, name in enumerate(classes)
    ]


def _colour(name: str) -> int | None:
    return synapses.CLASSES.index(name) if name in synapses.CLASSES else None


def doubts(counts: Sequence[int]) -> list[str]:
    """Returns the reasons why the call of a neuron is uncertain.

    Args:
      counts: how many of the neuron's synapses are called as each class.
    """
    predicted = sum(counts)
    found = []
    if predicted < FEW:
        found.append(f"fewer than {FEW} predicted synapses")
    if 2 * max(counts) <= predicted:
        found.append("no class has more than half of the predicted synapses")
    return found


def prepare(groups: pa.Table, classes: Sequence[str], rule: str) -> dict[str, Any]:
    """Returns what a page needs to show a table of neurons.

    The page gets the `MOST` neurons with the most predicted synapses, in this order.
    The entry `data` goes into the page as JSON. There ids are text, because numbers in
    JavaScript are exact only up to 15 digits.

    Args:
      groups: the neurons, as `group_calls.of` returns them.
      classes: the classes of the network.
      rule: the rule that called the neurons.
    """
    ids = groups["neuron_id"].to_numpy()
    predicted = groups["predicted"].to_numpy()
    chosen = np.lexsort((ids, -predicted))[:MOST]
    shown = groups.take(pa.array(chosen))
    words = {}
    columns: dict[str, list[Any]] = {
        "id": [str(i) for i in shown["neuron_id"].to_pylist()]
    }
    headings = {"id": "neuron"}
    for name, source, heading in _WORDS:
        encoded = shown[source].combine_chunks().dictionary_encode()
        if name in ("hemilineage", "cell_type") and not len(encoded.dictionary):
            continue
        words[name] = encoded.dictionary.to_pylist()
        columns[name] = encoded.indices.fill_null(-1).to_pylist()
        headings[name] = heading
    for name in ("synapses", "predicted"):
        columns[name] = shown[name].to_pylist()
    for name in _NUMBERS:
        columns[name] = [
            None if value is None or not np.isfinite(value) else round(value, 4)
            for value in shown[name].to_pylist()
        ]
    # A margin of 0 means that several classes are equal and the rule chose one of them.
    is_called = synapses.index_in(shown["predicted_neurotransmitter"], classes) >= 0
    margin = shown["margin"].to_numpy()
    columns["tie"] = (is_called & (margin == 0)).astype(int).tolist()
    counts = np.stack([shown[f"count_{c}"].to_numpy() for c in classes], axis=1)
    data = {
        "rule": rule,
        "classes": list(classes),
        "short": [c.short for c in legend(classes)],
        "colours": [c.colour for c in legend(classes)],
        "words": words,
        "columns": columns,
        "counts": counts.tolist(),
    }
    return {
        "rule": rule,
        "classes": legend(classes),
        "total": len(groups),
        "shown": len(shown),
        "headings": headings,
        "data": data,
        "first": [_row(data, row) for row in range(min(FIRST, len(shown)))],
        "verdicts": _verdicts(groups, classes),
        "ties": sum(columns["tie"]),
    }


def _row(data: dict[str, Any], row: int) -> dict[str, Any]:
    """Returns a row of the table that is shown without JavaScript."""
    result = {name: values[row] for name, values in data["columns"].items()}
    for name, values in data["words"].items():
        result[name] = None if result[name] < 0 else values[result[name]]
    comparable = {result["known"], result["called"]} <= set(data["classes"])
    result["right"] = result["known"] == result["called"] if comparable else None
    result["counts"] = data["counts"][row]
    return result


def _verdicts(groups: pa.Table, classes: Sequence[str]) -> dict[str, int]:
    """Counts neurons by what can be said about their calls.

    `known` counts the neurons with a known class and a call. `right` counts the right
    calls among these neurons. `unclear` counts unclear calls. `nothing` counts the
    neurons without a predicted synapse.
    """
    known = synapses.labels(groups, classes)
    called = synapses.index_in(groups["predicted_neurotransmitter"], classes)
    both = (known >= 0) & (called >= 0)
    nothing = groups["predicted"].to_numpy() == 0
    return {
        "known": int(both.sum()),
        "right": int((both & (known == called)).sum()),
        "unclear": int(((called < 0) & ~nothing).sum()),
        "nothing": int(nothing.sum()),
    }
