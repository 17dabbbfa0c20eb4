# SPDX-License-Identifier: Apache-2.0
"""Writes predictions as the BANC project's tables of synapses and of neurons.

docs/exports.md gives the columns, their types and their units.
"""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.evaluation import group_calls
from synister_jax.evaluation.confusions import Confusion
from synister_jax.exchange import export_files
from synister_jax.exchange.export_files import Consumer, ExportOptions
from synister_jax.tables import predictions
from synister_jax.tables.predictions import Predictions

_CLASSES = (
    "acetylcholine",
    "dopamine",
    "gaba",
    "glutamate",
    "histamine",
    "octopamine",
    "serotonin",
    "tyramine",
)
NAMES = {name: name for name in _CLASSES}


def _write(
    source: Predictions,
    folder: pathlib.Path,
    options: ExportOptions,
    confusion: Confusion | None,
) -> list[str]:
    _write_synapses(source, folder)
    _write_neurons(source, folder)
    return []


def _write_synapses(source: Predictions, folder: pathlib.Path) -> None:
    """Writes banc_nt_prediction.parquet, and the calls as a CAVE reference table."""
    classes = np.array([*source.classes, None], object)  # index -1: no prediction

    def convert(table: pa.Table) -> pa.Table:
        columns = export_files.fixed(table, NAMES)
        called = pa.array(classes[predictions.called(table)], pa.string())
        largest = np.max([*columns.values()], axis=0)
        columns |= {"probability": largest}
        halves = {name: pa.array(v.astype(np.float16)) for name, v in columns.items()}
        ends = {"predicted_nt": called, "probability": halves.pop("probability")}
        return pa.table({"id": table["synapse_id"], **halves, **ends})

    def refer(table: pa.Table) -> pa.Table:
        converted = convert(table)
        value = converted["probability"].to_numpy().astype(np.float32)
        return pa.table(
            {
                "tag": converted["predicted_nt"],
                "value": export_files.blank(value),
                "id_ref": converted["id"],
                "valid": pc.is_valid(converted["predicted_nt"]),
                "valid_ref": pa.repeat(True, len(table)),
            }
        )

    export_files.write(folder / "banc_nt_prediction.parquet", source, convert)
    export_files.write(folder / "synapses_nt_prediction.csv", source, refer)


def _write_neurons(source: Predictions, folder: pathlib.Path) -> None:
    """Writes banc_neurotransmitter_prediction.csv, by the rule of the BANC project."""
    neurons = group_calls.of(source, "neuron", "banc", folder=folder)
    types = export_files.calls_of_types(
        source, folder, neurons["cell_type"], "banc", None
    )
    nothing = pa.nulls(len(neurons), pa.string())
    columns = {"root_id": neurons["neuron_id"].cast(pa.string())}
    for name in NAMES:
        known = name in source.classes
        zeros = pa.array(np.zeros(len(neurons), np.int64))
        columns[name] = neurons[f"count_{name}"] if known else zeros
    columns |= {
        "neurotransmitter_predicted": neurons["predicted_neurotransmitter"],
        "neurotransmitter_score": neurons["score"],
        "count": neurons["predicted"],
        "supervoxel_id": nothing,
        "position": nothing,
        "cell_type": neurons["cell_type"],
        "cell_type_neurotransmitter_predicted": types["predicted_neurotransmitter"],
        "cell_type_neurotransmitter_score": types["score"],
    }
    export_files.write_table(
        folder / "banc_neurotransmitter_prediction.csv", pa.table(columns), source
    )


BANC = Consumer(
    names=NAMES,
    files=(
        "banc_nt_prediction.parquet",
        "synapses_nt_prediction.csv",
        "banc_neurotransmitter_prediction.csv",
    ),
    takes={},
    needs_neurons=True,
    write=_write,
)
