# SPDX-License-Identifier: Apache-2.0
"""Writes the files of the original synister: its answer to a request, its Zenodo table.

docs/exports.md gives the columns, their types and their units.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.evaluation.confusions import Confusion
from synister_jax.exchange import export_files, flyem_points
from synister_jax.exchange.export_files import Consumer, ExportOptions
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions

NAMES = {name: name for name in synapses.CLASSES}


def _write(
    source: Predictions,
    folder: pathlib.Path,
    options: ExportOptions,
    confusion: Confusion | None,
) -> list[str]:
    assert options.voxel_size_nm_zyx is not None and options.predict is not None
    _write_files(source, folder, options.voxel_size_nm_zyx, options.predict)
    return []


def _write_files(
    source: Predictions,
    folder: pathlib.Path,
    voxel_size_nm_zyx: Sequence[float],
    predict: int,
) -> None:
    """Writes the original's predictions.csv, and synapses.feather as on Zenodo.

    Args:
      predict: the number of the prediction in the original synister, which is part of
        the column names (`nts_<predict>.…`).
    """

    def published(table: pa.Table) -> pa.Table:
        voxel = flyem_points.voxels(table, voxel_size_nm_zyx)
        columns = {
            "id": table["synapse_id"],
            "body": export_files.ids(table, "neuron_id"),
        }
        columns |= flyem_points.xyz(
            np.where(np.abs(voxel) < flyem_points.INT32, voxel, np.nan)
        )
        for name in predictions.classes(table):
            columns[f"nts_{predict}.{name}"] = export_files.probability(table, name)
        return pa.table(columns)

    export_files.write(folder / "predictions.csv", source, request_columns)
    export_files.write(folder / "synapses.feather", source, published)


def request_columns(table: pa.Table) -> pa.Table:
    """Returns the columns of the original's answer to a request (synistereq).

    `x`, `y` and `z` are nm in the volume frame. Unknown positions and probabilities are
    null, which CSV files leave blank. `skid` is -1 for a synapse without a neuron.

    Args:
      table: a batch of predictions.
    """
    z, y, x = (export_files.blank(table[name].to_numpy()) for name in synapses.POSITION)
    skids = pc.fill_null(table["neuron_id"], -1)
    columns = {"position_id": table["synapse_id"], "skid": skids}
    columns |= {"x": x, "y": y, "z": z}
    for name in predictions.classes(table):
        columns[name] = export_files.blank(export_files.probability(table, name))
    return pa.table(columns)


SYNISTER = Consumer(
    names=NAMES,
    files=("predictions.csv", "synapses.feather"),
    takes={"voxel_size_nm_zyx": True, "predict": True},
    needs_neurons=False,
    write=_write,
)
