# SPDX-License-Identifier: Apache-2.0
"""Writes predictions as FlyWire's tables: for fafbseg, for CAVE and for Codex.

docs/exports.md gives the columns, their types and their units.
"""

import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base import sql
from synister_jax.base.errors import listed
from synister_jax.evaluation import group_calls, vote_tallies
from synister_jax.evaluation.confusions import Confusion
from synister_jax.exchange import export_files
from synister_jax.exchange.export_files import Consumer, ExportOptions
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions

_FAFB = ("gaba", "acetylcholine", "glutamate", "octopamine", "serotonin", "dopamine")
_FAFBSEG = {name: name for name in _FAFB}
_CAVE = dict(zip(_FAFB, ("gaba", "ach", "glut", "oct", "ser", "da"), strict=True))
_CODEX = {
    "dopamine": "DA",
    "serotonin": "SER",
    "gaba": "GABA",
    "glutamate": "GLUT",
    "acetylcholine": "ACH",
    "octopamine": "OCT",
}


def _write_fafbseg(
    source: Predictions,
    folder: pathlib.Path,
    options: ExportOptions,
    confusion: Confusion | None,
) -> list[str]:
    """Writes synapses.feather for fafbseg-py and R's fafbseg; returns messages.

    fafbseg-py divides by the sum of the weights of a neuron's synapses. If this sum is
    zero for one neuron, fafbseg-py fails for all neurons. So if no predicted synapse of
    a neuron has a cleft score above 0, all synapses of this neuron get the weight 1.
    """
    weightless = _weightless(source, folder)

    def convert(table: pa.Table) -> pa.Table:
        ids, neurons = table["synapse_id"], export_files.ids(table, "neuron_id")
        z, y, x = (table[name] for name in synapses.POSITION)
        columns = {"id": ids, "offset": ids, "pre": neurons}
        if "post_neuron_id" in table.column_names:
            columns["post"] = export_files.ids(table, "post_neuron_id")
        columns |= {"pre_x": x, "pre_y": y, "pre_z": z}
        weights = _weights(table)
        weights[_among(neurons.to_numpy(), weightless)] = 1
        columns["scores"] = export_files.score(table, "connection_score")
        columns |= {"cleft_score": pa.array(weights), "cleft_scores": pa.array(weights)}
        return pa.table(columns | export_files.fixed(table, _FAFBSEG))

    export_files.write(folder / "synapses.feather", source, convert)
    if "cleft_score" not in source.schema.names:
        return ["the predictions have no cleft scores: every synapse gets the weight 1"]
    if not len(weightless):
        return []
    count = len(weightless)
    return [
        f"neurons without a predicted synapse whose cleft score is above 0: {count:,}; "
        f"each of their synapses gets the weight 1: {listed(weightless, count)}"
    ]


def _weightless(source: Predictions, folder: pathlib.Path) -> np.ndarray:
    """Returns the neurons, int64 [n], whose predicted synapses all have weight 0."""
    schema = pa.schema([("neuron", pa.int64()), ("weight", pa.float32())])

    def batches() -> Iterator[pa.RecordBatch]:
        for table in source.tables():
            known = predictions.called(table) >= 0
            columns = [export_files.ids(table, "neuron_id").to_numpy(), _weights(table)]
            yield pa.record_batch([pa.array(c[known]) for c in columns], schema)

    query = """SELECT neuron FROM rows GROUP BY neuron HAVING max(weight) = 0
        ORDER BY neuron"""
    found = pa.Table.from_batches(
        sql.run(query, schema, batches(), folder), pa.schema([schema.field(0)])
    )
    return found["neuron"].to_numpy()


def _among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Returns bool [n]: which values occur in `ascending`.

    np.isin would sort `ascending` again in every call.
    """
    place = np.searchsorted(ascending, values)
    found = place < len(ascending)
    found[found] = ascending[place[found]] == values[found]
    return found


def _weights(table: pa.Table) -> np.ndarray:
    """Returns the cleft scores, float32 [n]; 0 where unknown.

    In a table without cleft scores, every synapse gets 1.
    """
    if "cleft_score" not in table.column_names:
        return np.ones(len(table), np.float32)
    return vote_tallies.weights(table)


def _write_cave(
    source: Predictions,
    folder: pathlib.Path,
    options: ExportOptions,
    confusion: Confusion | None,
) -> list[str]:
    """Writes synapses_nt_v1.feather, FlyWire's CAVE table; positions are in nm."""

    def convert(table: pa.Table) -> pa.Table:
        z, y, x = (table[name] for name in synapses.POSITION)
        nowhere = pa.nulls(len(table), pa.float64())
        unknown = pa.array(np.zeros(len(table), np.int64))
        return pa.table(
            {
                "id": table["synapse_id"],
                "pre_pt_root_id": export_files.ids(table, "neuron_id"),
                "post_pt_root_id": export_files.ids(table, "post_neuron_id"),
                "connection_score": export_files.score(table, "connection_score"),
                "cleft_score": export_files.score(table, "cleft_score"),
                **export_files.fixed(table, _CAVE),
                "valid_nt": pa.array(predictions.called(table) >= 0),
                "pre_pt_supervoxel_id": unknown,
                "post_pt_supervoxel_id": unknown,
                "pre_pt_position_x": x,
                "pre_pt_position_y": y,
                "pre_pt_position_z": z,
                **{f"post_pt_position_{axis}": nowhere for axis in "xyz"},
            }
        )

    export_files.write(folder / "synapses_nt_v1.feather", source, convert)
    return []


def _write_codex(
    source: Predictions,
    folder: pathlib.Path,
    options: ExportOptions,
    confusion: Confusion | None,
) -> list[str]:
    """Writes neurons.csv.gz: each neuron's mean probabilities and the largest mean."""
    neurons = group_calls.of(source, "neuron", "mean_probability", folder=folder)
    names = _CODEX
    columns = {
        "root_id": neurons["neuron_id"],
        "group": pa.nulls(len(neurons), pa.string()),
        "nt_type": export_files.translated(
            neurons["predicted_neurotransmitter"], names
        ),
        "nt_type_score": neurons["score"],
    }
    zero = pc.if_else(pc.is_valid(neurons["score"]), 0.0, None)
    for name, code in names.items():
        known = name in source.classes
        mean = neurons[f"mean_{name}_prob"] if known else zero
        columns[f"{code.lower()}_avg"] = mean
    export_files.write_table(folder / "neurons.csv.gz", pa.table(columns), source)
    return []


FAFBSEG = Consumer(
    names=_FAFBSEG,
    files=("synapses.feather",),
    takes={},
    needs_neurons=True,
    write=_write_fafbseg,
)
CAVE = Consumer(
    names=_CAVE,
    files=("synapses_nt_v1.feather",),
    takes={},
    needs_neurons=False,
    write=_write_cave,
)
CODEX = Consumer(
    names=_CODEX,
    files=("neurons.csv.gz",),
    takes={},
    needs_neurons=True,
    write=_write_codex,
)
