# SPDX-License-Identifier: Apache-2.0
"""Writes predictions as CSV files that neo4j's importer reads into neuPrint.

docs/exports.md gives the columns, their types and their units.
"""

import pathlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.evaluation import group_calls
from synister_jax.evaluation.confusions import Confusion
from synister_jax.exchange import export_files, flyem, flyem_points
from synister_jax.exchange.export_files import Consumer, ExportOptions
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions

NAMES = {name: name.capitalize() for name in synapses.CLASSES} | {"neither": "Unknown"}


def _write(
    source: Predictions,
    folder: pathlib.Path,
    options: ExportOptions,
    confusion: Confusion | None,
) -> list[str]:
    assert options.voxel_size_nm_zyx is not None
    notes = _write_synapses(source, folder, options.voxel_size_nm_zyx)
    _write_neurons(source, folder, confusion)
    return notes


def _write_synapses(
    source: Predictions, folder: pathlib.Path, voxel_size_nm_zyx: Sequence[float]
) -> list[str]:
    """Writes Neuprint_Synapses.csv, the properties of neuPrint's Synapse nodes.

    Returns:
      Messages for the user.
    """

    def convert(table: pa.Table) -> pa.Table:
        point, voxel, table = flyem_points.having(table, voxel_size_nm_zyx)
        x, y, z = (
            values.cast(pa.string()) for values in flyem_points.xyz(voxel).values()
        )
        parts = ["{x:", x, ", y:", y, ", z:", z, "}"]
        columns = {
            ":ID(Element-ID)": pa.array(point),
            "type:string": pa.repeat("pre", len(table)),
            "confidence:float": export_files.blank(flyem_points.confidence(table)),
            "location:point{srid:9157}": pc.binary_join_element_wise(*parts, ""),
        }
        for name in predictions.classes(table):
            values = export_files.blank(export_files.probability(table, name))
            columns[f"nt{NAMES[name]}Prob:float"] = values
        return pa.table(columns)

    path = folder / "Neuprint_Synapses.csv"
    return flyem_points.write(path, source, voxel_size_nm_zyx, convert)


def _write_neurons(
    source: Predictions, folder: pathlib.Path, confusion: Confusion | None
) -> None:
    """Writes Neuprint_Neurons.csv, the properties of Segment and Neuron nodes.

    With a confusion matrix, the properties are those of the optic lobe and the male CNS
    (FlyEM's rule). Without a confusion matrix, the properties are those of the male VNC
    (the class with the largest mean probability).
    """
    if confusion is None:
        neurons = group_calls.of(source, "neuron", "mean_probability", folder=folder)
        called = neurons["predicted_neurotransmitter"]
        properties = {
            "predictedNt:string": export_files.translated(called, flyem.NAMES),
            "predictedNtProb:float": neurons["score"],
        }
    else:
        bodies = flyem.bodies(source, folder, confusion)
        neurons = bodies.pop("neurons")
        del bodies["ground_truth"]  # neuPrint has no such property
        properties = {_property(name, c): c for name, c in bodies.items()}
    body = neurons["neuron_id"]
    columns = {":ID(Body-ID)": body, "bodyId:long": body, **properties}
    for name in source.classes:
        column = f"nt{NAMES[name]}Prob:float"
        columns[column] = neurons[f"mean_{name}_prob"]
    export_files.write_table(folder / "Neuprint_Neurons.csv", pa.table(columns), source)


def _property(name: str, column: pa.ChunkedArray) -> str:
    """Returns the header for neo4j's importer: predicted_nt → predictedNt:string."""
    first, *others = name.split("_")
    kinds = {pa.int32(): "int", pa.float64(): "float", pa.string(): "string"}
    return first + "".join(map(str.capitalize, others)) + ":" + kinds[column.type]


NEUPRINT = Consumer(
    names=NAMES,
    files=("Neuprint_Synapses.csv", "Neuprint_Neurons.csv", flyem_points.LEFT_OUT),
    takes={"voxel_size_nm_zyx": True, "confusion": False},
    needs_neurons=True,
    write=_write,
)
