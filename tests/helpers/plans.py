# SPDX-License-Identifier: Apache-2.0
"""Plans of small tables in a volume of zeros."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.bulk import planning
from synister_jax.bulk.planning import Plan
from synister_jax.em import volumes
from synister_jax.em.volumes import Volume
from synister_jax.tables import synapses
from synister_jax.tables.synapse_stream import SynapseStream

SHAPE_ZYX = (60, 500, 700)


CHUNK_ZYX = (8, 32, 64)


VOXEL_NM_ZYX = (40.0, 4.0, 8.0)


OFFSET_NM_ZYX = (400.0, -80.0, 16.0)


CROP_ZYX = (4, 16, 18)


MADE_FROM: dict[str, Any] = {"classes": ["gaba", "acetylcholine", "dopamine"]}


def make_volume(
    path: pathlib.Path,
    shape_zyx: Sequence[int] = SHAPE_ZYX,
    chunk_zyx: Sequence[int] = CHUNK_ZYX,
    voxel_nm_zyx: Sequence[float] = VOXEL_NM_ZYX,
    offset_nm_zyx: Sequence[float] = OFFSET_NM_ZYX,
) -> Volume:
    """Makes a volume without stored voxels, because a plan reads no voxel."""
    path.mkdir(exist_ok=True)
    array = {"zarr_format": 2, "shape": list(shape_zyx), "chunks": list(chunk_zyx)}
    array |= {"dtype": "|u1", "order": "C", "fill_value": 0}
    array |= {"compressor": None, "filters": None}
    (path / ".zarray").write_text(json.dumps(array))
    attributes = {"resolution": list(voxel_nm_zyx), "offset": list(offset_nm_zyx)}
    (path / ".zattrs").write_text(json.dumps(attributes))
    return volumes.open(str(path))


def table_of(positions_nm_zyx: np.ndarray) -> pa.Table:
    """Returns a row for each position [n, 3], with falling ids. NaN becomes null."""
    columns: dict[str, Any] = {"synapse_id": np.arange(len(positions_nm_zyx))[::-1]}
    for name, values in zip(synapses.POSITION, positions_nm_zyx.T, strict=True):
        columns[name] = pa.array(values, from_pandas=True)
    return pa.table(columns)


def source_of(table: pa.Table, batch_rows: int = 1 << 17) -> SynapseStream:
    batches = table.to_batches(max_chunksize=batch_rows)
    if not batches:
        batches = [pa.RecordBatch.from_pylist([], table.schema)]
    return SynapseStream("table", lambda: iter(batches))


def make_plan(
    table: pa.Table | SynapseStream,
    volume: Volume,
    folder: pathlib.Path,
    unit_rows: int = 100,
    crop_zyx: Sequence[int] = CROP_ZYX,
    **made_from: Any,
) -> Plan:
    source = table if isinstance(table, SynapseStream) else source_of(table)
    made_from = MADE_FROM | made_from
    return planning.make(source, volume, crop_zyx, folder, unit_rows, made_from)


def positions_in_and_out(count: int, seed: int = 0) -> np.ndarray:
    """Returns positions [n, 3] in nm, of which more than half are in the volume.

    The others are just outside the volume, far from it, missing or infinite.
    """
    rng = np.random.default_rng(seed)
    size = np.multiply(SHAPE_ZYX, VOXEL_NM_ZYX)
    positions = (rng.random((count, 3)) * 1.2 - 0.1) * size + OFFSET_NM_ZYX
    positions[::50] += size * 3
    positions[7::90, 1] = np.nan
    positions[8::90, 2] = np.inf
    positions[9::90, 0] = -1e300
    return positions


def expected_rows(positions_nm_zyx: np.ndarray) -> dict[int, tuple[int, ...]]:
    """Returns the start of the crop for each row whose crop touches the volume.

    The function is the reference for tests, in plain Python.
    """
    found = {}
    for row, position in enumerate(positions_nm_zyx.tolist()):
        if not all(abs(v) < 1e9 for v in position):
            continue
        start = tuple(
            round((p - o - n // 2 * v) / v)  # rounds halves to even
            for p, o, n, v in zip(
                position, OFFSET_NM_ZYX, CROP_ZYX, VOXEL_NM_ZYX, strict=True
            )
        )
        axes = zip(start, CROP_ZYX, SHAPE_ZYX, strict=True)
        if all(s + n > 0 and s < bound for s, n, bound in axes):
            found[row] = start
    return found


def names_in(folder: pathlib.Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
