# SPDX-License-Identifier: Apache-2.0
"""What the files that other tools read have in common: names, ids, how to write them.

Each family of tools has a module beside this one, whose consumers `export` lists;
docs/exports.md says what is in each file. In all of them classes are found by name; a
class that a file always has and the network has not is 0 where there is a prediction;
probabilities are NaN (CSV: blank) where there is none; an id that is not known is 0,
because of a null pandas makes the whole column floats, which lose digits of large ids.
"""

import contextlib
import dataclasses
import gzip
import io
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from synister_jax.base import files, table_metadata
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.evaluation import group_calls
from synister_jax.evaluation.confusions import Confusion
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions

Convert = Callable[[pa.Table], pa.Table]


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What a consumer may have to be told; None where it was not given.

    Attributes:
      voxel_size_nm_zyx: of the volume, for files with voxels.
      confusion: file of the network's confusion matrix.
      split: whose parts a file with one such column names.
      predict: the original's number of the prediction.
    """

    voxel_size_nm_zyx: tuple[float, float, float] | None = None
    confusion: str | None = None
    split: str | None = None
    predict: int | None = None


class Write(Protocol):
    """Writes a consumer's files; returns what the user should be told of them."""

    def __call__(
        self,
        source: Predictions,
        folder: pathlib.Path,
        options: ExportOptions,
        confusion: Confusion | None,
    ) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A tool that reads predictions, and how its files are written.

    Attributes:
      names: class → what the tool calls it, in the tool's order.
      files: all files that may be written.
      takes: the options that count, and whether each is needed.
      needs_neurons: it finds a synapse's neuron, or has a row for each neuron.
      write: writes the files of predictions that `prepare` has passed; what `takes`
        needs is there.
    """

    names: Mapping[str, str]
    files: tuple[str, ...]
    takes: Mapping[str, bool]
    needs_neurons: bool
    write: Write


def prepare(
    source: Predictions, to: str, consumer: Consumer, drop_classes: Sequence[str]
) -> Predictions:
    """The table as the consumer can have it: checked, without the dropped classes.

    A dropped class is as though the network did not have it: rows are called among the
    others, and no probability is rescaled.

    Raises:
      UserError: a class that the consumer has no column for, or is not there to drop;
        no row names a neuron, where the consumer needs them.
    """
    for name in drop_classes:
        if name not in source.classes:
            raise UserError(
                f"--drop_classes={name}: {source.path} is of the classes "
                f"{', '.join(source.classes)}"
            )
    classes = [name for name in source.classes if name not in drop_classes]
    names = consumer.names
    for name in classes:
        if name not in names:
            raise UserError(
                f"--to={to} has no column for {name!r} (it has {', '.join(names)}): "
                f"choose another, or leave it out with --drop_classes={name}"
            )
    if not classes or len({names[name] for name in classes}) < len(classes):
        raise UserError(
            f"--to={to} cannot tell the classes {', '.join(classes) or '(none)'} "
            "apart: choose others with --drop_classes"
        )
    if consumer.needs_neurons and not any_value(source, "neuron_id"):
        raise UserError(
            f"{source.path} names no neuron (neuron_id is empty), and --to={to} needs "
            "them: predict a table that has neuron_id"
        )
    gone = [predictions.probability_column(name) for name in drop_classes]
    kept = [field for field in source.schema if field.name not in gone]
    about = source.about | {"classes": classes}
    schema = pa.schema(kept, table_metadata.entry(about))
    return dataclasses.replace(source, schema=schema)


def any_value(source: Predictions, column: str) -> bool:
    """Whether a row of the column is not null."""
    tables = source.tables([column])
    return any(table[column].null_count < len(table) for table in tables)


def write(
    path: pathlib.Path, source: Predictions, convert: Convert, silent: bool = False
) -> int:
    """Writes all rows, streamed through `convert`; returns how many it gave.

    The name says how: .feather, .parquet, .csv or .csv.gz. Whole or not at all.
    """
    rows = 0
    progress = Progress(path.name, source.rows, "rows", silent=silent)
    schema = _described(convert(source.schema.empty_table()), source).schema
    with _sink(path, schema) as sink:
        for table in source.tables():
            converted = convert(table)
            sink.write_table(_described(converted, source))
            rows += len(converted)
            progress.add(len(table))
    return rows


def write_table(path: pathlib.Path, table: pa.Table, source: Predictions) -> None:
    """Writes what was made of `source` and is in memory, as `write` does."""
    table = _described(table, source)
    with _sink(path, table.schema) as sink:
        sink.write_table(table)


def _described(table: pa.Table, source: Predictions) -> pa.Table:
    """With the metadata of the predictions: run, step, volume, classes."""
    return table.replace_schema_metadata(source.schema.metadata)


@contextlib.contextmanager
def _sink(path: pathlib.Path, schema: pa.Schema) -> Iterator[Any]:
    if path.suffix in (".feather", ".parquet"):
        with synapses.writer(path, schema) as sink:
            yield sink
        return
    # A header by us: Arrow would put its names in quotes.
    options = csv.WriteOptions(include_header=False, quoting_style="needed")
    with contextlib.ExitStack() as opened:
        partial = opened.enter_context(files.replacing(path))
        file: io.BufferedIOBase = opened.enter_context(partial.open("wb"))
        if path.suffix == ".gz":  # without name and time: the same bytes every time
            zipped = gzip.GzipFile("", "wb", 6, file, mtime=0)
            file = opened.enter_context(zipped)
        file.write((",".join(schema.names) + "\n").encode())
        yield opened.enter_context(csv.CSVWriter(file, schema, write_options=options))


def blank(values: np.ndarray) -> pa.Array:
    """With nulls, which CSV leaves blank, for NaN."""
    return pa.array(values, from_pandas=True)


def ids(table: pa.Table, column: str) -> pa.ChunkedArray | pa.Array:
    """int64, 0 where unknown, or for a table without the column."""
    if column not in table.column_names:
        return pa.array(np.zeros(len(table), np.int64))
    return pc.fill_null(table[column], 0)


def score(table: pa.Table, column: str) -> np.ndarray:
    """float32 [n], NaN where unknown, or for a table without the column."""
    if column not in table.column_names:
        return np.full(len(table), np.nan, np.float32)
    return pc.fill_null(table[column], np.nan).to_numpy().astype(np.float32)


def probability(table: pa.Table, name: str) -> np.ndarray:
    return table[predictions.probability_column(name)].to_numpy()


def fixed(table: pa.Table, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """A float32 column for every class that the consumer has, NaN if not predicted."""
    absent = np.where(predictions.called(table) >= 0, 0, np.nan).astype(np.float32)
    classes = predictions.classes(table)
    return {
        column: probability(table, name) if name in classes else absent
        for name, column in names.items()
    }


def calls_of_types(
    source: Predictions,
    folder: pathlib.Path,
    cell_type: pa.ChunkedArray,
    rule: str,
    confusion: Confusion | None,
) -> pa.Table:
    """The row of `aggregate` of each neuron's cell type; nulls for one without."""
    if not any_value(source, "cell_type"):
        fields = [
            ("neurotransmitter", pa.string()),
            ("predicted", pa.int64()),
            ("predicted_neurotransmitter", pa.string()),
            ("score", pa.float64()),
        ]
        nothing = [pa.nulls(len(cell_type), kind) for _, kind in fields]
        return pa.table(nothing, schema=pa.schema(fields))
    types = group_calls.of(source, "cell_type", rule, confusion, folder)
    names = types["cell_type"].combine_chunks()
    return types.take(pc.index_in(cell_type, value_set=names))


def translated(
    called: pa.ChunkedArray | pa.Array, names: Mapping[str, str]
) -> pa.ChunkedArray | pa.Array:
    """The consumer's names for those of classes; what is none stays."""
    index = pc.index_in(called, value_set=pa.array([*names]))
    return pc.coalesce(pa.array([*names.values()]).take(index), called)
