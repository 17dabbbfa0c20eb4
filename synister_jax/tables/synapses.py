# SPDX-License-Identifier: Apache-2.0
"""The synapse table: one row for each synapse, with the same columns for every source.

The columns are as follows. A type with `?` can be null.

- `synapse_id` int64, unique
- `z_nm`, `y_nm`, `x_nm` float64, the position in the volume frame
- `neuron_id` int64?
- `neurotransmitter` string?, several known transmitters are joined by `+`
- `hemilineage`, `brain_region`, `cell_type` string?
- `split_<name>` string?, one column for each split: train, validation or test
- the columns of `OPTIONAL`, if the source has them: the scores of the detection, and
  the postsynaptic neuron
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from synister_jax.base import files, table_metadata
from synister_jax.base.errors import UserError, listed
from synister_jax.base.progress import Progress
from synister_jax.tables import file_formats

SCHEMA = pa.schema(
    [
        pa.field("synapse_id", pa.int64(), nullable=False),
        pa.field("z_nm", pa.float64(), nullable=False),
        pa.field("y_nm", pa.float64(), nullable=False),
        pa.field("x_nm", pa.float64(), nullable=False),
        ("neuron_id", pa.int64()),
        ("neurotransmitter", pa.string()),
        ("hemilineage", pa.string()),
        ("brain_region", pa.string()),
        ("cell_type", pa.string()),
    ]
)
# Columns that a table may lack. `cleft_score` can weigh synapses (FlyWire: 0 to 255,
# Heinrich et al. 2018; FlyEM: the confidence of a T-bar). `connection_score` is the
# score of the pair of neurons (Buhmann et al. 2021).
OPTIONAL = pa.schema(
    [
        ("cleft_score", pa.float32()),
        ("connection_score", pa.float32()),
        ("post_neuron_id", pa.int64()),
    ]
)
PARTS = ("train", "validation", "test")
# The values that the column `neurotransmitter` can have.
NEUROTRANSMITTERS = (
    "gaba",
    "acetylcholine",
    "glutamate",
    "serotonin",
    "octopamine",
    "dopamine",
    "histamine",
    "tyramine",
    "neither",
)
# Every class that a network of this family has had as an output. Only pseudo_classes
# makes rows of the class "unknown". In other tables "unknown" means a missing value.
CLASSES = (*NEUROTRANSMITTERS, "unknown")
POSITION = ("z_nm", "y_nm", "x_nm")
# The kinds of groups of synapses, and the column that names the group of a synapse.
GROUP_COLUMNS = {
    "neuron": "neuron_id",
    "hemilineage": "hemilineage",
    "cell_type": "cell_type",
    "brain_region": "brain_region",
}
_REQUIRED = ("synapse_id", *POSITION)


def columns_to_read(source: str) -> file_formats.Choose:
    """Returns a function that chooses the columns of a synapse table in a file.

    The positions of a text file are read as text, so that `conform` can name a row
    whose position is not a number.

    Args:
      source: the name of the file, for messages.
    """

    def choose(names: Sequence[str]) -> dict[str, pa.DataType]:
        _require_columns(names, source)
        types = {field.name: field.type for field in (*SCHEMA, *OPTIONAL)}
        types |= dict.fromkeys(POSITION, pa.string())
        return {
            name: types.get(name, pa.string())
            for name in names
            if name in types or name.startswith("split_")
        }

    return choose


def _require_columns(names: Sequence[str], source: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{source} has two columns of one name: {list(names)}")
    for name in _REQUIRED:
        if name not in names:
            raise UserError(f"{source} has no column {name}; it has {', '.join(names)}")


def write(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Writes a Feather or Parquet file, as the ending of `path` says.

    A file that cannot be written completely does not appear at all.

    Raises:
      UserError: `path` ends in neither .feather nor .parquet.
    """
    with writer(path, table.schema) as sink:
        sink.write_table(table)


