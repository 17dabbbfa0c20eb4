# SPDX-License-Identifier: Apache-2.0
"""The prediction table: one row a synapse, a probability a class, a status.

Columns: those of the synapse table (synapses.py), `status`, and `nt_<class>_prob`
float32 in the network's class order, NaN where there is no prediction. No other column
begins with `nt`, because FlyEM's reader takes every such column for a probability
(flyem_snapshot/inputs/neurotransmitters.py). The class order is also in the schema's
metadata.
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
    """Adds [n, classes] probabilities and [n] statuses to the n rows of `table`.

    Args:
      about: what made them (run, step, volume, …), kept in the schema's metadata.
    """
    result = table.select(synapses.columns(table))
    result = result.append_column("status", pa.array(status, pa.string()))
    for index, name in enumerate(classes):
        column = pa.array(probabilities[:, index].astype(np.float32))
        result = result.append_column(probability_column(name), column)
    return table_metadata.described(result, {"classes": list(classes), **about})


def probability_column(class_name: str) -> str:
    return f"nt_{class_name}_prob"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A prediction table of any size, to be read any number of times."""

    path: pathlib.Path
    schema: pa.Schema
    rows: int
    _files: Sequence[pathlib.Path]

    @property
    def about(self) -> dict[str, Any]:
        return about(self.schema)

    @property
    def classes(self) -> tuple[str, ...]:
        return classes(self.schema)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Its rows in order, in one piece at least; all have its metadata.

        Args:
          columns: only these, in this order.

        Raises:
          UserError: a file is damaged, or no longer what it was.
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
            raise UserError(f"{self.path} has changed while it was read; rerun")
        if not rows:
            yield self.schema.empty_table().select(columns)


def open(path: str | os.PathLike[str]) -> Predictions:
    """A prediction table on disk: Feather, Parquet, or a folder of Parquet files.

    Raises:
      UserError: it is not one.
    """
    path = pathlib.Path(path)
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"cannot read predictions {path}: no Parquet file in it")
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
    """The whole of a prediction table, for one that fits into memory.

    Raises:
      UserError: it is not one.
    """
    return whole(open(path))


def whole(source: Predictions) -> pa.Table:
    """All its rows, in memory."""
    return pa.concat_tables(source.tables())


def check(schema: pa.Schema, path: str | os.PathLike[str]) -> None:
    """Raises `UserError` unless the columns and the class order are all there."""
    columns = set(schema.names)
    try:
        wanted = [probability_column(name) for name in classes(schema)]
    except (KeyError, json.JSONDecodeError):
        raise UserError(f"{path} is not a prediction table: no class order") from None
    for name in [*synapses.SCHEMA.names, "status", *wanted]:
        if name not in columns:
            raise UserError(f"{path} is not a prediction table: no column {name}")
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
    """The metadata given to `build`, with the class order."""
    return table_metadata.of(table)


def classes(table: pa.Table | pa.Schema) -> tuple[str, ...]:
    """Class names in the order of the network's outputs."""
    return tuple(about(table)["classes"])


def probabilities(table: pa.Table) -> np.ndarray:
    """[n, classes] float32."""
    names = [probability_column(name) for name in classes(table)]
    return np.stack([table[name].to_numpy() for name in names], axis=1)


def called(table: pa.Table) -> np.ndarray:
    """Index of the likeliest class, [n] int32; -1 where there is no prediction."""
    return called_of(probabilities(table))


def called_of(values: np.ndarray) -> np.ndarray:
    """As `called`, of probabilities [n, classes]; of equal ones the first."""
    unpredicted = np.isnan(values).any(axis=1)
    return np.where(unpredicted, -1, values.argmax(axis=1)).astype(np.int32)
