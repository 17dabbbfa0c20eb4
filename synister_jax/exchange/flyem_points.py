# SPDX-License-Identifier: Apache-2.0
"""Turns predictions into FlyEM points: voxel positions, and point ids made of them."""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from synister_jax.base import sql
from synister_jax.exchange import export_files
from synister_jax.tables import ids_from_positions, synapses
from synister_jax.tables.predictions import Predictions

LEFT_OUT = "left-out.feather"
INT32 = 2**31  # voxel coordinates from here on do not fit the type of x, y and z


def write(
    path: pathlib.Path,
    source: Predictions,
    voxel_size_nm_zyx: Sequence[float],
    convert: export_files.Convert,
) -> list[str]:
    """Writes the rows that have a point id; copies all other rows into `LEFT_OUT`.

    Args:
      path: the file. `LEFT_OUT` is written into the same folder.
      source: the predictions.
      voxel_size_nm_zyx: [3] nm, the voxel size of the volume.
      convert: turns a batch of predictions into the rows that have a point id.

    Returns:
      Messages for the user about rows without a point id and about repeated points.
    """
    rows = export_files.write(path, source, convert)
    notes = []
    if rows < source.rows:
        left_out = path.parent / LEFT_OUT
        export_files.write(
            left_out, source, lambda t: having(t, voxel_size_nm_zyx, False)[2]
        )
        notes.append(
            "rows without a point id (no position, or a voxel coordinate beyond "
            f"21 bits): {source.rows - rows:,}; these rows are in {left_out} instead"
        )
    schema = pa.schema([("point", pa.int64())])
    points = (
        pa.record_batch([pa.array(having(table, voxel_size_nm_zyx)[0])], schema)
        for table in source.tables()
    )
    query = """SELECT count(*) AS n FROM
        (SELECT point FROM rows GROUP BY point HAVING count(*) > 1)"""
    [counted] = sql.run(query, schema, points, path.parent)
    if repeated := counted["n"][0].as_py():
        notes.append(
            f"points with several rows: {repeated:,}; these rows share a point id, and "
            "FlyEM's tools expect each point id only once"
        )
    return notes


def having(
    table: pa.Table, voxel_size_nm_zyx: Sequence[float], with_id: bool = True
) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Returns the rows that have a point id, or the rows that have none.

    Args:
      table: a batch of predictions.
      voxel_size_nm_zyx: [3] nm, the voxel size of the volume.
      with_id: True for the rows with a point id, False for the rows without.

    Returns:
      The point ids, int64 [n]; the voxels, float64 [n, 3]; and the n rows.
    """
    voxel = voxels(table, voxel_size_nm_zyx)
    point = ids_from_positions.neuprint(voxel)
    chosen = (point >= 0) == with_id
    return point[chosen], voxel[chosen], table.filter(pa.array(chosen))


def voxels(table: pa.Table, voxel_size_nm_zyx: Sequence[float]) -> np.ndarray:
    """Returns the voxels (z, y, x): whole numbers, float64 [n, 3]; NaN if unknown."""
    return np.rint(synapses.positions_nm_zyx(table) / voxel_size_nm_zyx)


def xyz(voxel_zyx: np.ndarray) -> dict[str, pa.Array]:
    """Returns the columns x, y and z, int32 [n], of voxels [n, 3]; null for NaN."""
    z, y, x = (export_files.blank(values).cast(pa.int32()) for values in voxel_zyx.T)
    return {"x": x, "y": y, "z": z}


def confidence(table: pa.Table) -> np.ndarray:
    """Returns FlyEM's confidence in each T-bar, float32 [n]; NaN where unknown.

    This is `cleft_score`, or `connection_score` in a table without `cleft_score`
    (see `synapses.OPTIONAL`).
    """
    has_cleft = "cleft_score" in table.column_names
    return export_files.score(table, "cleft_score" if has_cleft else "connection_score")