def write_batches(
    path: str | os.PathLike[str],
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    total: int,
) -> int:
    """Writes a synapse table batch by batch, and returns the number of its rows.

    Args:
      path: a name that ends in .feather or .parquet.
      schema: the schema of `batches`.
      total: the expected number of rows, for the progress line.

    Raises:
      UserError: `path` has another ending, or a synapse id occurs twice.
    """
    ids = []
    progress = Progress("read", total, "synapses")
    with writer(path, schema) as sink:
        for batch in batches:
            sink.write_batch(batch)
            ids.append(batch["synapse_id"].to_numpy())
            progress.add(len(batch))
        return len(check_unique(ids, str(path)))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises `UserError` if `path` ends in neither .feather nor .parquet."""
    if pathlib.Path(path).suffix not in (".feather", ".parquet"):
        raise UserError(f"cannot write {path}: name a .feather or .parquet file")


def check_classes(names: Sequence[str]) -> None:
    """Raises `UserError` if --classes has an unknown name, or a name twice."""
    for name in names:
        if name not in CLASSES or list(names).count(name) > 1:
            raise UserError(
                f"--classes: {name!r} is unknown or given twice; give each class "
                f"once (known: {', '.join(CLASSES)})"
            )


def check_unique(ids: Sequence[np.ndarray], where: str) -> np.ndarray:
    """Returns all ids as one array, [n] int64.

    Args:
      ids: the ids in pieces.
      where: the name of the table, for the message.

    Raises:
      UserError: an id occurs twice.
    """
    together = np.concatenate([np.zeros(0, np.int64), *ids])
    ordered = np.sort(together)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        raise UserError(
            f"{where} has synapse {again[0]} twice; give every synapse its own id"
        )
    return together


@contextlib.contextmanager
def writer(
    path: str | os.PathLike[str], schema: pa.Schema
) -> Iterator[pa.ipc.RecordBatchFileWriter | parquet.ParquetWriter]:
    """Yields a writer that takes tables and batches, and puts them into one file.

    The file appears when the context ends without an error.

    Raises:
      UserError: `path` ends in neither .feather nor .parquet.
    """
    check_writable(path)
    with files.replacing(path) as partial:
        if pathlib.Path(path).suffix == ".feather":
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            opened = pa.ipc.new_file(str(partial), schema, options=options)
        else:
            opened = parquet.ParquetWriter(partial, schema, compression="zstd")
        with opened as sink:
            yield sink


def positions_nm_zyx(table: pa.Table) -> np.ndarray:
    """Returns the positions in nm, [n, 3] float64 in the order (z, y, x)."""
    return np.stack([table[name].to_numpy() for name in POSITION], axis=1)


def labels(table: pa.Table, classes: Sequence[str]) -> np.ndarray:
    """Returns the index of each row's neurotransmitter in `classes`, [n] int32.

    The index is -1 if the transmitter is not known, if several are known, or if the
    transmitter is not one of `classes`.
    """
    return index_in(table["neurotransmitter"], classes)


def index_in(column: pa.ChunkedArray, values: Sequence[str]) -> np.ndarray:
    """Returns the index of each entry in `values`, [n] int32; -1 if it is absent."""
    index = pc.index_in(column, value_set=pa.array(values, pa.string()))
    return pc.fill_null(index, -1).to_numpy().astype(np.int32)


def in_part(table: pa.Table, split: str, part: str) -> np.ndarray:
    """Returns which rows belong to a part of a split, [n] bool.

    Raises:
      UserError: the table does not have the split, or there is no such part.
    """
    column = f"split_{split}"
    if column not in table.column_names:
        known = [n.removeprefix("split_") for n in split_columns(table)]
        raise UserError(
            f"no split {split!r} here; the table has {', '.join(known) or 'none'}"
        )
    check_part(part)
    return pc.fill_null(pc.equal(table[column], part), False).to_numpy()


def check_part(part: str) -> None:
    """Raises `UserError` unless `part` is train, validation or test."""
    if part not in PARTS:
        raise UserError(f"no part {part!r}; it is one of {', '.join(PARTS)}")


def split_columns(table: pa.Table) -> list[str]:
    """Returns the names of the `split_<name>` columns of the table."""
    return [name for name in table.column_names if name.startswith("split_")]


def columns(table: pa.Table) -> list[str]:
    """Returns the columns of `SCHEMA`, then the table's optional columns and splits."""
    optional = [name for name in OPTIONAL.names if name in table.column_names]
    return [*SCHEMA.names, *optional, *split_columns(table)]


