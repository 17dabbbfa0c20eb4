# SPDX-License-Identifier: Apache-2.0
"""Rows as FlyEM's points: voxels, and point ids that are made of them."""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from synister_jax.base import sql
from synister_jax.exchange import export_files
from synister_jax.tables import ids_from_positions, synapses
from synister_jax.tables.predictions import Predictions

LEFT_OUT = "left-out.feather"
INT32 = 2**31  # voxels beyond do not fit the type of x, y and z


def write(
    path: pathlib.Path,
    source: Predictions,
    voxel_size_nm_zyx: Sequence[float],
    convert: export_files.Convert,
) -> list[str]:
    """Writes rows that have a point id; the others as they are into `LEFT_OUT`."""
    rows = export_files.write(path, source, convert)
    notes = []
    if rows < source.rows:
        left_out = path.parent / LEFT_OUT
        export_files.write(
            left_out, source, lambda t: having(t, voxel_size_nm_zyx, False)[2]
        )
        notes.append(
            "rows without a point id (no position, or one beyond 21 bits of voxels): "
            f"{source.rows - rows:,}; they are in {left_out} instead"
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
            f"points with several rows: {repeated:,}; their rows share a point id, and "
            "FlyEM's tools expect each once"
        )
    return notes


def having(
    table: pa.Table, voxel_size_nm_zyx: Sequence[float], with_id: bool = True
) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """(point ids, voxels, rows) of the rows that have a point id, or have none."""
    voxel = voxels(table, voxel_size_nm_zyx)
    point = ids_from_positions.neuprint(voxel)
    chosen = (point >= 0) == with_id
    return point[chosen], voxel[chosen], table.filter(pa.array(chosen))


def voxels(table: pa.Table, voxel_size_nm_zyx: Sequence[float]) -> np.ndarray:
    """Whole numbers as float64 [n, 3], NaN where there is no position."""
    return np.rint(synapses.positions_nm_zyx(table) / voxel_size_nm_zyx)


def xyz(voxel_zyx: np.ndarray) -> dict[str, pa.Array]:
    """Columns x, y, z int32, null for NaN."""
    z, y, x = (export_files.blank(values).cast(pa.int32()) for values in voxel_zyx.T)
    return {"x": x, "y": y, "z": z}


def confidence(table: pa.Table) -> np.ndarray:
    """FlyEM's confidence of a T-bar (synapses.OPTIONAL), float32 [n], NaN: unknown."""
    has_cleft = "cleft_score" in table.column_names
    return export_files.score(table, "cleft_score" if has_cleft else "connection_score")
