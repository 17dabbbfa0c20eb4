# SPDX-License-Identifier: Apache-2.0
"""Reads tables from files of several formats.

`open` reads a table of any size as record batches, in the order of the file. This needs
the memory of a few batches, or of the whole file if a Feather file is a single batch.
`read` reads a foreign table as a whole and does not change its values. The module
`columns` converts them.
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

# A function that takes the names of a file's columns and returns the columns to read.
# The types that it returns are used for text files.
Choose = Callable[[Sequence[str]], dict[str, pa.DataType]]
Opened = tuple[pa.Schema, Iterator[pa.RecordBatch]]


def open(
    path: str | os.PathLike[str], choose: Choose, what: str = "synapse table"
) -> Opened:
    """Returns the schema and the batches of a .feather, .parquet, .csv or .csv.gz file.

    Args:
      path: the file. The ending of its name says the format.
      choose: chooses the columns. It may raise `UserError` if a column is missing.
      what: what the file is, for messages.

    Raises:
      UserError: the file does not exist, has another format or cannot be read. The
        iteration over the batches can raise this, too.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    ending = next((end for end in _OPENERS if path.name.endswith(end)), None)
    if ending is None:
        raise UserError(
            f"cannot tell the format of {what} {path}; give the folder of a JSON "
            f"export v3, or a file whose name ends in {', '.join(_OPENERS)}"
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
    # The file is not mapped into memory, because mapped memory counts as memory of this
    # process.
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
    """Returns Arrow's reader, which unpacks a file whose name ends in .gz."""
    blocks = csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
    # Without this option, a line break within quotes can split a row at the end of a
    # block of the file.
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
    """Reads a whole table, without changing its values.

    Args:
      path: a Feather or Parquet file, a JSON list of objects, or a CSV file. A CSV file
        may be packed (.csv.gz), and all its columns are read as text.

    Raises:
      UserError: the file does not exist, has another format or cannot be read, or two
        of its columns have the same name.
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
        names = table.column_names  # Arrow decodes the names here
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns of one name: {names}")
    # A column without a name holds the row names of R or pandas.
    return table.drop_columns([""]) if "" in names else table


def _is_json(path: pathlib.Path) -> bool:
    # The original's consolidated FAFB files are JSON, although they end in .csv.
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
            # The column has values of several types. As text they can be read, and a
            # message can name the row that is wrong.
            texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
            nothing = np.array([v is None for v in values], bool)
            columns[name] = pa.array(texts, pa.string(), mask=nothing)
    return pa.table(columns)


def _read_csv(path: pathlib.Path) -> pa.Table:
    # All columns are read as text, because Arrow could guess floats for long ids.
    types = dict.fromkeys(_csv_names(path), pa.string())
    with _csv_reader(path, csv.ConvertOptions(column_types=types)) as reader:
        return reader.read_all()