def conform(
    table: pa.Table, source: str, *, answer_all: bool = False, first_row: int = 0
) -> pa.Table:
    """Returns the table with the columns, types and metadata of a synapse table.

    The values are checked. Columns that a synapse table does not have are left out.

    Args:
      source: the name of the file or database, for messages and the metadata.
      answer_all: for a command that must answer every row. Coordinates that are missing
        or not finite become NaN, and an id may occur twice.
      first_row: the number of the table's first row in the source, for messages.

    Raises:
      UserError: a column is missing, or a value is wrong. The message names `source`,
        the first wrong rows and the reason.
    """
    _require_columns(table.column_names, source)
    fields = list(SCHEMA)
    fields += [field for field in OPTIONAL if field.name in table.column_names]
    fields += [pa.field(name, pa.string()) for name in split_columns(table)]
    arrays = []
    for field in fields:
        if field.name not in table.column_names:
            arrays.append(pa.nulls(len(table), field.type))
            continue
        arrays.append(_cast(table[field.name], field, source, first_row))
    about = {"space": "volume frame, nm", "source": source, "version": 1}
    about |= table_metadata.of(table)
    if answer_all:
        fields = [
            field.with_nullable(True) if field.name in POSITION else field
            for field in fields
        ]
    schema = pa.schema(fields, table_metadata.entry(about))
    checked = dict(zip(schema.names, arrays, strict=True))
    _check(checked, source, answer_all, first_row)
    if answer_all:
        for name in POSITION:
            place = schema.names.index(name)
            finite = pc.fill_null(pc.is_finite(arrays[place]), False)
            arrays[place] = pc.if_else(finite, arrays[place], np.nan)
    return pa.table(arrays, schema=schema)


def _cast(
    column: pa.ChunkedArray, field: pa.Field, source: str, first_row: int
) -> pa.ChunkedArray:
    kind = column.type
    if field.name.endswith("_id") and not (
        pa.types.is_integer(kind) or pa.types.is_null(kind)
    ):
        raise UserError(
            f"{source}: column {field.name} is {kind}; ids must be integers, "
            "because floats have lost digits of large ids"
        )
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        for row, value in enumerate(column, first_row):
            try:
                value.cast(field.type)
            except pa.ArrowException:
                raise UserError(
                    f"{source}, row {row}: {field.name} is {value.as_py()!r}, not "
                    f"{'a number' if pa.types.is_floating(field.type) else field.type}"
                ) from None
        raise UserError(f"{source}: column {field.name}: {error}") from None


def _check(
    columns: dict[str, pa.ChunkedArray], source: str, answer_all: bool, first_row: int
) -> None:
    def refuse(why: str, bad: Any, column: pa.ChunkedArray) -> None:
        _refuse(source, why, bad, column, first_row)

    ids = columns["synapse_id"]
    refuse("synapse_id is missing", pc.is_null(ids), ids)
    if not answer_all:
        values = ids.to_numpy()
        order = np.argsort(values, kind="stable")
        again = np.zeros(len(values), bool)
        again[order[1:]] = values[order[1:]] == values[order[:-1]]
        refuse("duplicate synapse_id", again, ids)
        for name in POSITION:
            bad = pc.invert(pc.fill_null(pc.is_finite(columns[name]), False))
            refuse(f"{name} is missing or not finite", bad, columns[name])
    column = columns["neurotransmitter"]
    for value in pc.unique(column).to_pylist():
        for name in [] if value is None else value.split("+"):
            if name not in NEUROTRANSMITTERS:
                why = f"unknown neurotransmitter {name!r} (known: "
                why += f"{', '.join(NEUROTRANSMITTERS)})"
                refuse(why, pc.equal(column, value), column)
    for name, column in columns.items():
        if name.startswith("split_"):
            bad = pc.invert(pc.is_in(column, value_set=pa.array([*PARTS, None])))
            refuse(f"{name} is not one of {', '.join(PARTS)}", bad, column)


def _refuse(
    source: str, why: str, bad: Any, column: pa.ChunkedArray, first_row: int
) -> None:
    """Raises `UserError` that names the rows where `bad` is true, if there are any."""
    if isinstance(bad, pa.ChunkedArray):
        bad = pc.fill_null(bad, False).to_numpy()
    rows = np.flatnonzero(bad)
    if not len(rows):
        return
    named = (f"row {first_row + r} ({column[int(r)].as_py()!r})" for r in rows)
    raise UserError(
        f"{source}: {why}: {listed(named, len(rows))}; correct or remove these rows"
    )
