# SPDX-License-Identifier: Apache-2.0
"""The prediction table: each row has a synapse, its status and its probabilities.

The table has the columns of the synapse table (synapses.py), the column `status`, and
a float32 column `nt_<class>_prob` for each class in the network's class order. The
probabilities are NaN if there is no prediction. No other column begins with `nt`,
because FlyEM's reader takes every such column for a probability
(flyem_snapshot/inputs/neurotransmitters.py). The metadata of the schema holds the class
order, too.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from synister_jax.base import table_metadata
from synister_jax.base.errors import UserError
from synister_jax.tables import file_formats, synapses

BAD_POSITION = "bad_position"


def build(
    table: pa.Table,
    probabilities: np.ndarray,
    status: Sequence[str] | np.ndarray,
    classes: Sequence[str],
    about: Mapping[str, Any],
) -> pa.Table:
    """Returns a prediction table: the n rows of `table` with their predictions.

    Args:
      table: a synapse table of n rows.
      probabilities: [n, classes], stored as float32.
      status: the n statuses.
      classes: the class names in the order of the network's outputs.
      about: what made the predictions (run, step, volume, …). The metadata of the
        schema keeps this.
    """
    result = table.select(synapses.columns(table))
    result = result.append_column("status", pa.array(status, pa.string()))
    for index, name in enumerate(classes):
        column = pa.array(probabilities[:, index].astype(np.float32))
        result = result.append_column(probability_column(name), column)
    return table_metadata.described(result, {"classes": list(classes), **about})


def probability_column(class_name: str) -> str:
    """Returns the name of the column with the probabilities of a class."""
    return f"nt_{class_name}_prob"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A prediction table on disk, which can exceed memory and be read several times."""

    path: pathlib.Path
    schema: pa.Schema
    rows: int
    _files: Sequence[pathlib.Path]

    @property
    def about(self) -> dict[str, Any]:
        """The metadata given to `build`, with the class order."""
        return about(self.schema)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the network's outputs."""
        return classes(self.schema)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yields the rows in order, as at least one table with the schema's metadata.

        Args:
          columns: read only these columns, in this order. None reads all columns.

        Raises:
          UserError: a file is damaged, or has changed since it was opened.
        """
        columns = self.schema.names if columns is None else list(columns)
        chosen = dict.fromkeys(columns)
        rows = 0
        for path in self._files:
            _, batches = file_formats.open(path, lambda _: chosen, "predictions")
            for batch in batches:
                rows += len(batch)
                table = pa.Table.from_batches([batch]).select(columns)
                yield table.replace_schema_metadata(self.schema.metadata)
        if rows != self.rows:
            raise UserError(f"{self.path} has changed while it was read; run again")
        if not rows:
            yield self.schema.empty_table().select(columns)


def open(path: str | os.PathLike[str]) -> Predictions:
    """Opens a prediction table: Feather, Parquet, or a folder of Parquet files.

    Raises:
      UserError: `path` cannot be read or is not a prediction table, or the files of the
        folder differ in their columns or classes.
    """
    path = pathlib.Path(path)
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise UserError(
            f"cannot read predictions {path}: the folder has no Parquet file in it"
        )
    try:
        schemas, rows = zip(*map(_shape, paths), strict=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read predictions {path}: {error}") from None
    for other, schema in zip(paths, schemas, strict=True):
        if not schema.equals(schemas[0], check_metadata=True):
            raise UserError(f"{other} has other columns or classes than {paths[0]}")
    check(schemas[0], path)
    return Predictions(path, schemas[0], sum(rows), paths)


def _shape(path: pathlib.Path) -> tuple[pa.Schema, int]:
    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata.num_rows
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.schema, reader.count_rows()


def load(path: str | os.PathLike[str]) -> pa.Table:
    """Reads a whole prediction table into memory.

    Raises:
      UserError: `path` cannot be read or is not a prediction table.
    """
    return whole(open(path))


def whole(source: Predictions) -> pa.Table:
    """Reads all rows of an open prediction table into memory."""
    return pa.concat_tables(source.tables())


def check(schema: pa.Schema, path: str | os.PathLike[str]) -> None:
    """Checks that a schema is that of a prediction table.

    Args:
      schema: the schema of a file.
      path: the file, for the message.

    Raises:
      UserError: the class order or a column is missing, or a column has another type.
    """
    columns = set(schema.names)
    try:
        wanted = [probability_column(name) for name in classes(schema)]
    except (KeyError, json.JSONDecodeError):
        raise UserError(
            f"{path} is not a prediction table: its metadata has no class order; give "
            "a table that predict wrote"
        ) from None
    for name in [*synapses.SCHEMA.names, "status", *wanted]:
        if name not in columns:
            raise UserError(
                f"{path} is not a prediction table: it has no column {name}; give a "
                "table that predict wrote"
            )
    kinds = [
        (field.name, field.type) for field in (*synapses.SCHEMA, *synapses.OPTIONAL)
    ]
    for name, kind in [*kinds, *((name, pa.float32()) for name in wanted)]:
        if name in columns and schema.field(name).type != kind:
            raise UserError(
                f"{path} is not a prediction table: column {name} is "
                f"{schema.field(name).type}, not {kind}"
            )


def about(table: pa.Table | pa.Schema) -> dict[str, Any]:
    """Returns the metadata given to `build`, with the class order."""
    return table_metadata.of(table)


def classes(table: pa.Table | pa.Schema) -> tuple[str, ...]:
    """Returns the class names in the order of the network's outputs."""
    return tuple(about(table)["classes"])


def probabilities(table: pa.Table) -> np.ndarray:
    """Returns the probabilities, [n, classes] float32, NaN without a prediction."""
    names = [probability_column(name) for name in classes(table)]
    return np.stack([table[name].to_numpy() for name in names], axis=1)


def called(table: pa.Table) -> np.ndarray:
    """Returns the index of the likeliest class, [n] int32; -1 without a prediction."""
    return called_of(probabilities(table))


def called_of(values: np.ndarray) -> np.ndarray:
    """Returns the index of the likeliest class for probabilities [n, classes].

    The result is [n] int32. It is -1 if a probability is NaN, and the first of several
    classes with equal probabilities.
    """
    unpredicted = np.isnan(values).any(axis=1)
    return np.where(unpredicted, -1, values.argmax(axis=1)).astype(np.int32)
