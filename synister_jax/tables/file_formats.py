# SPDX-License-Identifier: Apache-2.0
"""Tables in files, whatever their format.

`open` gives a table of any size in record batches, in the file's order and in the
memory of a few batches, unless a Feather file was written as one. `read` gives a table
that others wrote, whole and as it is, for `columns` to make its values exact.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import csv, feather, parquet

from synister_jax.base import files
from synister_jax.base.errors import UserError

BATCH_ROWS = 1 << 17
_CSV_BLOCK_BYTES = 8 << 20

# Names of a file's columns → those to read, with the type that text is to have.
Choose = Callable[[Sequence[str]], dict[str, pa.DataType]]
Opened = tuple[pa.Schema, Iterator[pa.RecordBatch]]


def open(
    path: str | os.PathLike[str], choose: Choose, what: str = "synapse table"
) -> Opened:
    """Schema and batches of a Feather, Parquet, CSV or .csv.gz file.

    Its name tells which.

    Args:
      choose: which columns; it may raise where those that it needs are not there.
      what: the file is, for messages.

    Raises:
      UserError: absent, another format, not to be read (also while iterating).
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    ending = next((end for end in _OPENERS if path.name.endswith(end)), None)
    if ending is None:
        raise UserError(
            f"cannot tell the format of {what} {path}; give an export v3 "
            f"folder or a file ending in {', '.join(_OPENERS)}"
        )
    try:
        schema, batches = _OPENERS[ending](path, choose)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from None
    return schema, _guarded(path, batches, what)


def _guarded(
    path: pathlib.Path, batches: Iterator[pa.RecordBatch], what: str
) -> Iterator[pa.RecordBatch]:
    try:
        for batch in batches:
            for start in range(0, len(batch), BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from None


def _open_feather(path: pathlib.Path, choose: Choose) -> Opened:
    # Not mapped into memory: what is mapped counts as this process's.
    names = pa.ipc.open_file(pa.OSFile(str(path))).schema.names
    places = [names.index(name) for name in choose(names)]
    options = pa.ipc.IpcReadOptions(included_fields=places)
    reader = pa.ipc.open_file(pa.OSFile(str(path)), options=options)
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    return reader.schema, batches


def _open_parquet(path: pathlib.Path, choose: Choose) -> Opened:
    file = parquet.ParquetFile(path)
    columns = list(choose(file.schema_arrow.names))
    schema = pa.schema(
        [file.schema_arrow.field(name) for name in columns], file.schema_arrow.metadata
    )
    return schema, file.iter_batches(BATCH_ROWS, columns=columns)


def _open_csv(path: pathlib.Path, choose: Choose) -> Opened:
    types = choose(_csv_names(path))
    convert = csv.ConvertOptions(
        column_types=types,
        include_columns=list(types),
        strings_can_be_null=True,
        null_values=["", "NA", "NULL"],
    )
    reader = _csv_reader(path, convert)
    return reader.schema, iter(reader)


def _csv_reader(
    path: pathlib.Path, convert: csv.ConvertOptions | None = None
) -> csv.CSVStreamingReader:
    """Arrow's reader, which unpacks what is named .gz."""
    blocks = csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
    # Else a line break within quotes splits a row where a block of the file ends.
    parse = csv.ParseOptions(newlines_in_values=True)
    return csv.open_csv(path, blocks, parse, convert)


def _csv_names(path: pathlib.Path) -> list[str]:
    with _csv_reader(path) as reader:
        return reader.schema.names


_OPENERS = {
    ".feather": _open_feather,
    ".parquet": _open_parquet,
    ".csv": _open_csv,
    ".csv.gz": _open_csv,
}


def read(path: str | os.PathLike[str]) -> pa.Table:
    """Feather, Parquet, a JSON list of objects, or CSV (also .gz) with text columns.

    Raises:
      UserError: absent, not of that format, or two columns of one name.
    """
    path = pathlib.Path(path)
    name = path.name.removesuffix(".gz")
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file")
    try:
        if name.endswith(".feather"):
            table = feather.read_table(path)
        elif name.endswith(".parquet"):
            table = parquet.read_table(path)
        elif _is_json(path):
            table = _read_json(path)
        elif name.endswith(".csv"):
            table = _read_csv(path)
        else:
            raise UserError(
                f"cannot tell the format of {path}; its name should end in .feather, "
                ".parquet, .json, .csv or .csv.gz"
            )
        names = table.column_names  # decoded only here
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns of one name: {names}")
    # A column without a name holds the row names of R or pandas.
    return table.drop_columns([""]) if "" in names else table


def _is_json(path: pathlib.Path) -> bool:
    """The original's consolidated FAFB files are JSON although named .csv."""
    with path.open("rb") as file:
        return path.suffix == ".json" or file.read(64).lstrip().startswith(b"[")


def _read_json(path: pathlib.Path) -> pa.Table:
    content = files.read_json(path)
    if not isinstance(content, list) or not all(isinstance(x, dict) for x in content):
        raise UserError(f"{path} is not a JSON list of objects")
    names = list(dict.fromkeys(name for line in content for name in line))
    columns = {}
    for name in names:
        values = [line.get(name) for line in content]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):
            # Mixed kinds: as text, so that the odd one is named by its row.
            texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
            nothing = np.array([v is None for v in values], bool)
            columns[name] = pa.array(texts, pa.string(), mask=nothing)
    return pa.table(columns)


def _read_csv(path: pathlib.Path) -> pa.Table:
    # Numbers as text: what a guess would make of long ids is not exact.
    types = dict.fromkeys(_csv_names(path), pa.string())
    with _csv_reader(path, csv.ConvertOptions(column_types=types)) as reader:
        return reader.read_all()
