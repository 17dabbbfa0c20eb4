# SPDX-License-Identifier: Apache-2.0
"""A synapse table by its address, whatever it lies in: a file, a folder, a database.

`load` reads a table into memory and checks it; `open` reads one of any size, batch by
batch, for work that answers every row.
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
    """Reads an export v3, Feather, Parquet, CSV or MongoDB as a checked synapse table.

    Args:
      uri: a folder with `synapses_v3.json`, `skeletons_v3.json` and
        `hemi_lineages_v3.json`, a file whose name tells its format, or
        mongodb://[user:password@]host[:port]/DB[?options] (see databases.py).

    Raises:
      UserError: names the first offending rows and the reason.
    """
    if str(uri).startswith(address.SCHEMES):
        from synister_jax.tables.mongo import databases  # pymongo is not always needed

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
    """The table `uri`, which is all that `load` takes.

    Feather, Parquet and CSV files and databases are read a part at a time, an export v3
    as a whole.

    Args:
      part: (split, part), as ("skeleton", "test"): only its rows.

    Raises:
      UserError: absent, of no known format, no such part; anything else while reading.
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
    file_formats.open(uri, choose)  # absent, or no columns
    return SynapseStream(name, lambda: _one(*file_formats.open(uri, choose)), part)


def _from_mongo(uri: str) -> Iterator[pa.RecordBatch]:
    from synister_jax.tables.mongo import databases  # pymongo is not always needed

    with databases.connect(uri) as database:
        yield from _one(*databases.read_batches(database))


def _one(
    schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The batches, or one without rows: what has no rows has columns."""
    first = next(batches, None)
    yield pa.RecordBatch.from_pylist([], schema) if first is None else first
    yield from batches
