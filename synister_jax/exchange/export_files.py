# SPDX-License-Identifier: Apache-2.0
"""Holds what the exports to all other tools share: checks, ids, writing of files.

Each family of tools has its own module in this folder. The command `export` lists the
tools. docs/exports.md says what is in each file. These rules hold for all files:

- Classes are matched by name.
- A file may have a class that the network lacks. Its probability is 0 where the synapse
  has a prediction.
- Probabilities are NaN (blank in CSV) where the synapse has no prediction.
- An unknown id is 0. With a null, pandas would read the whole column as floats, which
  lose the last digits of large ids.
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
    """The options of an export. An option that the user did not give is None.

    Attributes:
      voxel_size_nm_zyx: the voxel size of the volume in nm, for files that give
        positions in voxels.
      confusion: the file of the network's confusion matrix.
      split: the split whose parts are written, for files with a single split column.
      predict: the number of the prediction, as the original synister counts them.
    """

    voxel_size_nm_zyx: tuple[float, float, float] | None = None
    confusion: str | None = None
    split: str | None = None
    predict: int | None = None


class Write(Protocol):
    """Writes the files of a consumer; returns messages about them for the user."""

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
      names: class → the tool's name of the class, in the tool's order.
      files: the names of all files that `write` can write.
      takes: option → whether the tool requires the option. The tool ignores options
        that are not listed.
      needs_neurons: whether the tool needs `neuron_id`, because its files name the
        neuron of each synapse or have a row for each neuron.
      write: writes the files. The predictions have passed `prepare`, and all required
        options are given.
    """

    names: Mapping[str, str]
    files: tuple[str, ...]
    takes: Mapping[str, bool]
    needs_neurons: bool
    write: Write


def prepare(
    source: Predictions, to: str, consumer: Consumer, drop_classes: Sequence[str]
) -> Predictions:
    """Checks the predictions for a consumer, and leaves out the dropped classes.

    A dropped class is treated as if the network did not have this class. The call of a
    row is the most probable of the kept classes. The kept probabilities are not
    rescaled.

    Args:
      source: the predictions.
      to: the consumer's name, for messages.
      consumer: the tool that reads the files.
      drop_classes: the classes to leave out.

    Raises:
      UserError: The predictions do not have a class that should be dropped. The
        consumer has no column for a class, or one column for several classes. All
        classes are dropped. The consumer needs neurons and no row names a neuron.
    """
    for name in drop_classes:
        if name not in source.classes:
            raise UserError(
                f"--drop_classes={name}: {source.path} has no such class; its classes "
                f"are {', '.join(source.classes)}"
            )
    classes = [name for name in source.classes if name not in drop_classes]
    names = consumer.names
    for name in classes:
        if name not in names:
            raise UserError(
                f"--to={to} has no column for {name!r} (it has {', '.join(names)}): "
                f"choose another --to, or leave the class out with "
                f"--drop_classes={name}"
            )
    if not classes or len({names[name] for name in classes}) < len(classes):
        raise UserError(
            f"--to={to} cannot distinguish the classes "
            f"{', '.join(classes) or '(none)'}: choose other classes with "
            "--drop_classes"
        )
    if consumer.needs_neurons and not any_value(source, "neuron_id"):
        raise UserError(
            f"{source.path} names no neuron (neuron_id is empty), and --to={to} needs "
            "neurons: predict a table of synapses that has neuron_id"
        )
    gone = [predictions.probability_column(name) for name in drop_classes]
    kept = [field for field in source.schema if field.name not in gone]
    about = source.about | {"classes": classes}
    schema = pa.schema(kept, table_metadata.entry(about))
    return dataclasses.replace(source, schema=schema)


def any_value(source: Predictions, column: str) -> bool:
    """Returns whether the column has a value that is not null."""
    tables = source.tables([column])
    return any(table[column].null_count < len(table) for table in tables)


def write(
    path: pathlib.Path, source: Predictions, convert: Convert, silent: bool = False
) -> int:
    """Writes all predictions, converted batch by batch, into one file.

    If writing fails, no incomplete file is left.

    Args:
      path: the file; its ending sets the format (.feather, .parquet, .csv or .csv.gz).
      source: the predictions.
      convert: turns a batch of predictions into rows of the file.
      silent: whether to hide the progress bar.

    Returns:
      The number of rows written.
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
    """Writes a table in memory that was made from `source`; see `write` for formats."""
    table = _described(table, source)
    with _sink(path, table.schema) as sink:
        sink.write_table(table)


def _described(table: pa.Table, source: Predictions) -> pa.Table:
    """Returns the table with the metadata of `source`: run, step, volume, classes."""
    return table.replace_schema_metadata(source.schema.metadata)


@contextlib.contextmanager
def _sink(path: pathlib.Path, schema: pa.Schema) -> Iterator[Any]:
    if path.suffix in (".feather", ".parquet"):
        with synapses.writer(path, schema) as sink:
            yield sink
        return
    # The header is written here, because Arrow would put the names in quotes.
    options = csv.WriteOptions(include_header=False, quoting_style="needed")
    with contextlib.ExitStack() as opened:
        partial = opened.enter_context(files.replacing(path))
        file: io.BufferedIOBase = opened.enter_context(partial.open("wb"))
        if path.suffix == ".gz":
            # No name and time: equal predictions must give equal bytes.
            zipped = gzip.GzipFile("", "wb", 6, file, mtime=0)
            file = opened.enter_context(zipped)
        file.write((",".join(schema.names) + "\n").encode())
        yield opened.enter_context(csv.CSVWriter(file, schema, write_options=options))


def blank(values: np.ndarray) -> pa.Array:
    """Returns the values with null for NaN. CSV files leave a null blank."""
    return pa.array(values, from_pandas=True)


def ids(table: pa.Table, column: str) -> pa.ChunkedArray | pa.Array:
    """Returns the ids as int64 [n]; 0 where unknown or if the column is missing."""
    if column not in table.column_names:
        return pa.array(np.zeros(len(table), np.int64))
    return pc.fill_null(table[column], 0)


def score(table: pa.Table, column: str) -> np.ndarray:
    """Returns the column as float32 [n]; NaN where unknown or if it is missing."""
    if column not in table.column_names:
        return np.full(len(table), np.nan, np.float32)
    return pc.fill_null(table[column], np.nan).to_numpy().astype(np.float32)


def probability(table: pa.Table, name: str) -> np.ndarray:
    """Returns the probability of the class `name`, float [n]."""
    return table[predictions.probability_column(name)].to_numpy()


def fixed(table: pa.Table, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Returns a float32 column [n] for every class that the consumer has.

    Rows without a prediction are NaN. A class that the network lacks is 0 in all other
    rows.

    Args:
      table: a batch of predictions.
      names: class → the consumer's name of the class.
    """
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
    """Returns the call of each neuron's cell type, as `aggregate` computes it.

    Args:
      source: the predictions.
      folder: the folder of the export, which also takes temporary files.
      cell_type: string [n], the cell type of each neuron.
      rule: the rule by which votes become a call.
      confusion: the network's confusion matrix, for rules that need it.

    Returns:
      One row for each neuron; all values are null for a neuron without a cell type.
    """
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
    """Returns the consumer's name of each called class.

    Values that are no class stay as they are.
    """
    index = pc.index_in(called, value_set=pa.array([*names]))
    return pc.coalesce(pa.array([*names.values()]).take(index), called)
