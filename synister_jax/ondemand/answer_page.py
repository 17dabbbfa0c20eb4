# SPDX-License-Identifier: Apache-2.0
"""Renders the answer to a request as one self-contained HTML page.

The page loads nothing from a server and can be printed. Like the page of a report, the
page shows its charts and the first rows of its table without JavaScript.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base import files
from synister_jax.base.errors import redact
from synister_jax.evaluation import group_calls
from synister_jax.ondemand import sources
from synister_jax.ondemand.answer_record import AnswerRecord
from synister_jax.pages import neurons_table, predictions_section, rendering
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions

MOST_CHARTS = 60
MOST_POSITIONS = 200  # shown in the page; predictions.csv has all positions
MOST_NAMED = 200  # neurons without predictions that are named; answer.json has all


def render(folder: pathlib.Path, about: AnswerRecord) -> str:
    """Returns the page as text.

    Args:
      folder: the folder with predictions.feather. Temporary files for data that do not
        fit into memory are written into this folder, too.
      about: the content of answer.json (answering.py).

    Raises:
      UserError: predictions.feather is missing, or is not a table of predictions.
    """
    source = predictions.open(folder / "predictions.feather")
    content: dict[str, Any] = {
        "about": about,
        "source": sources.find(about["source"]),
        "volume": redact(about["volume"]),
        "most_named": MOST_NAMED,
        "classes": neurons_table.legend(source.classes),
        "charts": [],
        "neurons": None,
        "positions": None,
    }
    first = _first_neurons(source)
    if first:
        with files.scratch(folder / "report.html") as scratch:
            groups = group_calls.of(source, "neuron", "majority", folder=scratch)
        content["neurons"] = neurons_table.prepare(groups, source.classes, "majority")
        content["charts"] = _charts(groups, first, source.classes)
        of_neurons = pc.sum(groups["synapses"]).as_py()
        content["of_no_neuron"] = source.rows - of_neurons
    elif source.rows:
        content["positions"] = _positions(source)
    return rendering.render("answer.html.j2", content)


def _first_neurons(source: Predictions) -> list[int]:
    """Returns the ids of the first `MOST_CHARTS` neurons in the order of the rows."""
    found: dict[int, None] = {}
    for table in source.tables(["neuron_id"]):
        found |= dict.fromkeys(pc.unique(table["neuron_id"].drop_null()).to_pylist())
        if len(found) >= MOST_CHARTS:
            break
    return list(found)[:MOST_CHARTS]


def _charts(
    groups: pa.Table, ids: Sequence[int], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the content of the chart of each of these neurons."""
    places = np.searchsorted(groups["neuron_id"].to_numpy(), ids)
    charts = []
    for row in groups.take(pa.array(places)).to_pylist():
        counts = [row[f"count_{name}"] for name in classes]
        charts.append(
            {
                "id": str(row["neuron_id"]),
                "counts": counts,
                "predicted": sum(counts),
                "synapses": row["synapses"],
                "leaders": [k for k, n in enumerate(counts) if 0 < n == max(counts)],
                "doubts": neurons_table.doubts(counts),
            }
        )
    return charts


def _positions(source: Predictions) -> dict[str, Any]:
    """Returns the counts of the calls and the first rows, if no row names a neuron."""
    counts = predictions_section.Counter.of(source).top.sum(axis=1)
    columns = ["synapse_id", *synapses.POSITION, "status"]
    columns += map(predictions.probability_column, source.classes)
    rows: list[dict[str, Any]] = []
    for table in source.tables(columns):
        table = table.slice(0, MOST_POSITIONS - len(rows))
        called = predictions.called(table).tolist()
        top = predictions.probabilities(table).max(axis=1, initial=0).tolist()
        for row, k, p in zip(table.to_pylist(), called, top, strict=True):
            nm = [row[name] for name in reversed(synapses.POSITION)]
            rows.append(
                {
                    "id": str(row["synapse_id"]),
                    "xyz": [f"{x:,.0f}" if np.isfinite(x) else "–" for x in nm],
                    "called": None if k < 0 else k,
                    "probability": None if k < 0 else p,
                    "status": row["status"],
                }
            )
        if len(rows) == MOST_POSITIONS:
            break
    return {"counts": counts.tolist(), "predicted": int(counts.sum()), "rows": rows}
