# SPDX-License-Identifier: Apache-2.0
"""Reads a synapse table from its address: a file, a folder or a database.

`load` reads a table into memory and checks it. `open` reads a table of any size in
batches, for commands that answer every row.
"""

import os
import pathlib
from collections.abc import Iterator

import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.tables import file_formats, synapses
from synister_jax.tables.mongo import address, json_export
from synister_jax.tables.synapse_stream import SynapseStream


def load(uri: str | os.PathLike[str]) -> pa.Table:
    """Reads a file, a folder or a database, and returns a checked synapse table.

    Args:
      uri: one of three things. A JSON export v3, which is a folder with
        `synapses_v3.json`, `skeletons_v3.json` and `hemi_lineages_v3.json`. A file that
        ends in .feather, .parquet, .csv or .csv.gz. A MongoDB database, which is
        mongodb://[user:password@]host[:port]/DB[?options] (see databases.py).

    Raises:
      UserError: the table cannot be read, a column is missing, or a value is wrong. The
        message names the first wrong rows and the reason.
    """
    if str(uri).startswith(address.SCHEMES):
        from synister_jax.tables.mongo import databases  # only MongoDB needs pymongo

        name = address.redact(str(uri))
        return synapses.conform(databases.read_table(str(uri)), name)
    if pathlib.Path(uri).is_dir():
        try:
            table = json_export.read(pathlib.Path(uri), synapses.SCHEMA)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read synapse table {uri}: {error}") from None
    else:
        schema, batches = file_formats.open(uri, synapses.columns_to_read(str(uri)))
        table = pa.Table.from_batches(batches, schema)
    return synapses.conform(table, str(uri))


def open(
    uri: str | os.PathLike[str], part: tuple[str, str] | None = None
) -> SynapseStream:
    """Opens a synapse table of any size.

    Feather, Parquet and CSV files and databases are read in batches. A JSON export v3
    is read as a whole.

    Args:
      uri: the address of the table, as for `load`.
      part: read only the rows of this (split, part), such as ("skeleton", "test").

    Raises:
      UserError: the table does not exist, its format is not known, a column is missing,
        or there is no such part. Other mistakes are raised while the rows are read.
    """
    if part is not None:
        synapses.check_part(part[1])
    name = str(uri)
    if name.startswith(address.SCHEMES):
        return SynapseStream(address.redact(name), lambda: _from_mongo(name), part)
    if pathlib.Path(uri).is_dir():
        table = load(uri)
        return SynapseStream(
            name, lambda: _one(table.schema, iter(table.to_batches())), part
        )
    choose = synapses.columns_to_read(name)
    file_formats.open(uri, choose)  # raises if absent or incomplete
    return SynapseStream(name, lambda: _one(*file_formats.open(uri, choose)), part)


def _from_mongo(uri: str) -> Iterator[pa.RecordBatch]:
    from synister_jax.tables.mongo import databases  # only MongoDB needs pymongo

    with databases.connect(uri) as database:
        yield from _one(*databases.read_batches(database))


def _one(
    schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Yields the batches, or one batch without rows, so that the columns are known."""
    first = next(batches, None)
    yield pa.RecordBatch.from_pylist([], schema) if first is None else first
    yield from batches
