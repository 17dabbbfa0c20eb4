# SPDX-License-Identifier: Apache-2.0
"""Record batches of a synapse table as its file has them, in its order.

A table of any size is read in the memory of a few batches, unless a Feather file was
written as one.
"""

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
from pyarrow import csv, parquet

from synister_jax.base.errors import UserError

BATCH_ROWS = 1 << 17
_CSV_BLOCK_BYTES = 8 << 20

# Names of a file's columns → those to read, with the type that text is to have.
Choose = Callable[[Sequence[str]], dict[str, pa.DataType]]
Opened = tuple[pa.Schema, Iterator[pa.RecordBatch]]


def open(  # noqa: A001
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
    # Arrow unpacks what is named .gz.
    blocks = csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
    # Else a line break within quotes splits a row where a block of the file ends.
    parse = csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, blocks, parse) as reader:
        types = choose(reader.schema.names)
    convert = csv.ConvertOptions(
        column_types=types,
        include_columns=list(types),
        strings_can_be_null=True,
        null_values=["", "NA", "NULL"],
    )
    reader = csv.open_csv(path, blocks, parse, convert)
    return reader.schema, iter(reader)


_OPENERS = {
    ".feather": _open_feather,
    ".parquet": _open_parquet,
    ".csv": _open_csv,
    ".csv.gz": _open_csv,
}
