# SPDX-License-Identifier: Apache-2.0
"""Synapse tables in every file format that can be read."""

import pathlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from synister_jax.tables import synapses

ROWS = 300


def contract_table(rows: int = ROWS) -> pa.Table:
    """Returns random synapses with every column that a synapse table can have.

    All columns except `synapse_id` and the position have some nulls.
    """
    rng = np.random.default_rng(rows)
    known = rng.random(rows) < 0.7

    def some(values: list[str]) -> pa.Array:
        chosen = rng.integers(0, len(values), rows)
        return pa.array([values[i] for i in chosen], mask=rng.random(rows) < 0.2)

    columns = {
        "synapse_id": 2**60 + rng.permutation(rows),
        "z_nm": rng.integers(0, 10**6, rows) * 40.0,
        "y_nm": rng.random(rows) * 1e6,
        "x_nm": rng.random(rows) * 1e-3,
        "neuron_id": pa.array(rng.integers(0, 2**62, rows), mask=~known),
        "neurotransmitter": some(["gaba", "gaba+octopamine", "neither"]),
        "hemilineage": some(["ALad1", 'é "x", y']),
        "brain_region": some(["AL", "MB(+ACA)"]),
        "cell_type": some(["KC", "two\nlines\n"]),
        "split_skeleton": some(list(synapses.PARTS)),
        "split_brain region": some(list(synapses.PARTS)),
    }
    return synapses.conform(pa.table(columns), "made up")


def widened(table: pa.Table) -> pa.Table:
    """Returns the table with foreign columns before, between and after its own."""
    wide = table.replace_schema_metadata(None)
    others = {
        "score": pa.array(np.arange(len(table)) / 7),
        "z": pa.array(["text"] * len(table)),
        "ntprob": pa.array(np.arange(len(table))),
    }
    for place, (name, values) in zip((0, 5, 13), others.items(), strict=True):
        wide = wide.add_column(place, name, values)
    return wide


def write_feather(
    path: pathlib.Path, table: pa.Table, rows: int, compression: str | None
) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), table.schema, options=options) as sink:
        sink.write_table(table, max_chunksize=rows)


Write = Callable[[pathlib.Path, pa.Table], None]


# Every file format, as other programs write it.
WRITERS: dict[str, tuple[str, Write]] = {
    "feather, many batches, zstd": (
        "feather",
        lambda path, table: write_feather(path, table, 37, "zstd"),
    ),
    "feather, many batches, plain": (
        "feather",
        lambda path, table: write_feather(path, table, 37, None),
    ),
    "feather, one batch, lz4": (
        "feather",
        lambda path, table: write_feather(path, table, ROWS, "lz4"),
    ),
    "feather, one batch, plain": (
        "feather",
        lambda path, table: write_feather(path, table, ROWS, None),
    ),
    "parquet, row groups": (
        "parquet",
        lambda path, table: parquet.write_table(table, path, row_group_size=50),
    ),
    "parquet, one row group": (
        "parquet",
        lambda path, table: parquet.write_table(table, path, compression="zstd"),
    ),
    "csv": ("csv", lambda path, table: csv.write_csv(table, path)),
}


def write(kind: str, folder: pathlib.Path, table: pa.Table) -> pathlib.Path:
    suffix, writer = WRITERS[kind]
    path = folder / f"table.{suffix}"
    writer(path, table)
    return path
